"""Plots of result files: growth as curves, peers as fidelity over time, studies as accuracy over time, everything else as
bars over the floor.

    python benchmarks/plot.py benchmarks/results/growth.json growth.png

Needs matplotlib (the ``demo`` extra). The format follows the ending: png, svg or pdf.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import rounds
import study_page

mpl.use("Agg")
from matplotlib import pyplot as plt

from dwattn.finetune.study_results import StudyResult
from dwattn.report.study import StudyReport
from dwattn.report.study_figures import draw_pareto

ALONG = re.compile(r"(tokens|batch|width)=(\d+)")


def growth(results: list[dict[str, Any]]) -> Any:
    """Medians over size, both axes logarithmic, with the range from the 20th to the 80th percentile."""
    curves: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in results:
        if found := ALONG.fullmatch(row["case"]):
            curves[found[1]][row["candidate"]].append((int(found[2]), row))
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), squeeze=False)
    for axis, (along, by_candidate) in zip(axes[0], curves.items(), strict=True):
        for candidate, points in by_candidate.items():
            sizes, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            axis.plot(sizes, [row["median_ms"] for row in rows], marker="o", label=candidate)
            low, high = ([row[key] for row in rows] for key in ("p20_ms", "p80_ms"))
            axis.fill_between(sizes, low, high, alpha=0.2)
        axis.set(xscale="log", yscale="log", xlabel=along, ylabel="ms")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.legend()
    return figure


def pareto(results: list[dict[str, Any]]) -> Any:
    """Fidelity over time: a row for dense features, one for image embeddings; a column for each case."""
    cases = list(dict.fromkeys(row["case"] for row in results))
    rows = {"patch_cosine": "dense: cosine of patches", "cls_cosine": "embedding: cosine of CLS"}
    figure, axes = plt.subplots(
        len(rows), len(cases), figsize=(5.5 * len(cases), 4 * len(rows)), squeeze=False
    )
    for line, (key, label) in zip(axes, rows.items(), strict=True):
        for axis, case in zip(line, cases, strict=True):
            curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for row in results:
                if row["case"] == case:
                    curves[row["method"]].append((row["over_floor"], row[key]))
            for method, points in curves.items():
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
            axis.set(xlabel="time over the original's", ylabel=label, title=case)
            axis.legend(fontsize=8)
    return figure


DRAW = {"growth": growth, "peers": pareto}


def bars(results: list[dict[str, Any]]) -> Any:
    """Time over that of the floor, by case; logarithmic."""
    cases = list(dict.fromkeys(row["case"] for row in results))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(7, 0.3 * len(results) + len(cases)), squeeze=False
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        rows = [row for row in results if row["case"] == case and row["over_floor"] is not None]
        axis.barh([row["candidate"] for row in rows], [row["over_floor"] for row in rows])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=case, xlabel="time over that of the floor", xscale="log")
    return figure


def study(document: dict[str, Any]) -> Any:
    """Differences of calibrated models to the unconverted one over time relative to its, beside the paper's.

    From a file of ``bench_tasks.py``. Models of another start lose so much in little training that
    nothing else could be told apart.
    """
    runs = [run for run in document["runs"] if run["label"][-1] in ("", "calibrated")]
    page = StudyReport(StudyResult(runs), "", latency=document["latency"] or ())
    figure, axis = plt.subplots(figsize=(7, 5))
    draw_pareto(axis, page.points(), page.metric)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    if "grid" in found:
        figure, where = study(found), {**found["environment"], "created": found["created"]}
        where["CPU"] += f", {study_page.latency_size(found)} pixels"
    else:
        document = rounds.read(options.results)
        figure = DRAW.get(document["benchmark"], bars)(document["results"])
        where = document["machine"]
    figure.suptitle(f"{where['CPU']}, {where['created']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
