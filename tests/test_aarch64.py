"""Cross-compiled for AArch64 (Jetson) and, where it needs no GPU, run in an emulator.

Needs ``g++-aarch64-linux-gnu`` and ``qemu-user-static``. The library also needs nvcc and CUDA for AArch64:
``DWATTN_CUDA_AARCH64`` names the ``nvidia/cu13`` of its wheel ``nvidia-cuda-runtime``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support import cuda_sources, tensorrt, tensorrt_build, tensorrt_cases

pytestmark = pytest.mark.slow

ROOT = cuda_sources.ROOT
TOOLCHAIN = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
CPU_SOURCES = (
    "attention_variance.cpp", "dw_aggregate.cpp", "features.cpp", "gemm.cpp", "kernels_generic.cpp",
    "prefix_rows.cpp",
)  # fmt: skip


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def emulate(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(program), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_cpu_kernels(tmp_path: Path) -> None:
    need(COMPILER, EMULATOR, "aarch64-linux-gnu-objdump")
    program = tmp_path / "self_check"
    sources = [ROOT / "csrc/kernels/cpu" / name for name in CPU_SOURCES]
    subprocess.run(
        [
            COMPILER, "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fno-math-errno",
            "-fno-trapping-math", f"-I{ROOT / 'csrc'}", str(ROOT / "tests/cpu/self_check.cpp"),
            *map(str, sources), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    done = emulate(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 failure(s)")
    assembly = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", str(program)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert assembly.count("\tfmla\t") > 50, "the kernels are not vectorized"


def test_the_plugins_with_emulated_kernels(tmp_path: Path) -> None:
    need(COMPILER, EMULATOR)
    program = tensorrt_build.built(
        "tensorrt-aarch64-emulated", "dwattn_trt_harness_emulated", TOOLCHAIN,
        "-DDWATTN_TRT_EMULATION=ON", "-DDWATTN_TRT_SANITIZE=OFF",
        f"-DTENSORRT_INCLUDE_DIR={tensorrt.include_dir()}",
        f"-DDWATTN_CUDA_INCLUDE_DIR={cuda_sources.need_emulation()}",
    ) / "dwattn_trt_harness_emulated"  # fmt: skip
    cases = [str(tensorrt_cases.write(case, tmp_path)) for case in tensorrt_cases.CASES]
    done = emulate(program, *cases)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("largest error") == len(cases)


def test_the_library_links() -> None:
    need(COMPILER, "nvcc", "aarch64-linux-gnu-readelf")
    target = tensorrt.named("DWATTN_CUDA_AARCH64", "nvidia/cu13 of CUDA's runtime for AArch64")
    library = tensorrt_build.built(
        "tensorrt-aarch64", "dwattn_trt", TOOLCHAIN, f"-DDWATTN_CUDA_TARGET={target}",
        f"-DTENSORRT_INCLUDE_DIR={tensorrt.include_dir()}", "-DDWATTN_CUDA_ARCHITECTURES=87-real",
    ) / "libdwattn_trt.so"  # fmt: skip
    read = subprocess.run(
        ["aarch64-linux-gnu-readelf", "-hd", str(library)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "AArch64" in read
    assert "nvinfer" not in read
    assert "cudart" not in read
