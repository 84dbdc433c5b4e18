"""How many cases the fuzz tests draw, counted; and the strategies that several of them share."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

#: 1 in the default suite, which draws the same cases every time; ``make fuzz`` draws new ones.
FACTOR = int(os.environ.get("DWATTN_FUZZ", "1"))
#: Cases that ran, by test; printed at the end of the session.
COUNTS: Counter[str] = Counter()

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["dense", "sliced", "permuted", "expanded", "strided"])
SEEDS = st.integers(0, 2**32 - 1)


def fuzz(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[..., Any]:
    """Run a test on ``examples * FACTOR`` drawn cases and count them."""

    def decorate(test: Callable[..., None]) -> Any:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            COUNTS[test.__name__] += 1
            test(*args, **kwargs)

        drawn = given(**strategies)(counted)
        return settings(
            max_examples=examples * FACTOR,
            derandomize=FACTOR == 1,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )(drawn)

    return decorate


class Draw:
    """Repeatable random tensors in unusual memory layouts.

    What lies between the elements of a tensor is NaN, so that a wrong stride shows.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(
        self,
        *shape: int,
        layout: str = "dense",
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        values = torch.randn(*shape, generator=self.generator) * scale
        return laid_out(values.to(dtype or self.dtype), layout)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` in another memory layout; ``expanded`` repeats its first entry."""
    if layout == "dense":
        return t
    if layout == "permuted":
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return t[:1].expand_as(t)
    step = 2 if layout == "strided" else 1
    margins = [size * (step if d == t.dim() - 1 else 1) + 3 for d, size in enumerate(t.shape)]
    around = t.new_full(margins, float("nan"))
    inside = around[tuple(slice(1, 1 + size) for size in t.shape[:-1])]
    inside = inside[..., 1 : 1 + t.shape[-1] * step : step]
    inside.copy_(t)
    return inside


def assert_within_rounding(result: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Every entry is as close to the exact one as its dtype allows.

    Args:
        exact: the reference in fp64; ``magnitude``: the same with all operands made positive, which
            bounds every intermediate result.
        terms: longest sum that is accumulated, in fp32 or better.
    """
    assert result.shape == exact.shape
    epsilon = torch.finfo(result.dtype).eps
    accumulation = torch.finfo(
        torch.float64 if result.dtype == torch.float64 else torch.float32
    ).eps
    # Plain PyTorch rounds after each of its steps, of which there are fewer than eight.
    relative = 8 * epsilon + (terms + 8) * accumulation
    allowed = relative * magnitude + 8 * torch.finfo(result.dtype).tiny
    excess = ((result.double() - exact).abs() - allowed).amax() if exact.numel() else 0
    assert excess <= 0, f"beyond the allowed rounding by {float(excess):.3g}"
