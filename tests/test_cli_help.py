"""The command's help and completion, which import nothing slow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dwattn
from dwattn.cli import app
from test_cli import process


@pytest.mark.parametrize("name", ["", *(name for name in typer.main.get_command(app).commands)])
def test_help_is_short_and_whole(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "-h"])
    assert shown.exit_code == 0, shown.output
    usage = shown.output.partition("\n")[0]
    assert not name or not re.search(r"\{[A-Z]|\[\[", usage)
    assert name or "..." not in shown.output.partition("Commands:")[2]


def test_shells_complete_commands() -> None:
    asked = {"_DWATTN_COMPLETE": "complete_bash", "COMP_WORDS": "dwattn s", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, env=asked, prog_name="dwattn")
    assert result.stdout.split() == ["score", "select", "study"]


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, dwattn.cli\n"
        "heavy = {'torch', 'timm', 'transformers', 'onnx', 'onnxruntime', 'matplotlib', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    source = str(Path(dwattn.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source}
    )
    started = process("--help")
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    for name in (
        "demo",
        "doctor",
        "score",
        "select",
        "replace",
        "finetune",
        "study",
        "export",
        "report",
    ):
        assert name in output
