"""What is in a built wheel. ``DWATTN_WHEEL=dist/dwattn-....whl pytest tests/test_wheel.py``."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import pytest

WHEEL = os.environ.get("DWATTN_WHEEL")
#: The budget of the documentation, for a CPU wheel.
LARGEST_BYTES = 2_000_000

pytestmark = pytest.mark.skipif(WHEEL is None, reason="DWATTN_WHEEL names no wheel.")


@pytest.fixture(scope="module")
def names() -> list[str]:
    with zipfile.ZipFile(str(WHEEL)) as wheel:
        return wheel.namelist()


def test_the_size_is_within_its_budget() -> None:
    assert Path(str(WHEEL)).stat().st_size < LARGEST_BYTES


def test_both_modules_and_all_data_files_are_in_it(names: list[str]) -> None:
    compiled = sorted(name for name in names if name.endswith(".so"))
    assert [re.sub(r"\..*", "", Path(name).name) for name in compiled] == ["_C", "_native"]
    source = Path(__file__).parents[1] / "python"
    expected = {
        str(path.relative_to(source))
        for path in (source / "dwattn").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert expected <= set(names)


def test_nothing_else_is_in_it(names: list[str]) -> None:
    strangers = [name for name in names if not re.match(r"dwattn(-[^/]+\.dist-info)?/", name)]
    assert strangers == []
    assert not [name for name in names if "__pycache__" in name]


def test_no_library_was_copied_in(names: list[str]) -> None:
    assert not [name for name in names if "libtorch" in name or ".libs/" in name]
