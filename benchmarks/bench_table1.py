"""The paper's protocol: one attention block at batch 1 on one pinned core, beside the paper's own figures.

    python benchmarks/bench_table1.py --json benchmarks/results/table1.json

Table 1 has 16 heads and 576 tokens. Table A.3 has 12 and 16 heads; its FLOPs are those of 256 tokens (the headings of
its FLOPs and parameter columns are exchanged), so that is what is run for it, and 12 heads at 576 tokens besides. Times
of different machines cannot be compared, so the ratios to softmax attention stand beside the paper's ratios. FLOPs and
parameters are compared with the paper's digits; exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rounds
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dwattn


@dataclass(frozen=True)
class Row:
    """One line of the paper: GFLOPs and millions of parameters as printed, time on its GPU in ms."""

    variant: str
    gflops: str
    params: str
    paper_ms: float


@dataclass(frozen=True)
class Block:
    """One block of a table. ``deployed``: parameters are counted after folding, as Table A.3 does."""

    name: str
    grid: int
    heads: int
    rows: tuple[Row, ...]
    deployed: bool = False

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def dim(self) -> int:
        return 64 * self.heads


BLOCKS = (
    Block(
        "Table 1: 16 heads, 576 tokens (Orin Nano)", 24, 16,
        (
            Row("mhsa", "6.19", "4.2", 3.2),
            Row("conv", "12.08", "2.1", 3.71),
            Row("dw", "2.43", "2.11", 1.26),
            Row("spvit", "0.75", "2.1", 0.641),
            Row("ens_dw", "0.15", "2.1", 0.215),
        ),
    ),
    Block(
        "Table A.3: 16 heads, 256 tokens (Orin)", 16, 16,
        (
            Row("mhsa", "2.42", "4.20", 0.93),
            Row("dw", "1.08", "2.11", 0.32),
            Row("ens_dw", "0.07", "0.13", 0.06),
        ),
        deployed=True,
    ),
    Block(
        "Table A.3: 12 heads, 256 tokens (Orin)", 16, 12,
        (
            Row("mhsa", "1.41", "2.362", 0.75),
            Row("dw", "0.61", "1.189", 0.28),
            Row("ens_dw", "0.05", "0.1", 0.09),
        ),
        deployed=True,
    ),
)  # fmt: skip
#: Beside the paper's rows: 12 heads at 576 tokens, and the narrow variant, of which the paper has no figures.
EXTRA = Block(
    "12 heads, 576 tokens", 24, 12, tuple(Row(v, "", "", 0) for v in ("mhsa", "dw", "ens_dw"))
)


def layer(variant: str, block: Block) -> nn.Module:
    """Without biases, context terms or prefix tokens, as the paper's; ``ens_dw`` folded."""
    grid, plain = (block.grid, block.grid), {"qkv_bias": False, "proj_bias": False}
    if variant == "mhsa":
        return dwattn.SelfAttention(block.dim, block.heads, **plain)
    options = {"grid": grid, "context": False, **plain}
    made: dict[str, Callable[[], nn.Module]] = {
        "dw": lambda: dwattn.FusedDWAttention(block.dim, block.heads, **options),
        "conv": lambda: dwattn.ConvAttention(block.dim, block.heads, **options),
        "spvit": lambda: dwattn.SPViTAttention(block.dim, block.heads, **options),
        "ens_dw": lambda: dwattn.EnsembleDWAttention(block.dim, block.heads, **options).fold(),
        "lowrank_dw": lambda: dwattn.LowRankDWAttention(
            block.dim, block.heads, rank=block.dim // 4, **options
        ),
    }
    return made[variant]()


def counts(variant: str, block: Block) -> tuple[float, float]:
    """GFLOPs and millions of parameters."""
    sizes = {"dim": block.dim, "num_heads": block.heads}
    rank = block.dim // 4 if variant == "lowrank_dw" else None
    flops = dwattn.flops(variant, tokens=block.tokens, rank=rank, **sizes)
    if variant == "ens_dw" and block.deployed:
        return flops / 1e9, dwattn.params("lowrank_dw", rank=64, **sizes) / 1e6
    return flops / 1e9, dwattn.params(variant, rank=rank, **sizes) / 1e6


def agrees(value: float, printed: str) -> bool:
    """Whether rounding or cutting off ``value`` gives the printed digits, or misses by one in the last place."""
    if not printed:
        return True
    last = 10.0 ** -len(printed.partition(".")[2])
    return abs(value - float(printed)) < 1.5 * last + 0.002 * value


def mismatches() -> list[str]:
    """Rows whose FLOPs or parameters are not the paper's."""
    found = []
    for block in BLOCKS:
        for row in block.rows:
            for value, printed in zip(
                counts(row.variant, block), (row.gflops, row.params), strict=True
            ):
                if not agrees(value, printed):
                    found.append(
                        f"{block.name}: {row.variant} has {value:.4f}, printed is {printed}"
                    )
    return found


def pin(core: int | None) -> int | None:
    """Keep this process on one core, its last one unless told otherwise; None where that is not possible."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    chosen = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def run(block: Block, seconds: float, extra: bool = True) -> list[rounds.Measured]:
    torch.manual_seed(0)
    x = torch.randn(1, block.tokens, block.dim)
    calls: dict[str, Callable[[], Tensor]] = {}
    variants = [row.variant for row in block.rows] + (["lowrank_dw"] if extra else [])
    for variant in variants:
        module = layer(variant, block).eval()
        calls[variant] = lambda module=module: module(x)
    with torch.inference_mode():
        return rounds.summarise(block.name, rounds.measure(calls, seconds), "mhsa")


def show(block: Block, found: list[rounds.Measured]) -> None:
    table = Table(
        "layer", "GFLOPs", "M params", "median ms", "over mhsa", "paper's", title=block.name
    )
    for column in table.columns[1:]:
        column.justify = "right"
    paper = {row.variant: row.paper_ms for row in block.rows}
    for row in found:
        gflops, params = counts(row.candidate, block)
        theirs = paper.get(row.candidate, 0) / (paper["mhsa"] or 1)
        table.add_row(
            row.candidate, f"{gflops:.2f}", f"{params:.2f}", f"{row.median_ms:.3f}",
            f"{row.over_floor:.3f}", f"{theirs:.3f}" if theirs else "-",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="per block")
    parser.add_argument("--core", type=int, help="core to run on; default: the last usable one")
    parser.add_argument("--json", type=Path, help="write JSON, and CSV beside it")
    options = parser.parse_args()
    if wrong := mismatches():
        sys.exit("\n".join(wrong))
    core = pin(options.core)
    torch.set_num_threads(1)
    results: list[rounds.Measured] = []
    for block in (*BLOCKS, EXTRA):
        found = run(block, options.seconds)
        results += found
        show(block, found)
    if options.json:
        rounds.write(options.json, "table1", results, pinned_to_core=core)


if __name__ == "__main__":
    main()
