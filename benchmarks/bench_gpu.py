"""The operators on a GPU: every backend, the fastest plain PyTorch forms, and the cost floors beside them.

For each size: value projection and aggregation (floor: the projection alone), the whole layer at full
and at narrow width (floors: its two products; reading the tokens once and writing them once at the
measured copy bandwidth), and attention with the best SDPA backend. Medians of CUDA-event times with a
cold L2 cache; backends that cannot run are listed first, with the reason. Losses are printed too::

    python benchmarks/bench_gpu.py --json benchmarks/results/gpu.json
    python benchmarks/bench_gpu.py --device cpu --quick     # that everything runs, not how fast
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dwattn
from dwattn import backends, functional
from dwattn.geometry import Geometry
from dwattn.reference import merge_heads, split_heads

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: grid side, D, heads
SIZES = {"ViT-S/224": (16, 384, 6), "ViT-L/336": (24, 1024, 16), "ViT-L/518": (37, 1024, 16)}
RANKS = (64, 128, 256)
BACKENDS = ("cuda", "triton", "torch")
Calls = dict[str, Callable[[], Tensor]]


class Stopwatch:
    """Milliseconds of calls in turn; on CUDA with events and a flushed L2 cache before each call."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.flush = (
            torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
        )

    def measure(self, calls: Calls) -> dict[str, dict[str, float]]:
        """Median, 20th and 80th percentile of each call; calls that raise are left out and reported."""
        usable = {name: call for name, call in calls.items() if _warm(name, call)}
        times: dict[str, list[float]] = {name: [] for name in usable}
        deadline = time.perf_counter() + self.seconds
        while usable and (time.perf_counter() < deadline or len(next(iter(times.values()))) < 5):
            for name, call in usable.items():
                times[name].append(self._once(call))
        return {name: _summary(values) for name, values in times.items()}

    def _once(self, call: Callable[[], Tensor]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)


def _warm(name: str, call: Callable[[], Tensor]) -> bool:
    """Whether the call works; a compiler that fails must not end the benchmark."""
    try:
        for _ in range(3):
            call()
    except Exception as error:
        print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def _summary(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median_ms": statistics.median(values), "p20_ms": fifths[0], "p80_ms": fifths[-1]}


def _draw(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(dtype)

    return draw


def layer_calls(x: Tensor, side: int, width: int) -> Calls:
    """One layer of inner width ``width`` on every backend, its two products, and compiled PyTorch."""
    draw, dim = _draw(x.device.type, x.dtype), x.shape[2]
    wv, wo = draw(width, dim, scale=dim**-0.5), draw(dim, width, scale=width**-0.5)
    bv, bo, mu, beta = draw(width), draw(dim), draw(width).float(), draw(width).float()
    kernel = draw(width, 3, 3, scale=0.1).float()
    geometry = Geometry(side, side, 0)

    def layer(backend: str) -> Tensor:
        return functional.dw_layer(
            x, wv, bv, kernel, wo, bo, geometry, None, mu, beta, backend=backend
        )

    def values(backend: str) -> Tensor:
        return functional.dw_attention(x, wv, bv, kernel, geometry, None, mu, beta, backend=backend)

    compiled_layer, compiled_values = torch.compile(layer), torch.compile(values)
    calls: Calls = {
        "two products": lambda: F.linear(F.linear(x, wv, bv), wo, bo),
        "value product": lambda: F.linear(x, wv, bv),
        "layer compiled torch": lambda: compiled_layer("torch"),
        "values compiled torch": lambda: compiled_values("torch"),
    }
    verdicts = backends.explain("dw_layer", device=x.device.type, dtype=x.dtype)
    for name in (v.backend for v in verdicts if v and v.backend in BACKENDS):
        calls[f"layer {name}"] = lambda name=name: layer(name)
        calls[f"values {name}"] = lambda name=name: values(name)
    return calls


def attention_call(x: Tensor, heads: int) -> Callable[[], Tensor]:
    """Softmax attention with its projections; SDPA picks its fastest backend."""
    draw, dim = _draw(x.device.type, x.dtype), x.shape[2]
    wqkv, wo = draw(3 * dim, dim, scale=dim**-0.5), draw(dim, dim, scale=dim**-0.5)

    def attention() -> Tensor:
        q, k, v = (split_heads(part, heads) for part in F.linear(x, wqkv).chunk(3, dim=-1))
        return F.linear(merge_heads(F.scaled_dot_product_attention(q, k, v)), wo)

    return attention


def measure_case(
    watch: Stopwatch, size: str, batch: int, dtype: str, device: str
) -> list[dict[str, Any]]:
    """All widths of one size, batch and dtype."""
    side, dim, heads = SIZES[size]
    x = _draw(device, DTYPES[dtype])(batch, side * side, dim)
    out = torch.empty_like(x)
    rows = []
    for width in (dim, *RANKS):
        calls = {
            "attention": attention_call(x, heads),
            "copy": lambda: out.copy_(x),
            **layer_calls(x, side, width),
        }
        with torch.inference_mode():
            times = watch.measure(calls)
        torch._dynamo.reset()
        rows.append({
            "size": size, "batch": batch, "dtype": dtype, "width": width, "times": times,
        })  # fmt: skip
    return rows


def report(rows: list[dict[str, Any]]) -> Table:
    """Ratios: values to their product, layers to their two products, to attention, and to a copy."""
    table = Table(title="Medians; below 1 is faster than what it is compared with")
    for name in ("case", "backend", "values / product", "layer / products", "attention / layer",
                 "copy / layer"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("case", "backend") else "right")
    for row in rows:
        times = {name: entry["median_ms"] for name, entry in row["times"].items()}
        case = f"{row['size']} b{row['batch']} {row['dtype']} r{row['width']}"
        for backend in ("cuda", "triton", "torch", "compiled torch"):
            layer, values = times.get(f"layer {backend}"), times.get(f"values {backend}")
            if layer is None or values is None:
                continue
            table.add_row(
                case, backend, f"{values / times['value product']:.2f}",
                f"{layer / times['two products']:.2f}", f"{times['attention'] / layer:.2f}",
                f"{times['copy'] / layer:.2f}",
            )  # fmt: skip
    return table


def environment(device: str) -> dict[str, Any]:
    cuda = device == "cuda"
    return {
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "dwattn": dwattn.__version__,
        "seed": 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp16"])
    parser.add_argument("--seconds", type=float, default=0.6, help="per case")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch, options.dtype = ["ViT-S/224"], [1], ["fp32"]
    for verdict in backends.explain("dw_layer", device=options.device, dtype=torch.float16):
        print(f"{verdict.backend}: {' '.join(verdict.reasons) or 'runs'}")
    watch = Stopwatch(options.device, options.seconds)
    rows: list[dict[str, Any]] = []
    for size in options.size:
        for batch in options.batch:
            for dtype in options.dtype:
                print(f"{size}, batch {batch}, {dtype}", flush=True)
                rows += measure_case(watch, size, batch, dtype, options.device)
    Console(width=120).print(report(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": environment(options.device), "cases": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
