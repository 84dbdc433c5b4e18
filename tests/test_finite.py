"""The cheap test for NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from dwattn.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_huge_values_are_finite_although_their_sum_is_not(dtype: torch.dtype) -> None:
    huge = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(huge)
    assert all_finite(torch.zeros(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        for tensor in (torch.zeros(50, dtype=dtype), huge.clone(), -huge):
            tensor[17] = bad
            assert not all_finite(tensor)
    opposite = torch.zeros(5, dtype=dtype)
    opposite[1], opposite[3] = float("inf"), float("-inf")
    assert not all_finite(opposite)


def test_integers_are_finite() -> None:
    assert all_finite(torch.arange(4))
