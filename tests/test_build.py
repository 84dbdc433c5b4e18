"""The build and what it leaves behind: headers found or explained, binaries that fit any torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dwattn
from dwattn import library

ROOT = Path(__file__).parent.parent
FINDER = ROOT / "cmake" / "find_torch_headers.py"


def find_headers(*python_options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DWATTN"))}
    return subprocess.run(
        [sys.executable, *python_options, str(FINDER)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_compiled_modules_are_there() -> None:
    """Every other test would skip, or pass on another backend."""
    if os.environ.get(library.DISABLE_VARIABLE):
        pytest.skip(f"{library.DISABLE_VARIABLE} is set")
    assert library.AVAILABLE, library.load_error()
    assert library.native is not None, library.native_error()


def test_torch_headers_are_found() -> None:
    done = find_headers()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(torch.__file__).parent / "include"


def test_torch_headers_are_found_under_build_isolation() -> None:
    """With ``-S`` site-packages is not on the path, as in pip's isolated builds."""
    done = find_headers("-S", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(torch.__file__).parent / "include"


def test_missing_headers_are_explained(tmp_path: Path) -> None:
    done = find_headers(DWATTN_TORCH_INCLUDE=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    for words in ("PyTorch >= 2.11", "nowhere: not there", "pip install 'torch>=2.11'"):
        assert words in done.stderr


def test_headers_that_are_too_old_are_named(tmp_path: Path) -> None:
    (tmp_path / "torch/headeronly").mkdir(parents=True)
    (tmp_path / "torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "torch/csrc/stable/library.h").touch()
    (tmp_path / "torch/headeronly/version.h").write_text(
        "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n"
    )
    done = find_headers(DWATTN_TORCH_INCLUDE=str(tmp_path))
    assert done.returncode != 0
    assert "PyTorch 2.10" in done.stderr


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    pybind11 = find_spec("pybind11")
    if pybind11 is None:
        pytest.skip("pybind11 is not installed")
    directory = Path(pybind11.origin).parent / "share" / "cmake" / "pybind11"
    return subprocess.run(
        [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DSKBUILD_PROJECT_VERSION=0.1.0", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={directory}", *options,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_build_without_torch_stops_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DWATTN_TORCH_INCLUDE", str(tmp_path / "nowhere"))
    done = configure(tmp_path / "build")
    assert done.returncode != 0
    assert "Install PyTorch first" in " ".join(done.stderr.split())


def test_without_a_compiler_the_package_is_installed_without_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip has to succeed; a compiler that fails, or one that was demanded, is an error all the same."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("CXX", "g++")  # as scikit-build-core sets it, from Python's own build
    hidden = "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"
    done = configure(tmp_path / "build", hidden)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "without compiled kernels, to run on plain PyTorch: no C++ compiler was found" in said
    assert configure(tmp_path / "demanded", hidden, "-DDWATTN_CUDA=ON").returncode != 0
    (tools / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tools / "g++").chmod(0o755)
    assert "g++" in configure(tmp_path / "broken", hidden).stderr
    done = configure(tmp_path / "off", "-DDWATTN_NATIVE=OFF")
    assert done.returncode == 0
    assert "DWATTN_NATIVE=OFF" in done.stderr


def test_the_sources_need_no_header_text_newer_than_the_oldest_torch() -> None:
    """Wheels are built with the headers of PyTorch 2.11; those of 2.13 brought another name for this macro."""
    sources = sorted((ROOT / "csrc" / "torch").iterdir())
    assert any("TORCH_ERROR_CODE_CHECK" in path.read_text() for path in sources)
    assert [p.name for p in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in p.read_text()] == []


def binary(name: str) -> Path:
    spec = find_spec(f"dwattn.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not built")
    return Path(spec.origin)


def dynamic_section(path: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return subprocess.run(
        ["readelf", "-d", "-W", "--dyn-syms", str(path)], capture_output=True, text=True, check=True
    ).stdout


def test_the_operators_use_only_torch_s_stable_interface() -> None:
    """No C++ symbol of torch or c10 and none of Python: that is what ties a binary to one version."""
    text = dynamic_section(binary("_C"))
    undefined = [line.split()[-1] for line in text.splitlines() if " UND " in line]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    tied = [n for n in undefined if re.match(r"_?Py[A-Z_]|_ZNK?(2at|3c10|5torch)", n)]
    assert tied == []


@pytest.mark.parametrize("name", ["_C", "_native"])
def test_binaries_hold_no_path_of_the_build(name: str) -> None:
    path = binary(name)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section(path))
    assert str(ROOT).encode() not in path.read_bytes()


def test_the_build_information_fits_the_package() -> None:
    if library.native is None:
        pytest.skip(library.native_error())
    build = library.native.build_info()
    assert build["cpu_isas"][-1] == "generic"
    assert build["cuda_architectures"] == [] or "87-real" in build["cuda_architectures"]
    if dwattn.__version__ != "0.0.0":
        assert build["version"] == dwattn.__version__
