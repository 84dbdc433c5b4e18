"""ONNX bodies of the nodes of replaced layers, in standard operators.

With a body a file runs wherever ONNX does, and a node can be compared with PyTorch. A body takes the
inputs of its node (:data:`dwattn.export.node.INPUTS`) as they are, so both forms of a file share every
weight.
"""

from __future__ import annotations

from typing import Any

from dwattn.export.node import DOMAIN, WEIGHTS, layer_nodes, named_inputs

_FAR = 2**62  # the end of a slice to the end


def attach_bodies(model: Any) -> None:
    """Give the model (``onnx_ir``) a function for every kind of layer node in it.

    Nodes that differ in inputs, attributes or widths need bodies of their own; from the second on
    these are told apart by ONNX's ``overload``, which onnxruntime honours.
    """
    bodies: dict[tuple[Any, ...], Any] = {}
    for node in layer_nodes(model.graph):
        key = _kind(node)
        if key not in bodies:
            same = sum(body.name == node.op_type for body in bodies.values())
            bodies[key] = _function(node, f"kind{same}" if same else "", model.opset_imports[""])
        node.overload = bodies[key].overload
    model.functions.update({body.identifier(): body for body in bodies.values()})


def detach_bodies(model: Any) -> None:
    """Undo :func:`attach_bodies`."""
    for identifier in [i for i in model.functions if i[0] == DOMAIN]:
        del model.functions[identifier]
    for node in layer_nodes(model.graph):
        node.overload = ""


def _kind(node: Any) -> tuple[Any, ...]:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = named_inputs(node)
    shapes = [tuple(inputs[name].shape) for name in ("kernel", *WEIGHTS) if name in inputs]
    return (node.op_type, inputs["wv"].dtype, tuple(sorted(attributes.items())), tuple(shapes))


def _function(node: Any, overload: str, opset: int) -> Any:
    import onnx_ir as ir

    body = _Body(node)
    out = body.layer()
    graph = ir.Graph(
        list(body.inputs.values()), [out], nodes=body.tape.nodes, opset_imports={"": opset}
    )
    parameters = [ir.Attr(name, value.type, None) for name, value in node.attributes.items()]
    return ir.Function(DOMAIN, node.op_type, overload, graph=graph, attributes=parameters)


