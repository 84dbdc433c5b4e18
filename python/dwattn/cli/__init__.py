"""The ``dwattn`` command: thin layers over the library, in the order a person uses them.

Exit codes: 0 done, 1 an error said in one sentence, 2 wrong usage, 130 interrupted, 143 terminated.
torch and the model libraries are imported by the commands that need them, so that ``dwattn --help``
answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dwattn.cli import deployment, pipeline, refinement, study, tools, training

__all__ = ["app"]

app = typer.Typer(
    name="dwattn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make pretrained Vision Transformers faster: replace softmax attention that hardly varies between "
    "images by a 3x3 depthwise aggregation. In order: score, select (or refine), replace, export.",
)


class Command(TyperCommand):
    """Its usage line names arguments as they are typed, where typer sets braces and brackets around them."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = super().collect_usage_pieces(ctx)
        return [p.strip("{}").replace("[[", "[").replace("]]", "]") for p in pieces]


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


#: With summaries that fit on a line of ``dwattn --help``.
_COMMANDS = (
    ("demo", tools.demo, "Run all steps on a real model and real photos."),
    ("doctor", tools.doctor, "Show what is installed and built, and which backend will run."),
    ("score", pipeline.score, "Measure how much every head's attention map varies."),
    ("select", pipeline.select, "Choose the blocks or heads whose attention varies least."),
    ("refine", refinement.refine, "Choose blocks by trying out whole sets of them."),
    ("replace", pipeline.replace, "Replace what the plan names, and fit the new weights."),
    ("finetune", training.finetune, "Recover accuracy by training."),
    ("study", study.study, "Compare variants, selections and recipes on a task."),
    ("export", pipeline.export, "Write ONNX, checked against PyTorch on onnxruntime."),
)
for _name, _function, _summary in _COMMANDS:
    app.command(_name, cls=Command, short_help=_summary)(_function)
deployment.add_to(app)
app.command("report", cls=Command, short_help="Write the demo's HTML report again.")(tools.report)
