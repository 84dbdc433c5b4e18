"""Figures of the demo's report: scores, heads, kernels, fidelity, latency."""

from __future__ import annotations

import numpy as np

from dwattn.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, as_svg, pyplot
from dwattn.report.results import BlockScore, ConversionInfo, LatencyInfo


def _blocks_label(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))


def block_scores(scores: list[BlockScore], selected: dict[str, list[int]]) -> str:
    """A bar chart for each criterion, the chosen blocks hatched."""
    panels = [("variance", "Variance score Σ", [s.sigma for s in scores])]
    if all(s.residual is not None for s in scores):
        panels.append(("residual", "Residual", [s.residual or 0.0 for s in scores]))
    if all(s.perturbation is not None for s in scores):
        panels.append(("perturbation", "Perturbation", [s.perturbation or 0.0 for s in scores]))
    with pyplot("scores") as plt:
        figure, axes = plt.subplots(len(panels), 1, figsize=(5.4, 2.1 * len(panels)), squeeze=False)
        for axis, (criterion, title, values) in zip(axes[:, 0], panels, strict=True):
            chosen = set(selected.get(criterion, []))
            for score, value in zip(scores, values, strict=True):
                picked = score.index in chosen
                axis.bar(
                    score.index, value, width=0.78, color=BLUE if picked else GREY, hatch="///" if
                    picked else None, edgecolor=INK if picked else "none", linewidth=0.6,
                )  # fmt: skip
            axis.set_title(f"{title} (chosen: {_blocks_label(sorted(chosen))})")
            axis.set_xticks([s.index for s in scores])
            axis.grid(visible=True, axis="y")
        axes[-1, 0].set_xlabel("block")
        figure.tight_layout(h_pad=1.2)
        description = "; ".join(
            f"{title} by block: "
            + ", ".join(f"{s.index}: {v:.3g}" for s, v in zip(scores, values, strict=True))
            for _, title, values in panels
        )
        svg = as_svg(figure, "scores", description)
        plt.close(figure)
    return svg


def _short(value: float) -> str:
    """At most four characters where that is enough."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def head_map(scores: list[BlockScore]) -> str:
    """Heat map of Sigma: heads by blocks, with the values written in the cells."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    values = np.array([s.head_sigma for s in scores]).T
    with pyplot("heads") as plt:
        figure, axis = plt.subplots(figsize=(5.6, 0.42 * values.shape[0] + 1.0))
        # Logarithmic: a single restless head would leave all others one colour.
        scale = LogNorm(max(values.min(), 1e-12), max(values.max(), 1e-12))
        mesh = axis.pcolormesh(values, cmap="cividis", norm=scale, edgecolors="none", linewidth=0)
        for (head, block), value in np.ndenumerate(values):
            axis.text(
                block + 0.5, head + 0.5, _short(value), ha="center", va="center", fontsize=7.5,
                color="white" if scale(value) < 0.5 else "black",
            )  # fmt: skip
        axis.set_xticks(np.arange(values.shape[1]) + 0.5, [str(s.index) for s in scores])
        axis.set_yticks(np.arange(values.shape[0]) + 0.5, [str(h) for h in range(values.shape[0])])
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("block")
        axis.set_ylabel("head")
        ticks = LogLocator(subs=(1, 2, 5))
        bar = figure.colorbar(
            mesh, ax=axis, pad=0.02, aspect=14, ticks=ticks, format=ScalarFormatter()
        )
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.outline.set_visible(False)
        svg = as_svg(figure, "heads", "Variance score of every head of every block")
        plt.close(figure)
    return svg


def kernels(scores: list[BlockScore], blocks: list[int]) -> str:
    """Mean attention at the 3x3 displacements, a square for each head of the chosen blocks."""
    from matplotlib.colors import PowerNorm

    chosen = [s for s in scores if s.index in blocks]
    heads = max(len(s.mean_kernel) for s in chosen)
    top = max(float(np.max(s.mean_kernel)) for s in chosen)
    with pyplot("kernels") as plt:
        figure, axes = plt.subplots(
            len(chosen),
            heads,
            figsize=(0.72 * heads + 1.0, 0.72 * len(chosen) + 0.4),
            squeeze=False,
        )
        for row, score in zip(axes, chosen, strict=True):
            for head, axis in enumerate(row):
                kernel = np.array(score.mean_kernel[head])[::-1]
                mesh = axis.pcolormesh(kernel, cmap="cividis", norm=PowerNorm(0.5, 0, top))
                axis.set_aspect("equal")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
                if head == 0:
                    axis.set_ylabel(f"block {score.index}", rotation=0, ha="right", va="center")
                if score is chosen[0]:
                    axis.set_title(
                        f"head {head}" if head == 0 else str(head), loc="center", fontsize=10
                    )
        figure.subplots_adjust(wspace=0.12, hspace=0.12)
        bar = figure.colorbar(mesh, ax=axes.ravel().tolist(), pad=0.03, aspect=24, fraction=0.04)
        bar.outline.set_visible(False)
        svg = as_svg(
            figure,
            "kernels",
            f"Mean attention to the 3x3 neighbourhood, up to {top:.2g}, by block and head",
        )
        plt.close(figure)
    return svg


