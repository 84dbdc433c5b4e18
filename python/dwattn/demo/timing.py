"""Latency of several models on one machine, and what a model without attention would take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.latency import times_in_turns


@dataclass(frozen=True)
class CallTime:
    """Milliseconds of one call: median and the 20th and 80th percentile of ``rounds`` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 40, budget_s: float = 60.0
) -> dict[str, CallTime]:
    """Summaries of :func:`dwattn.latency.times_in_turns` on the CPU, by name."""
    times = times_in_turns(calls, rounds, torch.device("cpu"), budget_s=budget_s)
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> CallTime:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return CallTime(statistics.median(values), fifths[0], fifths[-1], len(values))


class RemovedAttention(nn.Module):
    """Takes the place of an attention layer and does nothing: the time of the rest bounds what any replacement can reach.

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
