"""Times of calls on a GPU (or a CPU), and what those times depend on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, TypeVar

import torch

import dwattn
from dwattn import library

Calls = Mapping[str, Callable[[], object]]
Times = dict[str, dict[str, float]]
T = TypeVar("T")

_FEWEST_ROUNDS = 5
#: Cycles that the GPU waits before each call, about a millisecond: meanwhile the CPU queues all of the
#: call's kernels, so that its own speed is not what is measured.
_HEAD_START = 2_000_000
_CLOCKS = (
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,driver_version"
)


class DeviceLost(Exception):
    """After this call the GPU refuses all work of this process; the text is the reason."""

    def __init__(self, call: str, reason: str) -> None:
        super().__init__(reason)
        self.call = call


class Stopwatch:
    """Milliseconds of calls in turn; on CUDA with events and a flushed L2 cache before each call.

    A call that raises is left out from then on, and :attr:`failures` says why.

    Args:
        seconds: time for one set of calls; at least a few rounds are made.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.failures: dict[str, str] = {}
        #: The call that is running and since when, for :func:`watch_over`.
        self.running: tuple[str, float] | None = None
        self.flush = (
            torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
        )

    def measure(self, calls: Calls) -> Times:
        """Median, 20th and 80th percentile of each call.

        Raises:
            DeviceLost: see there.
        """
        usable = {name: call for name, call in calls.items() if self.attempt(name, _warm(call))}
        times: dict[str, list[float]] = {name: [] for name in usable}
        deadline = time.perf_counter() + self.seconds
        rounds = 0
        while usable and (time.perf_counter() < deadline or rounds < _FEWEST_ROUNDS):
            rounds += 1
            for name, call in list(usable.items()):
                elapsed = self.attempt(name, lambda call=call: self._once(call))
                if elapsed is None:
                    del usable[name], times[name]
                else:
                    times[name].append(elapsed)
        return {name: summary(values) for name, values in times.items()}

    def attempt(self, name: str, call: Callable[[], T]) -> T | None:
        """What the call returns; None where it raises: no kernel and no compiler ends the benchmark.

        Raises:
            DeviceLost: see there.
        """
        self.running = name, time.monotonic()
        try:
            return call()
        except DeviceLost:  # of an attempt inside
            raise
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"  {name}: {self.failures[name]}", flush=True)
        finally:
            self.running = None
        if self.device == "cuda" and not _answers():
            raise DeviceLost(name, self.failures[name])
        return None

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


def _warm(call: Callable[[], object]) -> Callable[[], bool]:
    def thrice() -> bool:
        for _ in range(3):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that a kernel's error is its own
        return True

    return thrice


def _answers() -> bool:
    """Whether the GPU still works for this process: an illegal access is final."""
    try:
        torch.cuda.empty_cache()
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def watch_over(watch: Stopwatch, limit: float, on_stall: Callable[[str], object]) -> None:
    """Calls ``on_stall(name)``, in a thread, once a call of ``watch`` takes longer than ``limit`` seconds."""

    def look() -> None:
        while True:
            time.sleep(min(1.0, limit / 4))
            running = watch.running
            if running is not None and time.monotonic() - running[1] > limit:
                on_stall(running[0])
                return

    threading.Thread(target=look, daemon=True).start()


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


def smi_id() -> str:
    """The current GPU by its name for nvidia-smi, which counts all GPUs and not the visible ones."""
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    return "0" if uuid is None else f"GPU-{uuid}"


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says now of the GPU that is measured; None without it."""
    gpu = f"--id={smi_id()}"
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", gpu]
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
