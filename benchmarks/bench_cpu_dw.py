"""The compiled CPU ``dw_attention`` against PyTorch: value projection and aggregation, before Wo.

    python benchmarks/bench_cpu_dw.py --json cpu_dw.json

Candidates run in interleaved rounds, so that whatever else the machine does hits all of them alike;
read the ratios before the times. ``linear`` is the projection alone, the floor of all that compute V.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rounds import machine, measure, ratio
from torch import Tensor

from dwattn import functional, library
from dwattn.geometry import Geometry

SIZES = {"n=256,D=384": (16, 16, 384), "n=576,D=1024": (24, 24, 1024)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """Tensors of one layer; ``context`` adds kappa and mu to the beta that every case has."""

    geometry: Geometry
    x: Tensor
    wv: Tensor
    bv: Tensor
    kernel: Tensor
    kappa: Tensor | None
    mu: Tensor | None
    beta: Tensor | None


def make_case(
    height: int, width: int, dim: int, batch: int, dtype: torch.dtype, context: bool
) -> Case:
    """Random tensors with one prefix token."""
    torch.manual_seed(0)
    geometry = Geometry(height, width, 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    return Case(
        geometry,
        draw(batch, geometry.num_tokens, dim),
        draw(dim, dim) / dim**0.5,
        draw(dim),
        draw(dim, 3, 3),
        draw(1, dim) if context else None,
        draw(dim) if context else None,
        draw(dim) if context else None,
    )


def nchw(case: Case) -> Tensor:
    """The usual way to write it: copy to NCHW, convolve, copy back (without ctx)."""
    v = F.linear(case.x, case.wv, case.bv)[:, case.geometry.num_prefix :]
    image = v.transpose(1, 2).unflatten(2, case.geometry.grid).contiguous()
    y = F.conv2d(image, case.kernel.unsqueeze(1), padding=1, groups=image.shape[1])
    return y.flatten(2).transpose(1, 2).contiguous()


def candidates(case: Case) -> dict[str, Callable[[], Tensor]]:
    """What is compared; ``torch`` is channels-last without copies, the best PyTorch form."""

    def run(backend: str) -> Callable[[], Tensor]:
        return lambda: functional.dw_attention(
            case.x, case.wv, case.bv, case.kernel, case.geometry, case.kappa, case.mu, case.beta,
            backend=backend,
        )  # fmt: skip

    return {
        "linear": lambda: F.linear(case.x, case.wv, case.bv),
        "torch": run("torch"),
        "cpp": run("cpp"),
        "nchw": lambda: nchw(case),
    }


def summarise(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median, p20 and p80 in ms of every candidate, and the two ratios that matter."""
    summary: dict[str, Any] = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5)
        summary[name] = {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}
    summary["cpp/torch"] = ratio(times, "cpp", "torch")
    summary["cpp/linear"] = ratio(times, "cpp", "linear")
    summary["rounds"] = len(times["cpp"])
    return summary


def line(name: str, summary: dict[str, Any]) -> str:
    """One row of the table."""
    medians = "".join(
        f"{summary[key]['median']:9.3f}" for key in ("linear", "torch", "cpp", "nchw")
    )
    return f"{name:44}{medians}{summary['cpp/torch']:12.3f}{summary['cpp/linear']:12.3f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--context", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = parse()
    if not library.AVAILABLE:
        raise SystemExit(library.load_error())
    results = []
    print(f"{'median ms':44}   linear    torch      cpp     nchw   cpp/torch  cpp/linear")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.size:
            for dtype in args.dtype:
                for batch in args.batch:
                    for context in args.context:
                        case = make_case(*SIZES[size], batch, DTYPES[dtype], bool(context))
                        summary = summarise(measure(candidates(case), args.seconds))
                        name = f"{size} {dtype} batch={batch} ctx={context} threads={threads}"
                        results.append({"case": name, **summary})
                        print(line(name, summary), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": machine(), "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
