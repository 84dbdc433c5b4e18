"""Attention layers: every variant, backend and dtype at the shapes of real models, beside their floor.

    python benchmarks/bench_ops.py --model ViT-L --size 336 --dtype fp32 bf16 --json ops.json
    python benchmarks/bench_ops.py --all --json everything.json       # hours

A case is a shape, batch, dtype and thread count; its candidates are softmax attention as PyTorch runs it
(``mhsa sdpa``), and the replacements on each backend. ``dw nchw`` is the usual way to write a depthwise
convolution over tokens, ``compiled`` is torch.compile of plain PyTorch, ``onnxruntime`` and ``openvino`` run the
exported layer where they are installed. The floor is the two products of ``dw`` alone; narrow variants have
smaller ones and can be below it. Prefix rows are left out, as in the paper.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rounds
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dwattn
from dwattn import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: width, heads
MODELS = {"ViT-S": (384, 6), "ViT-B": (768, 12), "ViT-L": (1024, 16), "ViT-g": (1536, 24)}
#: patch grid of patches of 14 pixels
SIZES = {"224": (16, 16), "336": (24, 24), "448x336": (32, 24), "518": (37, 37)}
VARIANTS = ("dw", "lowrank_dw", "ens_dw", "conv", "spvit")
FLOOR = "floor: two products"


@dataclass(frozen=True)
class Shape:
    """One layer call."""

    model: str
    size: str
    batch: int
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.size} {self.dtype} batch={self.batch} threads={self.threads}"


def build(variant: str, shape: Shape) -> nn.Module:
    """A layer with random weights; ``lowrank_dw`` of a quarter of the width, ``ens_dw`` folded."""
    dim, heads = MODELS[shape.model]
    classes: dict[str, Callable[..., nn.Module]] = {
        "dw": dwattn.FusedDWAttention,
        "lowrank_dw": lambda *a, **k: dwattn.LowRankDWAttention(*a, rank=dim // 4, **k),
        "ens_dw": lambda *a, **k: dwattn.EnsembleDWAttention(*a, **k).fold(),
        "conv": dwattn.ConvAttention,
        "spvit": dwattn.SPViTAttention,
    }
    layer = classes[variant](dim, heads, grid=SIZES[shape.size])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(parameter[0].numel(), 1) ** 0.5)
    return layer.to(DTYPES[shape.dtype]).eval()


def nchw(layer: nn.Module, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """``dw`` with a copy to NCHW, a convolution, and a copy back; no context."""

    def run(x: Tensor) -> Tensor:
        v = layer.value(x).transpose(1, 2).unflatten(2, grid).contiguous()
        y = F.conv2d(v, layer.kernel.unsqueeze(1), padding=1, groups=v.shape[1])
        return layer.proj(y.flatten(2).transpose(1, 2).contiguous())

    return run


def on_backend(layer: nn.Module, name: str, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with backends.use(name):
            return layer(x)

    return run


def candidates(shape: Shape, options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Calls by name, all on the same tokens."""
    torch.manual_seed(0)
    dim, heads = MODELS[shape.model]
    grid, dtype = SIZES[shape.size], DTYPES[shape.dtype]
    x = torch.randn(shape.batch, grid[0] * grid[1], dim).to(dtype)
    dw = build("dw", shape)
    attention = dwattn.SelfAttention(dim, heads).to(dtype).eval()
    calls: dict[str, Callable[[], Tensor]] = {
        FLOOR: lambda: dw.proj(dw.value(x)),
        "mhsa sdpa": lambda: attention(x),
    }
    usual = nchw(dw, grid)
    verdicts = backends.explain("dw_layer", device="cpu", dtype=dtype)
    usable = [v.backend for v in verdicts if v and v.backend in options.backend]
    calls["dw nchw"] = lambda: usual(x)
    for variant in options.variant:
        layer = build(variant, shape)
        for name in usable if uses_backends(variant) else ["torch"]:
            calls[f"{variant} {name}"] = on_backend(layer, name, x)
        if options.compile and variant in ("dw", "lowrank_dw"):
            calls[f"{variant} compiled"] = compiled(layer, x)
    if shape.dtype == "fp32":
        calls.update(runtimes({"dw": dw}, x, grid, shape.threads, options.runtime))
    return calls


def uses_backends(variant: str) -> bool:
    """``conv`` and ``spvit`` are dense convolutions, in plain PyTorch only."""
    return variant not in ("conv", "spvit")


def compiled(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    torch._dynamo.reset()

    def plain(tokens: Tensor) -> Tensor:
        with backends.use("torch"):
            return layer(tokens)

    fast = torch.compile(plain)
    return lambda: fast(x)


def runtimes(
    layers: dict[str, nn.Module], x: Tensor, grid: tuple[int, int], threads: int, names: list[str]
) -> dict[str, Callable[[], Tensor]]:
    """The layers exported to ONNX, on the runtimes that are asked for and installed."""
    calls: dict[str, Callable[[], Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant, layer in layers.items():
            if not any(importlib.util.find_spec(name) for name in names):
                continue
            path = Path(folder) / f"{variant}.onnx"
            dwattn.export(layer, path, grid, check=False)
            for name in names:
                if importlib.util.find_spec(name) is not None:
                    calls[f"{variant} {name}"] = RUNTIMES[name](path, x, threads)
    return calls


def onnxruntime(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    # Its threads would go on spinning after a call and take the cores from the next candidate.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    name, tokens = session.get_inputs()[0].name, x.numpy()
    return lambda: session.run(None, {name: tokens})[0]


def openvino(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    import openvino

    # fp32 like the others: on CPUs with 16-bit units OpenVINO would compute in bf16 by default.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    tokens = x.numpy()
    return lambda: model(tokens)[0]


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    for threads in options.threads:
        for model in options.model:
            for size in options.size:
                for dtype in options.dtype:
                    for batch in options.batch:
                        yield Shape(model, size, batch, dtype, threads)


def show(case: str, found: list[rounds.Measured]) -> None:
    table = Table("candidate", "median ms", "p20", "p80", "over floor", title=case)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found:
        times = (f"{t:.3f}" for t in (row.median_ms, row.p20_ms, row.p80_ms))
        table.add_row(row.candidate, *times, f"{row.over_floor:.3f}")
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["ViT-S", "ViT-L"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["224", "336"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--backend", nargs="+", choices=backends.NAMES, default=["cpp", "torch"])
    parser.add_argument("--runtime", nargs="*", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument(
        "--all", action="store_true", help="all models, sizes, dtypes, batches 1 to 64"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--json", type=Path, help="write JSON, and CSV beside it")
    options = parser.parse_args()
    if options.all:
        options.model, options.size, options.dtype = list(MODELS), list(SIZES), list(DTYPES)
        options.batch, options.threads = [1, 8, 64], [1, 2]
    return options


def main() -> None:
    options = parse()
    results: list[rounds.Measured] = []
    for shape in shapes(options):
        torch.set_num_threads(shape.threads)
        calls = candidates(shape, options)
        with torch.inference_mode():
            times = rounds.measure(calls, options.seconds)
        found = rounds.summarise(shape.name, times, FLOOR)
        results += found
        show(shape.name, found)
    if options.json:
        rounds.write(options.json, "ops", results, seconds_per_case=options.seconds)


if __name__ == "__main__":
    main()
