"""Launches of the attention statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dwattn.triton_ops.kernels import attention as kernels
from dwattn.triton_ops.launch import (
    cdiv,
    config,
    on_its_device,
    power_of_two,
    precision,
    strides,
    tuned,
)

#: By bytes of an element: products in fp32 without tensor cores hold their operands in registers.
CONFIGS = {
    2: (
        config(4, 2, QUERIES=32, KEYS=32),
        config(4, 2, QUERIES=64, KEYS=32),
        config(4, 2, QUERIES=64, KEYS=64),
        config(8, 2, QUERIES=128, KEYS=64),
    ),
    4: (
        config(8, 2, QUERIES=32, KEYS=32),
        config(8, 2, QUERIES=32, KEYS=64),
    ),
}
_attend = {
    size: tuned(kernels.attend, configs, key=["tokens", "head_dim", "value_dim"])
    for size, configs in CONFIGS.items()
}
_fold_maps = {
    size: tuned(
        kernels.fold_maps,
        configs,
        key=["queries", "keys", "head_dim"],
        restore_value=["mean", "m2"],  # measuring runs the kernel many times
    )
    for size, configs in CONFIGS.items()
}
#: The few columns of the prefix tokens are not worth tuning.
_PREFIX_TILE = {"QUERIES": 32, "KEYS": 16, "num_warps": 4}


@on_its_device
def update(
    q: Tensor,
    k: Tensor,
    mean: Tensor,
    m2: Tensor,
    seen: int,
    v: Tensor | None,
    prefix_mean: Tensor | None,
    num_prefix: int,
    scale: float | None,
) -> Tensor | None:
    """See :func:`dwattn.triton_ops.attention_variance`."""
    logit_scale = (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e)
    lse, out = attend(q, k, v, logit_scale)
    size = q.shape[2] - num_prefix
    everything = (num_prefix, num_prefix, size, size)
    fold(_fold_maps[q.element_size()], {}, q, k, lse, mean, m2, seen, logit_scale, everything)
    if prefix_mean is not None and num_prefix:
        columns = (num_prefix, 0, size, num_prefix)
        fold(
            kernels.fold_maps,
            _PREFIX_TILE,
            q,
            k,
            lse,
            prefix_mean,
            None,
            seen,
            logit_scale,
            columns,
        )
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, logit_scale: float
) -> tuple[Tensor, Tensor | None]:
    """``lse (B, h, N)`` and, with v, the attention output ``(B, h, N, d_v)``.

    The output is laid out as ``(B, N, h, d_v)``: joining the heads afterwards is a view.
    """
    batch, heads, tokens, head_dim = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    value_dim = 0 if v is None else v.shape[3]
    out = None if v is None else v.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)
    _attend[q.element_size()][lambda meta: (batch * heads * cdiv(tokens, meta["QUERIES"]),)](
        q, k, v, lse, out, logit_scale, heads, tokens, head_dim, value_dim,
        *q.stride(), *k.stride(), *strides(v, 4), *strides(out, 4),
        PRECISION=precision(q.dtype),
        CHANNELS=power_of_two(head_dim),
        VALUES=power_of_two(max(1, value_dim)),
    )  # fmt: skip
    return lse, out


def fold(
    kernel: Any,
    tile: dict[str, int],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mean: Tensor,
    m2: Tensor | None,
    seen: int,
    logit_scale: float,
    window: tuple[int, int, int, int],
) -> None:
    """Join the entries ``window = (first query, first key, queries, keys)`` of all maps to a
    state; ``tile`` is empty for a tuned kernel.
    """
    batch, heads, tokens, head_dim = q.shape
    queries, keys = window[2:]

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (heads * cdiv(queries, meta["QUERIES"]) * cdiv(keys, meta["KEYS"]),)

    kernel[grid](
        q, k, lse, mean, m2, seen, logit_scale, batch, heads, tokens, head_dim, *window,
        *q.stride(), *k.stride(), *mean.stride(), *strides(m2, 3),
        PRECISION=precision(q.dtype),
        CHANNELS=power_of_two(head_dim),
        **tile,
    )  # fmt: skip
