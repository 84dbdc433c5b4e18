"""Replaced layers as convolutions of images, for compilers that take static graphs of 4-D
convolutions, such as Hailo's.

The patches are one ``(B, C, H, W)`` image from the value projection, a 1x1 convolution, to the output
projection, another. Prefix tokens are a ``(B, C, 1, P)`` image of their own that goes through the same
1x1 convolutions, and their share in the context is a depthwise 1xP convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.attention import EnsembleDWAttention, FusedDWAttention
from dwattn.export.node import layer_tensors, variant_name
from dwattn.prefix import ExactPrefixRows
from dwattn.rotary import Rotary
from dwattn.token_grid import Grid


def refusal(layer: nn.Module) -> str | None:
    """Why a replaced layer has no such form, with the remedy, or None."""
    if not isinstance(layer, (FusedDWAttention, EnsembleDWAttention)):
        return (
            f"{variant_name(layer)!r} has no form of 4-D convolutions, only dw, lowrank_dw and ens_dw of whole "
            "layers have; export with lowering='native'"
        )
    if isinstance(layer.prefix_rows, ExactPrefixRows):
        return (
            "its exact prefix rows are softmax attention, which is no convolution; replace with "
            "prefix='static', or take a model without prefix tokens"
        )
    return None


class ImageLayer(nn.Module):
    """The export form, on a fixed grid, of a layer that :func:`refusal` has nothing against:
    ``(B, N, D) -> (B, N, D)``.
    """

    def __init__(self, layer: nn.Module, grid: Grid) -> None:
        super().__init__()
        assert isinstance(layer, (FusedDWAttention, EnsembleDWAttention))
        given = layer_tensors(layer)
        self.grid, self.num_prefix = grid, layer.num_prefix
        self.value = _pointwise(given["wv"], given.get("bv"))
        self.proj = _pointwise(given["wo"], given.get("bo"))
        self.prefix_value = self.prefix_proj = self.kappa = self.mu = None
        if "prefix_value" in given:
            bias = given.get("prefix_value_bias")
            self.prefix_value = _pointwise(given["prefix_value"], bias)
        if "prefix_out" in given:
            self.prefix_proj = _pointwise(given["prefix_out"], given.get("prefix_out_bias"))
        self.stencil = _depthwise(given["kernel"], given.get("beta"), padding=1)
        if "kappa" in given:
            self.kappa = _depthwise(given["kappa"].t()[:, None])
        if "mu" in given:
            self.mu = _depthwise(given["mu"][:, None, None])
        for name in ("static_a", "static_b"):
            rows = given.get(name)
            image = None if rows is None else rows.detach().t()[None, :, None].contiguous()
            self.register_buffer(name, image)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        tokens = x.transpose(1, 2)
        image = tokens[:, :, self.num_prefix :].unflatten(2, self.grid)
        prefix = tokens[:, :, None, : self.num_prefix] if self.num_prefix else None
        out = self.proj(self.aggregate(image, prefix)).flatten(2)
        if prefix is not None:
            out = torch.cat([self.prefix_rows(image, prefix).flatten(2), out], 2)
        return out.transpose(1, 2)

    def aggregate(self, image: Tensor, prefix: Tensor | None) -> Tensor:
        """``(B, D, H, W)`` and ``(B, D, 1, P)`` to ``(B, C, H, W)`` before the output projection."""
        values: Tensor = self.value(image)
        y: Tensor = self.stencil(values)
        if self.mu is not None:
            y = y + self.mu(_mean(values))
        if self.kappa is not None and prefix is not None:
            y = y + self.kappa(self.value(prefix))
        return y

    def prefix_rows(self, image: Tensor, prefix: Tensor) -> Tensor:
        """``a V_t + b mean(V)`` after the output projection: ``(B, D, 1, P)``."""
        value, proj = self.prefix_value or self.value, self.prefix_proj or self.proj
        rows = self.static_a * value(prefix) + self.static_b * value(_mean(image))
        out: Tensor = proj(rows)
        return out


def _mean(image: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(image, 1)


def _pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    return _convolution(weight[:, :, None, None], bias, groups=1, padding=0)


def _depthwise(kernel: Tensor, bias: Tensor | None = None, padding: int = 0) -> nn.Conv2d:
    """From a kernel ``(C, h, w)``."""
    return _convolution(kernel[:, None], bias, groups=kernel.shape[0], padding=padding)


def _convolution(weight: Tensor, bias: Tensor | None, groups: int, padding: int) -> nn.Conv2d:
    out, inner, height, width = weight.shape
    made = nn.Conv2d(
        inner * groups, out, (height, width), padding=padding, groups=groups, bias=bias is not None,
        dtype=weight.dtype,
    )  # fmt: skip
    made.weight.copy_(weight)
    if bias is not None and made.bias is not None:
        made.bias.copy_(bias)
    return made.requires_grad_(False)
