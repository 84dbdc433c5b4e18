"""Constant folding with onnxruntime: whatever depends on weights alone is computed once, at export.

The exporter's own folder stops at a size limit and leaves, among others, the resampling of the
position embedding in a fixed-size graph, which would then run for every image (and which TensorRT
cannot run at all when it is antialiased).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def fold_constants(model: Any) -> int:
    """Fold in place; the number of nodes removed. ``model`` is an ``onnx_ir`` model without
    subgraphs.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnx_ir as ir

    graph = model.graph
    constant: set[Any] = set(graph.initializers.values())
    nodes = []
    for node in graph:
        if all(value is None or value in constant for value in node.inputs):
            nodes.append(node)
            constant.update(node.outputs)
    frontier = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(user not in set(nodes) for user, _ in value.uses())
    ]
    frontier = [value for value in frontier if not value.is_graph_output()]
    if not frontier:
        return 0
    for value, array in zip(frontier, _evaluate(ir, model, nodes, frontier), strict=True):
        tensor = ir.tensor(np.ascontiguousarray(array), name=value.name)
        folded = ir.Value(
            name=f"{value.name}_folded", const_value=tensor, type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )  # fmt: skip
        graph.register_initializer(folded)
        value.replace_all_uses_with(folded)
    return _sweep(graph, nodes)


def _evaluate(ir: Any, model: Any, nodes: list[Any], frontier: list[Any]) -> list[Any]:
    """Values of the frontier, computed by onnxruntime on the constant part of the graph alone."""
    import onnx
    import onnxruntime

    used = {value for node in nodes for value in node.inputs if value is not None}
    weights = [value for value in model.graph.initializers.values() if value in used]
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(value.name) for value in frontier],
        initializer=[_named(ir.to_proto(value.const_value), value.name) for value in weights],
    )
    proto = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", model.opset_imports[""])],
        ir_version=model.ir_version,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays: list[Any] = session.run([value.name for value in frontier], {})
    return arrays


def _named(tensor: Any, name: str) -> Any:
    tensor.name = name
    return tensor


def _sweep(graph: Any, nodes: list[Any]) -> int:
    """Remove the folded nodes, last first, and the weights nobody reads any more."""
    removed = 0
    for node in reversed(nodes):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return removed
