"""The attention statistics alone, beside hooks that materialise the maps; part of bench_scoring.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rounds import measure
from torch import Tensor

from dwattn import backends, library
from dwattn.variance import AttentionVariance

HEADS, WIDTH, BATCH = 6, 64, 16


def hooks(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """What a hook costs: the layer attends, and E of the batch is formed again and folded in fp64."""
    mean = torch.zeros(HEADS, q.shape[2], q.shape[2], dtype=torch.float64)
    m2 = torch.zeros_like(mean)
    count = 0

    def call() -> None:
        nonlocal count
        F.scaled_dot_product_attention(q, k, v)
        for e in torch.softmax(q @ k.transpose(2, 3) * WIDTH**-0.5, dim=-1):
            count += 1
            entry = e.double()
            delta = entry - mean
            mean.add_(delta / count)
            m2.add_(delta * (entry - mean))

    return call


def with_backend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """Statistics of patch-patch entries and the output, as scoring asks for them."""
    state = AttentionVariance(num_prefix=1)

    def call() -> None:
        with backends.use(name):
            state.attend(q, k, v)

    return call


@torch.no_grad()
def measure_operator(tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds an image, and ratios to the hooks of the same round; attention output included."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    q, k, v = torch.randn(BATCH, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    calls = {
        "hooks": hooks(q, k, v),
        "attention alone": lambda: F.scaled_dot_product_attention(q, k, v),
        "PyTorch tiles": with_backend("torch", q, k, v),
    }
    if library.AVAILABLE:
        calls["compiled"] = with_backend("cpp", q, k, v)
    times = measure(calls, 0, rounds)
    torch.set_num_threads(before)
    return {
        "tokens": tokens,
        "heads": HEADS,
        "width": WIDTH,
        "batch": BATCH,
        "threads": threads,
        "ways": {
            name: {
                "ms_per_image": statistics.median(values) / BATCH,
                "hooks_over_this": statistics.median(
                    h / t for h, t in zip(times["hooks"], values, strict=True)
                ),
                "rounds": [value / BATCH for value in values],
            }
            for name, values in times.items()
        },
    }


def sentence(found: dict[str, Any]) -> str:
    """One result in words."""
    ways = (
        f"{name} {way['ms_per_image']:.2f} ms ({way['hooks_over_this']:.2f}x)"
        for name, way in found["ways"].items()
    )
    return f"N={found['tokens']}, {found['threads']} thread(s), an image: {', '.join(ways)}"
