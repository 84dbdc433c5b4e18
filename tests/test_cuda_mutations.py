"""Bugs planted into copies of the CUDA kernels: the emulation has to find every one of them.

``tests/cuda/mutations_*.json`` lists them: what to replace in which file, and the program that has to fail.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from support import cuda_sources

pytestmark = pytest.mark.thorough


class Bug(NamedTuple):
    file: str
    find: str
    replace: str
    what: str
    program: str


BUGS = [
    Bug(**bug)
    for path in sorted((cuda_sources.ROOT / cuda_sources.PROGRAMS).glob("mutations_*.json"))
    for bug in json.loads(path.read_text(encoding="utf-8"))
]


def depends(source: Path, changed: Path, kernels: Path) -> bool:
    """Whether a source is the changed file or includes it, directly or not."""
    if source == changed:
        return True
    names = re.findall(r'#include "kernels/cuda/([^"]+)"', source.read_text(encoding="utf-8"))
    return any(depends(kernels / name, changed, kernels) for name in names)


def test_every_program_has_bugs_to_find() -> None:
    programs = set(cuda_sources.programs()) - {"test_emulation"}  # that one breaks rules itself
    assert {bug.program for bug in BUGS} == programs
    assert len(BUGS) >= 12


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    for folder in ("csrc/kernels", cuda_sources.PROGRAMS):
        shutil.copytree(cuda_sources.ROOT / folder, tmp_path / folder)
    changed = tmp_path / bug.file
    text = changed.read_text(encoding="utf-8")
    assert text.count(bug.find) == 1, "the place of the bug is not unique any more"
    changed.write_text(text.replace(bug.find, bug.replace), encoding="utf-8")

    kernels = tmp_path / cuda_sources.KERNELS
    program = tmp_path / cuda_sources.PROGRAMS / f"{bug.program}.cpp"
    parts = []
    for source in (program, *(kernels / name for name in cuda_sources.linked(bug.program))):
        if depends(source, changed, kernels):
            parts.append(tmp_path / f"{source.stem}.o")
            cuda_sources.compile_object(source, parts[-1], tree=tmp_path)
        elif source == program:
            parts.append(cuda_sources.program_object(bug.program))
        else:
            parts += cuda_sources.kernel_objects([source.name])
    executable = tmp_path / bug.program
    cuda_sources.link(parts, executable)
    done = cuda_sources.run(executable)
    said = done.stdout + done.stderr
    assert done.returncode != 0, "the bug went unnoticed"
    assert re.search(r"FAIL |ERROR: AddressSanitizer|simt: |runtime error", said), said[-2000:]
