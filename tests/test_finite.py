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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_views_of_one_tensor_are_read_together(bad: float) -> None:
    qkv = torch.randn(2, 5, 3, 4, 8)
    for damaged in range(3):
        qkv_damaged = qkv.clone()
        qkv_damaged[1, 2, damaged, 3, 7] = bad
        q, k, v = qkv_damaged.permute(2, 0, 3, 1, 4)
        assert all_finite(q, k) == (damaged == 2)  # what lies between them does not matter
        assert all_finite(k, v) == (damaged == 0)
        assert not all_finite(q, k, v)
    assert all_finite(qkv[:, :0], qkv)
    assert not all_finite(torch.full((3,), bad), torch.zeros(3))
    assert not all_finite(torch.zeros(3), torch.full((3,), bad))


def test_memory_between_far_views_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    total = torch.Tensor.sum
    monkeypatch.setattr(
        torch.Tensor, "sum", lambda t, **options: read.append(t.numel()) or total(t, **options)
    )
    memory = torch.zeros(1000)
    assert all_finite(memory[:10], memory[-10:])
    assert all_finite(memory[:10], memory[12:20])
    assert read == [10, 10, 20]
