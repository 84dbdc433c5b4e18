"""Launches of the aggregation: forward, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from dwattn.geometry import Geometry
from dwattn.triton_ops.kernels import aggregate as kernels
from dwattn.triton_ops.kernels.gradient import kernel_gradient
from dwattn.triton_ops.launch import cdiv, config, on_its_device, processors, strides, tuned

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_SUM_TOKENS, _SUM_ROWS, _SUM_CHANNELS, _CONTEXT_CHANNELS = 256, 16, 64, 128
_GRADIENT_ROWS, _GRADIENT_COLUMNS, _GRADIENT_CHANNELS = 8, 8, 64
_GRADIENT_PROGRAMS_PER_PROCESSOR = 4
#: Most units of work whose products one sum takes, 512 of them: the error of a sum grows with its length.
_GRADIENT_UNITS = 64

#: The order in which an output's nine products are added is the same in all of them.
CONFIGS = (
    config(4, ROWS=8, COLUMNS=8, CHANNELS=64),
    config(4, ROWS=8, COLUMNS=8, CHANNELS=128),
    config(4, ROWS=4, COLUMNS=8, CHANNELS=64),
    config(4, ROWS=16, COLUMNS=8, CHANNELS=64),
    config(8, ROWS=8, COLUMNS=16, CHANNELS=64),
    config(4, ROWS=32, COLUMNS=4, CHANNELS=128),
)
_aggregate = tuned(kernels.aggregate, CONFIGS, key=["height", "width", "channels"])


@on_its_device
def forward(
    v: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """``v (B, N, C) -> (B, H*W, C)``; the context costs one more read of V where mu is given."""
    patches = v[:, geometry.num_prefix :]
    partial = None if mu is None else partial_sums(patches)
    ctx = context(v, partial, geometry, kappa, mu, beta)
    return stencil(patches, kernel, ctx, geometry, out)


def stencil(
    patches: Tensor,
    kernel: Tensor,
    ctx: Tensor | None,
    geometry: Geometry,
    out: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """``patches (B, H*W, C)`` aggregated, plus ``ctx (B, C)``.

    Args:
        ctx: fp32, contiguous.
        out: ``(B, H*W, C)`` of any strides, written and returned.
        transposed: turn the taps around, which is the gradient with respect to the patches.
    """
    batch, _, channels = patches.shape
    if out is None:
        out = patches.new_empty(patches.shape)
    if out.numel() == 0:
        return out
    channel, row, column = kernel.stride()
    if transposed:  # the last tap first, backwards: no flipped copy
        kernel, row, column = kernel[:, 2:, 2:], -row, -column
    height, width = geometry.grid
    _aggregate[
        lambda meta: (
            batch
            * cdiv(height, meta["ROWS"])
            * cdiv(width, meta["COLUMNS"])
            * cdiv(channels, meta["CHANNELS"]),
        )
    ](
        patches, out, kernel, ctx, height, width, channels,
        *patches.stride(), *out.stride(), channel, row, column,
    )  # fmt: skip
    return out


def partial_sums(patches: Tensor) -> Tensor:
    """``(B, T, C)`` fp32: sums over stretches of the patches."""
    batch, count, channels = patches.shape
    tiles = cdiv(count, _SUM_TOKENS)
    partial = patches.new_empty(batch, tiles, channels, dtype=torch.float32)
    if partial.numel():
        kernels.patch_sums[(batch * tiles * cdiv(channels, _SUM_CHANNELS),)](
            patches, partial, count, channels, *patches.stride(),
            TOKENS=_SUM_TOKENS, ROWS=_SUM_ROWS, CHANNELS=_SUM_CHANNELS,
        )  # fmt: skip
    return partial


def context(
    v: Tensor,
    partial: Tensor | None,
    geometry: Geometry,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
) -> Tensor | None:
    """``ctx (B, C)`` fp32 from all tokens' values and the sums over their patches; None without
    terms.
    """
    if kappa is None and mu is None and beta is None:
        return None
    batch, _, channels = v.shape
    ctx = v.new_empty(batch, channels, dtype=torch.float32)
    if ctx.numel():
        kernels.context[(batch * cdiv(channels, _CONTEXT_CHANNELS),)](
            v, partial, kappa, mu, beta, ctx,
            geometry.num_prefix, geometry.num_patches, 0 if partial is None else partial.shape[1],
            channels, *v.stride(), *strides(kappa, 2), *strides(mu, 1), *strides(beta, 1),
            CHANNELS=_CONTEXT_CHANNELS,
        )  # fmt: skip
    return ctx


@on_its_device
def backward(
    grad: Tensor,
    v: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of v, kernel, kappa, mu and beta, None where absent or not in ``needs``.

    With ``S[b] = sum of grad[b]``: the patches get the transposed stencil of grad plus the context
    ``mu S / (H*W)``, prefix token t gets ``kappa[t] S``; ``dkappa[t] = sum_b v[b, t] S``, ``dmu =
    sum_b mean(v[b]) S``, ``dbeta = sum_b S``.
    """
    needs_v, needs_kernel, needs_kappa, needs_mu, needs_beta = needs
    prefix, patches = v[:, : geometry.num_prefix], v[:, geometry.num_prefix :]
    total = partial_sums(grad).sum(1)
    dv = dkernel = dkappa = dmu = dbeta = None
    if needs_v:
        dv = v.new_empty(v.shape)
        ctx = None if mu is None else total * (mu.float() / geometry.num_patches)
        stencil(grad, kernel, ctx, geometry, dv[:, geometry.num_prefix :], transposed=True)
        dv[:, : geometry.num_prefix] = 0 if kappa is None else kappa.float() * total[:, None]
    if needs_kernel:
        dkernel = taps_gradient(grad, patches, geometry).to(kernel.dtype)
    if needs_kappa and kappa is not None:
        dkappa = (prefix * total[:, None]).sum(0).to(kappa.dtype)
    if needs_mu and mu is not None:
        mean = partial_sums(patches).sum(1) / geometry.num_patches
        dmu = (mean * total).sum(0).to(mu.dtype)
    if needs_beta and beta is not None:
        dbeta = total.sum(0).to(beta.dtype)
    return dv, dkernel, dkappa, dmu, dbeta


def gradient_groups(units: int, blocks: int, multiprocessors: int) -> int:
    """Groups of programs that share the ``units``; each makes a partial gradient of its own."""
    wanted = _GRADIENT_PROGRAMS_PER_PROCESSOR * multiprocessors // max(1, blocks)
    return min(units, max(1, wanted, cdiv(units, _GRADIENT_UNITS)))


def taps_gradient(grad: Tensor, patches: Tensor, geometry: Geometry) -> Tensor:
    """``(C, 3, 3)`` fp32."""
    batch, _, channels = patches.shape
    height, width = geometry.grid
    blocks = cdiv(channels, _GRADIENT_CHANNELS)
    units = batch * cdiv(height, _GRADIENT_ROWS) * cdiv(width, _GRADIENT_COLUMNS)
    groups = gradient_groups(units, blocks, processors(grad.device))
    partial = grad.new_empty(groups, 9, channels, dtype=torch.float32)
    if partial.numel():
        kernel_gradient[(groups * blocks,)](
            patches, grad, partial, batch, height, width, channels, groups,
            *patches.stride(), *grad.stride(),
            ROWS=_GRADIENT_ROWS, COLUMNS=_GRADIENT_COLUMNS, CHANNELS=_GRADIENT_CHANNELS,
        )  # fmt: skip
    return partial.sum(0).t().reshape(channels, 3, 3)
