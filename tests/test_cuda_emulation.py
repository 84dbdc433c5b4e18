"""The CUDA kernels themselves, run on the CPU under sanitizers and judged against fp64 loops.

The programs in ``tests/cuda`` are linked with the same ``.cu`` files that nvcc compiles for a GPU;
``tests/cuda/simt_host.h`` says how threads are scheduled and what is checked on the way.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import cuda_sources


@pytest.mark.slow
@pytest.mark.parametrize("program", cuda_sources.programs())
def test_kernels_agree_with_the_definition(program: str, tmp_path: Path) -> None:
    kernels = cuda_sources.kernel_objects(cuda_sources.linked(program))
    executable = tmp_path / program
    cuda_sources.link([cuda_sources.program_object(program), *kernels], executable)
    done = cuda_sources.run(executable)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"\b0 failure", done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("divergent-barrier", "after some threads of the block returned"),
        ("two-barriers", "different __syncthreads"),
        ("early-exit", "after some threads of the block returned"),
        ("half-a-warp", "deadlock"),
        ("mixed-collectives", "different warp collectives"),
        ("unwaited-copy", "asynchronous copies in flight"),
        ("misaligned-copy", "not aligned"),
        ("unrounded-tf32", "not rounded to TF32"),
    ],
)
def test_the_emulation_refuses_broken_kernels(rule: str, sentence: str, tmp_path: Path) -> None:
    executable = tmp_path / "test_emulation"
    cuda_sources.link([cuda_sources.program_object("test_emulation")], executable)
    done = cuda_sources.run(executable, rule)
    assert done.returncode != 0
    assert sentence in done.stderr
