"""What an export has written, and how well it agrees with PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dwattn.export.parity import Parity


@dataclass(frozen=True)
class ExportReport:
    """The result of :func:`dwattn.export`; ``print`` it, or take :meth:`to_dict`.

    Args:
        path: the ONNX file; data_path: weights beside it, for models over 2 GB.
        opset, ir_version, dtype, io_dtype: of the file.
        inputs, outputs: name to shape; symbolic dimensions by name.
        size: pixels ``(H, W)`` (patches for a bare layer); dynamic_batch, dynamic_size: what may
            vary.
        lowering: what became of replaced layers; replaced: how many there are.
        nodes: layers that are single nodes, name to type and version, for example
            ``"blocks.3.attn": "dwattn::DWAttention 1"``.
        ops: operator counts; folded: nodes that constant folding removed.
        weights: number of weight elements by dtype; bytes: size of the file or files.
        tolerance: bound on ``max_rel``, or None where the file was not checked.
        parity: errors against fp32 PyTorch by output, batch and size.
        latency_ms: median milliseconds on onnxruntime's CPU provider at batch 1, where measured.
        metadata: what is stored in the file.
    """

    path: Path
    opset: int
    ir_version: int
    dtype: str
    io_dtype: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    size: tuple[int, int]
    dynamic_batch: bool
    dynamic_size: bool
    lowering: str
    replaced: int
    nodes: dict[str, str]
    ops: dict[str, int]
    folded: int
    weights: dict[str, int]
    bytes: int
    tolerance: float | None
    parity: tuple[Parity, ...]
    metadata: dict[str, str]
    data_path: Path | None = None
    latency_ms: float | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """What was written: the ONNX file, and the weights beside it, without which it is not read."""
        return (self.path,) if self.data_path is None else (self.path, self.data_path)

    @property
    def max_abs(self) -> float | None:
        """The largest absolute error, or None where the file was not checked."""
        return max((p.max_abs for p in self.parity), default=None)

    @property
    def max_rel(self) -> float | None:
        """The largest error relative to the output's scale, or None if the file was not checked."""
        return max((p.max_rel for p in self.parity), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        plain = asdict(self)
        plain["path"] = str(self.path)
        plain["data_path"] = None if self.data_path is None else str(self.data_path)
        plain["max_abs"], plain["max_rel"] = self.max_abs, self.max_rel
        return plain

    def __str__(self) -> str:
        checked = (
            "not checked"
            if self.max_rel is None
            else f"onnxruntime agrees with PyTorch to {self.max_rel:.1e} of the output scale"
        )
        return (
            f"{' and '.join(map(str, self.files))}: {self.dtype}, opset {self.opset}, {sum(self.ops.values())} nodes, "
            f"{self.bytes / 1e6:.1f} MB, {self.replaced} replaced layer{'' if self.replaced == 1 else 's'} "
            f"({self.lowering}); {checked}."
        )

    def __rich__(self) -> Table:
        table = Table(title=f"ONNX export: {self.path}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for name, shape in (*self.inputs.items(), *self.outputs.items()):
            table.add_row("input" if name in self.inputs else "output", f"{name} {tuple(shape)}")
        table.add_row(
            "format",
            f"opset {self.opset}, IR {self.ir_version}, weights {self.dtype}, I/O {self.io_dtype}",
        )
        table.add_row("replaced layers", f"{self.replaced}, lowering {self.lowering}")
        for name, kind in self.nodes.items():
            table.add_row("layer node", f"{name}: {kind}")
        table.add_row("nodes", f"{sum(self.ops.values())} ({_top(self.ops)})")
        table.add_row("size", f"{self.bytes / 1e6:.1f} MB")
        if self.data_path is not None:
            table.add_row("weights", f"in {self.data_path.name}, which belongs beside the file")
        for p in self.parity:
            label = f"parity, batch {p.batch}, {p.size[0]} x {p.size[1]}"
            table.add_row(label, f"{p.output}: max {p.max_abs:.2e} abs, {p.max_rel:.2e} of scale")
        if not self.parity:
            table.add_row("parity", "not checked")
        if self.latency_ms is not None:
            table.add_row("onnxruntime CPU", f"{self.latency_ms:.2f} ms at batch 1")
        return table


def _top(ops: dict[str, int], count: int = 6) -> str:
    ranked = sorted(ops.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{number} {name}" for name, number in ranked)
