"""A replaced layer as one ONNX node: the form that the TensorRT plugin library computes.

A node computes the whole layer, values to output projection with the prefix rows, so that nothing
has to be transposed, cut or joined around it. Its inputs are those of :data:`INPUTS` that the layer
has, in that order; its attribute ``inputs`` lists them. Weights are inputs, not attributes: they
stay visible to a runtime, which may convert, refit or share them.

The node by itself is nothing that onnxruntime can run; :mod:`dwattn.export.function` gives it a body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.attention import EnsembleDWAttention, FusedDWAttention, LowRankDWAttention
from dwattn.prefix import ExactPrefixRows, StaticPrefixRows
from dwattn.rotary import Rotary
from dwattn.scattered import ScatteredDWAttention
from dwattn.token_grid import Grid

#: ONNX domain and plugin namespace; plugin version and version of the domain.
DOMAIN = "dwattn"
VERSION = "1"

#: Everything a node may take. ``x`` and ``residual`` are ``(B, N, D)``; ``grid`` is any tensor whose last
#: two dimensions are the patch grid, where that is dynamic.
INPUTS = (
    "x", "residual", "grid", "wv", "bv", "kernel", "kappa", "mu", "beta", "wo", "bo", "gamma",
    "query", "query_bias", "key", "prefix_value", "prefix_value_bias", "prefix_out", "prefix_out_bias",
    "static_a", "static_b",
)  # fmt: skip
#: Matrices, in the model's precision. All other constants are coefficients and always fp32.
WEIGHTS = ("wv", "wo", "query", "key", "prefix_value", "prefix_out")

#: What the one kernel of ``LowRankDWAttention`` holds, in fp32; wider layers take the other node.
NARROW_CHANNELS = 816

Layer = FusedDWAttention | EnsembleDWAttention


def refusal(layer: nn.Module) -> str | None:
    """Why a replaced layer has no such node, with the remedy, or None."""
    if not isinstance(layer, (FusedDWAttention, EnsembleDWAttention)):
        return (
            f"the plugin library has no layer {variant_name(layer)!r}, only dw, lowrank_dw and ens_dw of whole "
            "layers; export with lowering='native'"
        )
    rows = layer.prefix_rows
    if isinstance(rows, ExactPrefixRows) and (
        rows.q_norm is not None or rows.k_norm is not None or rows.rotary
    ):
        what = "rotary positions" if rows.rotary else "query and key norms"
        return (
            f"its exact prefix rows have {what}, which the plugin library does not "
            "compute; replace with prefix='static', or export with lowering='native'"
        )
    return None


def variant_name(layer: nn.Module) -> str:
    """What users call a replaced layer."""
    name = str(getattr(layer, "variant", "") or type(layer).__name__)
    return f"scattered {name}" if isinstance(layer, ScatteredDWAttention) else name


def op_type(layer: Layer, channels: int) -> str:
    """Name of the node and of the plugin. Both compute the same; they differ in their kernels."""
    narrow = isinstance(layer, (LowRankDWAttention, EnsembleDWAttention))
    return "LowRankDWAttention" if narrow and channels <= NARROW_CHANNELS else "DWAttention"


def layer_tensors(layer: Layer) -> dict[str, Tensor]:
    """The layer's constants by their names in :data:`INPUTS`, gamma folded; absent ones are left out."""
    if isinstance(layer, EnsembleDWAttention):
        wv, bv, wo = layer.ensemble()
    else:
        wv, bv = layer.value_projection()
        wo = layer.proj.weight
    tensors = {
        "wv": wv, "bv": bv, "wo": wo, "bo": layer.proj.bias, "kernel": layer.kernel,
        "kappa": layer.kappa, "mu": layer.mu, "beta": layer.beta, **_prefix_tensors(layer),
    }  # fmt: skip
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _prefix_tensors(layer: Layer) -> dict[str, Tensor | None]:
    rows, value, proj = layer.prefix_rows, layer.prefix_value, layer.prefix_proj
    if rows is None:
        return {}
    if isinstance(layer, EnsembleDWAttention):  # prefix rows have all heads' channels
        value, proj = value or layer.value, proj or layer.proj
    tensors: dict[str, Tensor | None] = {}
    if value is not None:
        tensors |= {"prefix_value": value.weight, "prefix_value_bias": value.bias}
    if proj is not None:
        tensors |= {"prefix_out": proj.weight, "prefix_out_bias": proj.bias}
    if isinstance(rows, StaticPrefixRows):
        return tensors | {"static_a": rows.a, "static_b": rows.b}
    bias = rows.query.bias
    return tensors | {
        "query": rows.query.weight * rows.scale,
        "query_bias": None if bias is None else bias * rows.scale,
        "key": rows.key.weight,  # a key bias cancels in the softmax
    }


