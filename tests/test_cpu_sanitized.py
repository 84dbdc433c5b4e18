"""CPU kernels under sanitizers: the attention statistics for each instruction set, the products by AMX tiles."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dwattn import library

ROOT = Path(__file__).parents[1]
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


def build(isa: str, program: Path, sources: Path = ROOT / "csrc") -> None:
    subprocess.run(
        [
            "g++", "-std=c++17", "-O0", "-g1", "-fno-math-errno", "-fno-trapping-math",
            "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *FLAGS[isa],
            f"-DDWATTN_ISA={isa}", *([] if isa == "generic" else ["-DDWATTN_WITHOUT_GENERIC"]),
            f"-I{sources}", str(ROOT / "tests/cpu/attention_variance_check.cpp"),
            str(sources / "kernels/cpu/attention_variance.cpp"),
            str(sources / "kernels/cpu/features.cpp"), "-pthread", "-o", str(program),
        ],
        check=True,
    )  # fmt: skip


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "isa",
    [
        pytest.param("generic", marks=pytest.mark.thorough),
        pytest.param("avx2", marks=pytest.mark.thorough),
        "avx512",
    ],
)
def test_the_attention_statistics(isa: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if library.native is None or isa not in library.native.cpu_info()["usable_isas"]:
        pytest.skip(f"this CPU has no {isa}")
    build(isa, tmp_path / "check")
    done = run(tmp_path / "check")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout == "0 failure(s)\n"


AMX_FLAGS = [*FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
AMX_SOURCES = ("attention_variance", "dw_aggregate", "features", "gemm", "kernels_generic")


def build_tiles(program: Path, sources: Path = ROOT / "csrc") -> None:
    """The self-check with the generic kernels and the products by tiles."""
    flags = [
        "-std=c++17", "-O0", "-g1", "-fno-math-errno", "-fno-trapping-math", "-DDWATTN_HAVE_AMX",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{sources}",
    ]  # fmt: skip
    tiles, kernels = program.parent / "gemm_amx.o", sources / "kernels/cpu"
    subprocess.run(
        ["g++", *flags, *AMX_FLAGS, "-c", str(kernels / "gemm_amx.cpp"), "-o", str(tiles)],
        check=True,
    )
    subprocess.run(
        [
            "g++", *flags, str(ROOT / "tests/cpu/self_check.cpp"), str(tiles),
            *(str(kernels / f"{name}.cpp") for name in AMX_SOURCES), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip


def need_tiles() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if library.native is None or "amx" not in library.native.cpu_info()["usable_isas"]:
        pytest.skip("no AMX tiles: not built, not in this CPU, or refused by the system")


@pytest.mark.slow
def test_the_products_by_tiles(tmp_path: Path) -> None:
    need_tiles()
    build_tiles(tmp_path / "check")
    done = run(tmp_path / "check")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout == "0 failure(s), instruction set amx\n"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (": kBand - count;", ": 0;"),  # reads behind the last row
        ("std::memset(to + given, 0, 2 * (whole - given));", ""),
        ("_mm512_unpackhi_epi64(low01, low23)", "_mm512_unpacklo_epi64(low01, low23)"),
        ("(uint64_t{1} << columns) - 1", "(uint64_t{2} << columns) - 1"),
        ("_tile_dpbf16ps(2, 5, 6);", "_tile_dpbf16ps(2, 4, 6);"),
    ],
)
def test_planted_bugs_in_the_products_by_tiles_are_found(
    right: str, wrong: str, tmp_path: Path
) -> None:
    need_tiles()
    shutil.copytree(ROOT / "csrc/kernels", tmp_path / "csrc/kernels")
    source = tmp_path / "csrc/kernels/cpu/gemm_amx.cpp"
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    build_tiles(tmp_path / "check", tmp_path / "csrc")
    assert run(tmp_path / "check").returncode != 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("W::load(s2_ + entry) - s1 * offset", "W::load(s2_ + entry)"),
        ("delta * delta * cross", "delta * cross"),
        ("row < 0) continue", "row < -1) continue"),
    ],
)
def test_planted_bugs_are_found(right: str, wrong: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    shutil.copytree(ROOT / "csrc/kernels", tmp_path / "csrc/kernels")
    source = tmp_path / "csrc/kernels/cpu/attention_moments_impl.h"
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    build("generic", tmp_path / "check", tmp_path / "csrc")
    done = run(tmp_path / "check")
    assert done.returncode != 0
    assert "FAIL" in done.stdout or "Sanitizer" in done.stderr, done.stderr
