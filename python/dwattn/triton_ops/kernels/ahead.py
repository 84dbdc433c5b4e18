"""Kernels with the arguments that TensorRT's ahead-of-time plugins pass: inputs, integers, outputs.

All tensors are contiguous: values ``v (B, H*W, C)``, taps ``weight (C, 3, 3)`` and ``ctx (B, C)``
fp32, output ``y`` like ``v``; ``wo (D', C)``, ``bo (D')`` fp32, ``out (B, H*W, D')``.
"""

import triton
import triton.language as tl

from dwattn.triton_ops.kernels import aggregate as aggregation
from dwattn.triton_ops.kernels import lowrank

_aggregate = aggregation.aggregate
_expand = lowrank.expand


@triton.jit
def aggregate(
    v, weight, ctx, height, width, channels, y,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """See :func:`dwattn.triton_ops.kernels.aggregate.aggregate`."""
    image = height * width * channels
    _aggregate(
        v, y, weight, ctx, height, width, channels, image, channels, 1, image, channels, 1, 9, 3, 1,
        ROWS, COLUMNS, CHANNELS,
    )  # fmt: skip


@triton.jit
def expand(
    v, weight, ctx, wo, bo, height, width, channels, dim, groups, out,
    CHANNELS: tl.constexpr, ONE_CHUNK: tl.constexpr,
    PATCHES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """See :func:`dwattn.triton_ops.kernels.lowrank.expand`."""
    _expand(
        v, weight, ctx, wo, bo, None, None, out, height, width, channels, dim, groups,
        height * width * channels, channels, 9, 3, 1, channels, 1, 1, 0, 0, 0, 0,
        height * width * dim, dim, 1,
        "ieee", CHANNELS, ONE_CHUNK, PATCHES, FEATURES,
    )  # fmt: skip
