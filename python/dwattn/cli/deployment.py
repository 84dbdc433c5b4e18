"""``dwattn build | bench | verify | compare | golden``: the commands of ``dwattn-deploy``, which
need no torch and are defined there once, options and all.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from dwattn.deploy.commands import SUMMARIES, main


def add_to(app: typer.Typer) -> None:
    """Add them to the ``dwattn`` command."""
    untouched = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    for name, summary in SUMMARIES.items():
        app.command(name, help=summary, context_settings=untouched)(_passed_on(name))


def _passed_on(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        raise typer.Exit(main([name, *context.args], program="dwattn"))

    return run
