"""The package's main job end to end, on a real pretrained model and real photographs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwattn.report.results import Results

__all__ = ["run"]


def run(
    out: str | os.PathLike[str], *, quick: bool = False, json: bool = False, **settings: Any
) -> Results:
    """Score, select, replace, calibrate, measure, export and report.

    Args:
        out: folder for results.json, report.html, pictures, the converted model and its ONNX file.
        quick: fewer photos and conversions.
        json: keep stdout free for the caller; progress goes to stderr in either case.
        settings: other fields of :class:`dwattn.demo.journey.Settings`.

    Raises:
        DataError: the model or the photos are not installed.
    """
    from pathlib import Path

    from dwattn.demo.journey import Settings, travel

    return travel(Settings(out=Path(out), quick=quick, **settings), summary=not json)
