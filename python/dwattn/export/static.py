"""What the graph of a static compiler may hold: fixed shapes, 4-D convolutions and few operators."""

from __future__ import annotations

from typing import Any

from dwattn.errors import ExportError

_STANDARD = (
    "Add AveragePool BatchNormalization Clip Concat Constant Conv ConvTranspose Div Elu Erf Flatten "
    "Gather Gelu Gemm GlobalAveragePool HardSigmoid HardSwish Identity LayerNormalization LeakyRelu "
    "MatMul Max MaxPool Min Mul Neg PRelu Pad Pow Reciprocal ReduceMax ReduceMean ReduceSum Relu "
    "Reshape Resize Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze"
)
#: Standard operators of a static graph. None computes a shape or picks by what it finds at run time.
STATIC = frozenset(_STANDARD.split())
#: Of these all inputs but the first must be constants.
_SHAPING = frozenset({"Clip", "Gather", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze"})
_SHAPING |= {"ReduceMax", "ReduceMean", "ReduceSum", "Unsqueeze"}


def check_static(model: Any) -> None:
    """Check that an ``onnx_ir`` graph has only operators of :data:`STATIC` and fixed shapes.

    Raises:
        ExportError: with the operators and nodes that do not belong, or the values of open shape.
    """
    graph = model.graph
    open_values = [
        f"{value.name} {tuple(map(str, value.shape))}"
        for value in (*graph.inputs, *graph.outputs)
        if not all(isinstance(side, int) for side in value.shape)
    ]
    wrong: dict[str, list[str]] = {}
    for node in graph:
        reason = _foreign(node)
        if reason is not None:
            wrong.setdefault(reason, []).append(node.name or node.outputs[0].name)
    found = [f"{reason} ({_some(names)})" for reason, names in wrong.items()]
    found += [f"open shape of {value}" for value in open_values]
    if found:
        raise ExportError(
            f"lowering='conv2d' writes static graphs of few operators, but this one has "
            f"{'; '.join(found)}. Export the part of the model without them, with output= or "
            "method=, or export with lowering='native'."
        )


def _foreign(node: Any) -> str | None:
    """What is wrong with a node in a static graph."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in STATIC:
        return f"operator {node.op_type}"
    if node.op_type in _SHAPING and not all(map(_is_constant, node.inputs[1:])):
        return f"{node.op_type} with arguments from run time"
    if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs[1].shape or ()) != 4:
        return f"{node.op_type} with a weight of {len(node.inputs[1].shape or ())} dimensions"
    return None


def _is_constant(value: Any) -> bool:
    if value is None or value.const_value is not None:
        return True
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _some(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def to_opset(model: Any, opset: int) -> Any:
    """An ``onnx_ir`` model of opset 18, which the exporter writes at least, in 17 or 18.

    Raises:
        ExportError: an operator has no form in that opset.
    """
    import onnx
    import onnx_ir as ir

    if opset < 18:
        _slice_splits(model.graph)
    for node in model.graph:
        empty = node.attributes.get("noop_with_empty_axes")
        if empty is not None and not empty.value:  # the default, which older opsets do not know
            node.attributes.pop("noop_with_empty_axes")
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), opset)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"The graph cannot be written in opset {opset}: {reason}") from error
    return ir.from_proto(proto)


def _slice_splits(graph: Any) -> None:
    """Slices in the place of Split nodes, which the converter of older opsets does not know."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Split":
            continue
        axis, start, tape = node.attributes["axis"].value, 0, ir.tape.Tape()
        for part in node.outputs:
            stop = start + part.shape[axis]
            numbers = (tape.op("Constant", [], {"value_ints": [n]}) for n in (start, stop, axis))
            cut = tape.op("Slice", [node.inputs[0], *numbers])
            cut.shape, cut.type, start = part.shape, part.type, stop
            part.replace_all_uses_with(cut)
        graph.insert_before(node, list(tape.nodes))
        graph.remove(node, safe=True)
