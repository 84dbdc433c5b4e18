"""What a study found: runs, means with intervals over seeds, differences paired by seed; as table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dwattn.finetune.study_grid import BASELINE, SETTINGS
from dwattn.printed import Printed

#: Two-sided 95% quantiles of Student's t by degrees of freedom, from 1 on.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class StudyResult(Printed):
    """Measurements by cell: ``{"cell": name, "label": [...], "seed": s, "metrics": {...}, ...}``."""

    rows: list[dict[str, Any]]

    def summary(self) -> list[dict[str, Any]]:
        """One entry per setting: mean, 95% interval over seeds, and difference to the unconverted model trained for as long."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row["label"]), []).append(row)
        summary = []
        for label, rows in groups.items():
            stages = "one-stage" if label[3] == "one-stage" else "two-stage"
            baseline = groups.get((BASELINE, "", "", stages, ""), [])
            base = {row["seed"]: row["metrics"] for row in baseline}
            for metric in rows[0]["metrics"]:
                values = [row["metrics"][metric] for row in rows]
                paired = [
                    row["metrics"][metric] - base[row["seed"]][metric]
                    for row in rows
                    if row["seed"] in base
                ]
                mean, half = interval(values)
                loss, loss_half = interval(paired)
                summary.append(
                    {
                        "label": list(label), "metric": metric, "runs": len(values), "mean": mean,
                        "interval": half, "difference": loss, "difference_interval": loss_half,
                    }
                )  # fmt: skip
        return summary

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"runs": self.rows, "summary": self.summary()}

    def table(self) -> Table:
        """For people, in points (hundredths); settings that are the same everywhere are left out."""
        entries = self.summary()
        labels = [entry["label"] for entry in entries if entry["label"][0] != BASELINE]
        # The unconverted model was trained in different stages, so these are always shown.
        shown = [p for p in range(1, 5) if p == 3 or len({label[p] for label in labels}) > 1]
        table = Table(title="Study", title_justify="left")
        for column in ("attention", *(SETTINGS[place] for place in shown), "metric"):
            table.add_column(column, no_wrap=True)
        for column in ("mean", "difference", "runs"):
            table.add_column(column, justify="right", no_wrap=True)
        for entry in entries:
            label, baseline = entry["label"], entry["label"][0] == BASELINE
            table.add_row(
                label[0], *(label[place] for place in shown), entry["metric"],
                points(entry["mean"], entry["interval"]),
                "" if baseline else points(entry["difference"], entry["difference_interval"], sign=True),
                str(entry["runs"]),
            )  # fmt: skip
        return table

    def csv(self) -> str:
        """The runs as CSV."""
        metrics = sorted({name for row in self.rows for name in row["metrics"]})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*SETTINGS, "seed", "replaced", *metrics])
        for row in self.rows:
            replaced = " ".join(row["replaced"])
            values = [row["metrics"].get(name, "") for name in metrics]
            writer.writerow([*row["label"], row["seed"], replaced, *values])
        return text.getvalue()


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """Mean (None for no value) and half the width of its 95% interval (None for less than two)."""
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, _quantile(len(values) - 1) * math.sqrt(variance / len(values))


def _quantile(freedom: int) -> float:
    """Beyond the table the normal one with the first term of its expansion: right to 0.001."""
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom


def points(value: float | None, half: float | None, *, sign: bool = False) -> str:
    """In hundredths, with half the interval."""
    if value is None:
        return ""
    text = f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"
    return text if half is None else f"{text} ± {100 * half:.2f}"
