"""NVIDIA's own Python packages of TensorRT without TensorRT: the libraries they are linked to are
replaced by empty ones, so that their names can be looked at and their Python code run.

``DWATTN_TENSORRT_BINDINGS`` names a folder with one folder a version, each filled by
``pip install --no-deps --target FOLDER/10.3.0 tensorrt_cu12_bindings==10.3.0``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.tensorrt import named

VARIABLE = "DWATTN_TENSORRT_BINDINGS"


def versions() -> list[str]:
    """The versions that are there, to parametrize with; the tests skip where there are none."""
    folder = os.environ.get(VARIABLE)
    return sorted(p.name for p in Path(folder).iterdir()) if folder else ["none"]


def environment(version: str, scratch: Path, registry: Path | None = None) -> dict[str, str]:
    """Variables of a process that can ``import tensorrt``.

    Args:
        scratch: for the libraries.
        registry: ``libnvinfer_lean.so`` of the same version, whose plugin registry is then used;
            without it there is none.
    """
    folder = named(VARIABLE, "a folder of TensorRT's Python packages") / version
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    (module,) = (folder / "tensorrt_bindings").glob("tensorrt*.so")
    symbols = re.findall(r" U (\w+)$", _output("nm", "-D", "--undefined-only", module), re.M)
    ours = [s for s in symbols if re.match(r"create|getNv|initLibNv|get\w*PluginRegistry", s)]
    if registry is not None:
        ours.remove("getPluginRegistry")
    source = scratch / "empty.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in ours))
    needed = re.findall(r"\[(libnv\w+\.so\.\d+)\]", _output("readelf", "-d", module))
    for soname in needed:
        linked = [str(registry)] if registry and soname.startswith("libnvinfer.") else []
        contents = [str(source)] if soname.startswith("libnvinfer.") else []
        subprocess.run(
            ["gcc", "-w", "-shared", "-fPIC", "-x", "c", *(contents or ["/dev/null"]), "-x", "none",
             f"-Wl,-soname,{soname}", "-Wl,--no-as-needed", *linked, "-o", scratch / soname],
            check=True,
        )  # fmt: skip
    # The package `tensorrt` itself is one line.
    (scratch / "tensorrt").mkdir()
    (scratch / "tensorrt" / "__init__.py").write_text(
        "import sys, tensorrt_bindings\nsys.modules['tensorrt'] = tensorrt_bindings\n"
    )
    libraries = [str(scratch), *([str(registry.parent)] if registry else [])]
    paths = [str(scratch), str(folder), *(p for p in sys.path if p)]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout
