"""The TensorRT plugin library as a file: its symbols, and the registries of TensorRT that load it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import cuda_sources, tensorrt, tensorrt_build

EXPORTS = {"getCreators", "setLoggerFinder"}
FIELDS = ["inputs", "prefix", "height", "width", "num_prefix", "num_heads"]


@pytest.fixture(scope="module")
def library() -> Path:
    return tensorrt.plugin_library()


def symbols(library: Path, kind: str) -> set[str]:
    """Names, without their versions, of the symbols that a library defines or needs."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    done = subprocess.run(
        ["nm", "-D", f"--{kind}-only", str(library)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def assert_exports_are_right(library: Path) -> None:
    assert symbols(library, "defined") == EXPORTS


@pytest.mark.slow
def test_two_functions_are_exported(library: Path) -> None:
    assert_exports_are_right(library)


@pytest.mark.slow
def test_an_extra_export_is_found(tmp_path: Path) -> None:
    """The same objects, linked with a list of exports that is too wide."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    tensorrt_build.library(tensorrt.include_dir())
    exports = tensorrt_build.SOURCES / "exports.map"
    wide = tmp_path / "exports.map"
    wide.write_text(
        exports.read_text(encoding="utf-8").replace("getCreators;", "getCreators; _ZN*;")
    )
    link = tensorrt_build.commands("tensorrt", "dwattn_trt")[-1]
    assert str(exports) in link
    link = link.replace(str(exports), str(wide))
    link = link.replace("-o libdwattn_trt.so", f"-o {tmp_path}/libdwattn_trt.so")
    tensorrt_build.run_command("tensorrt", link)
    with pytest.raises(AssertionError):
        assert_exports_are_right(tmp_path / "libdwattn_trt.so")


@pytest.mark.slow
def test_nothing_of_tensorrt_cuda_or_python_is_needed(library: Path) -> None:
    needed = symbols(library, "undefined")
    assert not [name for name in needed if "nvinfer" in name or "Plugin" in name]
    assert not [name for name in needed if name.startswith(("cu", "_Py", "Py"))]
    done = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    )
    for name in ("nvinfer", "cudart", "torch", "python"):
        assert name not in done.stdout
    assert str(cuda_sources.ROOT).encode() not in library.read_bytes(), "a path of the build"


@pytest.mark.slow
def test_the_kernels_are_compiled_for_orin(library: Path) -> None:
    if library.parent != cuda_sources.BUILDS / "tensorrt":
        pytest.skip("the library was not built here")
    compiled = [
        c for c in tensorrt_build.commands("tensorrt", "dwattn_trt") if "kernels/cuda/" in c
    ]
    kernels = {
        name for name in cuda_sources.with_kernels() if any(f"/{name}" in c for c in compiled)
    }
    assert kernels >= {"dw_attention.cu", "lowrank_dw_attention.cu", "linear.cu"}
    for command in compiled:
        assert "sm_87" in command or command.startswith(":")  # or it is the linker's


@pytest.mark.thorough
def test_a_library_for_orin_and_hopper() -> None:
    """Hopper's kernels are in it, which compile to nothing elsewhere."""
    library = tensorrt_build.library(tensorrt.include_dir(), "87-real;90a-real")
    assert_exports_are_right(library)
    compiled = tensorrt_build.commands(library.parent.name, "dwattn_trt")
    (hopper,) = [c for c in compiled if "dw_attention_sm90.cu" in c and " -c " in c]
    assert "sm_87" in hopper
    assert "sm_90a" in hopper


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("DWAttention", {"inputs": "x wv kernel wo", "height": 3, "width": 4}),
    (
        "LowRankDWAttention",
        {
            "inputs": "x grid wv bv kernel wo query key prefix_value prefix_out", "height": 0,
            "width": 0, "num_prefix": 1, "prefix": "exact", "num_heads": 6,
        },
    ),
]  # fmt: skip
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("DWAttention", {}, "field 'inputs' is '': 'x' is missing"),
    ("DWAttention", {**GOOD[0][1], "hieght": 3}, "unknown field 'hieght'"),
    ("DWAttention", {**GOOD[0][1], "height": 3.0}, "field 'height' is FLOAT32"),
    ("DWAttention", {**GOOD[0][1], "height": -3}, "height=-3, width=4"),
    ("DWAttention", {**GOOD[0][1], "prefix": "all"}, "field 'prefix' is 'all'"),
    ("LowRankDWAttention", {**GOOD[1][1], "height": 2, "width": 2}, "exclude each other"),
    ("LowRankDWAttention", {**GOOD[1][1], "inputs": "x wv kernel wo"}, "from the input 'grid'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bindings", "version"),
    [("tensorrt_rtx_bindings", "1.7.1"), ("tensorrt_lean_bindings", "11.4")],
)
def test_the_library_loads_in_a_registry(
    library: Path, bindings: str, version: str, tmp_path: Path
) -> None:
    rtx = bindings == "tensorrt_rtx_bindings"
    environment = tensorrt.rtx_environment(tmp_path) if rtx else tensorrt.lean_environment()
    nodes = [*GOOD, *((name, values) for name, values, _ in BAD)]
    done = subprocess.run(
        [sys.executable, "-m", "support.plugin_registry", bindings, str(library), json.dumps(nodes)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"].startswith(version)
    assert sorted(result["creators"]) == [
        ["DWAttention", "1", "dwattn", FIELDS],
        ["LowRankDWAttention", "1", "dwattn", FIELDS],
    ]
    assert result["created"] == [True] * len(GOOD) + [False] * len(BAD)
    for *_, sentence in BAD:
        assert sentence in done.stdout + done.stderr


def header_folder(folder: Path, text: str) -> Path:
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").write_text(text, encoding="utf-8")
    return folder


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Without CUDA: what is asked is decided before it is looked for."""
    return tensorrt_build.configure(
        build, "-DDWATTN_TRT_EMULATION=ON", f"-DDWATTN_CUDA_INCLUDE_DIR={build}", *options
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("#define NV_TENSORRT_MAJOR 10 //!< Major.\n#define NV_TENSORRT_MINOR 3 //!< Minor.\n", "10.3"),
        (
            "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 4\n"
            "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< Major.\n",
            "11.4",
        ),
    ],
)  # fmt: skip
def test_releases_of_tensorrt_are_recognised(text: str, version: str, tmp_path: Path) -> None:
    headers = header_folder(tmp_path, text)
    done = configure(tmp_path / "build", f"-DTENSORRT_INCLUDE_DIR={headers}")
    assert done.returncode == 0, done.stderr
    assert f"headers {version} in {headers}" in done.stdout


def test_old_headers_are_refused(tmp_path: Path) -> None:
    text = "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n"
    done = configure(tmp_path / "build", f"-DTENSORRT_INCLUDE_DIR={header_folder(tmp_path, text)}")
    assert done.returncode != 0
    assert "TensorRT 8.6; the plugin needs 10.0 or later" in " ".join(done.stderr.split())


def test_old_headers_do_not_stop_a_build_of_the_package(tmp_path: Path) -> None:
    text = "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n"
    headers = f"-DTENSORRT_INCLUDE_DIR={header_folder(tmp_path, text)}"
    found = ("-DDWATTN_TENSORRT=AUTO", "-DDWATTN_HAVE_CUDA=ON")
    done = configure(tmp_path / "build", headers, *found)
    assert done.returncode == 0, done.stderr
    assert "no TensorRT plugin" in done.stdout
    assert "TensorRT 8.6, and it needs 10.0 or later" in done.stdout


def test_an_nvcc_that_is_too_old_is_refused_with_its_version(tmp_path: Path) -> None:
    real = shutil.which("nvcc")
    if real is None:
        pytest.skip("nvcc is not installed")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(  # the program in which CMake looks for the version of its compiler says 11.8
        f'#!/bin/sh\n{real} "$@" || exit\n'
        "[ ! -e a.out ] || sed -i 's/_version\\[[0-9]*[.][0-9]*/_version[00000011.00000008/' a.out\n"
    )
    nvcc.chmod(0o755)
    headers = header_folder(tmp_path, "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n")
    done = tensorrt_build.configure(
        tmp_path / "build", f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DCMAKE_CUDA_COMPILER={nvcc}"
    )
    assert done.returncode != 0
    assert re.search(r"is of CUDA 11\.8.*needs 12\.0 or later", " ".join(done.stderr.split()))


def test_kernels_are_compiled_in_a_folder_with_a_space(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    headers = header_folder(tmp_path, "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n")
    (tmp_path / "a b").symlink_to(cuda_sources.ROOT)
    build = tmp_path / "build"
    done = tensorrt_build.cmake(
        "-S", f"{tmp_path}/a b/plugins/tensorrt", "-B", str(build), "-G", "Ninja",
        f"-DTENSORRT_INCLUDE_DIR={headers}", "-DDWATTN_CUDA_ARCHITECTURES=87-real",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = subprocess.run(
        ["ninja", "-C", str(build), "-t", "commands"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (compile_one,) = [c for c in commands if "tensor_map.cu" in c and "nvcc" in c]
    assert "a b/csrc" in compile_one
    (target,) = [w for w in shlex.split(compile_one) if w.endswith("tensor_map.cu.o")][-1:]
    done = tensorrt_build.cmake("--build", str(build), "--target", target)
    assert done.returncode == 0, done.stdout


def test_missing_headers_are_explained(tmp_path: Path) -> None:
    missing = "-DTENSORRT_INCLUDE_DIR=TENSORRT_INCLUDE_DIR-NOTFOUND"
    done = configure(tmp_path / "build", missing)
    if "dwattn: TensorRT plugin, headers" in done.stdout:
        pytest.skip("TensorRT's headers are installed on this machine")
    assert done.returncode != 0
    assert "libnvinfer-headers-dev" in " ".join(done.stderr.split())
