"""``dwattn demo | doctor | report``: the demonstration, the state of the installation, the demo's report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dwattn.cli.common import JsonOption, command, emit, note
from dwattn.errors import DataError
from dwattn.files import require_writable


@command
def demo(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for the report and everything it shows."),
    ] = Path("dwattn-demo"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer photos and settings: a few minutes instead of many."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run all steps on a real model and real photos, and write a report."""
    from dwattn.demo import run

    result = run(out, quick=quick, json=as_json)
    if as_json:
        emit(result, as_json)


@command
def doctor(as_json: JsonOption = False) -> None:
    """Show what is installed, what was built, which backend will run, and why not the others."""
    from dwattn import environment

    collected = environment.collect()
    if as_json:
        emit(collected, as_json)
    else:
        emit(environment.explain(collected), as_json)


@command
def report(
    results: Annotated[
        Path,
        typer.Argument(metavar="RESULTS", help="Folder or results.json written by dwattn demo."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="HTML file to write; default: beside the results."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the HTML report again from the demo's results."""
    from dwattn.report import write

    if results.is_dir():
        results = results / "results.json"
    out = out or results.with_name("report.html")
    require_writable(out, DataError, [results])
    path = write(results, out)
    emit({"report": str(path)}, True) if as_json else note(f"Wrote {path}.")
