"""The measured parts of docs/study.md, from the result files of ``bench_tasks.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dwattn.demo.pretrained import DEPTH
from dwattn.finetune.study_grid import BASELINE, KernelInit
from dwattn.finetune.study_results import interval, points

TASKS = {"classify": "top1", "segment": "miou"}
NAMES = {"classify": "Fashion-MNIST, top-1", "segment": "cut-outs on photos, mIoU"}
#: What is measured beside it, with its name.
BESIDE = {"segment": ("pixel_accuracy", "cut-outs on photos, share of pixels that are right")}
Label = tuple[str, str, str, str, str]
#: A difference in points, half its interval, and the number of seeds that it is from.
Pair = tuple[float, float | None, int]
#: What a converted model is compared with, by stages of the unconverted one.
BASELINES = {
    "two-stage": "the unconverted model trained as long",
    "one-stage": "it after the first stage alone",
}
#: Differences below this, in points, are called a draw.
DRAW = 0.3


def scaled(of_24: int) -> str:
    """The paper's count of 24 blocks for this model."""
    return str(round(of_24 * DEPTH / 24))


def label(
    attention: str = "dw", criterion: str = "variance", count: str = scaled(12), stages: str = "two-stage",
    init: KernelInit = "calibrated",
) -> Label:  # fmt: skip
    return (attention, criterion, count, stages, init)


#: What is compared: text, the two settings, and the paper's difference between them in points, if it has one.
CLAIMS: tuple[tuple[str, Label, Label, float | None], ...] = (
    ("`dw` against `conv`, half of the blocks", label(), label("conv"), 0.11),
    ("`dw`, half, against `spvit`, 10 of 24", label(), label("spvit", count=scaled(10), init="mean-attention"), 0.90),
    ("`spvit` against `ens_dw`, 10 of 24", label("spvit", count=scaled(10), init="mean-attention"), label("ens_dw", count=scaled(10)), 0.63),
    ("`dw` against `ens_dw`, half", label(), label("ens_dw"), 2.03),
    ("`ens_dw`: 10 of 24 against half", label("ens_dw", count=scaled(10)), label("ens_dw"), 0.50),
    ("lowest against highest Σ, half", label(), label(criterion="highest-variance"), 4.49),
    ("Σ against DSP-2S, half", label(), label(criterion="dsp"), 1.95),
    ("Σ against DSP-2S, 17 of 24", label(count=scaled(17)), label(criterion="dsp", count=scaled(17)), -0.43),
    ("DSP-2S against DSP-e2e, half", label(criterion="dsp"), label(criterion="dsp-e2e", init="gaussian"), -0.15),
    ("whole blocks against scattered heads, Σ, half", label(), label(count="36 heads"), 0.43),
    ("two stages against one", label(), label(stages="one-stage"), 0.32),
    ("all weights against replaced layers only", label(), label(stages="frozen"), 0.83),
    ("calibrated against Gaussian kernels, `dw`, half", label(), label(init="gaussian"), None),
    ("calibrated against Gaussian kernels, `ens_dw`, 10 of 24", label("ens_dw", count=scaled(10)), label("ens_dw", count=scaled(10), init="gaussian"), None),
    ("`residual` against Σ, `dw`, half", label(criterion="residual"), label(), None),
)  # fmt: skip


def latency_size(found: dict[str, Any]) -> int:
    """Pixels of the image that the models of a study were timed on."""
    setting = found["setting"]
    return int(setting.get("latency_size", setting["size"]))


def table(found: dict[str, Any], metric: str) -> list[list[str]]:
    """Rows of all settings that were run, the unconverted model first."""
    times = {(t["attention"], t["count"]): t["ratio"] for t in found.get("latency") or ()}
    rows = []
    for entry in sorted(found["summary"], key=lambda entry: entry["label"][0] != BASELINE):
        if entry["metric"] != metric:
            continue
        attention, criterion, count, stages, init = entry["label"]
        lost = (
            ""
            if attention == BASELINE
            else points(entry["difference"], entry["difference_interval"], sign=True)
        )
        row = [
            f"`{attention}`",
            criterion,
            count,
            stages,
            init,
            points(entry["mean"], entry["interval"]),
            lost,
        ]
        row.append(str(entry["runs"]))
        if times:
            ratio = times.get((attention, count))
            row.append("" if ratio is None else f"{100 * (1 - ratio):.1f} %")
        rows.append(row)
    return rows  # fmt: skip


