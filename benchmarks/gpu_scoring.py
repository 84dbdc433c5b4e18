"""Scoring a ViT-L beside a plain pass of the same images and beside hooks that materialise E, on a GPU.

Times are of fewer images than the 1000 of the acceptance, scaled up in proportion: the work after the last
image, which is the same for any number of them, then weighs more than it would.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import bench_scoring
import torch
from gpu_cases import DTYPES, Case
from gpu_clock import summary
from torch import nn

import dwattn
from dwattn.adapters import describe
from dwattn.variance import AttentionVariance
from support.hub_dinov2 import DinoVisionTransformer

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


def measure(sizes: Case, device: str) -> list[dict[str, Any]]:
    """A row with times in ms for 1000 images and, on CUDA, one with peaks of memory in bytes."""
    model = build(sizes, device)
    images = torch.randn(
        sizes["images"], 3, sizes["size"], sizes["size"],
        generator=torch.Generator().manual_seed(0),
    ).to(device, DTYPES[sizes["dtype"]])  # fmt: skip
    calls = ways(model, images, sizes["batch"])
    scale = SCALED_TO / sizes["images"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(sizes["rounds"] + 1):
        for name, call in calls.items():
            elapsed = _timed(call, device)
            if turn:  # the first round warms up
                times[name].append(elapsed * scale)
    rows = [
        {
            "part": "scoring", "case": sizes, "scaled_from_images": sizes["images"],
            "times": {name: summary(values) for name, values in times.items()},
        }
    ]  # fmt: skip
    if device == "cuda":
        rows.append({"part": "memory", "case": sizes, "bytes": _peaks(calls, model, sizes)})
    return rows


def build(sizes: Case, device: str) -> nn.Module:
    """Random weights: time does not depend on them."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=sizes["size"], patch_size=bench_scoring.PATCH, embed_dim=sizes["dim"],
        depth=sizes["depth"], num_heads=sizes["heads"],
    )  # fmt: skip
    return model.eval().to(device, DTYPES[sizes["dtype"]])


def ways(model: nn.Module, images: torch.Tensor, batch: int) -> dict[str, Callable[[], None]]:
    @torch.no_grad()
    def plain() -> None:
        for part in images.split(batch):
            model(part)

    def hooks() -> None:
        installed = bench_scoring.NaiveHooks(model)
        plain()
        installed.remove()

    def score(residual: bool) -> None:
        dwattn.score(
            model, images, len(images), batch_size=batch, residual=residual, progress=False
        )

    return {
        "plain": plain,
        "score, variance alone": lambda: score(False),
        "score, with residual": lambda: score(True),
        "hooks": hooks,
    }


def _timed(call: Callable[[], None], device: str) -> float:
    """Milliseconds on the wall: scoring also works on the CPU between batches."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _peaks(calls: dict[str, Callable[[], None]], model: nn.Module, sizes: Case) -> dict[str, int]:
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
