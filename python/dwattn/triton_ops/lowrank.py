"""Launches of ``lowrank_dw``: ``x -> r channels -> stencil and context -> D`` in two passes."""

from __future__ import annotations

import torch
from torch import Tensor

from dwattn.geometry import Geometry
from dwattn.triton_ops.aggregate import context
from dwattn.triton_ops.kernels import lowrank as kernels
from dwattn.triton_ops.launch import (
    cdiv,
    config,
    on_its_device,
    power_of_two,
    precision,
    processors,
    strides,
    tuned,
)

#: Channels that a program of the first pass projects to; more of them read x more than once.
_CHANNELS_PER_PROJECTION = 256
#: Inner channels that a program of the second pass keeps in registers, by bytes of an element.
CHANNELS_IN_REGISTERS = {2: 128, 4: 64}
CHANNELS_PER_CHUNK = 32

#: By bytes of an element: products in fp32 without tensor cores hold their operands in registers.
#: The sum over the r channels has the same order in all of them.
CONFIGS = {
    2: (
        config(4, 2, PATCHES=32, FEATURES=64),
        config(4, 2, PATCHES=32, FEATURES=128),
        config(8, 2, PATCHES=64, FEATURES=64),
        config(8, 2, PATCHES=64, FEATURES=128),
        config(4, 2, PATCHES=16, FEATURES=128),
    ),
    4: (
        config(4, 2, PATCHES=32, FEATURES=32),
        config(4, 2, PATCHES=16, FEATURES=64),
        config(8, 2, PATCHES=32, FEATURES=64),
    ),
}
_expand = {
    size: tuned(
        kernels.expand,
        configs,
        key=["height", "width", "rank", "dim", "groups"],
        restore_value=["out"],  # measuring runs the kernel many times; out may be the residual
    )
    for size, configs in CONFIGS.items()
}


@on_its_device
def forward(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    geometry: Geometry,
    wo: Tensor,
    bo: Tensor | None,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """See :func:`dwattn.triton_ops.lowrank_dw_attention`."""
    if out is None:
        out = x.new_empty(x.shape[0], geometry.num_patches, wo.shape[0])
    if out.numel() == 0:
        return out
    v, partial = project(x, wv, bv, geometry, sums=mu is not None)
    ctx = context(v, partial, geometry, kappa, mu, beta)
    expand(v[:, geometry.num_prefix :], kernel, ctx, geometry, wo, bo, residual, scale, out)
    return out


def project(
    x: Tensor, wv: Tensor, bv: Tensor | None, geometry: Geometry, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``v (B, N, r)`` in the dtype of x, and sums over its patches per tile, ``(B, T, r)``.

    V's rows are padded to 16 numbers, so that every rank has aligned accesses.
    """
    batch, count, dim = x.shape
    rank = wv.shape[0]
    v = x.new_empty(batch, count, cdiv(rank, 16) * 16)[:, :, :rank]
    channels = min(power_of_two(rank), _CHANNELS_PER_PROJECTION)
    blocks = cdiv(rank, channels)
    tokens = _tokens_per_tile(batch, count, blocks, processors(x.device))
    tiles = cdiv(count, tokens)
    partial = x.new_empty(batch, tiles, rank, dtype=torch.float32) if sums else None
    kernels.project[(batch * tiles * blocks,)](
        x, wv, bv, v, partial, count, geometry.num_prefix, dim, rank,
        *x.stride(), *wv.stride(), *strides(bv, 1), *v.stride()[:2],
        PRECISION=precision(x.dtype),
        TOKENS=tokens,
        CHANNELS=channels,
        **projection_tile(channels, x.element_size()),
    )  # fmt: skip
    return v, partial


def projection_tile(channels: int, element_size: int) -> dict[str, int]:
    """The rest of the first pass's tile: 16 KB of weights a stage fit every GPU's shared memory."""
    return {
        "FEATURES": max(16, min(64, 16384 // (channels * element_size))),
        "num_warps": 4 if channels <= 128 else 8,
        "num_stages": 3,
    }


def _tokens_per_tile(batch: int, count: int, blocks: int, wanted: int) -> int:
    """The largest tile that still gives every multiprocessor one."""
    for tokens in (64, 32):
        if batch * blocks * cdiv(count, tokens) >= wanted:
            return tokens
    return 16


def expand(
    patches: Tensor,
    kernel: Tensor,
    ctx: Tensor | None,
    geometry: Geometry,
    wo: Tensor,
    bo: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
) -> None:
    """Stencil, output projection and epilogue into ``out``; patches have channel stride 1."""
    batch, count, rank = patches.shape
    height, width = geometry.grid
    dim = wo.shape[0]
    channels = power_of_two(rank)
    size = wo.element_size()
    one_chunk = channels <= CHANNELS_IN_REGISTERS[size]
    # Few images: several programs form the same aggregated tile, each for some of the features.
    groups = min(cdiv(dim, 64), max(1, processors(out.device) // (batch * cdiv(count, 32))))
    _expand[size][lambda meta: (batch * cdiv(count, meta["PATCHES"]) * groups,)](
        patches, kernel, ctx, wo, bo, scale, residual, out,
        height, width, rank, dim, groups,
        *patches.stride()[:2], *kernel.stride(), *wo.stride(), *strides(bo, 1), *strides(scale, 1),
        *strides(residual, 3), *out.stride(),
        PRECISION=precision(wo.dtype),
        CHANNELS=channels if one_chunk else CHANNELS_PER_CHUNK,
        ONE_CHUNK=one_chunk,
    )  # fmt: skip
