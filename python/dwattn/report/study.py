"""What a study found as one self-contained HTML page: the paper's tables and figures for the user's model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwattn.errors import DataError
from dwattn.files import write_atomically
from dwattn.finetune.study import SCORES
from dwattn.finetune.study_grid import BASELINE
from dwattn.finetune.study_results import StudyResult, points
from dwattn.report.study_figures import Point
from dwattn.scores import Scores

Heads = set[tuple[int, int]]


@dataclass(frozen=True)
class StudyReport:
    """What the page is made of; what is missing leaves its figures out.

    Args:
        result: the runs.
        command: that made them; setting: numbers to show with them.
        before, after: scores of the pretrained and of a fine-tuned backbone.
        latency: see :func:`dwattn.finetune.study_latency.measure_cells`; machine: where they were measured.
    """

    result: StudyResult
    command: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    before: Scores | None = None
    after: Scores | None = None
    latency: Sequence[Mapping[str, Any]] = ()
    machine: str = ""

    @classmethod
    def of(cls, folder: str | os.PathLike[str], result: StudyResult, **fields: Any) -> StudyReport:
        """With the scores that are in a study's folder: of the first seed, and of the pretrained backbone."""
        root = Path(folder)
        tuned = sorted(root.glob(f"first-seed*/{SCORES}"))
        fields["before"] = Scores.load(root / SCORES) if (root / SCORES).exists() else None
        fields["after"] = Scores.load(tuned[0]) if tuned else None
        return cls(result, **fields)

    @property
    def metric(self) -> str:
        """The task's main metric: the first that was measured."""
        return next(iter(self.result.rows[0]["metrics"]))

    def points(self) -> list[Point]:
        """Converted settings that were trained in two stages, for the curves."""
        ratios = {(entry["attention"], entry["count"]): entry["ratio"] for entry in self.latency}
        found: dict[tuple[str, str, str], Point] = {}
        starts = ("calibrated", "mean-attention", "gaussian")
        entries = [entry for entry in self.result.summary() if entry["label"][0] != BASELINE]
        # The best start that was run stands for a layer; a stable sort keeps the order of the runs otherwise.
        for entry in sorted(entries, key=lambda entry: starts.index(entry["label"][4])):
            attention, criterion, count, stages, _ = entry["label"]
            if (entry["metric"], stages) != (self.metric, "two-stage") or entry[
                "difference"
            ] is None:
                continue
            half = entry["difference_interval"]
            point = Point(
                attention, criterion, count, 100 * entry["difference"],
                None if half is None else 100 * half, ratios.get((attention, count)),
            )  # fmt: skip
            found.setdefault((attention, criterion, count), point)
        return list(found.values())

    def tables(self) -> list[dict[str, Any]]:
        """``{"title", "columns", "rows"}`` of the paper's Tables 2 and 3, 5 and A.1, and of starting kernels."""
        selections = ("highest-variance", "dsp", "dsp-e2e")
        parts: tuple[tuple[str, Callable[[list[str]], bool]], ...] = (
            ("Layers (Tables 2 and 3)", lambda s: s[3] == "two-stage" and s[4] != "gaussian" and s[1] not in selections),
            ("Selection (Table 5)", lambda s: s[0] == "dw" and s[3] == "two-stage"),
            ("Stages (Tables 5 and A.1)", lambda s: s[0] == "dw" and s[1] == "variance" and s[4] == "calibrated"),
            ("Starting kernels", lambda s: s[1] == "variance" and s[3] == "two-stage"),
        )  # fmt: skip
        return [t for title, wanted in parts if (t := self._table(title, wanted))["rows"]]

    def _table(self, title: str, wanted: Callable[[list[str]], bool]) -> dict[str, Any]:
        ratios = {(entry["attention"], entry["count"]): entry for entry in self.latency}
        columns = [
            "attention",
            "chosen by",
            "replaced",
            "stages",
            "start",
            self.metric,
            "difference",
            "runs",
        ]
        columns += ["time saved"] if self.latency else []
        rows = []
        for entry in self.result.summary():
            label = entry["label"]
            baseline = label[0] == BASELINE
            if entry["metric"] != self.metric or not (baseline or wanted(label)):
                continue
            row = [
                *label, points(entry["mean"], entry["interval"]),
                "" if baseline else points(entry["difference"], entry["difference_interval"], sign=True),
                str(entry["runs"]),
            ]  # fmt: skip
            timed = ratios.get((label[0], label[2]))
            if self.latency:
                row.append("" if timed is None else f"{100 * (1 - timed['ratio']):.1f} %")
            rows.append(row)
        only_baselines = all(row[0] == BASELINE for row in rows)
        return {"title": title, "columns": columns, "rows": [] if only_baselines else rows}

    def figures(self) -> list[tuple[str, str]]:
        """Captions and SVG."""
        from dwattn.report import study_figures as draw

        found: list[tuple[str, str | None]] = []
        shown = self.points()
        if shown:
            found.append(
                (
                    "Accuracy by number of replaced blocks; dashed: one point lost.",
                    draw.by_count(shown, self.metric),
                )
            )
        if self.latency and shown:
            found.append(
                (
                    f"Accuracy against time ({self.machine}); numbers are replaced blocks.",
                    draw.pareto(shown, self.metric),
                )
            )
        scores = self.after or self.before
        if scores is None:
            return [(caption, svg) for caption, svg in found if svg]
        if self.latency:
            heads = scores.layers[0].num_heads
            found.append(("Time saved (Figures 2 and A.5).", draw.speedup(self.latency, heads)))
        chosen = self.chosen(scores)
        blocks = {
            name: [sorted({b for b, _ in run}) for run in runs]
            for name, runs in chosen.items()
            if "heads" not in name
        }
        if blocks:
            depth = 1 + max(layer.block for layer in scores.layers)
            found.append(("Chosen blocks (Figure 3).", draw.chosen_blocks(blocks, depth)))
        if self.before is not None and self.after is not None:
            found.append(
                (
                    "Σ before and after fine-tuning (Figure A.1).",
                    draw.before_and_after(self.before, self.after),
                )
            )
        maps = next((s for s in (self.after, self.before) if s and draw.deviations(s)), None)
        if maps is not None:
            found.append(
                ("Deviation of attention by displacement from the query, which is moved to the centre; the square is the "
                 "3x3 kernel (Figure A.2).", draw.deviations(maps))
            )  # fmt: skip
        scattered = {name: set.union(*runs) for name, runs in chosen.items() if "heads" in name}
        found.append(("Σ of all heads (Figure A.4).", draw.heads_by_score(scores, scattered)))
        return [(caption, svg) for caption, svg in found if svg]

    def chosen(self, scores: Scores) -> dict[str, list[Heads]]:
        """``(block, head)`` pairs of every run of ``dw``, by criterion and count."""
        layers = {layer.name: layer for layer in scores.layers}
        found: dict[str, list[Heads]] = {}
        for row in self.result.rows:
            attention, criterion, count, stages, init = row["label"]
            if attention != "dw" or stages == "frozen" or init == "mean-attention":
                continue
            pairs: Heads = set()
            for entry in row["replaced"]:
                name, _, listed = entry.partition(":")
                heads = map(int, listed.split(",")) if listed else range(layers[name].num_heads)
                pairs |= {(layers[name].block, head) for head in heads}
            label = f"{criterion} {count}" + (" (one stage)" if stages == "one-stage" else "")
            found.setdefault(label, []).append(pairs)
        return found


def write_study(report: StudyReport, path: str | os.PathLike[str]) -> Path:
    """Write the page; it appears whole or not at all.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dwattn.report", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("study.html").render(
        r=report, tables=report.tables(), figures=report.figures()
    )
    path = Path(path)
    with write_atomically(path, DataError) as temporary:
        temporary.write_text(page, "utf-8")
    return path
