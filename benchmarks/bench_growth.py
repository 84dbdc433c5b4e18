"""How the time of a layer grows with tokens, batch, width and replaced blocks; and a prediction for an Orin Nano.

    python benchmarks/bench_growth.py --json benchmarks/results/growth.json

Exponents are slopes of log time over log size, fitted by least squares: softmax attention tends to 2 in the number of
tokens, everything that replaces it to 1. Predictions come from a roofline: each kernel takes the larger of its FLOPs
over the arithmetic rate and its bytes over the bandwidth, and a launch. They are no measurements.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rounds
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dwattn
from dwattn.demo._torchvision import make_importable

TOKENS, BATCHES, WIDTHS = (
    (64, 144, 256, 576, 1024, 2304, 4096),
    (1, 2, 4, 8, 16),
    (192, 384, 768, 1536),
)
BLOCKS, DEPTH = (0, 3, 6, 9, 12), 12
VARIANTS = ("mhsa", "dw", "lowrank_dw")


@dataclass(frozen=True)
class Device:
    """What a roofline needs. Rates are of data sheets, and reached in part only."""

    name: str
    bandwidth: float  # bytes/s
    rate: float  # FLOP/s of matrix products in fp16
    launch: float  # seconds a kernel
    efficiency: float  # share of either that real kernels reach


#: Jetson Orin Nano 8 GB: 68 GB/s; 20 dense INT8 TOPS, so 10 TFLOPS in fp16.
ORIN_NANO = Device("Jetson Orin Nano 8 GB, fp16", 68e9, 10e12, 5e-6, 0.6)


@dataclass(frozen=True)
class Kernel:
    """One launch: FLOPs, and bytes read and written."""

    flops: float
    moved: float

    def seconds(self, device: Device) -> float:
        compute, memory = self.flops / device.rate, self.moved / device.bandwidth
        return max(compute, memory) / device.efficiency + device.launch


def product(rows: int, inner: int, columns: int, size: int = 2) -> Kernel:
    """A matrix product in a dtype of ``size`` bytes."""
    return Kernel(
        2.0 * rows * inner * columns, size * (rows * inner + inner * columns + rows * columns)
    )


def kernels(variant: str, tokens: int, dim: int, rank: int) -> list[Kernel]:
    """What a good implementation launches for one layer at batch 1, without prefix tokens."""
    if variant == "mhsa":
        attention = Kernel(
            4.0 * tokens**2 * dim, 2 * 4 * tokens * dim
        )  # fused: the map stays on chip
        return [product(tokens, dim, 3 * dim), attention, product(tokens, dim, dim)]
    if variant == "dw":  # the aggregation rides on the first product
        return [product(tokens, dim, dim), product(tokens, dim, dim)]
    both = 2.0 * tokens * dim * rank * 2
    return [Kernel(both, 2 * (2 * tokens * dim + 2 * rank * dim))]  # one narrow kernel


def predict(variant: str, tokens: int, dim: int, device: Device = ORIN_NANO) -> float:
    """Milliseconds of one layer. A prediction."""
    return 1e3 * sum(kernel.seconds(device) for kernel in kernels(variant, tokens, dim, dim // 4))


def exponent(sizes: Mapping[int, float]) -> float:
    """Slope of log time over log size, by least squares over the larger half of the sizes."""
    points = sorted(sizes.items())[-max(3, len(sizes) // 2 + 1) :]
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def layer(variant: str, dim: int, heads: int, grid: tuple[int, int]) -> nn.Module:
    if variant == "mhsa":
        return dwattn.SelfAttention(dim, heads)
    if variant == "dw":
        return dwattn.FusedDWAttention(dim, heads, grid=grid)
    return dwattn.LowRankDWAttention(dim, heads, rank=dim // 4, grid=grid)


def times(
    along: str, sizes: tuple[int, ...], seconds: float
) -> tuple[list[rounds.Measured], dict[str, dict[int, float]]]:
    """Medians of each variant by size, with the other sizes at n=576, batch 1, D=384."""
    results: list[rounds.Measured] = []
    medians: dict[str, dict[int, float]] = {variant: {} for variant in VARIANTS}
    for size in sizes:
        tokens, batch, dim = (
            size if along == name else default
            for name, default in (("tokens", 576), ("batch", 1), ("width", 384))
        )
        side = math.isqrt(tokens)
        x = torch.randn(batch, tokens, dim)
        calls: dict[str, Callable[[], Tensor]] = {}
        for variant in VARIANTS:
            module = layer(variant, dim, dim // 64, (side, tokens // side)).eval()
            calls[variant] = lambda module=module, x=x: module(x)
        with torch.inference_mode():
            found = rounds.summarise(f"{along}={size}", rounds.measure(calls, seconds, 5), "mhsa")
        results += found
        for row in found:
            medians[row.candidate][size] = row.median_ms
    return results, medians


def whole_models(seconds: float) -> list[rounds.Measured]:
    """A ViT of DINOv2-S's size at 336 px with more and more blocks replaced, in one set of rounds."""
    make_importable()
    import timm

    size = 336
    calls: dict[str, Callable[[], Tensor]] = {}
    x = torch.randn(1, 3, size, size)
    for count in BLOCKS:
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_small_patch14_dinov2", img_size=size, num_classes=0, depth=DEPTH
        ).eval()
        if count:
            dwattn.replace(model, dwattn.Plan.for_layers(model, list(range(count))), progress=False)
        calls[f"{count} of {DEPTH} blocks dw"] = lambda model=model: model(x)
    with torch.inference_mode():
        measured = rounds.measure(calls, seconds, 5)
    return rounds.summarise(f"ViT-S/14 at {size} px", measured, next(iter(calls)))


