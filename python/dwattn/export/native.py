"""Replacement layers rewritten for export: weights folded to constants, one transpose in and one
out.

A lowered layer computes what the training module computes (checked after every export) from
constants laid out as a runtime wants them: the depthwise kernel is a ``(C, 1, 3, 3)`` convolution
weight, ``beta`` is that convolution's bias, ``gamma`` and per-head kernels are folded, and absorbed
prefix attention is two matrix products. Nothing is trainable. The patches make one round trip ``(B,
N, C) -> (B, C, H, W) -> back``, the least that a runtime with NCHW convolutions needs; the context
terms are added on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.attention import (
    ConvAttention,
    EnsembleDWAttention,
    FusedDWAttention,
    ReplacementAttention,
    SPViTAttention,
)
from dwattn.errors import ExportError
from dwattn.prefix import ExactPrefixRows, StaticPrefixRows
from dwattn.reference import ensemble_weights, fold_conv, merge_heads, split_heads, spvit_weights
from dwattn.rotary import Rotary
from dwattn.scattered import ScatteredDWAttention
from dwattn.token_grid import Grid, GridSource


def lower(layer: nn.Module, grid: Grid | None) -> nn.Module:
    """The export form of a replacement layer; ``grid=None`` reads it from the layer's grid source.

    Raises:
        ExportError: the layer is of a class that has no native lowering.
    """
    where = _Where(grid, getattr(layer, "grid_source", None), getattr(layer, "num_prefix", 0))
    with torch.no_grad():
        if isinstance(layer, ScatteredDWAttention):
            return _Scattered(layer, where)
        if isinstance(layer, (FusedDWAttention, EnsembleDWAttention)):
            return _Depthwise(layer, where)
        if isinstance(layer, (ConvAttention, SPViTAttention)):
            return _Dense(layer, where)
    raise ExportError(
        f"{type(layer).__name__} has no native lowering; it is known for the variants dw, "
        "lowrank_dw, conv, ens_dw, spvit and scattered dw."
    )


class _Where:
    """The geometry of a lowered layer: fixed at lowering, or read from the grid source while
    tracing.
    """

    def __init__(self, grid: Grid | None, source: GridSource | None, num_prefix: int) -> None:
        self.fixed, self.source, self.num_prefix = grid, source, num_prefix

    @property
    def grid(self) -> Grid:
        grid = self.fixed or (self.source.grid if self.source is not None else None)
        if grid is None:
            raise ExportError(
                "A replaced layer has neither a fixed grid nor a source of it; pass size=."
            )
        return grid


def _constant(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Register a tensor as a buffer that takes part in ``.half()``; None stays None."""
    module.register_buffer(name, None if value is None else value.detach().clone().contiguous())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, inner = weight.shape
    linear = nn.Linear(inner, out, bias=bias is not None, dtype=weight.dtype, device=weight.device)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T) v`` for already scaled queries, in the form that runtimes recognise and
    fuse.
    """
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


class _ExactRows(nn.Module):
    """Absorbed prefix attention, ``(B, N, D) -> (B, P, C)``; see :class:`ExactPrefixRows`."""

    absorb: Tensor
    value: Tensor
    bias: Tensor | None

    def __init__(self, rows: ExactPrefixRows, value: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        heads, head_dim = rows.num_heads, rows.head_dim
        self.num_heads, self.num_prefix = heads, rows.num_prefix
        scale = 1.0 if rows.q_norm is not None else rows.scale
        self.query = _linear(
            rows.query.weight * scale, None if rows.query.bias is None else rows.query.bias * scale
        )
        self.q_norm, self.k_norm, self.scale = rows.q_norm, rows.k_norm, rows.scale
        formed = rows.k_norm is not None or rows.rotary
        self.key = _linear(rows.key.weight, rows.key.bias) if formed else None
        if self.key is None:
            _constant(self, "absorb", rows.key.weight.unflatten(0, (heads, head_dim)))
        _constant(self, "value", value.unflatten(0, (heads, head_dim)).transpose(1, 2))
        _constant(self, "bias", bias)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q = split_heads(self.query(x[:, : self.num_prefix]), self.num_heads)
        if self.q_norm is not None:
            q = self.q_norm(q) * self.scale
        # (B, n_h * P, D) @ (B, D, N): one product for all heads, since they share x.
        if self.key is not None:
            keys = split_heads(self.key(x), self.num_heads)
            keys = keys if self.k_norm is None else self.k_norm(keys)
            keys = keys if rotary is None else rotary.rotate(keys)
            share = torch.softmax(q @ keys.transpose(-2, -1), dim=-1).flatten(1, 2)
        else:
            share = torch.softmax((q @ self.absorb).flatten(1, 2) @ x.transpose(1, 2), dim=-1)
        pooled = (share @ x).unflatten(1, (self.num_heads, self.num_prefix))
        rows = merge_heads(pooled @ self.value)
        rows = rows if self.bias is None else rows + self.bias
        return rows


class _StaticRows(nn.Module):
    """``a V_t + b mean(V)``; see :class:`StaticPrefixRows`."""

    a: Tensor
    b: Tensor

    def __init__(self, rows: StaticPrefixRows, value: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.num_prefix = rows.num_prefix
        self.value = _linear(value, bias)
        _constant(self, "a", rows.a)
        _constant(self, "b", rows.b)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        mean = x[:, self.num_prefix :].mean(1, keepdim=True)
        values = self.value(torch.cat([x[:, : self.num_prefix], mean], 1))
        rows: Tensor = self.a * values[:, : self.num_prefix]
        return rows + self.b * values[:, self.num_prefix :]


def _prefix(layer: ReplacementAttention) -> nn.Module | None:
    """Prefix rows before the output projection."""
    if layer.prefix_rows is None:
        return None
    own = layer.prefix_value
    value, bias = layer.value_projection() if own is None else (own.weight, own.bias)
    if isinstance(layer.prefix_rows, StaticPrefixRows):
        return _StaticRows(layer.prefix_rows, value, bias)
    return _ExactRows(layer.prefix_rows, value, bias)


class _Stencil(nn.Module):
    """Depthwise 3x3 convolution plus context: values ``(B, N, C)`` to patches ``(B, H*W, C)``."""

    kernel: Tensor
    beta: Tensor | None
    mu: Tensor | None
    kappa: Tensor | None

    def __init__(self, layer: Any, where: _Where) -> None:
        super().__init__()
        kernel: Tensor = layer.kernel
        kappa, mu, beta = layer.kappa, layer.mu, layer.beta
        self.where, self.channels = where, kernel.shape[0]
        _constant(self, "kernel", kernel.unsqueeze(1))
        _constant(self, "beta", beta)
        _constant(self, "mu", None if mu is None else mu[:, None, None])
        _constant(self, "kappa", kappa)

    def forward(self, v: Tensor) -> Tensor:
        patches = v[:, self.where.num_prefix :]
        image = patches.transpose(1, 2).unflatten(2, self.where.grid)
        y = F.conv2d(image, self.kernel, self.beta, padding=1, groups=self.channels)
        if self.mu is not None:
            y = y + self.mu * image.mean((2, 3), keepdim=True)
        y = y.flatten(2).transpose(1, 2)
        if self.kappa is not None:
            y = y + (self.kappa * v[:, : self.where.num_prefix]).sum(1, keepdim=True)
        return y


class _Depthwise(nn.Module):
    """``dw``, ``lowrank_dw`` and ``ens_dw`` (gamma folded, Eq. 12): ``(B, N, D) -> (B, N, D)``."""

    def __init__(self, layer: FusedDWAttention | EnsembleDWAttention, where: _Where) -> None:
        super().__init__()
        if isinstance(layer, EnsembleDWAttention):
            weight, bias, out = layer.ensemble()
        else:
            weight, bias = layer.value_projection()
            out = layer.proj.weight
        self.value = _linear(weight, bias)
        self.stencil = _Stencil(layer, where)
        self.proj = _linear(out, layer.proj.bias)
        self.prefix = _prefix(layer)
        # Prefix rows with as many channels as the patches go through the same projection, in one
        # product.
        self.prefix_proj = None
        if self.prefix is not None and (
            layer.prefix_proj or isinstance(layer, EnsembleDWAttention)
        ):
            own = layer.prefix_proj or layer.proj
            self.prefix_proj = _linear(own.weight, own.bias)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        y = self.stencil(self.value(x))
        if self.prefix is None:
            out: Tensor = self.proj(y)
        elif self.prefix_proj is None:
            out = self.proj(torch.cat([self.prefix(x, rotary), y], 1))
        else:
            out = torch.cat([self.prefix_proj(self.prefix(x, rotary)), self.proj(y)], 1)
        return out


class _Dense(nn.Module):
    """``conv`` (Eq. 10) and ``spvit`` (Eq. A.4): one dense 3x3 convolution, then a projection."""

    dense: Tensor
    conv_bias: Tensor | None
    edge: Tensor | None
    kappa: Tensor | None
    mu: Tensor | None
    beta: Tensor | None

    def __init__(self, layer: ConvAttention | SPViTAttention, where: _Where) -> None:
        super().__init__()
        self.where = where
        weight, bias = layer.value_projection()
        if isinstance(layer, ConvAttention):
            dense, out, conv_bias = fold_conv(weight, layer.kernel), layer.proj.weight, None
            context_weight, context_bias, context_out = weight, bias, out
            # The value bias goes through the zero-padded kernel: a map over the grid, not a
            # constant.
            head_dim = weight.shape[0] // layer.kernel.shape[0]
            per_channel = layer.kernel.repeat_interleave(head_dim, dim=0)[:, None]
            edge = None if bias is None else per_channel * bias[:, None, None, None]
        else:
            dense, out, conv_bias, edge, share = _fold_spvit(layer)
            context_weight, context_bias, context_out = ensemble_weights(
                weight, bias, layer.proj.weight, share.log()
            )
        _constant(self, "dense", dense)
        _constant(self, "conv_bias", conv_bias)
        _constant(self, "edge", edge)
        self.proj = _linear(out, layer.proj.bias)
        self.prefix = _prefix(layer)
        own = layer.prefix_proj or layer.proj
        self.prefix_proj = _linear(own.weight, own.bias) if self.prefix is not None else None
        self.has_context = layer.beta is not None
        if self.has_context:
            self.context_value = _linear(context_weight, context_bias)
            self.context_proj = _linear(context_out, None)
            for name in ("kappa", "mu", "beta"):
                _constant(self, name, getattr(layer, name))

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        height, width = self.where.grid
        image = x[:, self.where.num_prefix :].transpose(1, 2).unflatten(2, (height, width))
        y = F.conv2d(image, self.dense, self.conv_bias, padding=1)
        if self.edge is not None:
            y = y + F.conv2d(x.new_ones(1, 1, height, width), self.edge, padding=1)
        out: Tensor = self.proj(y.flatten(2).transpose(1, 2))
        if self.has_context:
            out = out + self.context_proj(self._context(x))
        if self.prefix is not None and self.prefix_proj is not None:
            out = torch.cat([self.prefix_proj(self.prefix(x, rotary)), out], 1)
        return out

    def _context(self, x: Tensor) -> Tensor:
        prefix, patches = x[:, : self.where.num_prefix], x[:, self.where.num_prefix :]
        values: Tensor = self.context_value(torch.cat([prefix, patches.mean(1, keepdim=True)], 1))
        assert self.mu is not None
        assert self.beta is not None
        ctx = self.mu * values[:, self.where.num_prefix :] + self.beta
        if self.kappa is not None:
            ctx = ctx + (self.kappa * values[:, : self.where.num_prefix]).sum(1, keepdim=True)
        return ctx


def _fold_spvit(layer: SPViTAttention) -> tuple[Tensor, Tensor, Tensor | None, None, Tensor]:
    """Dense kernel, ``Woe``, convolution bias, no edge map, and the mean weight of each head."""
    head_weights = torch.softmax(layer.logits, dim=0)
    dense, out = spvit_weights(layer.value.weight, layer.proj.weight, head_weights)
    bias: Tensor | None = layer.value.bias
    if bias is not None:
        bias = torch.einsum("hrs,hc->c", head_weights, bias.unflatten(0, (layer.num_heads, -1)))
    return dense, out, bias, None, head_weights.mean((1, 2))


class _Scattered(nn.Module):
    """Scattered ``dw``: attention for the kept heads, a stencil for the replaced ones, one
    projection.
    """

    def __init__(self, layer: ScatteredDWAttention, where: _Where) -> None:
        super().__init__()
        kept = layer.kept_dim
        weight, bias = layer.value.weight, layer.value.bias
        kept_bias, replaced_bias = (None, None) if bias is None else (bias[:kept], bias[kept:])
        scale = 1.0 if layer.q_norm is not None else layer.scale
        self.heads, self.scale = len(layer.kept), layer.scale
        query_bias = None if layer.query.bias is None else layer.query.bias * scale
        self.query = _linear(layer.query.weight * scale, query_bias)
        self.key = _linear(layer.key.weight, layer.key.bias)
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        self.kept_value = _linear(weight[:kept], kept_bias)
        self.replaced_value = _linear(weight[kept:], replaced_bias)
        self.stencil = _Stencil(layer, where)
        self.proj = _linear(layer.proj.weight, layer.proj.bias)
        self.prefix = None
        if layer.prefix_rows is not None:
            self.prefix = _ExactRows(layer.prefix_rows, weight[kept:], replaced_bias)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.query, self.key, self.kept_value))
        q = q if self.q_norm is None else self.q_norm(q) * self.scale
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = (q, k) if rotary is None else (rotary.rotate(q), rotary.rotate(k))
        y = self.stencil(self.replaced_value(x))
        if self.prefix is not None:
            y = torch.cat([self.prefix(x, rotary), y], 1)
        rows = torch.cat([merge_heads(_plain_attention(q, k, v)), y], -1)
        out: Tensor = self.proj(rows)
        return out
