"""Attention statistics in Triton against whole maps in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import reference, triton_ops
from support.operators import assert_as_exact, error
from support.triton_cases import (
    DEVICE,
    DTYPES,
    draw_heads,
    runs_kernels,
    share,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = (torch.float32, torch.float64)


def exact_maps(q: Tensor, k: Tensor) -> Tensor:
    return reference.attention_map(q.double(), k.double())


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "tokens", "width", "num_prefix"),
    [(1, 1, 8, 0), (2, 37, 20, 1), (2, 70, 64, 5), (1, 16, 33, 0)],
)
def test_attention_statistics_over_two_batches(
    dtype: torch.dtype, heads: int, tokens: int, width: int, num_prefix: int
) -> None:
    for state in share(STATES, dtype == torch.float16, len(STATES)):
        check_statistics(dtype, state, heads, tokens, width, num_prefix)


def check_statistics(
    dtype: torch.dtype, state: torch.dtype, heads: int, tokens: int, width: int, num_prefix: int
) -> None:
    q, k, v = draw_heads(dtype, 5, heads, tokens, width)
    size = tokens - num_prefix
    # Garbage, because nothing was seen yet; views, because a state may be one.
    mean, m2 = torch.full((2, heads, size, size), float("nan"), dtype=state, device=DEVICE)
    prefix = torch.full((heads, size, num_prefix), float("nan"), dtype=state, device=DEVICE)
    outputs = [
        triton_ops.attention_variance(
            q[images], k[images], mean, m2, images.start, v=v[images],
            prefix_mean=prefix, num_prefix=num_prefix,
        )
        for images in (slice(0, 3), slice(3, 5))
    ]  # fmt: skip
    exact = exact_maps(q, k)
    patches = exact[:, :, num_prefix:, num_prefix:]
    assert error(mean, patches.mean(0)) < 2e-6
    if tokens > 1:
        deviations = patches - patches.mean(0)
        assert error(m2, deviations.square().sum(0)) < 1e-5
    else:
        assert m2.abs().max() < 1e-12
    if num_prefix:
        assert error(prefix, exact[:, :, num_prefix:, :num_prefix].mean(0)) < 2e-6
    assert all(o.transpose(1, 2).is_contiguous() for o in outputs)
    output = torch.cat(outputs)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert_as_exact(output, plain, exact @ v.double())


@runs_kernels
def test_statistics_of_one_image_at_a_time_and_of_a_batch_agree() -> None:
    q, k, _ = draw_heads(torch.float32, 7, 2, 24, 16)
    states = torch.zeros(2, 2, 2, 24, 24, dtype=torch.float64, device=DEVICE)
    triton_ops.attention_variance(q, k, *states[0], 0, scale=0.5)
    for image in range(7):
        one = slice(image, image + 1)
        assert triton_ops.attention_variance(q[one], k[one], *states[1], image, scale=0.5) is None
    assert error(states[1, 0], states[0, 0]) < 1e-6
    assert error(states[1, 1], states[0, 1]) < 1e-5
    maps = reference.attention_map(q.double(), k.double(), 0.5)
    assert error(states[0, 1], maps.var(0, correction=0) * 7) < 1e-5


@runs_kernels
def test_the_variance_of_nearly_constant_maps_is_not_lost() -> None:
    """A deviation of 1e-4 beside a mean of 1/24: sums of squares in fp32 would not see it."""
    q, k, _ = draw_heads(torch.float32, 1, 1, 24, 16)
    noise = torch.randn(6, 1, 24, 16).to(DEVICE) * 1e-4
    q, k = q + noise, k.expand(6, -1, -1, -1)
    mean, m2 = torch.zeros(2, 1, 24, 24, device=DEVICE)
    triton_ops.attention_variance(q, k, mean, m2, 0)
    exact = exact_maps(q, k).var(0, correction=0) * 6
    assert error(m2, exact) < 0.02
    maps = exact_maps(q, k).float()
    naive = maps.square().sum(0) - maps.sum(0).square() / 6
    assert error(naive, exact) > 0.02
