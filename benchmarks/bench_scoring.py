"""What scoring costs beside a plain forward pass of the same images, and how much memory it takes.

Four ways take turns on a ViT of DINOv2-S/14's size: the plain pass with SDPA, ``dwattn.score`` with
and without the residual criterion, and the usual hooks, which materialise E of every block and fold
it image by image. Times are medians; the ratios are those of the same turn, so that a busy machine
disturbs both alike. Peak memory is the high-water mark of a fresh process each::

    python benchmarks/bench_scoring.py --size 224 336 --threads 1 --json scoring.json

The statistics alone (queries, keys and values in, attention output and moments out) are timed for
``--tokens``, with one thread and with ``--threads``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rounds import machine
from scoring_operator import measure_operator, sentence

import dwattn
from dwattn.adapters import adapter_for, describe
from dwattn.reference import split_heads
from dwattn.residual import StaticFit
from dwattn.variance import AttentionVariance
from support.hub_dinov2 import DinoVisionTransformer

DIM, DEPTH, HEADS, PATCH = 384, 12, 6, 14


def build(size: int, dim: int = DIM, depth: int = DEPTH, heads: int = HEADS) -> nn.Module:
    """Random weights, large enough for attention to vary between images."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=size, patch_size=PATCH, embed_dim=dim, depth=depth, num_heads=heads
    )
    return model.eval()


class NaiveHooks:
    """Forward hooks that materialise E of a whole batch and update mean and M2 image by image."""

    def __init__(self, model: nn.Module) -> None:
        self.mean: dict[str, Tensor] = {}
        self.m2: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.handles = [
            site.attention.register_forward_hook(self._hook(site.attention_name, site.attention))
            for site in describe(model).blocks
        ]

    def _hook(self, name: str, attention: nn.Module) -> Callable[..., None]:
        adapter = adapter_for(attention)
        assert adapter is not None
        w = adapter.weights(attention)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            q, k = (
                split_heads(nn.functional.linear(args[0], weight, bias), w.num_heads)
                for weight, bias in ((w.wq, w.bq), (w.wk, w.bk))
            )
            for e in torch.softmax(q @ k.transpose(2, 3) * w.scale, dim=-1):
                self._welford(name, e.double())

        return hook

    def _welford(self, name: str, e: Tensor) -> None:
        if name not in self.mean:
            self.mean[name], self.m2[name], self.count[name] = e * 0, e * 0, 0
        self.count[name] += 1
        delta = e - self.mean[name]
        self.mean[name] += delta / self.count[name]
        self.m2[name] += delta * (e - self.mean[name])

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def ways(model: nn.Module, images: Tensor, batch: int) -> dict[str, Callable[[], Any]]:
    """The competitors by name."""

    @torch.no_grad()
    def plain() -> None:
        for part in images.split(batch):
            model(part)

    def naive() -> None:
        hooks = NaiveHooks(model)
        plain()
        hooks.remove()

    def score(residual: bool) -> None:
        dwattn.score(
            model, images, len(images), batch_size=batch, residual=residual, progress=False
        )

    return {
        "plain": plain,
        "score": lambda: score(True),
        "score, no residual": lambda: score(False),
        "naive hooks": naive,
    }


def measure_time(size: int, count: int, batch: int, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds per image, and of the ratio to the plain pass of the same round."""
    model, images = build(size), torch.randn(count, 3, size, size)
    calls = ways(model, images, batch)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3 / count)
    return {
        name: {
            "ms_per_image": statistics.median(values),
            "ratio": statistics.median(v / p for v, p in zip(values, times["plain"], strict=True)),
            "rounds": values,
        }
        for name, values in times.items()
    }


def peak_memory(name: str, size: int, count: int, batch: int) -> int:
    """Bytes by which the high-water mark rises over that of plain passes; call in a fresh process."""
    assert dwattn.score is not None  # imported before the measurement starts
    calls = ways(build(size), torch.randn(count, 3, size, size), batch)
    calls["plain"]()
    before = high_water()
    calls[name]()
    return high_water() - before


def high_water() -> int:
    """Peak resident memory of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory is measured on Linux only.")


def memory_of(name: str, size: int, count: int, batch: int, threads: int) -> int:
    """:func:`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--size", str(size)]
    command += ["--images", str(count), "--batch", str(batch), "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def state_bytes(size: int) -> int:
    """Bytes of the statistics of all layers: maps and Gram matrices."""
    tokens = (size // PATCH) ** 2 + 1
    return DEPTH * (AttentionVariance.nbytes(HEADS, tokens, 1) + StaticFit.nbytes(DIM, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="*", default=[224, 336], help="pixels")
    parser.add_argument("--tokens", type=int, nargs="*", default=[257, 577], help="N")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_memory(options.peak_of, options.size[0], options.images, options.batch))
        return
    results: dict[str, Any] = {
        "machine": machine(),
        "images": options.images,
        "batch": options.batch,
        "threads": options.threads,
        "sizes": {},
        "operator": [],
    }
    for tokens in options.tokens:
        for threads in sorted({1, options.threads}):
            alone = measure_operator(tokens, threads, options.rounds)
            print(sentence(alone), flush=True)
            results["operator"].append(alone)
    for size in options.size:
        found = measure_time(size, options.images, options.batch, options.rounds)
        state = state_bytes(size)
        print(f"{size} px, {options.threads} threads, state {state / 2**20:.0f} MiB")
        for name, numbers in found.items():
            line = f"  {name:20s} {numbers['ms_per_image']:8.1f} ms/image {numbers['ratio']:6.2f}x"
            if not options.no_memory:
                extra = memory_of(name, size, options.images, options.batch, options.threads)
                numbers["extra_bytes"] = extra
                line += f"   peak +{extra / 2**20:.0f} MiB"
            print(line, flush=True)
        results["sizes"][str(size)] = {"state_bytes": state, "ways": found}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
