"""One self-contained HTML file that shows what a run found: ``write(results, path)``.

The page needs no network: styles, figures (SVG) and pictures (base64) are inside it.
"""

from __future__ import annotations

import base64
import mimetypes
import os
from pathlib import Path
from typing import Any

from dwattn.errors import DataError
from dwattn.files import write_atomically
from dwattn.report.results import ConversionInfo, Results

__all__ = ["Results", "write"]


def write(
    results: Results | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    pictures: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the HTML report; it appears whole or not at all.

    Args:
        results: a run's results, or the file they were saved to.
        path: the HTML file.
        pictures: folder that the pictures' names are relative to; default the results file's
            folder, or the report's.

    Raises:
        DataError: the results file is missing or malformed.
    """
    path = Path(path)
    folder = path.parent
    if not isinstance(results, Results):
        folder = Path(results).parent
        results = Results.load(results)
    html = render(results, Path(pictures) if pictures is not None else folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, DataError) as temporary:
        temporary.write_text(html, "utf-8")
    return path


def render(results: Results, pictures: Path) -> str:
    """The page as text; ``pictures`` is the folder of the picture files."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dwattn.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("template.html")
    return page.render(
        r=results,
        main=_headline(results),
        rows=sorted(results.conversions, key=lambda item: len(item.blocks)),
        figures=_figures(results),
        speed=_speed(results),
        embed=lambda name: _embed(pictures / name),
    )


def _headline(results: Results) -> ConversionInfo | None:
    """The conversion whose numbers stand at the top."""
    return results.conversion(results.headline) or next(iter(results.conversions), None)


def _figures(results: Results) -> dict[str, Any]:
    from dwattn.report import figures

    drawn: dict[str, Any] = {
        "latency": [figures.latency_bars(i, n) for n, i in enumerate(results.latency)]
    }
    if results.scores:
        drawn["scores"] = figures.block_scores(results.scores, results.selected)
        drawn["heads"] = figures.head_map(results.scores)
        main = _headline(results)
        chosen = main.blocks if main else next(iter(results.selected.values()), [])
        if chosen and any(score.mean_kernel for score in results.scores):
            drawn["kernels"] = figures.kernels(results.scores, chosen)
    if results.conversions:
        drawn["cosine"] = figures.fidelity_curve(results.conversions, "cosine")
        drawn["iou"] = figures.fidelity_curve(results.conversions, "iou")
    return drawn


def _speed(results: Results) -> list[dict[str, Any]]:
    """By latency table: milliseconds and the share saved by each converted model and by the
    ceiling.
    """
    rows = []
    for info in results.latency:
        before = info.median("original")
        if before:
            rows.append(
                {
                    "threads": info.threads,
                    "before": before,
                    "saved": {e.key: 1 - e.median_ms / before for e in info.entries},
                    "entries": {e.key: e for e in info.entries},
                }
            )
    return rows


def _embed(file: Path) -> str:
    """A picture as a data URL.

    Raises:
        DataError: the file is missing.
    """
    try:
        content = base64.b64encode(file.read_bytes()).decode("ascii")
    except OSError as error:
        raise DataError(
            f"The picture {file} is missing ({error}). Keep the folder 'pictures' beside the results file, or "
            "pass pictures=FOLDER."
        ) from error
    return f"data:{mimetypes.guess_type(file.name)[0] or 'image/png'};base64,{content}"
