"""Attention, and the running statistics of its maps over images, without a map ever in memory.

Shapes: ``q``, ``k (B, h, N, d)``, ``v``, ``out (B, h, N, d_v)``, ``lse (B, h, N)`` fp32 contiguous
(log2 of the softmax' denominator, of logits that were multiplied by log2 e), state ``mean``, ``m2
(h, rows, columns)`` fp32 or fp64.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, row, column, rows, columns, row_stride, column_stride):
    return tl.load(
        pointer + row[:, None] * row_stride + column[None, :] * column_stride,
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0.0,
    )


@triton.jit
def attend(
    q,
    k,
    v,
    lse,
    out,
    scale,
    heads,
    tokens,
    head_dim,
    value_dim,
    q_batch,
    q_head,
    q_token,
    q_channel,
    k_batch,
    k_head,
    k_token,
    k_channel,
    v_batch,
    v_head,
    v_token,
    v_channel,
    out_batch,
    out_head,
    out_token,
    out_channel,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """``lse``, and ``out = softmax(q k^T) v`` where v is given; ``scale`` includes log2 e."""
    tiles = tl.cdiv(tokens, QUERIES)
    pid = tl.program_id(0)
    rows = pid % tiles * QUERIES + tl.arange(0, QUERIES)
    pid = pid // tiles
    head = (pid % heads).to(tl.int64)
    image = (pid // heads).to(tl.int64)
    d = tl.arange(0, CHANNELS)
    e = tl.arange(0, VALUES)

    query = load_tile(
        q + image * q_batch + head * q_head, rows, d, tokens, head_dim, q_token, q_channel
    )
    k += image * k_batch + head * k_head
    if v is not None:
        v += image * v_batch + head * v_head
        total = tl.zeros((QUERIES, VALUES), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tokens, KEYS):
        columns = start + tl.arange(0, KEYS)
        key = load_tile(k, d, columns, head_dim, tokens, k_channel, k_token)
        logits = tl.dot(query, key, input_precision=PRECISION) * scale
        logits = tl.where((columns < tokens)[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(peak - higher)
        mass = mass * shrink + tl.sum(p, 1)
        peak = higher
        if v is not None:
            value = load_tile(v, columns, e, tokens, value_dim, v_token, v_channel)
            total = tl.dot(
                p.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION
            )
    tl.store(lse + pid.to(tl.int64) * tokens + rows, peak + tl.log2(mass), mask=rows < tokens)
    if v is not None:
        tl.store(
            out
            + image * out_batch
            + head * out_head
            + rows[:, None] * out_token
            + e[None, :] * out_channel,
            (total / mass[:, None]).to(out.dtype.element_ty),
            mask=(rows < tokens)[:, None] & (e < value_dim)[None, :],
        )


@triton.jit(do_not_specialize=["seen"])
def fold_maps(
    q,
    k,
    lse,
    mean,
    m2,
    seen,
    scale,
    images,
    heads,
    tokens,
    head_dim,
    first_query,
    first_key,
    queries,
    keys,
    q_batch,
    q_head,
    q_token,
    q_channel,
    k_batch,
    k_head,
    k_token,
    k_channel,
    mean_head,
    mean_row,
    mean_column,
    m2_head,
    m2_row,
    m2_column,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Join ``E = exp2(scale q k^T - lse)`` of all images to the state of ``seen`` images.

    Rows and columns of the state are the tokens ``first_query ... + queries`` and ``first_key ...
    + keys``. A program owns one tile of one head: Welford's mean and M2 over the images stay in
    registers and meet the state once, by Chan's formula. Without m2 only the mean is kept.
    """
    query_tiles = tl.cdiv(queries, QUERIES)
    key_tiles = tl.cdiv(keys, KEYS)
    pid = tl.program_id(0)
    columns = pid % key_tiles * KEYS + tl.arange(0, KEYS)
    pid = pid // key_tiles
    rows = pid % query_tiles * QUERIES + tl.arange(0, QUERIES)
    head = (pid // query_tiles).to(tl.int64)
    d = tl.arange(0, CHANNELS)

    q += head * q_head
    k += head * k_head
    lse += head * tokens
    average = tl.zeros((QUERIES, KEYS), tl.float32)
    squares = tl.zeros((QUERIES, KEYS), tl.float32)
    for image in range(images):
        query = load_tile(
            q, first_query + rows, d, first_query + queries, head_dim, q_token, q_channel
        )
        key = load_tile(k, d, first_key + columns, head_dim, first_key + keys, k_channel, k_token)
        shift = tl.load(lse + first_query + rows, mask=rows < queries, other=0.0)
        logits = tl.dot(query, key, input_precision=PRECISION) * scale
        deviation = tl.exp2(logits - shift[:, None]) - average
        step = deviation / (image + 1)
        average += step
        if m2 is not None:
            squares += deviation * (deviation - step)
        q += q_batch
        k += k_batch
        lse += heads * tokens

    mask = (rows < queries)[:, None] & (columns < keys)[None, :]
    kind: tl.constexpr = mean.dtype.element_ty
    before = seen.to(kind)
    share = images / (before + images)
    mean += head * mean_head + rows[:, None] * mean_row + columns[None, :] * mean_column
    old = tl.where(before > 0, tl.load(mean, mask=mask, other=0.0), 0.0)
    delta = average.to(kind) - old
    tl.store(mean, old + delta * share, mask=mask)
    if m2 is not None:
        m2 += head * m2_head + rows[:, None] * m2_row + columns[None, :] * m2_column
        old_m2 = tl.where(before > 0, tl.load(m2, mask=mask, other=0.0), 0.0)
        tl.store(m2, old_m2 + squares.to(kind) + delta * delta * (before * share), mask=mask)
