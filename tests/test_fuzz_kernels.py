"""The CUDA kernels, emulated, on drawn sizes, layouts and options; judged as on their listed cases.

A failure prints a seed: the program with it and 1 repeats the case.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support import cuda_sources
from support.fuzzing import COUNTS, FACTOR

#: Those that draw cases: all but the tests of the emulation itself.
PROGRAMS = [name for name in cuda_sources.programs() if name != "test_emulation"]
CASES = 24


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_agree_with_the_definition_on_drawn_cases(program: str, tmp_path: Path) -> None:
    kernels = cuda_sources.kernel_objects(cuda_sources.linked(program))
    executable = tmp_path / program
    cuda_sources.link([cuda_sources.program_object(program), *kernels], executable)
    seed = 1 if FACTOR == 1 else random.randrange(2**32 - CASES * FACTOR)
    done = cuda_sources.run(executable, str(seed), str(CASES * FACTOR), timeout=3000)
    COUNTS[program] += CASES * FACTOR
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith(f"{CASES * FACTOR} case(s), 0 failure(s)\n")