def predictions() -> list[dict[str, Any]]:
    return [
        {"model": model, "tokens": tokens, "variant": variant, "predicted_ms": predict(variant, tokens, dim)}
        for model, dim in (("ViT-S", 384), ("ViT-B", 768), ("ViT-L", 1024))
        for tokens in (256, 576, 1369)
        for variant in VARIANTS
    ]  # fmt: skip


def show_growth(along: str, medians: dict[str, dict[int, float]]) -> None:
    sizes = list(next(iter(medians.values())))
    table = Table("layer", *map(str, sizes), "exponent", title=f"median ms by {along}")
    for variant, by_size in medians.items():
        table.add_row(variant, *(f"{t:.3f}" for t in by_size.values()), f"{exponent(by_size):.2f}")
    Console().print(table)


def show_predictions(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "model", "tokens", *VARIANTS, title=f"Predicted, not measured: {ORIN_NANO.name}, ms a layer"
    )
    for index in range(0, len(rows), len(VARIANTS)):
        group = rows[index : index + len(VARIANTS)]
        numbers = (f"{row['predicted_ms']:.3f}" for row in group)
        table.add_row(group[0]["model"], str(group[0]["tokens"]), *numbers)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="per size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-models", action="store_true", help="leave whole models out")
    parser.add_argument("--json", type=Path, help="write JSON, and CSV beside it")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results: list[rounds.Measured] = []
    exponents: dict[str, dict[str, float]] = {}
    for along, sizes in (("tokens", TOKENS), ("batch", BATCHES), ("width", WIDTHS)):
        found, medians = times(along, sizes, options.seconds)
        results += found
        exponents[along] = {variant: exponent(by_size) for variant, by_size in medians.items()}
        show_growth(along, medians)
    if not options.no_models:
        found = whole_models(8 * options.seconds)
        results += found
        for row in found:
            print(f"{row.candidate:24}{row.median_ms:10.1f} ms  {row.over_floor:.3f}")
    predicted = predictions()
    show_predictions(predicted)
    if options.json:
        rounds.write(
            options.json, "growth", results,
            exponents=exponents, predictions={"device": asdict(ORIN_NANO), "rows": predicted},
        )  # fmt: skip


if __name__ == "__main__":
    main()
