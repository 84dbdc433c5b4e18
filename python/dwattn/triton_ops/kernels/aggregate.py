"""The 3x3 depthwise aggregation, and the sums and the context that go into it.

Shapes: values ``v (B, H*W, C)`` (patches) or ``(B, N, C)`` (all tokens), output ``y (B, H*W, C)``,
taps ``weight (C, 3, 3)``, ``ctx (B, C)`` and ``partial (B, T, C)`` fp32 contiguous, coefficients
``kappa (P, C)``, ``mu (C)``, ``beta (C)``.
"""

import triton
import triton.language as tl


@triton.jit
def load_row(row, j, c, width, channels, token, channel, exists):
    """Values ``(j, c)`` of one grid row in fp32, zero outside the grid."""
    # The row's existence as a bound of j: the interpreter of Triton 3.9 takes no mask that a scalar condition is part of.
    end = tl.where(exists, width, 0)
    mask = ((j >= 0) & (j < end))[:, None] & (c < channels)[None, :]
    return tl.load(row + j[:, None] * token + c[None, :] * channel, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_vector(pointer, c, channels, stride):
    """``(1, C)`` in fp32."""
    return tl.load(pointer + c * stride, mask=c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def aggregate(
    v,
    y,
    weight,
    ctx,
    height,
    width,
    channels,
    v_batch,
    v_token,
    v_channel,
    y_batch,
    y_token,
    y_channel,
    w_channel,
    w_row,
    w_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``y[b, (i, j)] = sum_{r, s} weight[:, r, s] v[b, (i+r-1, j+s-1)] + ctx[b]``.

    A program walks down ROWS grid rows of COLUMNS columns and CHANNELS channels. Each row of V is
    read once (at three horizontal shifts, which the L1 cache serves) and added to the three output
    rows that it touches; two of them wait in registers. Only the rows above and below a strip are
    read by two programs.
    """
    channel_blocks = tl.cdiv(channels, CHANNELS)
    column_blocks = tl.cdiv(width, COLUMNS)
    strips = tl.cdiv(height, ROWS)
    pid = tl.program_id(0)
    c = pid % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // channel_blocks
    j = pid % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // column_blocks
    first = pid % strips * ROWS
    stop = tl.minimum(first + ROWS, height)
    image = (pid // strips).to(tl.int64)

    w00 = load_vector(weight, c, channels, w_channel)
    w01 = load_vector(weight + w_column, c, channels, w_channel)
    w02 = load_vector(weight + 2 * w_column, c, channels, w_channel)
    w10 = load_vector(weight + w_row, c, channels, w_channel)
    w11 = load_vector(weight + w_row + w_column, c, channels, w_channel)
    w12 = load_vector(weight + w_row + 2 * w_column, c, channels, w_channel)
    w20 = load_vector(weight + 2 * w_row, c, channels, w_channel)
    w21 = load_vector(weight + 2 * w_row + w_column, c, channels, w_channel)
    w22 = load_vector(weight + 2 * w_row + 2 * w_column, c, channels, w_channel)

    start = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    if ctx is not None:
        start += load_vector(ctx + image * channels, c, channels, 1)
    above = start
    here = start
    outputs = y + image * y_batch + j[:, None] * y_token + c[None, :] * y_channel
    for i in range(first - 1, stop + 1):
        exists = (i >= 0) & (i < height)
        row = v + image * v_batch + (i * width).to(tl.int64) * v_token
        left = load_row(row, j - 1, c, width, channels, v_token, v_channel, exists)
        centre = load_row(row, j, c, width, channels, v_token, v_channel, exists)
        right = load_row(row, j + 1, c, width, channels, v_token, v_channel, exists)
        done = above + w20 * left + w21 * centre + w22 * right
        above = here + w10 * left + w11 * centre + w12 * right
        here = start + w00 * left + w01 * centre + w02 * right
        # The first two rows that are left behind belong to the strip above (as a bound of c: see load_row).
        complete = tl.where(i > first, channels, 0)
        tl.store(
            outputs + ((i - 1) * width).to(tl.int64) * y_token,
            done.to(y.dtype.element_ty),
            mask=(j < width)[:, None] & (c < complete)[None, :],
        )


@triton.jit
def patch_sums(
    v,
    partial,
    patches,
    channels,
    v_batch,
    v_token,
    v_channel,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``partial[b, t] = sum of v[b]`` over the t-th stretch of TOKENS patches."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(patches, TOKENS)
    pid = tl.program_id(0)
    c = pid % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // channel_blocks
    first = pid % tiles * TOKENS
    image = (pid // tiles).to(tl.int64)

    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    row = v + image * v_batch + first.to(tl.int64) * v_token
    for start in range(0, TOKENS, ROWS):
        t = start + tl.arange(0, ROWS)
        total += load_row(row, t, c, patches - first, channels, v_token, v_channel, True)
    tl.store(partial + pid.to(tl.int64) * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit
def context(
    v,
    partial,
    kappa,
    mu,
    beta,
    ctx,
    num_prefix,
    patches,
    tiles,
    channels,
    v_batch,
    v_token,
    v_channel,
    kappa_token,
    kappa_channel,
    mu_channel,
    beta_channel,
    CHANNELS: tl.constexpr,
):
    """``ctx[b] = sum_t kappa[t] v[b, t] + mu sum_t partial[b, t] / patches + beta``."""
    channel_blocks = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    c = pid % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = (pid // channel_blocks).to(tl.int64)

    total = tl.zeros((1, CHANNELS), tl.float32)
    if mu is not None:
        for t in range(tiles):
            total += load_vector(partial + (image * tiles + t) * channels, c, channels, 1)
        total = total * load_vector(mu, c, channels, mu_channel) / patches
    if kappa is not None:
        for t in range(num_prefix):
            value = load_vector(v + image * v_batch + t * v_token, c, channels, v_channel)
            total += load_vector(kappa + t * kappa_token, c, channels, kappa_channel) * value
    if beta is not None:
        total += load_vector(beta, c, channels, beta_channel)
    tl.store(ctx + image * channels + c[None, :], total, mask=(c < channels)[None, :])
