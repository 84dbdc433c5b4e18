"""Bugs planted into copies of the CUDA kernels: the emulation has to find every one of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from support import cuda_sources

pytestmark = pytest.mark.slow


class Bug(NamedTuple):
    name: str
    file: str
    before: str
    after: str
    program: str = "test_dw_attention"


BUGS = (
    Bug("no barrier after the copies", "dw_attention.cu",
        "      __syncthreads();  // this step's stage", "      // this step's stage"),
    Bug("no barrier before the tile is read", "dw_attention.cu",
        "    __syncthreads();  // the tile", "    // the tile"),
    Bug("no barrier before the history moves", "dw_attention.cu",
        "    __syncthreads();  // nobody", "    // nobody"),
    Bug("a barrier that one warp does not reach", "dw_attention.cu",
        "    __syncthreads();  // the tile", "    if (threadIdx.x < 96) __syncthreads();  // the tile"),
    Bug("one group of copies too many in flight", "dw_attention.cu",
        "cp_async_wait<kStages<T> - 2>", "cp_async_wait<kStages<T> - 1>"),
    Bug("copies into the stage that is read", "dw_attention.cu",
        "loader.next(ahead)", "loader.next(stage)"),
    Bug("fragments of Wv exchanged", "tile_product.cuh",
        "lane / 16 * 8 + lane % 8", "lane / 8 % 2 * 8 + lane % 8"),
    Bug("fragments of x exchanged", "tile_product.cuh",
        "lane % 16, 2 * k + lane / 16", "lane % 16, 2 * k + lane / 8 % 2"),
    Bug("two chunks in one place", "tile_product.cuh",
        "chunk) ^ (row / 2 % 8)", "chunk) | (row / 2 % 8)"),
    Bug("accumulators kept from tile to tile", "dw_attention.cu",
        "    product.clear();", "    if (tile == 0) product.clear();"),
    Bug("an output before its neighbour", "dw_attention.cu",
        "kTileRows - window.width - 1", "kTileRows - window.width"),
    Bug("a history without the last token", "dw_attention.cu",
        "return 2 * (window_width + 1);", "return 2 * (window_width + 1) - 1;"),
    Bug("a history that stays", "dw_attention.cu", "    lines.advance();", "    // stays"),
    Bug("a history that is not zero at first", "dw_attention.cu", "  lines.clear();", ""),
    Bug("no row of neighbours above a band", "dw_attention.cu",
        "start = max(begin - 1, 0);", "start = begin;"),
    Bug("no zeros left of the grid", "dw_attention.cu", "      right = ctx;", ""),
    Bug("no zeros below the grid", "dw_attention.cu",
        "row + 1 < window.height ?", "row < window.height ?"),
    Bug("x read behind its end", "dw_attention.cu",
        "rest > 0 ? (rest + kRowStep - 1) / kRowStep : 0", "rest != 0 ? kRowsOfX : 0"),
    Bug("Wv read behind its end", "dw_attention.cu", "i < wv_rows_ ? left : 0", "left"),
    Bug("lines of V out of line", "dw_attention.cu",
        "(sizeof(T) == 2 ? 8 : 4)", "(sizeof(T) == 2 ? 7 : 3)"),
    Bug("16-byte copies of odd rows", "dw_attention.cu", "p.dim % n == 0 && ", ""),
    Bug("the stride of x taken for packed", "dw_attention.cu",
        "* p_.x_stride_token + chunk_", "* p_.dim + chunk_"),
    Bug("the context forgotten", "dw_attention.cu",
        "ctx = coefficient(coefficients, 9);", "ctx = zero2();"),
    Bug("the bias forgotten", "dw_attention.cu", "make_float2(v + bias[column], w +",
        "make_float2(v, w +"),
    Bug("a prefix row in the mean", "dw_context.cu",
        "p.num_prefix * p.x_stride_token", "(p.num_prefix > 0) * 0"),
    Bug("an image that does not exist", "dw_context.cu",
        "first + i < p.batch ? first + i : p.batch - 1", "first + i"),
    Bug("no barrier in the mean", "patch_mean.cuh",
        "  __syncthreads();\n", "\n", "test_dw_aggregate"),
    Bug("bias outside the grid", "dw_aggregate.cu", ": zero2();\n    }\n    return strip",
        ": bias;\n    }\n    return strip", "test_dw_aggregate"),
    Bug("a row behind the last one", "dw_aggregate.cu",
        "if (row + i < p.height)", "if (row < p.height)", "test_dw_aggregate"),
    Bug("the second of one channel", "pairs.cuh",
        "if (valid > 1) p[1]", "if (valid > 0) p[1]", "test_dw_aggregate"),
)  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> cuda_sources.Objects:
    cuda_sources.need_emulation()
    return cuda_sources.Objects(tmp_path_factory.mktemp("objects"))


def includes(kernel: Path, header: str, seen: set[str] | None = None) -> bool:
    """Whether a kernel includes a header of its folder, directly or not."""
    seen = set() if seen is None else seen
    for name in re.findall(r'#include "kernels/cuda/([^"]+)"', kernel.read_text(encoding="utf-8")):
        if name == header:
            return True
        if name not in seen:
            seen.add(name)
            if includes(kernel.parent / name, header, seen):
                return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug, objects: cuda_sources.Objects, tmp_path: Path) -> None:
    for folder in ("csrc/kernels", cuda_sources.PROGRAMS):
        shutil.copytree(cuda_sources.ROOT / folder, tmp_path / folder)
    changed = tmp_path / cuda_sources.KERNELS / bug.file
    source = changed.read_text(encoding="utf-8")
    assert source.count(bug.before) == 1, "the place of the bug is not unique any more"
    changed.write_text(source.replace(bug.before, bug.after), encoding="utf-8")

    parts = [objects.program(bug.program)]
    for name in cuda_sources.linked(bug.program):
        kernel = tmp_path / cuda_sources.KERNELS / name
        if kernel == changed or includes(kernel, bug.file):
            part = tmp_path / f"{kernel.stem}.o"
            cuda_sources.compile_object(kernel, part, tree=tmp_path)
            parts.append(part)
        else:
            parts.append(objects.kernel(name))
    executable = tmp_path / bug.program
    cuda_sources.link(parts, executable)
    done = cuda_sources.run(executable)
    assert done.returncode != 0, "the bug went unnoticed"
    found = re.search(
        r"FAIL |ERROR: AddressSanitizer|simt: |runtime error", done.stdout + done.stderr
    )
    assert found, (done.stdout + done.stderr)[-2000:]
