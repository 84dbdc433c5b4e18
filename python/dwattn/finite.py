"""A cheap test for NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite.

    One pass that writes nothing: a NaN or an infinity makes the sum NaN or infinite. Only if it is,
    the entries are looked at (finite ones may overflow when they are added).
    """
    if not tensor.is_floating_point():
        return True
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if bool(torch.isfinite(tensor.sum(dtype=dtype))):
        return True
    return bool(torch.isfinite(tensor).all())
