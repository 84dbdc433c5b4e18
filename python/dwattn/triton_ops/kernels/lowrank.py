"""Projection to a few channels, and the way back through the stencil.

Shapes: tokens ``x (B, N, D)``, inner values ``v (B, N, r)`` or its patches ``(B, H*W, r)``, factors
``wv (r, D)`` and ``wo (D', r)``, taps ``weight (r, 3, 3)``, ``ctx (B, r)`` and ``partial (B, T, r)``
fp32 contiguous, output and residual ``(B, H*W, D')``, ``bo``, ``scale (D')``.
"""

import triton
import triton.language as tl

from dwattn.triton_ops.kernels.aggregate import load_vector


@triton.jit
def project(
    x,
    wv,
    bv,
    v,
    partial,
    tokens,
    num_prefix,
    dim,
    rank,
    x_batch,
    x_token,
    x_feature,
    wv_channel,
    wv_feature,
    bv_channel,
    v_batch,
    v_token,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """``v[b] = x[b] wv^T + bv``, and ``partial[b, t]``: the sum of v over the patches of tile t."""
    channel_blocks = tl.cdiv(rank, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    pid = tl.program_id(0)
    c = pid % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // channel_blocks
    t = pid % tiles * TOKENS + tl.arange(0, TOKENS)
    image = (pid // tiles).to(tl.int64)

    d = tl.arange(0, FEATURES)
    rows = x + image * x_batch + t.to(tl.int64)[:, None] * x_token
    columns = wv + c[None, :] * wv_channel
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for start in range(0, dim, FEATURES):
        inside = start + d < dim
        a = tl.load(
            rows + (start + d)[None, :] * x_feature,
            mask=(t < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            columns + (start + d)[:, None] * wv_feature,
            mask=inside[:, None] & (c < rank)[None, :],
            other=0.0,
        )
        total = tl.dot(a, w, total, input_precision=PRECISION)
    if bv is not None:
        total += load_vector(bv, c, rank, bv_channel)
    value = total.to(v.dtype.element_ty)
    tl.store(
        v + image * v_batch + t.to(tl.int64)[:, None] * v_token + c[None, :],
        value,
        mask=(t < tokens)[:, None] & (c < rank)[None, :],
    )
    if partial is not None:
        patch = (t >= num_prefix) & (t < tokens)
        sums = tl.sum(tl.where(patch[:, None], value.to(tl.float32), 0.0), 0)
        tl.store(partial + pid.to(tl.int64) * rank + c, sums, mask=c < rank)


@triton.jit
def stencil(
    v, weight, ctx, p, c, height, width, rank, v_token, w_channel, w_row, w_column,
    PATCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``(PATCHES, CHANNELS)`` fp32: the aggregation at patches p of one image, plus ``ctx``.

    Nine shifted reads of V, which is narrow enough to stay in the L1 and L2 caches.
    """
    i = p // width
    j = p % width
    total = tl.zeros((PATCHES, CHANNELS), tl.float32)
    if ctx is not None:
        total += load_vector(ctx, c, rank, 1)
    # Not unrolled: nine loads at a time would take most of the registers.
    for r in range(3):
        for s in tl.static_range(3):
            row = i + (r - 1)
            column = j + (s - 1)
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            value = tl.load(
                v + (p + (r - 1) * width + (s - 1))[:, None] * v_token + c[None, :],
                mask=inside[:, None] & (c < rank)[None, :],
                other=0.0,
            )
            tap = load_vector(weight + r * w_row + s * w_column, c, rank, w_channel)
            total += value.to(tl.float32) * tap
    return total


@triton.jit
def expand(
    v,
    weight,
    ctx,
    wo,
    bo,
    scale,
    residual,
    out,
    height,
    width,
    rank,
    dim,
    groups,
    v_batch,
    v_token,
    w_channel,
    w_row,
    w_column,
    wo_feature,
    wo_channel,
    bo_feature,
    scale_feature,
    residual_batch,
    residual_token,
    residual_feature,
    out_batch,
    out_token,
    out_feature,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    PATCHES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """``out = residual + scale * ((aggregate(v) + ctx) wo^T + bo)``, scale and residual optional.

    A program owns PATCHES patches of an image and one of ``groups`` ranges of the output features.
    With ONE_CHUNK (``r <= CHANNELS``) the aggregated tile is formed once and stays in registers
    while the program walks over its features; otherwise it is formed again, in chunks, for every
    FEATURES features.
    """
    patches = height * width
    tiles = tl.cdiv(patches, PATCHES)
    blocks = tl.cdiv(dim, FEATURES)
    blocks_each = tl.cdiv(blocks, groups)
    pid = tl.program_id(0)
    first = pid % groups * blocks_each
    pid = pid // groups
    p = pid % tiles * PATCHES + tl.arange(0, PATCHES)
    image = (pid // tiles).to(tl.int64)

    v_image = v + image * v_batch
    if ctx is not None:
        ctx += image * rank
    long_p = p.to(tl.int64)[:, None]
    k = tl.arange(0, CHANNELS)
    if ONE_CHUNK:
        inner = stencil(
            v_image, weight, ctx, p, k, height, width, rank, v_token, w_channel, w_row, w_column,
            PATCHES, CHANNELS,
        ).to(wo.dtype.element_ty)  # fmt: skip
    for block in range(first, tl.minimum(first + blocks_each, blocks)):
        f = block * FEATURES + tl.arange(0, FEATURES)
        columns = wo + f[None, :] * wo_feature
        total = tl.zeros((PATCHES, FEATURES), tl.float32)
        if ONE_CHUNK:
            w = tl.load(
                columns + k[:, None] * wo_channel,
                mask=(k < rank)[:, None] & (f < dim)[None, :],
                other=0.0,
            )
            total = tl.dot(inner, w, total, input_precision=PRECISION)
        else:
            for start in range(0, rank, CHANNELS):
                c = start + k
                chunk = stencil(
                    v_image, weight, ctx, p, c, height, width, rank, v_token, w_channel, w_row,
                    w_column, PATCHES, CHANNELS,
                ).to(wo.dtype.element_ty)  # fmt: skip
                w = tl.load(
                    columns + c[:, None] * wo_channel,
                    mask=(c < rank)[:, None] & (f < dim)[None, :],
                    other=0.0,
                )
                total = tl.dot(chunk, w, total, input_precision=PRECISION)
        if bo is not None:
            total += load_vector(bo, f, dim, bo_feature)
        if scale is not None:
            total *= load_vector(scale, f, dim, scale_feature)
        mask = (p < patches)[:, None] & (f < dim)[None, :]
        if residual is not None:
            total += tl.load(
                residual
                + image * residual_batch
                + long_p * residual_token
                + f[None, :] * residual_feature,
                mask=mask,
                other=0.0,
            ).to(tl.float32)
        tl.store(
            out + image * out_batch + long_p * out_token + f[None, :] * out_feature,
            total.to(out.dtype.element_ty),
            mask=mask,
        )
