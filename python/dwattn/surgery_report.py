"""The table of what was, or would be, replaced, and what is refused and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from dwattn.printed import Printed

Action = Literal["replaced", "kept", "refused"]


@dataclass(frozen=True)
class ReplacementRow:
    """One attention layer of the model.

    Args:
        block: index in depth order.
        heads: replaced heads; None for all of them or none.
        parameters: of the attention layer before and after.
        planned: whether the plan names the layer.
        reason: why it is refused, or that its hooks are not called while it is replaced; else empty.
    """

    block: int
    name: str
    action: Action
    variant: str = "mhsa"
    heads: tuple[int, ...] | None = None
    score: float | None = None
    parameters: tuple[int, int] | None = None
    planned: bool = False
    reason: str = ""


@dataclass(frozen=True)
class ReplacementReport(Printed):
    """Result of :func:`dwattn.replace`; ``print()`` shows the table.

    Args:
        rows: every attention layer of the backbone, in depth order.
        dry_run: nothing was changed.
        calibration: diagnostics of the calibration, or None.
    """

    family: str
    rows: tuple[ReplacementRow, ...]
    dry_run: bool
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: Any = None

    @property
    def replaced(self) -> list[str]:
        """Names of the replaced layers."""
        return [row.name for row in self.rows if row.action == "replaced"]

    @property
    def refused(self) -> dict[str, str]:
        """Name and reason of every layer that cannot be replaced, planned or not."""
        return {row.name: row.reason for row in self.rows if row.action == "refused"}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        calibration = self.calibration
        return {
            "family": self.family,
            "dry_run": self.dry_run,
            "settings": self.settings,
            "layers": [asdict(row) for row in self.rows],
            "calibration": calibration.to_dict() if hasattr(calibration, "to_dict") else None,
        }

    def table(self) -> Table:
        """All layers, with what was done to each."""
        verb = "would be replaced" if self.dry_run else "replaced"
        table = Table(
            title=f"{self.family}: {len(self.replaced)} of {len(self.rows)} layers {verb}"
        )
        for name in ("block", "attention layer", "action", "heads", "score", "parameters", "note"):
            table.add_column(name, justify="right" if name in ("block", "score") else "left")
        for row in self.rows:
            table.add_row(*_cells(row, self.dry_run), style="dim" if row.action == "kept" else None)
        return table


def _cells(row: ReplacementRow, dry_run: bool) -> Sequence[str]:
    action: str = row.action
    if row.action == "replaced":
        action = f"{'would be ' if dry_run else ''}-> {row.variant}"
    before, after = row.parameters or (None, None)
    return (
        str(row.block),
        row.name,
        action,
        "all" if row.heads is None and row.action == "replaced" else _listed(row.heads),
        "" if row.score is None else f"{row.score:.4g}",
        "" if before is None else f"{before:,} -> {after:,}",
        row.reason,
    )


def _listed(heads: tuple[int, ...] | None) -> str:
    return "" if heads is None else ", ".join(map(str, heads))
