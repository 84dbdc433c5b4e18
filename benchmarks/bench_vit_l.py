"""A whole ViT-L/14 at 336 px, batch 1: how much of the possible gain the replaced layers reach on the CPU.

    python benchmarks/bench_vit_l.py --json benchmarks/results/vit-l.json      # under ten minutes on two cores

12 and 18 of 24 attention layers are replaced. What a layer can save is bounded by itself: ``dw`` by the model in which
it is its two matrix products and nothing else, every layer by the model without those attention layers. The share of
the possible gain is the time saved over the time that the bound saves, in the same round: the time of the attention
layers of the model as it runs, because the noise of the rest of the model, which is the same in all of them, is larger
than what is to be told apart. Whole models are timed beside it. Weights are random (they do not change the time), each
block has its own, and prefix rows are exact except where a row says static.

A CPU without bf16 units emulates the bf16 products of all the other layers, several times slower than fp32: bf16 then
gets most of the time for few rounds, and runs on one thread only (``--all`` adds two).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rounds
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dwattn import FusedDWAttention, LowRankDWAttention, _native
from dwattn.demo._torchvision import make_importable
from dwattn.demo.timing import RemovedAttention

MODEL, PIXELS, GRID, DIM, HEADS = "vit_large_patch14_dinov2", 336, (24, 24), 1024, 16
BLOCKS = (12, 18)
#: dtype, threads, share of the time
NATIVE = (
    (torch.float32, 1, 0.45),
    (torch.float32, 2, 0.3),
    (torch.bfloat16, 1, 0.15),
    (torch.bfloat16, 2, 0.1),
)
EMULATED = ((torch.float32, 1, 0.3), (torch.float32, 2, 0.2), (torch.bfloat16, 1, 0.5))
EMULATED_ON_TWO = (torch.bfloat16, 2, 0.4)
#: What bounds a candidate besides the removal of the layers.
BOUNDS = {"dw": "two products"}


class TwoProducts(nn.Module):
    """The floor of ``dw``: value and output projection of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return F.linear(
            F.linear(x, self.value.weight, self.value.bias), self.proj.weight, self.proj.bias
        )


class Called(nn.Module):
    """A replacement behind the call that timm's blocks make."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **_: object) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Clocked(nn.Module):
    """A layer, and how long its last call took."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.ms = layer, 0.0

    def forward(self, x: Tensor, **options: object) -> Tensor:
        begin = time.perf_counter()
        out: Tensor = self.layer(x, **options)
        self.ms = (time.perf_counter() - begin) * 1e3
        return out


@dataclass
class Times:
    """In ms, one of each round: the whole model, and each of its attention layers."""

    whole: list[float] = field(default_factory=list)
    layers: list[list[float]] = field(default_factory=list)

    def of_layers(self, count: int) -> list[float]:
        """The first ``count`` layers together."""
        return [sum(ms[:count]) for ms in self.layers]


def replacements() -> dict[str, Callable[[], nn.Module]]:
    """How a layer is replaced, by the candidate's name."""

    def lowrank(rank: int, prefix: str) -> Callable[[], nn.Module]:
        common = {"grid": GRID, "num_prefix": 1, "prefix": prefix}
        return lambda: Called(LowRankDWAttention(DIM, HEADS, rank=rank, **common))

    return {
        "two products": TwoProducts,
        "dw": lambda: Called(FusedDWAttention(DIM, HEADS, grid=GRID, num_prefix=1)),
        "lowrank_dw r=256": lowrank(256, "exact"),
        "lowrank_dw r=64": lowrank(64, "exact"),
        "lowrank_dw r=64 static": lowrank(64, "static"),
        "removed": lambda: RemovedAttention(False),
    }


def candidates(dtype: torch.dtype) -> dict[str, Callable[[], list[float]]]:
    """The model with no and with many layers replaced; one model, whose layers change places.

    A call returns the ms of each attention layer.
    """
    make_importable()  # before timm, which imports torchvision
    import timm

    model = timm.create_model(MODEL, pretrained=False, img_size=PIXELS, num_classes=0)
    model = model.eval().to(dtype)
    blocks = model.blocks
    originals = [Clocked(block.attn) for block in blocks]
    images = torch.rand(1, 3, PIXELS, PIXELS).to(dtype)

    def call(layers: list[Clocked]) -> Callable[[], list[float]]:
        def run() -> list[float]:
            for index, block in enumerate(blocks):
                block.attn = layers[index] if index < len(layers) else originals[index]
            model(images)
            return [block.attn.ms for block in blocks]

        return run

    calls = {"original": call([])}
    for name, build in replacements().items():
        layers = [Clocked(build()).eval().to(dtype) for _ in range(max(BLOCKS))]
        for count in BLOCKS:
            calls[f"{count} {name}"] = call(layers[:count])
    return calls