def compared(found: dict[str, Any], metric: str, first: Label, second: Label) -> Pair | None:
    """Two settings, seed by seed; None without a seed that has both."""
    by_label: dict[tuple[str, ...], dict[int, float]] = {}
    for run in found["runs"]:
        by_label.setdefault(tuple(run["label"]), {})[run["seed"]] = run["metrics"][metric]
    one, other = by_label.get(first, {}), by_label.get(second, {})
    paired = [100 * (one[seed] - other[seed]) for seed in sorted(one.keys() & other.keys())]
    mean, half = interval(paired)
    return None if mean is None else (mean, half, len(paired))


def signed(pair: Pair) -> str:
    """What :func:`compared` found, as text."""
    return f"{pair[0]:+.2f}" + ("" if pair[1] is None else f" ± {pair[1]:.2f}")


def verdict(ours: Sequence[Pair], paper: float) -> str:
    """Whether ours point where the paper's does; ``open`` where an interval holds both signs."""
    if not ours:
        return "not run"
    words = set()
    for mean, half, _ in ours:
        sure = half is not None and abs(mean) > half
        same = (mean > 0) == (paper > 0) or (abs(mean) < DRAW and abs(paper) < DRAW)
        words.add(("agrees" if same else "differs") if sure else "open")
    return ", ".join(sorted(words))


def claims(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row a comparison: the paper's difference, ours by task, the verdict."""
    rows = []
    for text, first, second, paper in CLAIMS:
        ours, cells = [], []
        for task, found in results.items():
            pair = compared(found, TASKS[task], first, second)
            cells.append("" if pair is None else signed(pair))
            ours += [] if pair is None else [pair]
        if ours:
            rows.append(
                [
                    text,
                    "" if paper is None else f"{paper:+.2f}",
                    *cells,
                    "" if paper is None else verdict(ours, paper),
                ]
            )
    return rows  # fmt: skip


def losses(found: dict[str, Any], metric: str) -> dict[tuple[str, int], list[Pair | None]]:
    """By layer and number of blocks, chosen by ``residual``: differences from each of :data:`BASELINES`."""
    labels = {tuple(entry["label"]) for entry in found["summary"]}
    by_layer = {
        (one[0], int(one[2])): [
            compared(found, metric, one, (BASELINE, "", "", stages, "")) for stages in BASELINES
        ]
        for one in labels
        if one == label(one[0], "residual", one[2])
    }
    return dict(sorted(by_layer.items()))


def limits(found: dict[str, Any], metric: str) -> list[list[str]]:
    """:func:`losses` as rows of a table."""
    return [
        [f"`{attention}`", f"{count} of {DEPTH}", *("" if p is None else signed(p) for p in pairs)]
        for (attention, count), pairs in losses(found, metric).items()
    ]


def short(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """:func:`losses` of several tasks from the unconverted model trained as long, side by side: a row per layer and number of
    blocks that all tasks have, or that one has with every block replaced."""
    by_task = [losses(found, TASKS[task]) for task, found in results.items()]
    rows = []
    for key in sorted({key for by_layer in by_task for key in by_layer}):
        attention, count = key
        pairs = [by_layer[key][0] if key in by_layer else None for by_layer in by_task]
        if all(pairs) or (any(pairs) and count == DEPTH):
            told = ("" if pair is None else signed(pair) for pair in pairs)
            rows.append([f"`{attention}`", f"{count} of {DEPTH}", *told])
    return rows


def within(found: dict[str, Any], metric: str, allowed: float = 1.0) -> list[str]:
    """A line a baseline: up to how many blocks of each layer the mean loss is at most ``allowed`` points."""
    lines = []
    for place, name in enumerate(BASELINES.values()):
        most: dict[str, int] = {}
        for (attention, count), pairs in losses(found, metric).items():
            pair = pairs[place]
            if pair is not None:
                most[attention] = max(most.get(attention, 0), count if pair[0] >= -allowed else 0)
        if not most:
            continue  # this baseline was not run
        told = (f"`{a}` {f'{n} of {DEPTH}' if n else 'none of these'}" for a, n in most.items())
        lines.append(f"Mean loss within {allowed:.1f} point of {name}: {', '.join(told)}.")
    return lines
