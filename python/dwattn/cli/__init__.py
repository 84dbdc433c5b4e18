"""The ``dwattn`` command: thin layers over the library, in the order a person uses them.

Exit codes: 0 done, 1 an error said in one sentence, 2 wrong usage, 130 interrupted, 143 terminated.
torch and the model libraries are imported by the commands that need them, so that ``dwattn --help``
answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dwattn.cli import deployment, pipeline, refinement, study, tools, training

__all__ = ["app"]

app = typer.Typer(
    name="dwattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replace attention layers of pretrained Vision Transformers by fixed 3x3 aggregation.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import dwattn

        typer.echo(f"dwattn {dwattn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


app.command("demo")(tools.demo)
app.command("doctor")(tools.doctor)
app.command("score")(pipeline.score)
app.command("select")(pipeline.select)
app.command("refine")(refinement.refine)
app.command("replace")(pipeline.replace)
app.command("finetune")(training.finetune)
app.command("study")(study.study)
app.command("export")(pipeline.export)
deployment.add_to(app)
app.command("report")(tools.report)
