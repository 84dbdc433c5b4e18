"""The compiled whole layer (values, aggregation, output projection) on the CPU, at full and narrow width.

Its floor is the time of its two products alone; beside it plain PyTorch (channels-last convolution),
the same under ``torch.compile``, and the layer exported to ONNX on ONNX Runtime and on OpenVINO
where they are installed (``pip install 'dwattn[bench]'``). Every round runs each candidate once;
ratios are medians over rounds. One thread at batch 1, two threads at batch 8. PyTorch fetches an output of more than
32 MB from the system anew at each call, unless its process happens to have that much free; with small pages this takes
as long as a narrow layer, so they are measured with large ones::

    THP_MEM_ALLOC_ENABLE=1 python benchmarks/bench_cpu_layer.py --json benchmarks/results/cpu-layer.json

Where another candidate is faster, the table and the result file say which, and what it does differently (:data:`WHY`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_cpu_dw import DTYPES
from bench_ops import RUNTIMES
from rounds import machine, measure, ratio
from torch import Tensor

import dwattn
from dwattn import FusedDWAttention, LowRankDWAttention, backends, functional, library
from dwattn.geometry import Geometry

#: grid side, D
SIZES = {"n=256,D=384": (16, 384), "n=576,D=1024": (24, 1024), "n=1369,D=1024": (37, 1024)}
RANKS = (64, 128, 256)


#: Where another candidate is faster: what it does and the operator does not. Differences of design;
#: what share of the time each is has not been measured.
WHY = {
    "compiled": "its products are the same BLAS calls, without the operator's checks in the call",
    "onnxruntime": "it packs the weights once, when the model is loaded; the operator packs at each "
    "call, because a PyTorch weight may change between two calls",
    "openvino": "it packs the weights once and generates its kernels for the shape when the model is "
    "loaded; the operator packs at each call, because a PyTorch weight may change between two calls",
}


def layer_of(side: int, dim: int, width: int) -> FusedDWAttention:
    """A layer without prefix tokens, with random weights and context terms."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"grid": (side, side), "num_prefix": 0}
    heads = dim // 64
    layer = (
        FusedDWAttention(dim, heads, **options)
        if width == dim
        else LowRankDWAttention(dim, heads, rank=width, **options)
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return layer.eval()


def runtimes(
    layer: FusedDWAttention, x: Tensor, threads: int, folder: Path
) -> dict[str, Callable[[], object]]:
    """The layer on the other runtimes that are installed, once they agree with PyTorch.

    fp32 only: ONNX Runtime has no bf16 on the CPU, and OpenVINO would compute in fp32 here.

    Args:
        folder: of the exported layers, each of which serves several cases.
    """
    calls: dict[str, Callable[[], object]] = {}
    if x.dtype != torch.float32:
        return calls
    path = folder / f"{layer.grid}-{layer.dim}-{layer.inner_dim}.onnx"
    for name, load in RUNTIMES.items():
        if importlib.util.find_spec(name) is None:
            continue
        if not path.exists():
            dwattn.export(layer, path, layer.grid, check=False)
        call = load(path, x, threads)
        torch.testing.assert_close(
            torch.as_tensor(call()), layer(x), rtol=1e-3, atol=1e-3, msg=f"{name} differs"
        )
        calls[name] = call
    return calls


def candidates(
    layer: FusedDWAttention,
    batch: int,
    dtype: torch.dtype,
    threads: int,
    folder: Path,
    *,
    compiled: bool,
) -> dict[str, Callable[[], object]]:
    """Calls by name; all but ``products`` compute the layer."""
    assert layer.grid is not None
    side, dim = layer.grid[0], layer.dim
    layer.to(dtype)
    x = torch.randn(batch, side * side, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    geometry = Geometry(side, side, 0)
    value, proj = layer.value, layer.proj

    def run(backend: str | None) -> Tensor:
        return functional.dw_layer(
            x, value.weight, value.bias, layer.kernel, proj.weight, proj.bias, geometry,
            None, layer.mu, layer.beta, backend=backend,
        )  # fmt: skip

    def products() -> Tensor:
        v = F.linear(x, value.weight, value.bias)
        return F.linear(v, proj.weight, proj.bias)

    # As users call it: the compiled kernels are what the rules choose on a CPU.
    assert backends.choose("dw_layer", device="cpu", dtype=dtype) == "cpp"
    calls: dict[str, Callable[[], object]] = {
        "products": products,
        "cpp": lambda: run(None),
        "torch": lambda: run("torch"),
    }
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(run)
        calls["compiled"] = lambda: fast("torch")
    return {**calls, **runtimes(layer, x, threads, folder)}


def explanation(ratios: dict[str, float]) -> dict[str, str]:
    """Who was faster than the operator by more than 2%, and why."""
    faster = (name for name in WHY if ratios.get(name, float("inf")) < 0.98 * ratios["cpp"])
    return {name: WHY[name] for name in faster}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))


def run(folder: Path) -> None:
    """Everything the command line asks for; ``folder`` is for exported layers."""
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
    missing = [name for name in RUNTIMES if importlib.util.find_spec(name) is None]
    for name in missing:
        print(f"{name} is not installed and left out: pip install 'dwattn[bench]'")
    columns = ("products ms", "cpp/products", "torch", "compiled", *RUNTIMES)
    print(f"{'':46}{''.join(f'{column:>13}' for column in columns)}  faster than cpp")
    for threads, batch in ((1, 1), (2, 8)):
        torch.set_num_threads(threads)
        for size in options.size:
            for dtype in options.dtype:
                side, dim = SIZES[size]
                for width in (dim, *RANKS):
                    with torch.inference_mode():
                        calls = candidates(
                            layer_of(side, dim, width), batch, DTYPES[dtype], threads, folder,
                            compiled=not options.no_compile,
                        )  # fmt: skip
                        times = measure(calls, options.seconds)
                    ratios = {name: ratio(times, name, "products") for name in calls}
                    median = sorted(times["products"])[len(times["products"]) // 2]
                    case = f"{size} r={width} {dtype} batch={batch} threads={threads}"
                    why = explanation(ratios)
                    results.append({
                        "case": case, "products_ms": median, "rounds": len(times["products"]),
                        "over_products": ratios, "faster_than_cpp": why,
                    })  # fmt: skip
                    shown = "".join(
                        f"{ratios[name]:13.3f}" if name in ratios else f"{'-':>13}"
                        for name in ("cpp", "torch", "compiled", *RUNTIMES)
                    )
                    print(f"{case:46}{median:13.3f}{shown}  {', '.join(why)}", flush=True)
    for name in sorted({name for result in results for name in result["faster_than_cpp"]}):
        print(f"{name}: {WHY[name]}.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": machine(),
            "not_installed": missing,
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