class PatchMap:
    """Forward hook of the patch embedding's convolution: its result tells a node the dynamic grid."""

    def __init__(self, convolution: nn.Module) -> None:
        self.tensor: Tensor | None = None  # (B, D, H, W) of the images that are passing
        convolution.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.tensor = output


class LayerNode(nn.Module):
    """The export form of a layer, ``(B, N, D) -> (B, N, D)``. It can be traced, not computed.

    Args:
        layer: a layer that :func:`refusal` has nothing against.
        grid: its patch grid; a dynamic one is read from a tensor.
    """

    def __init__(self, layer: nn.Module, grid: Grid | PatchMap) -> None:
        super().__init__()
        assert isinstance(layer, (FusedDWAttention, EnsembleDWAttention))
        tensors = layer_tensors(layer)
        self.op_type, self.dim = op_type(layer, tensors["wv"].shape[0]), layer.dim
        self.patch_map = grid if isinstance(grid, PatchMap) else None
        height, width = (0, 0) if isinstance(grid, PatchMap) else grid
        self.attributes: dict[str, int | str] = {
            "plugin_version": VERSION, "plugin_namespace": DOMAIN, "height": height, "width": width,
            "num_prefix": layer.num_prefix, "prefix": layer.prefix,
            "num_heads": layer.num_heads if layer.prefix == "exact" else 0,
        }  # fmt: skip
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone().contiguous())

    def _apply(self, fn: Any, recurse: bool = True) -> LayerNode:
        """Coefficients stay fp32 in a half-precision model."""
        coefficients = {n: b for n, b in self._buffers.items() if n not in WEIGHTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(coefficients)
        return self

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        tensors: dict[str, Any] = {"x": x, **self._buffers}
        if self.patch_map is not None:
            tensors["grid"] = self.patch_map.tensor
        names = ordered(tensors)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.op_type}",
            [tensors[name] for name in names],
            {**self.attributes, "inputs": " ".join(names)},
            dtype=x.dtype,
            shape=(x.shape[0], x.shape[1], self.dim),
            version=int(VERSION),
        )


def ordered(inputs: Mapping[str, Any]) -> list[str]:
    """The names in the order in which a node takes them."""
    return [name for name in INPUTS if name in inputs]


def layer_nodes(graph: Any) -> list[Any]:
    """The nodes of an ``onnx_ir`` graph that stand for replaced layers."""
    return [node for node in graph if node.domain == DOMAIN]


def named_inputs(node: Any) -> dict[str, Any]:
    """Name to ``onnx_ir`` value."""
    return dict(zip(node.attributes["inputs"].as_string().split(), node.inputs, strict=True))


def name_nodes(graph: Any) -> None:
    """Call nodes as the layers are called in the model, for example ``blocks.3.attn``."""
    for node in layer_nodes(graph):
        path = str(named_inputs(node)["wv"].name).split(".")[:-1]
        node.name = ".".join(part for part in path if part not in ("module", "layer")) or "layer"
