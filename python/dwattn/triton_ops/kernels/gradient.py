"""The gradient of the 3x3 taps.

Shapes: values ``v (B, H*W, C)`` (patches), output gradient ``g (B, H*W, C)``, ``partial (G, 9, C)``
fp32 contiguous: one partial gradient for each of G groups of programs, added up afterwards. No
atomics, so that the same call gives the same bits.
"""

import triton
import triton.language as tl

from dwattn.triton_ops.kernels.aggregate import load_row


@triton.jit
def kernel_gradient(
    v,
    g,
    partial,
    batch,
    height,
    width,
    channels,
    groups,
    v_batch,
    v_token,
    v_channel,
    g_batch,
    g_token,
    g_channel,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``dK[c, r, s] = sum_{b, i, j} g[b, (i, j), c] v[b, (i+r-1, j+s-1), c]``.

    Units of work are strips of ROWS rows of V under COLUMNS columns of g; group n takes the units
    n, n + groups, ... Walking down a strip, row i of V meets the rows i+1, i and i-1 of g; two of
    them are still in registers.
    """
    channel_blocks = tl.cdiv(channels, CHANNELS)
    column_blocks = tl.cdiv(width, COLUMNS)
    strips = tl.cdiv(height, ROWS)
    pid = tl.program_id(0)
    c = pid % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    group = pid // channel_blocks

    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    k00, k01, k02 = zero, zero, zero
    k10, k11, k12 = zero, zero, zero
    k20, k21, k22 = zero, zero, zero
    for unit in range(group, batch * strips * column_blocks, groups):
        j = unit % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        first = unit // column_blocks % strips * ROWS
        image = (unit // (column_blocks * strips)).to(tl.int64)
        g_image = g + image * g_batch
        row = g_image + ((first - 1) * width).to(tl.int64) * g_token
        above = load_row(row, j, c, width, channels, g_token, g_channel, first > 0)
        row = g_image + (first * width).to(tl.int64) * g_token
        here = load_row(row, j, c, width, channels, g_token, g_channel, True)
        for i in range(first, tl.minimum(first + ROWS, height)):
            row = g_image + ((i + 1) * width).to(tl.int64) * g_token
            below = load_row(row, j, c, width, channels, g_token, g_channel, i + 1 < height)
            row = v + image * v_batch + (i * width).to(tl.int64) * v_token
            left = load_row(row, j - 1, c, width, channels, v_token, v_channel, True)
            centre = load_row(row, j, c, width, channels, v_token, v_channel, True)
            right = load_row(row, j + 1, c, width, channels, v_token, v_channel, True)
            k00 += below * left
            k01 += below * centre
            k02 += below * right
            k10 += here * left
            k11 += here * centre
            k12 += here * right
            k20 += above * left
            k21 += above * centre
            k22 += above * right
            above = here
            here = below

    out = partial + group.to(tl.int64) * 9 * channels + c
    tl.store(out, tl.sum(k00, 0), mask=c < channels)
    tl.store(out + channels, tl.sum(k01, 0), mask=c < channels)
    tl.store(out + 2 * channels, tl.sum(k02, 0), mask=c < channels)
    tl.store(out + 3 * channels, tl.sum(k10, 0), mask=c < channels)
    tl.store(out + 4 * channels, tl.sum(k11, 0), mask=c < channels)
    tl.store(out + 5 * channels, tl.sum(k12, 0), mask=c < channels)
    tl.store(out + 6 * channels, tl.sum(k20, 0), mask=c < channels)
    tl.store(out + 7 * channels, tl.sum(k21, 0), mask=c < channels)
    tl.store(out + 8 * channels, tl.sum(k22, 0), mask=c < channels)
