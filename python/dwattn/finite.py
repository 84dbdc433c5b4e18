"""A cheap test for NaN and infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Where tensors lie between others, one pass over all is faster than a pass over each, up to this
#: ratio: two of the three thirds of a QKV projection.
_SPREAD = 1.5


def all_finite(*tensors: Tensor) -> bool:
    """Whether every entry of all tensors is finite.

    One pass that writes nothing: a NaN or an infinity makes the sum NaN or infinite. Only if it is,
    the entries are looked at (finite ones may overflow when they are added). Views of one tensor,
    as queries and keys often are, are read together, in the order of the memory.
    """
    span = _span(tensors)
    if span is not None and _finite(span):
        return True
    return all(_finite(tensor) for tensor in tensors)


def _span(tensors: Sequence[Tensor]) -> Tensor | None:
    """The memory from the first to the last entry of several views of a tensor, if it holds little
    else."""
    first = tensors[0]
    if len(tensors) == 1 or any(
        type(t) is not Tensor or t.dtype != first.dtype or t.numel() == 0 for t in tensors
    ):
        return None
    if len({t.untyped_storage().data_ptr() for t in tensors}) > 1:
        return None
    start = min(t.storage_offset() for t in tensors)
    stop = 1 + max(
        t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        for t in tensors
    )
    if stop - start > _SPREAD * sum(t.numel() for t in tensors):
        return None
    return first.as_strided((stop - start,), (1,), start)


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if bool(torch.isfinite(tensor.sum(dtype=dtype))):
        return True
    return bool(torch.isfinite(tensor).all())
