"""CPU kernels under sanitizers: the attention statistics for each instruction set, the products of bf16."""

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


#: Instruction sets that multiply bf16 as it is: on top of AVX-512.
BF16_FLAGS = {
    "avx512_bf16": [*FLAGS["avx512"], "-mavx512bf16"],
    "amx": [*FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
BF16_SOURCES = ("attention_variance", "dw_aggregate", "features", "gemm", "kernels_generic")


def build_products(isa: str, program: Path, sources: Path = ROOT / "csrc") -> None:
    """The self-check with the generic kernels and the products of bf16."""
    flags = [
        "-std=c++17", "-O0", "-g1", "-fno-math-errno", "-fno-trapping-math", f"-DDWATTN_HAVE_{isa.upper()}",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{sources}",
    ]  # fmt: skip
    products, kernels = program.parent / f"gemm_{isa}.o", sources / "kernels/cpu"
    subprocess.run(
        ["g++", *flags, *BF16_FLAGS[isa], "-c", str(kernels / f"gemm_{isa}.cpp"), "-o", str(products)],
        check=True,
    )  # fmt: skip
    subprocess.run(
        [
            "g++", *flags, str(ROOT / "tests/cpu/self_check.cpp"), str(products),
            *(str(kernels / f"{name}.cpp") for name in BF16_SOURCES), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip


def need(isa: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if library.native is None or isa not in library.native.cpu_info()["usable_isas"]:
        pytest.skip(f"no {isa}: not built, not in this CPU, or refused by the system")


@pytest.mark.slow
@pytest.mark.parametrize("isa", BF16_FLAGS)
def test_the_products_of_bf16(isa: str, tmp_path: Path) -> None:
    need(isa)
    build_products(isa, tmp_path / "check")
    done = run(tmp_path / "check")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout == f"0 failure(s), instruction set {isa}\n"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("isa", "right", "wrong"),
    [
        ("amx", ": kBand - count;", ": 0;"),  # reads behind the last row
        ("amx", "std::memset(to + given, 0, 2 * (whole - given));", ""),
        ("amx", "(uint64_t{1} << columns) - 1", "(uint64_t{2} << columns) - 1"),
        ("amx", "_tile_dpbf16ps(2, 5, 6);", "_tile_dpbf16ps(2, 4, 6);"),
        ("avx512_bf16", "(r < rows ? r : rows - 1)", "r"),  # reads behind the last row
        ("avx512_bf16", "rows[i * stride + p_.k] = BFloat16{0};", ""),
        ("avx512_bf16", "constexpr bool copied(int64_t k) { return k % 2 != 0; }",
         "constexpr bool copied(int64_t) { return false; }"),
        ("avx512_bf16", "(1u << columns) - 1u", "(2u << columns) - 1u"),
        ("avx512_bf16", "j / kLanes * strip_bytes_", "j / kPanel * strip_bytes_"),
        ("avx512_bf16", "row[r] + 4 * d", "row[r] + 2 * d"),
        ("avx512_bf16", "padded[kLanes][kDepth] = {};", "padded[kLanes][kDepth];"),
        ("avx512_bf16", "std::min(i + block, p_.m)", "i + block"),
    ],
)  # fmt: skip
def test_planted_bugs_in_the_products_of_bf16_are_found(
    isa: str, right: str, wrong: str, tmp_path: Path
) -> None:
    need(isa)
    plant("gemm_" + isa + ".cpp", right, wrong, tmp_path)
    build_products(isa, tmp_path / "check", tmp_path / "csrc")
    assert run(tmp_path / "check").returncode != 0


@pytest.mark.thorough
@pytest.mark.parametrize("isa", BF16_FLAGS)
def test_pairs_out_of_order_are_found(isa: str, tmp_path: Path) -> None:
    need(isa)
    right, wrong = (f"_mm512_unpack{half}_epi64(low01, low23)" for half in ("hi", "lo"))
    plant("pairs_impl.h", right, wrong, tmp_path)
    build_products(isa, tmp_path / "check", tmp_path / "csrc")
    assert run(tmp_path / "check").returncode != 0


def plant(name: str, right: str, wrong: str, folder: Path) -> None:
    """A copy of the kernels with a bug."""
    shutil.copytree(ROOT / "csrc/kernels", folder / "csrc/kernels")
    source = folder / "csrc/kernels/cpu" / name
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("moments", "W::load(s2_ + entry) - s1 * offset", "W::load(s2_ + entry)"),
        ("moments", "delta * delta * cross", "delta * cross"),
        ("moments", "row = first_ + l + r - p_.skip", "row = first_ + l + r"),
        ("variance", "first_ == p_.skip && values", "first_ == 0 && values"),
        ("variance", "i = rows_ * tiles_.channels; i <", "i = 0; i <"),
        (
            "variance",
            "write(image, query, output_, 1.0f / sum)",
            "write(image, query, output_, 1.0f)",
        ),
        ("variance", "sum += total(part)", "sum = total(part)"),
    ],
)
def test_planted_bugs_are_found(name: str, right: str, wrong: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    plant(f"attention_{name}_impl.h", right, wrong, tmp_path)
    build("generic", tmp_path / "check", tmp_path / "csrc")
    done = run(tmp_path / "check")
    assert done.returncode != 0
    assert "FAIL" in done.stdout or "Sanitizer" in done.stderr, done.stderr
