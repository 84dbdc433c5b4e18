"""Times of calls on a GPU (or a CPU), and what those times depend on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import torch

import dwattn
from dwattn import library

Calls = Mapping[str, Callable[[], object]]
Times = dict[str, dict[str, float]]

_FEWEST_ROUNDS = 5
#: Cycles that the GPU waits before each call, about a millisecond: meanwhile the CPU queues all of the
#: call's kernels, so that its own speed is not what is measured.
_HEAD_START = 2_000_000
_CLOCKS = (
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,driver_version"
)


class Stopwatch:
    """Milliseconds of calls in turn; on CUDA with events and a flushed L2 cache before each call.

    Args:
        seconds: time for one set of calls; at least a few rounds are made.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.flush = (
            torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
        )

    def measure(self, calls: Calls) -> Times:
        """Median, 20th and 80th percentile of each call; calls that raise are left out and reported."""
        usable = {name: call for name, call in calls.items() if _works(name, call)}
        times: dict[str, list[float]] = {name: [] for name in usable}
        deadline = time.perf_counter() + self.seconds
        while usable and (
            time.perf_counter() < deadline or len(next(iter(times.values()))) < _FEWEST_ROUNDS
        ):
            for name, call in usable.items():
                times[name].append(self._once(call))
        return {name: summary(values) for name, values in times.items()}

    def _once(self, call: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        torch.cuda._sleep(_HEAD_START)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        elapsed: float = before.elapsed_time(after)
        return elapsed


def _works(name: str, call: Callable[[], object]) -> bool:
    """Warms up; a compiler or a backend that fails must not end the benchmark."""
    try:
        for _ in range(3):
            call()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(f"  {name}: {type(error).__name__}: {reason}", flush=True)
        return False
    return True


def summary(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median_ms": statistics.median(values), "p20_ms": fifths[0], "p80_ms": fifths[-1]}


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on, as far as this machine tells."""
    cuda = device == "cuda"
    return {
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "dwattn": dwattn.__version__,
        "build_info": library.native.build_info() if library.native else None,
        "hopper_kernel": os.environ.get("DWATTN_CUDA_HOPPER") == "1",
        "seed": 0,
    }


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU now; None without it."""
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_CLOCKS.split(","), done.stdout.strip().split(", "), strict=False))


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
