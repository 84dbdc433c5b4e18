"""Launches over ``__cuda_array_interface__``: their workspace, over a pretended CUDA runtime."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support import cuda_sources

ROOT = Path(__file__).parents[1]


def test_a_device_without_memory_pools_gets_its_workspace(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    cuda = cuda_sources.need_emulation()
    library = tmp_path / "launch.so"
    sources = [ROOT / "tests/support/fake_cuda_launch.cpp", ROOT / "csrc/python/cuda_launch.cpp"]
    includes = [ROOT / "csrc", cuda, pybind11.get_include(), sysconfig.get_paths()["include"]]
    options = [
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-Wl,-Bsymbolic",
        *(f"-I{path}" for path in includes),
    ]
    subprocess.run(["g++", *options, *map(str, sources), "-o", str(library)], check=True)
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).main()"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [
        "0 got=1 freed=1 sync=0",
        "801 got=1 freed=0 sync=1",
        "2 Taking 64 bytes of GPU memory failed: out of memory.",
    ]
