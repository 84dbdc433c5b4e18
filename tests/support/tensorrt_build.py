"""Builds the TensorRT plugin and its harness for the tests, in ``build/tests`` of the checkout.

The folders are kept: a second run compiles only what has changed. Processes of one test run wait for each
other.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from support import cuda_sources
from support.cuda_sources import BUILDS

SOURCES = cuda_sources.ROOT / "plugins" / "tensorrt"

ORIN = "87-real"


def cmake(*arguments: str) -> subprocess.CompletedProcess[str]:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    return subprocess.run(
        ["cmake", *arguments], capture_output=True, text=True, timeout=900, check=False
    )


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return cmake("-S", str(SOURCES), "-B", str(build), "-G", "Ninja", *options)


def built(name: str, target: str, *options: str) -> Path:
    """The file ``target`` of the build folder ``name``, up to date."""
    with cuda_sources.build_folder(name) as folder:
        done = configure(folder, *options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        done = cmake("--build", str(folder), "--target", target)
        assert done.returncode == 0, done.stdout[-8000:]
    return folder


@functools.cache
def library(headers: Path, architectures: str = ORIN) -> Path:
    """``libdwattn_trt.so`` for ``architectures``, compiled by nvcc against TensorRT's ``headers``."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    options = [f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DDWATTN_CUDA_ARCHITECTURES={architectures}"]
    folder = "tensorrt-several"
    if architectures == ORIN:
        folder = "tensorrt"
        options.append("-DCMAKE_CUDA_FLAGS=-Xcicc -O1")  # half the time; nothing runs the kernels
    return built(folder, "dwattn_trt", *options) / "libdwattn_trt.so"


@functools.cache
def harness(headers: Path) -> Path:
    """The harness that runs the library's real kernels, for this machine's GPU."""
    options = (f"-DTENSORRT_INCLUDE_DIR={headers}", "-DDWATTN_CUDA_ARCHITECTURES=native")
    return built("tensorrt-gpu", "dwattn_trt_harness", *options) / "dwattn_trt_harness"


@functools.cache
def emulated_harness(headers: Path) -> Path:
    """The harness with plugin and emulated kernels in one program, under sanitizers."""
    cuda = cuda_sources.need_emulation()
    kernels = cuda_sources.kernel_objects(cuda_sources.DW_LAYER)
    options = (
        "-DDWATTN_TRT_EMULATION=ON",
        f"-DDWATTN_TRT_EMULATED_KERNELS={';'.join(map(str, kernels))}",
        f"-DTENSORRT_INCLUDE_DIR={headers}",
        f"-DDWATTN_CUDA_INCLUDE_DIR={cuda}",
    )
    target = "dwattn_trt_harness_emulated"
    return built("tensorrt-emulated", target, *options) / target


def commands(name: str, target: str) -> list[str]:
    """What ninja runs in the build folder ``name`` to make ``target``, in order; the last one links."""
    done = subprocess.run(
        ["ninja", "-C", str(BUILDS / name), "-t", "commands", target],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def run_command(name: str, command: str) -> None:
    """Runs a changed one of these commands in its build folder."""
    done = subprocess.run(
        command, shell=True, cwd=BUILDS / name, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
