"""How the reports' figures are drawn: by matplotlib, as SVG that takes its text colour from the page.

Colours are distinguishable with the common colour-vision deficiencies, readable on light and dark,
and never the only carrier: chosen blocks also have a hatch, lines have their own markers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dwattn.errors import DataError

BLUE, ORANGE, GREEN, RED, GREY = "#2a86c8", "#d98a00", "#12966f", "#d65a20", "#8b95a1"
PURPLE = "#8a5cc2"
# matplotlib cannot take colours from the page: these stand in for the page's and are replaced in the SVG text.
INK, FAINT = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@contextmanager
def pyplot(name: str) -> Iterator[Any]:
    """``matplotlib.pyplot`` in the reports' style, for a figure called ``name``.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DataError(
            f"The figures need matplotlib ({error}); install it with pip install 'dwattn[demo]'."
        ) from error

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # A fixed salt makes ids, and so the page, the same from run to run.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        yield plt


def as_svg(figure: Any, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page and has a text for screen
    readers.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) ?width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) ?height="[^"]*"', r"\1", text, count=1)
    # All figures share one page and so one space of ids.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{name}-", text)
    escaped = description.replace("&", "&amp;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)
