"""Latency of several models on one machine, measured so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TurnTiming:
    """Milliseconds of one call: median and the 20th and 80th percentile of ``rounds`` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 40,
    warmup: int = 3,
    budget_s: float = 60.0,
) -> dict[str, TurnTiming]:
    """Time the calls in turn, round by round, so that a busy moment of the machine falls on all of
    them alike.

    Args:
        calls: by name.
        rounds: wanted calls of each; fewer if ``budget_s`` seconds are over, but at least 5.
        warmup: untimed calls of each.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    deadline = time.perf_counter() + budget_s
    for index in range(rounds):
        if index >= 5 and time.perf_counter() > deadline:
            break
        # Rotating the order keeps one call's cache footprint from always being the same neighbour's
        # burden.
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> TurnTiming:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return TurnTiming(statistics.median(values), fifths[0], fifths[-1], len(values))


class RemovedAttention(nn.Module):
    """In place of an attention layer: no work at all. What remains is the ceiling of any
    replacement.

    ``dwattn.replace`` never produces it; the outputs are meaningless and only the time counts.
    """

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        nothing = tokens.new_zeros(()).expand(tokens.shape)
        return (nothing, None) if self.returns_tuple else nothing


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with ``count`` intra-op threads, then restore the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