# Lines of the fidelity figure: (method, variant, criterion or None for any) -> label, colour,
# marker.
_LINES = (
    (("calibrated", "dw", "perturbation"), "dw, fitted, perturbation", BLUE, "o"),
    (("calibrated", "dw", "residual"), "dw, fitted, residual", PURPLE, "P"),
    (("calibrated", "dw", "variance"), "dw, fitted, variance", ORANGE, "s"),
    (("calibrated", "lowrank_dw", "residual"), "lowrank_dw, fitted", GREEN, "D"),
    (("mean-map", "dw", "residual"), "dw, mean map, no fit", GREY, "^"),
    (("gaussian", "dw", "residual"), "dw, Gaussian, no fit", RED, "v"),
)


def _by_count(
    conversions: list[ConversionInfo], line: tuple[str, str, str]
) -> dict[int, ConversionInfo]:
    """The conversions of one line by number of blocks; of several ranks the widest."""
    found: dict[int, ConversionInfo] = {}
    for item in conversions:
        if (item.method, item.variant, item.criterion) == line:
            known = found.get(len(item.blocks))
            if known is None or (item.rank or 0) > (known.rank or 0):
                found[len(item.blocks)] = item
    return dict(sorted(found.items()))


def fidelity_curve(conversions: list[ConversionInfo], metric: str) -> str:
    """``cosine`` or ``iou`` against the number of replaced blocks."""
    name = f"fidelity-{metric}"
    told: list[str] = []
    with pyplot(name) as plt:
        figure, axis = plt.subplots(figsize=(5.4, 3.0))
        for line, label, colour, marker in _LINES:
            points = {
                count: getattr(item.fidelity, metric)
                for count, item in _by_count(conversions, line).items()
            }
            if points:
                counts, values = [0, *points], [1.0, *points.values()]
                axis.plot(counts, values, color=colour, marker=marker, label=label, lw=1.8, ms=6)
                numbers = ", ".join(f"{count}: {value:.3f}" for count, value in points.items())
                told.append(f"{label}: {numbers}")
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("replaced blocks")
        axis.set_ylabel({"cosine": "cosine of patch features", "iou": "IoU"}.get(metric, metric))
        axis.set_xticks(sorted({0, *(len(c.blocks) for c in conversions)}))
        axis.grid(visible=True, axis="y")
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, columnspacing=1.2)
        svg = as_svg(figure, name, "; ".join(told))
        plt.close(figure)
    return svg


def latency_bars(info: LatencyInfo, number: int = 0) -> str:
    """Horizontal bars with the spread from the 20th to the 80th percentile and the ceiling as a
    line.
    """
    name = f"latency{number}"
    with pyplot(name) as plt:
        figure, axis = plt.subplots(figsize=(5.6, 0.46 * len(info.entries) + 0.7))
        places = range(len(info.entries))[::-1]
        for place, entry in zip(places, info.entries, strict=True):
            ceiling = entry.key == "removed"
            axis.barh(
                place,
                entry.median_ms,
                height=0.62,
                color=GREY if entry.key in ("original", "removed") else BLUE,
            )
            axis.plot(
                [entry.p20_ms, entry.p80_ms], [place, place], color=INK, lw=1.2, marker="|", ms=7
            )
            axis.annotate(
                f"{entry.median_ms:.1f}", (entry.p80_ms, place), xytext=(7, 0),
                textcoords="offset points", va="center", ha="left",
            )  # fmt: skip
            if ceiling:
                axis.axvline(entry.median_ms, color=INK, lw=1, ls=(0, (4, 3)))
        axis.set_yticks(list(places), [entry.label for entry in info.entries])
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlim(0, 1.16 * max(entry.p80_ms for entry in info.entries))
        axis.set_xlabel(
            f"ms per image, batch {info.batch}, {info.threads} thread{'s' * (info.threads > 1)}"
        )
        told = ", ".join(f"{entry.label}: {entry.median_ms:.1f} ms" for entry in info.entries)
        svg = as_svg(figure, name, told)
        plt.close(figure)
    return svg
