"""Where the tests find TensorRT: packages in folders of their own (``pip install --target``), which
environment variables name, so that none of them enters the environment under test.

==========================  =====================================================================
DWATTN_TENSORRT_RTX         ``tensorrt_rtx_cu13``: a builder, an ONNX parser and a plugin registry
DWATTN_TENSORRT_LEAN        ``tensorrt_lean_cu13_libs`` and ``_bindings``: TensorRT's own registry
DWATTN_TENSORRT_INCLUDE     the headers, anywhere below it (``kernel-lens``, or a TensorRT)
DWATTN_TENSORRT_PLUGIN      the plugin library, ``libdwattn_trt.so``; without it tests build one
==========================  =====================================================================
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import tensorrt_build

TESTS = Path(__file__).parents[1]


def named(variable: str, what: str) -> Path:
    """The existing path that an environment variable holds; the test is skipped where there is none."""
    value = os.environ.get(variable)
    if not value or not Path(value).exists():
        pytest.skip(f"set {variable} to {what}" + (f": {value} does not exist" if value else ""))
    return Path(value).resolve()


def plugin_library() -> Path:
    """``libdwattn_trt.so``: the one that is named, or else built here."""
    if os.environ.get("DWATTN_TENSORRT_PLUGIN"):
        return named("DWATTN_TENSORRT_PLUGIN", "the built libdwattn_trt.so")
    return tensorrt_build.library(include_dir())


def include_dir() -> Path:
    """The directory that holds ``NvInfer.h``."""
    root = named("DWATTN_TENSORRT_INCLUDE", "a folder that holds TensorRT's headers")
    header = next(iter(sorted(root.rglob("NvInfer.h"))), None)
    assert header is not None, f"there is no NvInfer.h below {root}"
    return header.parent


def lean_environment() -> dict[str, str]:
    """Variables of a process that can ``import tensorrt_lean``."""
    folder = named("DWATTN_TENSORRT_LEAN", "a folder that holds tensorrt_lean_cu13")
    return _environment(folder)


def rtx_environment(scratch: Path) -> dict[str, str]:
    """Variables of a process that can ``import tensorrt_rtx_bindings`` and parse ONNX.

    The parser opens ``libtensorrt_rtx.so``, of which the wheel has only the versioned name, and the
    loader reads its path at the start of a process: hence a link in ``scratch``.
    """
    folder = named("DWATTN_TENSORRT_RTX", "a folder that holds tensorrt_rtx_cu13")
    link = scratch / "libtensorrt_rtx.so"
    if not link.exists():
        (library,) = (folder / "tensorrt_rtx_libs").glob("libtensorrt_rtx.so.*")
        link.symlink_to(library)
    return {**_environment(folder), "LD_LIBRARY_PATH": str(scratch)}


def run_rtx(scratch: Path, *arguments: str | Path) -> dict[str, Any]:
    """The JSON result of ``python -m support.rtx_build ARGUMENTS`` in a process of its own; its
    ``stderr``, where the plugin library speaks when nothing listens, comes with it.

    TensorRT-RTX may abort its process; then the test fails with what it has printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "support.rtx_build", *map(str, arguments)],
        env=rtx_environment(scratch), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "stderr": done.stderr}


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
