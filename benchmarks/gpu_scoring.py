"""Scoring a ViT-L beside a plain pass of the same images and beside hooks that materialise E, on a GPU.

Times are of fewer images than the 1000 of the acceptance, scaled up in proportion: the work after the last
image, which is the same for any number of them, then weighs more than it would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from typing import Any

import bench_scoring
import torch
from gpu_cases import DTYPES, Case, runnable
from gpu_clock import Stopwatch, Times, summary
from gpu_targets import FASTEST_SCORING, SCORING_WAYS
from torch import Tensor, nn

from dwattn import backends
from dwattn.adapters import describe
from dwattn.variance import AttentionVariance

SCALED_TO = 1000
_EXTRA_BYTES = 256 << 20
#: A ViT-L/14 at 336 pixels.
FULL: Case = {
    "size": 336, "tokens": 576, "dim": 1024, "depth": 24, "heads": 16, "dtype": "bf16", "batch": 32,
    "images": 128, "rounds": 3,
}  # fmt: skip
QUICK: Case = {
    "size": 56, "tokens": 16, "dim": 32, "depth": 2, "heads": 2, "dtype": "fp32", "batch": 4,
    "images": 8, "rounds": 2,
}  # fmt: skip


PEAKS = "peaks of memory"
#: Scoring by statistics that are chosen by name, beside those that come first by the rules.
COMPILED = tuple(f"score on {backend}, no residual" for backend in ("cuda", "triton"))


def measure(sizes: Case, watch: Stopwatch, without: Container[str] = ()) -> list[dict[str, Any]]:
    """A row with times in ms for 1000 images and, on CUDA, one with peaks of memory in bytes.

    Args:
        without: names of ways that are not tried.

    Raises:
        DeviceLost: see there.
    """
    device, dtype = watch.device, DTYPES[sizes["dtype"]]
    model = bench_scoring.build(*(sizes[name] for name in ("size", "dim", "depth", "heads")))
    model.to(device, dtype)
    images = torch.randn(
        sizes["images"], 3, sizes["size"], sizes["size"],
        generator=torch.Generator().manual_seed(0),
    ).to(device, dtype)  # fmt: skip
    calls = {
        name: call
        for name, call in ways(model, images, sizes["batch"]).items()
        if name not in without
    }
    scale = SCALED_TO / sizes["images"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(sizes["rounds"] + 1):
        for name, call in list(calls.items()):
            elapsed = watch.attempt(name, lambda call=call: _timed(call, device))
            if elapsed is None:
                del calls[name], times[name]
            elif turn:  # the first round warms up
                times[name].append(elapsed * scale)
    summaries = {name: summary(values) for name, values in times.items()}
    rows: list[dict[str, Any]] = [
        {
            "part": "scoring", "case": sizes, "scaled_from_images": sizes["images"],
            "times": summaries, "failures": watch.failures,
        }
    ]  # fmt: skip
    if device == "cuda" and "plain" in calls and PEAKS not in without:
        peaks = watch.attempt(PEAKS, lambda: _peaks(calls, model, sizes))
        rows += (
            [{"part": "memory", "case": sizes, "bytes": with_fastest(peaks, summaries)}]
            if peaks
            else []
        )
    return rows


def with_fastest(peaks: dict[str, int], times: Times) -> dict[str, int]:
    """The peaks, and among them that of the fastest way to score under a name of its own."""
    scored = [name for name in SCORING_WAYS if name in times and name in peaks]
    if not scored:
        return peaks
    fastest = min(scored, key=lambda name: times[name]["median_ms"])
    return {**peaks, FASTEST_SCORING: peaks[fastest]}


def ways(model: nn.Module, images: Tensor, batch: int) -> dict[str, Callable[[], Any]]:
    """Those of :mod:`bench_scoring`, and scoring by every backend with statistics of its own."""

    def scored_by(backend: str) -> Callable[[], None]:
        def call() -> None:
            with backends.use(backend):
                shared["score, no residual"]()

        return call

    shared = bench_scoring.ways(model, images, batch)
    runs = runnable(images.device.type, images.dtype, "attention_variance")
    compiled = {name: name.split()[2].rstrip(",") for name in COMPILED}
    return shared | {
        name: scored_by(backend) for name, backend in compiled.items() if backend in runs
    }


def _timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds on the wall: scoring also works on the CPU between batches."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _peaks(calls: dict[str, Callable[[], Any]], model: nn.Module, sizes: Case) -> dict[str, int]:
    """By how much the peak of allocated memory rises over that of a plain pass, the size of the state, and
    what is allowed."""

    def peak(name: str) -> int:
        torch.cuda.reset_peak_memory_stats()
        calls[name]()
        return torch.cuda.max_memory_allocated()

    plain = peak("plain")
    prefix = describe(model).num_prefix
    state = sizes["depth"] * AttentionVariance.nbytes(
        sizes["heads"], sizes["tokens"] + prefix, prefix
    )
    found = {name: peak(name) - plain for name in calls if name != "plain"}
    return {**found, "state": state, "allowed": state + _EXTRA_BYTES}
