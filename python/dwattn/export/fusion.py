"""LayerScale and residual connection taken into the node of the replaced layer they follow."""

from __future__ import annotations

from typing import Any

from dwattn.export.node import layer_nodes, named_inputs, ordered


def fuse_residuals(model: Any) -> None:
    """``residual + gamma * layer(x)`` becomes an input ``residual`` and an input ``gamma`` of the node.

    Each is optional. Only what directly follows and is used nowhere else is taken: a product with a
    constant of one number a channel, and a sum with tokens of exactly the layer's shape. ``model`` is an
    ``onnx_ir`` model that still has its intermediate shapes; it is changed in place.
    """
    for node in layer_nodes(model.graph):
        _fuse(model.graph, node)


def _fuse(graph: Any, node: Any) -> None:
    inputs, taken = named_inputs(node), [node]
    scale, gamma = _follower(node.outputs[0], "Mul")
    if scale is not None and _is_coefficient(gamma, inputs["wo"].shape[0]):
        inputs["gamma"] = _as_fp32(graph, gamma)
        taken.append(scale)
    add, residual = _follower(taken[-1].outputs[0], "Add")
    if add is not None and _same_tokens(residual, inputs["x"]):
        inputs["residual"] = residual
        taken.append(add)
    if len(taken) > 1:
        _replace(graph, taken, inputs)


def _follower(value: Any, kind: str) -> tuple[Any, Any]:
    """The only user of a value, if it is of that kind, and its other operand; else ``(None, None)``."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None, None
    ((user, index),) = uses
    if user.op_type != kind or user.domain or user.outputs[0].is_graph_output():
        return None, None
    return user, user.inputs[1 - index]


def _is_coefficient(value: Any, dim: int) -> bool:
    return value.const_value is not None and tuple(value.shape) == (dim,)


def _same_tokens(residual: Any, x: Any) -> bool:
    known = residual.shape is not None and x.shape is not None
    return known and residual.shape == x.shape and residual.dtype == x.dtype


def _as_fp32(graph: Any, value: Any) -> Any:
    """The constant itself, or for a half-precision model its copy as coefficients are: in fp32."""
    import numpy as np
    import onnx_ir as ir

    if value.dtype == ir.DataType.FLOAT:
        return value
    name = f"{value.name}_fp32"
    if name not in graph.initializers:
        tensor = ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
        graph.register_initializer(
            ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=value.shape
            )
        )
    return graph.initializers[name]


def _replace(graph: Any, taken: list[Any], inputs: dict[str, Any]) -> None:
    """One node with these inputs instead of a chain of nodes that starts with the layer's."""
    import onnx_ir as ir

    node, out, names = taken[0], taken[-1].outputs[0], ordered(inputs)
    made = ir.Node(
        node.domain, node.op_type, [inputs[name] for name in names],
        {**node.attributes, "inputs": ir.AttrString("inputs", " ".join(names))},
        name=node.name, version=node.version,
    )  # fmt: skip
    result = made.outputs[0]
    result.name, result.shape, result.type = out.name, out.shape, out.type
    graph.insert_before(taken[-1], made)
    out.replace_all_uses_with(result)
    for old in reversed(taken):
        graph.remove(old, safe=True)