class _Body:
    """The layer, written with one method for each of its parts; ``B, N, D, C, P`` as everywhere."""

    def __init__(self, node: Any) -> None:
        import onnx_ir as ir

        given = named_inputs(node)
        self.tape = ir.tape.Tape()
        self.inputs = {name: ir.Value(name=name) for name in given}
        self.dtype = int(given["wv"].dtype)
        self.half = given["wv"].dtype == ir.DataType.FLOAT16
        self.channels, self.dim = given["wv"].shape
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        self.grid = (attributes["height"], attributes["width"])
        self.prefix, self.num_prefix = attributes["prefix"], attributes["num_prefix"]
        self.heads = attributes["num_heads"]
        own_value, own_out = "prefix_value" in given, "prefix_out" in given
        self.value = ("prefix_value", "prefix_value_bias") if own_value else ("wv", "bv")
        self.out = ("prefix_out", "prefix_out_bias") if own_out else ("wo", "bo")

    def layer(self) -> Any:
        """``(B, N, D) -> (B, N, D)``."""
        x = self.inputs["x"]
        out = self.project(self.aggregate(self.project(x, "wv", "bv")), "wo", "bo")
        if self.prefix != "drop":
            rows = self.exact_rows(x) if self.prefix == "exact" else self.static_rows(x)
            out = self.op("Concat", self.project(rows, *self.out), out, axis=1)
        if "gamma" in self.inputs:
            out = self.op("Mul", out, self.coefficient("gamma"))
        if "residual" in self.inputs:
            out = self.op("Add", self.inputs["residual"], out)
        return out

    def aggregate(self, values: Any) -> Any:
        """Depthwise 3x3 and the context terms: ``(B, N, C) -> (B, H*W, C)``."""
        prefix, patches = self.split(values)
        image = self.op("Transpose", patches, perm=[0, 2, 1])
        image = self.op("Reshape", image, self.image_shape())
        kernel = self.op("Unsqueeze", self.coefficient("kernel"), self.ints(1))
        image = self.op("Conv", image, kernel, group=self.channels, pads=[1, 1, 1, 1])
        flat = self.op("Reshape", image, self.ints(0, self.channels, -1))
        y = self.op("Transpose", flat, perm=[0, 2, 1])
        if "mu" in self.inputs:
            y = self.op("Add", y, self.op("Mul", self.mean(patches), self.coefficient("mu")))
        if "kappa" in self.inputs:
            weighted = self.op("Mul", prefix, self.coefficient("kappa"))
            y = self.op("Add", y, self.op("ReduceSum", weighted, self.ints(1), keepdims=1))
        return self.op("Add", y, self.coefficient("beta")) if "beta" in self.inputs else y

    def image_shape(self) -> Any:
        """``(B, C, H, W)`` for Reshape, which takes 0 as the size that is there."""
        if "grid" not in self.inputs:
            return self.ints(0, self.channels, *self.grid)
        sides = self.op("Shape", self.inputs["grid"], start=-2)
        return self.op("Concat", self.ints(0, self.channels), sides, axis=0)

    def static_rows(self, x: Any) -> Any:
        """``a V_t + b mean(V)``: ``(B, N, D) -> (B, P, Cp)``."""
        prefix, patches = self.split(x)
        values = self.project(prefix, *self.value)
        mean = self.project(self.mean(patches), *self.value)
        own = self.op("Mul", values, self.coefficient("static_a"))
        return self.op("Add", own, self.op("Mul", mean, self.coefficient("static_b")))

    def exact_rows(self, x: Any) -> Any:
        """Absorbed softmax attention of the prefix queries: ``(B, N, D) -> (B, P, Cp)``."""
        prefix, _ = self.split(x)
        query = self.project(prefix, "query", "query_bias")
        query = self.op("Reshape", query, self.ints(0, self.num_prefix, self.heads, -1))
        query = self.op("Transpose", query, perm=[0, 2, 1, 3])  # (B, heads, P, d_h)
        absorbed = self.op("MatMul", query, self.per_head("key"))
        absorbed = self.op(
            "Reshape", absorbed, self.ints(0, self.heads * self.num_prefix, self.dim)
        )
        logits = self.op("MatMul", absorbed, self.op("Transpose", x, perm=[0, 2, 1]))
        pooled = self.op("MatMul", self.op("Softmax", logits, axis=-1), x)
        pooled = self.op("Reshape", pooled, self.ints(0, self.heads, self.num_prefix, self.dim))
        value, bias = self.value
        value = self.op("Transpose", self.per_head(value), perm=[0, 2, 1])
        rows = self.op("Transpose", self.op("MatMul", pooled, value), perm=[0, 2, 1, 3])
        rows = self.op("Reshape", rows, self.ints(0, self.num_prefix, -1))
        return self.op("Add", rows, self.coefficient(bias)) if bias in self.inputs else rows

    def per_head(self, weight: str) -> Any:
        """``(heads * d_h, D) -> (heads, d_h, D)``."""
        return self.op("Reshape", self.inputs[weight], self.ints(self.heads, -1, self.dim))

    def project(self, x: Any, weight: str, bias: str) -> Any:
        """``x W^T + b``, the bias where there is one."""
        y = self.op("MatMul", x, self.op("Transpose", self.inputs[weight], perm=[1, 0]))
        return self.op("Add", y, self.coefficient(bias)) if bias in self.inputs else y

    def split(self, tokens: Any) -> tuple[Any, Any]:
        """Prefix tokens (None without any) and patches."""
        if not self.num_prefix:
            return None, tokens
        start, middle, end = self.ints(0), self.ints(self.num_prefix), self.ints(_FAR)
        axis = self.ints(1)
        return (
            self.op("Slice", tokens, start, middle, axis),
            self.op("Slice", tokens, middle, end, axis),
        )

    def mean(self, patches: Any) -> Any:
        return self.op("ReduceMean", patches, self.ints(1), keepdims=1)

    def coefficient(self, name: str) -> Any:
        """An fp32 input in the precision of ``x``."""
        value = self.inputs[name]
        return self.op("Cast", value, to=self.dtype) if self.half else value

    def ints(self, *values: int) -> Any:
        return self.op("Constant", value_ints=list(values))

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        return self.tape.op(kind, inputs, attributes)
