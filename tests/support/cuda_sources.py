"""Compiles the CUDA kernels for the CPU emulation (g++) and for real architectures (nvcc)."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
KERNELS = "csrc/kernels/cuda"
PROGRAMS = "tests/cuda"
#: What tests compile and keep: a second run compiles only what has changed.
BUILDS = ROOT / "build" / "tests"

_DW_ATTENTION = ("dw_attention.cu", "dw_attention_sm90.cu", "dw_context.cu", "tensor_map.cu")

#: What ``dw_layer`` needs: the plugin's kernels.
DW_LAYER = (
    "dw_layer.cu",
    *_DW_ATTENTION,
    "lowrank_dw_attention.cu",
    "lowrank_dw_plan.cu",
    "linear.cu",
    "exact_prefix_rows.cu",
    "static_prefix_rows.cu",
)

#: The .cu files that a test program links; a program that is not listed includes what it needs.
LINKED: dict[str, tuple[str, ...]] = {
    "test_dw_attention": _DW_ATTENTION,
    "test_dw_attention_sm90": _DW_ATTENTION,
    "test_dw_aggregate": ("dw_aggregate.cu",),
    "test_dw_backward": ("dw_backward.cu",),
    "test_linear": ("linear.cu",),
    "test_lowrank_dw_attention": ("lowrank_dw_attention.cu",),
    "test_dw_layer": DW_LAYER,
}

_FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fno-strict-aliasing", "-fno-omit-frame-pointer",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-DDWATTN_SIMT_HOST",
)  # fmt: skip
_ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@functools.cache
def cuda_include() -> Path | None:
    """The directory with CUDA's headers: of CUDA_HOME, of nvcc, or of the usual place."""
    candidates = []
    if os.environ.get("CUDA_HOME"):
        candidates.append(Path(os.environ["CUDA_HOME"]) / "include")
    if shutil.which("nvcc"):
        done = subprocess.run(
            ["nvcc", "--dryrun", "-x", "cu", os.devnull],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        candidates += [Path(found) for found in re.findall(r'INCLUDES="-I([^"]+)"', done.stderr)]
    candidates.append(Path("/usr/local/cuda/include"))
    return next((place for place in candidates if (place / "cuda_fp16.h").is_file()), None)


def need_emulation() -> Path:
    """CUDA's headers; skips the test where the emulation cannot be built."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        pytest.skip("the emulation switches fibers with instructions of x86-64 or AArch64")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    include = cuda_include()
    if include is None:
        pytest.skip("CUDA's headers are not installed (nvcc on PATH or CUDA_HOME)")
    return include


def programs() -> list[str]:
    return sorted(path.stem for path in (ROOT / PROGRAMS).glob("test_*.cpp"))


def with_kernels() -> list[str]:
    """The .cu files that hold kernels; others hold host code only."""
    sources = (ROOT / KERNELS).glob("*.cu")
    return sorted(p.name for p in sources if "__global__" in p.read_text(encoding="utf-8"))


def linked(program: str) -> tuple[str, ...]:
    return LINKED.get(program, ())


def compile_object(source: Path, target: Path, tree: Path = ROOT) -> None:
    """One file of ``tree`` (the repository or a changed copy of its sources) for the emulation."""
    command = [*_compile_command(tree), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _compile_command(tree: Path) -> list[str]:
    return [
        "g++", *_FLAGS, "-isystem", str(need_emulation()), "-I", str(tree / "csrc"),
        "-I", str(tree / PROGRAMS), "-x", "c++",
    ]  # fmt: skip


def link(objects: Iterable[Path], target: Path) -> None:
    command = ["g++", "-fsanitize=address,undefined", *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(program: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments],
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip


@contextlib.contextmanager
def build_folder(name: str) -> Iterator[Path]:
    """A folder in ``build/tests``; the processes of one test run wait for each other."""
    folder = BUILDS / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def kernel_objects(names: Iterable[str]) -> list[Path]:
    """Object files of the unchanged kernels, compiled where they are not up to date."""
    return _objects([ROOT / KERNELS / name for name in names])


def program_object(name: str) -> Path:
    """The same of a test program."""
    return _objects([ROOT / PROGRAMS / f"{name}.cpp"])[0]


def _objects(sources: list[Path]) -> list[Path]:
    if not sources:  # ninja would take that for all
        return []
    with build_folder("emulated") as folder:
        targets = [folder / f"{source.stem}.o" for source in sources]
        rules = _ninja_file([*(ROOT / KERNELS).glob("*.cu"), *(ROOT / PROGRAMS).glob("*.cpp")])
        (folder / "build.ninja").write_text(rules, encoding="utf-8")
        done = subprocess.run(
            ["ninja", "-C", str(folder), *(target.name for target in targets)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return targets


def _ninja_file(sources: list[Path]) -> str:
    compiler = shlex.join(_compile_command(ROOT))
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {s.stem}.o: compile {str(s).replace(' ', '$ ')}" for s in sorted(sources)),
    ]
    return "\n".join(lines) + "\n"
