"""The compiled whole layer (values, aggregation, output projection) on the CPU, at full and narrow width.

Its floor is the time of its two products alone; beside it plain PyTorch (channels-last convolution)
and the same under ``torch.compile``. Every round runs each candidate once; ratios are medians over
rounds. One thread at batch 1, two threads at batch 8::

    python benchmarks/bench_cpu_layer.py --json benchmarks/results/cpu-layer.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_cpu_dw import DTYPES
from rounds import machine, measure, ratio
from torch import Tensor

from dwattn import functional, library
from dwattn.geometry import Geometry

#: grid side, D
SIZES = {"n=256,D=384": (16, 384), "n=576,D=1024": (24, 1024), "n=1369,D=1024": (37, 1024)}
RANKS = (64, 128, 256)


def candidates(
    side: int, dim: int, width: int, batch: int, dtype: torch.dtype, *, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Calls by name; all but ``products`` compute the layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x, geometry = draw(batch, side * side, dim), Geometry(side, side, 0)
    wv, wo = draw(width, dim, scale=dim**-0.5), draw(dim, width, scale=width**-0.5)
    bv, bo, kernel = draw(width), draw(dim), draw(width, 3, 3, scale=0.1)
    mu, beta = draw(width), draw(width)

    def layer(backend: str) -> Tensor:
        return functional.dw_layer(
            x, wv, bv, kernel, wo, bo, geometry, None, mu, beta, backend=backend
        )

    calls: dict[str, Callable[[], Tensor]] = {
        "products": lambda: F.linear(F.linear(x, wv, bv), wo, bo),
        "cpp": lambda: layer("cpp"),
        "torch": lambda: layer("torch"),
    }
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(layer)
        calls["compiled"] = lambda: fast("torch")
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=1.5, help="per case")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    options = parser.parse_args()
    if not library.AVAILABLE:
        raise SystemExit(library.load_error())
    results: list[dict[str, Any]] = []
    print(f"{'':46}products ms  cpp/products  torch/products  compiled/products")
    for threads, batch in ((1, 1), (2, 8)):
        torch.set_num_threads(threads)
        for size in options.size:
            for dtype in options.dtype:
                side, dim = SIZES[size]
                for width in (dim, *RANKS):
                    calls = candidates(
                        side, dim, width, batch, DTYPES[dtype], compiled=not options.no_compile
                    )
                    with torch.inference_mode():
                        times = measure(calls, options.seconds)
                    ratios = {name: ratio(times, name, "products") for name in calls}
                    median = sorted(times["products"])[len(times["products"]) // 2]
                    case = f"{size} r={width} {dtype} batch={batch} threads={threads}"
                    results.append({
                        "case": case, "products_ms": median, "rounds": len(times["products"]),
                        "over_products": ratios,
                    })  # fmt: skip
                    shown = "".join(
                        f"{ratios.get(name, float('nan')):15.3f}"
                        for name in calls
                        if name != "products"
                    )
                    print(f"{case:46}{median:11.3f}{shown}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine(), "results": results}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
