"""Progress bars of work whose steps can be counted."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(doing: str, unit: str, *, show: bool, transient: bool = False) -> Progress:
    """A bar on stderr: ``doing [===   ] 12/40 unit``, with elapsed and remaining time.

    Args:
        doing: the work, such as ``scoring``.
        unit: plural of what is counted.
        show: False draws nothing.
        transient: take the bar away at the end.
    """
    columns = (
        TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=transient, disable=not show)


def training_bar(show: bool) -> Progress:
    """Steps with elapsed and remaining time and the loss, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True), disable=not show,
    )  # fmt: skip
