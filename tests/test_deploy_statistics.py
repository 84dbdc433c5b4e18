"""How latencies of the deploy kit are measured in turns, and what is made of them."""

from __future__ import annotations

import re

import pytest

from dwattn import deploy
from dwattn.deploy.protocol import ratios


class Scripted:
    """A runner with known times, which notes when it was called."""

    def __init__(self, name: str, times: list[float], calls: list[str]) -> None:
        self.name, self.times, self.calls = name, iter(times), calls

    def sample(self) -> dict[str, float]:
        self.calls.append(self.name)
        return {"gpu": next(self.times), "host": 1.0}


def test_statistics() -> None:
    timing = deploy.Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.mean_ms, timing.median_ms, timing.min_ms) == (22.0, 3.0, 1.0)
    assert (timing.p20_ms, timing.p80_ms) == pytest.approx((1.8, 23.2))
    with pytest.raises(deploy.DeployError, match="1 iterations"):
        deploy.Timing.of([1.0])


def test_warm_up_is_not_counted() -> None:
    runner = Scripted("a", [100.0] * 3 + [1.0] * 10, [])
    found = deploy.measure({"a": runner}, iterations=10, warmup=3)
    assert found["a"]["gpu"].mean_ms == 1.0
    assert found["a"]["gpu"].iterations == 10


def test_candidates_take_turns_and_all_iterations_count() -> None:
    calls: list[str] = []
    runners = {name: Scripted(name, [float(i) for i in range(200)], calls) for name in "ab"}
    done: list[tuple[int, int]] = []
    found = deploy.measure(
        runners, iterations=12, warmup=1, progress=lambda *step: done.append(step)
    )
    assert [found[name]["gpu"].iterations for name in "ab"] == [12, 12]
    assert done[-1] == (24, 24)
    order = "".join(calls[2:])
    # Five turns of two or three counted calls, behind two that are not.
    assert [len(turn) for turn in re.findall("a+|b+", order)] == [4, 4, 4, 4, 5, 5, 4, 4, 5, 5]
    # The first two of a turn are not counted: after a warm-up of 1 they are calls 1 and 2.
    assert found["a"]["gpu"].min_ms == 3.0


def test_ratios_are_speed_ups() -> None:
    fast, slow = deploy.Timing.of([1.0, 1.0]), deploy.Timing.of([2.0, 4.0])
    assert ratios(fast, slow) == {"mean": 3.0, "median": 3.0}


@pytest.mark.parametrize("given", [{"iterations": 1}, {"warmup": -1}])
def test_protocols_that_mean_nothing_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(deploy.DeployError, match="at least 2 and 0"):
        deploy.measure({"a": Scripted("a", [1.0] * 9, [])}, **given)
