"""How latencies are measured and summed up, whatever is being measured.

The paper's protocol: one call recorded as a CUDA graph, waiting by spinning, no data transfers,
warm-up, then 100 iterations averaged. Several candidates are measured in turns of a few iterations,
so that a change of clocks falls on all of them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from dwattn.errors import DeployError

ITERATIONS = 100
WARMUP = 20
_TURNS = 5
# At each turn: its weights come back into the caches that another candidate has used.
_REFILL = 2


class Runner(Protocol):
    """Something to measure."""

    def sample(self) -> dict[str, float]:
        """Milliseconds of one call by kind of clock; the first kind is the one that counts."""
        ...


@dataclass(frozen=True)
class Timing:
    """Milliseconds over ``iterations`` calls."""

    mean_ms: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    iterations: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """The statistics of measured times.

        Raises:
            DeployError: fewer than two.
        """
        if len(times) < 2:
            raise DeployError(f"{len(times)} iterations have no statistics; measure at least 2.")
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return cls(
            mean_ms=statistics.fmean(times),
            median_ms=statistics.median(times),
            p20_ms=fifths[0],
            p80_ms=fifths[-1],
            min_ms=min(times),
            iterations=len(times),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure(
    runners: Mapping[str, Runner],
    *,
    iterations: int = ITERATIONS,
    warmup: int = WARMUP,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Timing]]:
    """Time every runner.

    Args:
        iterations: measured calls of each.
        warmup: unmeasured calls of each before.
        progress: called with calls done and calls in all.

    Returns:
        By runner, by kind of clock.

    Raises:
        DeployError: fewer than two iterations, or a negative warm-up.
    """
    if iterations < 2 or warmup < 0:
        raise DeployError(
            f"{iterations} iterations after {warmup} warm-up calls: at least 2 and 0 are needed."
        )
    for runner in runners.values():
        for _ in range(warmup):
            runner.sample()
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    turns = min(_TURNS, iterations) if len(runners) > 1 else 1
    refill = _REFILL if len(runners) > 1 else 0
    done = 0
    for turn in range(turns):
        count = (turn + 1) * iterations // turns - turn * iterations // turns
        for name, runner in runners.items():
            for call in range(refill + count):
                sample = runner.sample()
                if call < refill:
                    continue
                for kind, value in sample.items():
                    times[name].setdefault(kind, []).append(value)
                done += 1
                progress(done, iterations * len(runners))
    return {
        name: {kind: Timing.of(values) for kind, values in kinds.items()}
        for name, kinds in times.items()
    }


def ratios(timing: Timing, baseline: Timing) -> dict[str, float]:
    """How many times as fast as the baseline, by mean and by median."""
    return {
        "mean": baseline.mean_ms / timing.mean_ms,
        "median": baseline.median_ms / timing.median_ms,
    }