def measure(
    calls: dict[str, Callable[[], list[float]]], seconds: float, rest: int
) -> dict[str, Times]:
    """Interleaved rounds, as many as fit, at least two.

    Args:
        rest: rounds that the first one, which warms up, must leave time for; else it counts itself.
    """
    start, times = time.perf_counter(), {name: Times() for name in calls}
    names = list(calls)
    while True:
        began = time.perf_counter()
        for name in names:
            begin = time.perf_counter()
            times[name].layers.append(calls[name]())
            times[name].whole.append((time.perf_counter() - begin) * 1e3)
        now = time.perf_counter()
        if len(times["original"].whole) >= 2 and now - start + (now - began) > seconds:
            break
        names.append(names.pop(0))
    if len(times["original"].whole) > rest:
        times = {name: Times(t.whole[1:], t.layers[1:]) for name, t in times.items()}
    return times


def share(times: dict[str, Times], count: int, name: str, bound: str) -> float:
    """Median over the rounds of the time that ``name`` saves in ``count`` layers over what ``bound`` saves."""
    columns = (times[key].of_layers(count) for key in ("original", name, bound))
    rows = zip(*columns, strict=True)
    return statistics.median((original - t) / (original - least) for original, t, least in rows)


def show(case: str, times: dict[str, Times]) -> list[dict[str, object]]:
    """Print a setting; the shares for the result file."""
    columns = ("model", "median ms", "saved", "its layers, ms", "of its products", "of removal")
    table = Table(*columns, title=case)
    whole = statistics.median(times["original"].whole)
    shares: list[dict[str, object]] = []
    for name, found in times.items():
        median = statistics.median(found.whole)
        number, _, kind = name.partition(" ")
        cells = ["", "", ""]
        if kind in replacements():
            count = int(number)
            layers = statistics.median(found.of_layers(count))
            cells[0] = f"{layers:.1f}"
            if kind not in ("removed", "two products"):
                bounds = (BOUNDS.get(kind), "removed")
                kept = [share(times, count, name, f"{count} {b}") if b else None for b in bounds]
                shares.append(
                    {
                        "case": case, "candidate": name, "of_products": kept[0], "of_removal": kept[1],
                        "layers_ms": layers, "whole_ms": median, "original_ms": whole,
                    }
                )  # fmt: skip
                cells[1:] = ["" if value is None else f"{value:.1%}" for value in kept]
        table.add_row(name, f"{median:.1f}", f"{1 - median / whole:.1%}", *cells)
    Console().print(table)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="of measuring (default 8)")
    parser.add_argument("--all", action="store_true", help="emulated bf16 on two threads too")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="only this one")
    parser.add_argument("--json", type=Path, help="write the results here and as CSV beside it")
    options = parser.parse_args()
    features = _native.cpu_info()["features"]
    native = any(features[name] for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    settings = NATIVE if native else (*EMULATED, *([EMULATED_ON_TWO] if options.all else []))
    if options.dtype is not None:
        only = torch.float32 if options.dtype == "fp32" else torch.bfloat16
        settings = tuple(setting for setting in settings if setting[0] == only)
    total = sum(part for _, _, part in settings)
    results: list[rounds.Measured] = []
    shares: list[dict[str, object]] = []
    calls: dict[str, Callable[[], list[float]]] = {}
    made: torch.dtype | None = None
    torch.manual_seed(0)
    with torch.inference_mode():
        for dtype, threads, part in settings:
            if made is not dtype:
                calls.clear()  # two models need not exist at a time
                calls, made = candidates(dtype), dtype
            torch.set_num_threads(threads)
            name = "fp32" if dtype == torch.float32 else "bf16"
            case = f"{MODEL} {PIXELS} px {name} batch=1 threads={threads}"
            times = measure(calls, options.minutes * 60 * part / total, rest=2)
            results += rounds.summarise(case, {name: found.whole for name, found in times.items()})
            shares += show(f"{case}, {len(times['original'].whole)} rounds", times)
    if options.json:
        emulated = (
            "Few rounds in bf16: a CPU without bf16 units emulates the products of all layers."
        )
        rounds.write(options.json, "vit-l", results, shares=shares, note="" if native else emulated)


if __name__ == "__main__":
    main()
