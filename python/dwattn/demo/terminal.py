"""What the demo says while it runs, and its summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dwattn.report.results import Results, Step


class Narrator:
    """Prints numbered steps on stderr and keeps their wall times."""

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        self.total = total
        self.steps: list[Step] = []
        self.start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.start

    @property
    def progress(self) -> bool:
        """Whether progress bars make sense."""
        return self.console.is_terminal

    @contextmanager
    def step(self, name: str, doing: str) -> Iterator[None]:
        """A step of the run; ``name`` is for the record, ``doing`` for the person."""
        self.console.print(f"[bold]{len(self.steps) + 1}/{self.total}[/] {doing}", highlight=False)
        start = time.perf_counter()
        yield
        self.steps.append(Step(name=name, seconds=time.perf_counter() - start))

    def say(self, text: str) -> None:
        """A line below the current step."""
        self.console.print(f"    {text}", highlight=False, markup=False, soft_wrap=True)


def summary(results: Results, report: str) -> Table:
    """The run's numbers for the terminal."""
    outer = Table.grid(padding=(1, 0))
    outer.add_row(_fidelity(results))
    for table in _latency(results):
        outer.add_row(table)
    lines = [
        f"Photos: {results.photos.calibration} to calibrate, {results.photos.held_out} held out."
    ]
    if results.export:
        lines.append(
            f"ONNX: {results.export.file}, {results.export.bytes / 1e6:.0f} MB; onnxruntime and PyTorch differ by "
            f"at most {results.export.max_difference:.1e}."
        )
    lines += results.notes
    lines.append(f"Report: {report}   ({results.seconds:.0f} s in total)")
    outer.add_row(Panel("\n".join(lines), expand=False))
    return outer


def _fidelity(results: Results) -> Table:
    """Cosine and IoU with the original; the report has the other measures."""
    objects = results.original_mask_iou is not None
    table = Table(
        title="Fidelity to the original model on held-out photos",
        title_justify="left",
        caption="on objects: on the photos with a pasted cut-out, one object each" * objects,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("layer", "by", "blocks"):
        table.add_column(name, no_wrap=True)
    for name in ("cosine / IoU", *(["on objects"] if objects else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for item in sorted(results.conversions, key=lambda item: len(item.blocks)):
        f = item.fidelity
        pairs = [(f.cosine, f.iou), *([(f.object_cosine, f.object_iou)] if objects else [])]
        numbers = ["" if cosine is None else f"{cosine:.3f} / {iou:.3f}" for cosine, iou in pairs]
        style = "bold" if item.key == results.headline else None
        table.add_row(item.label, item.criterion, compact(item.blocks), *numbers, style=style)
    return table


def compact(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _latency(results: Results) -> Iterator[Table]:
    for info in results.latency:
        before = info.median("original")
        table = Table(
            title=f"Latency ({info.threads} thread{'s' * (info.threads > 1)}, batch {info.batch})",
            caption=f"{info.what}; medians of {info.rounds} interleaved rounds",
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for name in ("model", "ms", "less"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for entry in info.entries:
            less = (
                ""
                if not before or entry.key == "original"
                else f"{1 - entry.median_ms / before:.1%}"
            )
            table.add_row(entry.label.replace("\n", " "), f"{entry.median_ms:.1f}", less)
        yield table
