"""Figures of a study: what each replacement costs and saves, which layers were chosen, and how attention varies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwattn.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, as_svg, pyplot
from dwattn.scores import LayerScore, Scores

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#7a7200", "#00838f", "#a0527a")
_MARKERS = "osD^vPX*"

#: The paper's Table 2 on ViT-L (COCO, ImageNet) and ViT-B (COCO): layer, share of the blocks, time over MHSA's,
#: difference in points.
PAPER = (
    ("conv", 12 / 24, 173.5 / 161.4, -0.19), ("dw", 12 / 24, 133.6 / 161.4, -0.08),
    ("spvit", 10 / 24, 133.3 / 161.4, -0.98), ("ens_dw", 10 / 24, 131.1 / 161.4, -1.61),
    ("dw", 16 / 24, 126.1 / 161.4, -1.39), ("ens_dw", 12 / 24, 124.5 / 161.4, -2.11),
    ("dw", 6 / 12, 40.8 / 49.9, -1.16), ("ens_dw", 6 / 12, 38.1 / 49.9, -2.83),
    ("dw", 12 / 24, 133.6 / 161.4, -0.77), ("ens_dw", 10 / 24, 131.1 / 161.4, -1.26),
    ("dw", 16 / 24, 126.1 / 161.4, -1.34), ("ens_dw", 12 / 24, 124.5 / 161.4, -1.57),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One setting: difference to the unconverted model in points with half its interval, and time over its."""

    attention: str
    criterion: str
    count: str
    difference: float
    interval: float | None = None
    ratio: float | None = None

    @property
    def blocks(self) -> int | None:
        return int(self.count) if self.count.isdigit() else None


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by name, in the order of first appearance."""
    return {
        name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def by_count(points: Sequence[Point], metric: str) -> str:
    """Difference over the number of replaced blocks, one line per layer and criterion."""
    lines: dict[str, list[tuple[int, Point]]] = {}
    for point in points:
        if point.blocks is not None:
            name = f"{point.attention}, {point.criterion}"
            lines.setdefault(name, []).append((point.blocks, point))
    with pyplot("by-count") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 3.4))
        for name, (colour, marker) in _styles(lines).items():
            found = sorted(lines[name], key=lambda pair: pair[0])
            axis.errorbar(
                [count for count, _ in found], [p.difference for _, p in found],
                yerr=[p.interval or 0.0 for _, p in found], color=colour, marker=marker, label=name, lw=1.4,
                ms=5, capsize=2, elinewidth=0.8,
            )  # fmt: skip
        axis.axhline(-1, color=INK, lw=1, ls=(0, (4, 3)))
        axis.set_xticks(sorted({count for found in lines.values() for count, _ in found}))
        axis.set_xlabel("replaced blocks")
        axis.set_ylabel(f"{metric}, difference in points")
        axis.grid(visible=True, axis="y")
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, columnspacing=1.2)
        told = "; ".join(
            f"{name}: " + ", ".join(f"{count} blocks {p.difference:+.2f}" for count, p in found)
            for name, found in lines.items()
        )
        svg = as_svg(figure, "by-count", told)
        plt.close(figure)
    return svg


def draw_pareto(axis: Any, points: Sequence[Point], metric: str) -> None:
    """Difference over time relative to the unconverted model on a matplotlib axis, the paper's points in grey."""
    timed = [p for p in points if p.ratio is not None]
    for name, (colour, marker) in _styles(p.attention for p in timed).items():
        for number, point in enumerate(p for p in timed if p.attention == name):
            axis.errorbar(
                point.ratio, point.difference, yerr=point.interval, color=colour, marker=marker, ms=6,
                capsize=2, elinewidth=0.8, ls="none", label=name if number == 0 else None,
            )  # fmt: skip
            axis.annotate(
                point.count, (point.ratio, point.difference), xytext=(5, 3), fontsize=8,
                textcoords="offset points",
            )  # fmt: skip
    for number, (_, _, ratio, lost) in enumerate(PAPER):
        label = "the paper's (Orin Nano)" if number == 0 else None
        axis.plot(ratio, lost, color=GREY, marker="o", mfc="none", ls="none", ms=5, label=label)
    axis.axhline(-1, color=INK, lw=1, ls=(0, (4, 3)))
    axis.set_xlabel("time over the unconverted model's")
    axis.set_ylabel(f"{metric}, difference in points")
    axis.grid(visible=True, axis="y")
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=3, columnspacing=1.2)


def pareto(points: Sequence[Point], metric: str) -> str:
    """:func:`draw_pareto` as a figure of the page."""
    with pyplot("pareto") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 3.6))
        draw_pareto(axis, points, metric)
        told = "; ".join(
            f"{p.attention} {p.count}: {p.ratio:.3f}, {p.difference:+.2f}"
            for p in points
            if p.ratio is not None
        )
        svg = as_svg(figure, "pareto", told)
        plt.close(figure)
    return svg


def speedup(latency: Sequence[Mapping[str, Any]], heads: int) -> str:
    """Time saved over the number of replaced heads, by layer, whole blocks and scattered heads apart."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in latency:
        number, _, unit = entry["count"].partition(" ")
        name = entry["attention"] + (", scattered" if unit else "")
        count = int(number) * (1 if unit else heads)
        lines.setdefault(name, [(0, 0.0)]).append((count, 100 * (1 - entry["ratio"])))
    with pyplot("speedup") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 3.2))
        for name, (colour, marker) in _styles(lines).items():
            counts, saved = zip(*sorted(lines[name]), strict=True)
            axis.plot(counts, saved, color=colour, marker=marker, label=name, lw=1.6, ms=5)
        axis.set_xlabel("replaced heads")
        axis.set_ylabel("time saved, %")
        axis.grid(visible=True, axis="y")
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3, columnspacing=1.2)
        told = "; ".join(
            f"{name}: "
            + ", ".join(f"{count} heads {value:.1f} %" for count, value in sorted(found))
            for name, found in lines.items()
        )
        svg = as_svg(figure, "speedup", told)
        plt.close(figure)
    return svg


def chosen_blocks(chosen: Mapping[str, Sequence[Sequence[int]]], depth: int) -> str:
    """One row per selection, one column per block; the darker, the more seeds chose it.

    Args:
        chosen: for each selection the chosen blocks of each run.
    """
    shares = np.array(
        [[np.mean([b in run for run in runs]) for b in range(depth)] for runs in chosen.values()]
    )
    with pyplot("chosen") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 0.34 * len(chosen) + 0.9))
        axis.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.2, edgecolors=INK, linewidth=0.3)
        for (row, block), share in np.ndenumerate(shares):
            if 0 < share < 1:
                axis.text(
                    block + 0.5, row + 0.5, f"{share:.1f}", ha="center", va="center", fontsize=8
                )
        axis.set_xticks(np.arange(depth) + 0.5, [str(block) for block in range(depth)])
        axis.set_yticks(np.arange(len(chosen)) + 0.5, list(chosen))
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.set_xlabel("block")
        svg = as_svg(figure, "chosen", "Share of the seeds that chose each block, by selection")
        plt.close(figure)
    return svg


def before_and_after(before: Scores, after: Scores) -> str:
    """Sigma of every block before and after fine-tuning, each relative to its mean over the blocks."""
    with pyplot("tuning") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 2.6))
        told = []
        for shift, (scores, label, colour) in zip(
            (-0.2, 0.2), ((before, "pretrained", GREY), (after, "fine-tuned", BLUE)), strict=True
        ):
            blocks = np.array([layer.block for layer in scores.layers])
            values = np.array(scores.sigma_blocks)
            axis.bar(blocks + shift, values / values.mean(), width=0.38, color=colour, label=label)
            told.append(f"{label}: " + ", ".join(f"{value:.3g}" for value in values))
        axis.set_xticks([layer.block for layer in before.layers])
        axis.set_xlabel("block")
        axis.set_ylabel("Σ over its mean")
        axis.grid(visible=True, axis="y")
        axis.legend()
        svg = as_svg(figure, "tuning", "; ".join(told))
        plt.close(figure)
    return svg


def aligned(deviation: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """``(n, n)`` patch-patch deviations with the query moved to the centre: ``(2H-1, 2W-1)`` means over queries."""
    height, width = grid
    total, count = np.zeros((2, 2 * height - 1, 2 * width - 1))
    rows = deviation.reshape(height, width, height, width)
    for i in range(height):
        for j in range(width):
            window = (
                slice(height - 1 - i, 2 * height - 1 - i),
                slice(width - 1 - j, 2 * width - 1 - j),
            )
            total[window] += rows[i, j]
            count[window] += 1
    return total / count


def deviations(scores: Scores) -> str | None:
    """The aligned deviations of all heads of the first block, the one of least Sigma and the one of most.

    None where the scores hold no maps.
    """
    ranked = sorted(scores.layers, key=lambda layer: layer.sigma_block)
    shown = list({id(layer): layer for layer in (scores.layers[0], ranked[0], ranked[-1])}.values())
    if any(layer.std_map is None for layer in shown):
        return None
    heads = max(layer.num_heads for layer in shown)
    height, width = scores.grid
    with pyplot("deviations") as plt:
        figure, axes = plt.subplots(
            len(shown), heads, figsize=(0.9 * heads + 1.0, 0.9 * len(shown) + 0.4), squeeze=False
        )
        for row, layer in zip(axes, shown, strict=True):
            for head, axis in enumerate(row):
                axis.set_xticks([])
                axis.set_yticks([])
                if head >= layer.num_heads:
                    axis.axis("off")
                    continue
                axis.imshow(aligned(_patch_map(layer, head, scores), scores.grid), cmap="cividis")
                box = plt.Rectangle((width - 2.5, height - 2.5), 3, 3, fill=False, ec=RED, lw=1.2)
                axis.add_patch(box)
            row[0].set_ylabel(f"block {layer.block}", rotation=0, ha="right", va="center")
        figure.subplots_adjust(wspace=0.1, hspace=0.1)
        svg = as_svg(
            figure, "deviations", "Standard deviation of attention by displacement from the query"
        )
        plt.close(figure)
    return svg


def _patch_map(layer: LayerScore, head: int, scores: Scores) -> np.ndarray:
    assert layer.std_map is not None
    found: np.ndarray = layer.std_map[head].float().numpy()
    patches = scores.grid[0] * scores.grid[1]
    return found[-patches:, -patches:]


def heads_by_score(scores: Scores, chosen: Mapping[str, set[tuple[int, int]]]) -> str:
    """Sigma of every head by block; the heads of each selection marked.

    Args:
        chosen: ``(block, head)`` pairs by selection.
    """
    with pyplot("head-scores") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 3.2))
        for layer in scores.layers:
            axis.plot(
                [layer.block] * layer.num_heads,
                layer.sigma.tolist(),
                color=GREY,
                marker="_",
                ls="none",
                ms=9,
            )
        places = {
            (y.block, h): float(y.sigma[h]) for y in scores.layers for h in range(y.num_heads)
        }
        for shift, (name, heads) in enumerate(chosen.items()):
            offset = 0.22 * (shift + 1) * (-1) ** shift
            at = [
                (block + offset, places[block, head])
                for block, head in sorted(heads)
                if (block, head) in places
            ]
            if at:
                axis.plot(*zip(*at, strict=True), color=_COLOURS[shift], marker="oD^v"[shift % 4], ls="none", ms=4,
                          label=name)  # fmt: skip
        axis.set_yscale("log")
        axis.set_xticks([layer.block for layer in scores.layers])
        axis.set_xlabel("block")
        axis.set_ylabel("Σ of a head")
        if chosen:
            axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=3)
        svg = as_svg(figure, "head-scores", "Variance score of every head, and which were chosen")
        plt.close(figure)
    return svg
