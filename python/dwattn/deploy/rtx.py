"""TensorRT-RTX in a process of its own.

Its ONNX parser opens ``libtensorrt_rtx.so``, and the wheels hold only ``libtensorrt_rtx.so.1``: the
missing name must be on the loader's path before a process starts. A parser or plugin that aborts
also takes only that process along.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dwattn.deploy.options import BuildOptions
from dwattn.deploy.sidecar import Sidecar
from dwattn.errors import DeployError

#: Set in the process that the libraries were linked for.
_MARK = "DWATTN_RTX_PREPARED"


def prepared() -> bool:
    """Whether this process can load TensorRT-RTX's parser."""
    return os.environ.get(_MARK) == "1"


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Environment variables for a process that uses TensorRT-RTX.

    Raises:
        DeployError: its libraries are not installed as Python packages.
    """
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        raise DeployError(
            "The Python package of tensorrt-rtx is not installed: pip install tensorrt_rtx_cu13 "
            "(or _cu12)."
        )
    with tempfile.TemporaryDirectory(prefix="dwattn-rtx-") as folder:
        for library in Path(found.origin).parent.glob("lib*.so.1"):
            (Path(folder) / library.name.removesuffix(".1")).symlink_to(library)
        paths = [folder, os.environ.get("LD_LIBRARY_PATH", "")]
        yield {
            **os.environ,
            _MARK: "1",
            "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }


def build_in_subprocess(options: BuildOptions, *, show_progress: bool) -> Sidecar:
    """``dwattn.deploy.build`` in a process that is prepared for it; same errors."""
    with environment() as variables, tempfile.TemporaryDirectory(prefix="dwattn-rtx-") as folder:
        answer = Path(folder) / "answer.json"
        request = {"options": asdict(options), "progress": show_progress, "answer": str(answer)}
        child = subprocess.Popen(
            [sys.executable, "-m", "dwattn.deploy.rtx_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=variables, text=True,
        )  # fmt: skip
        try:
            child.communicate(json.dumps(request))
        except KeyboardInterrupt:
            child.wait()  # Ctrl-C reaches it too, and it cleans up
            raise
        except SystemExit:  # a SIGTERM reaches this process alone
            child.terminate()
            child.wait()
            raise
        result = json.loads(answer.read_text()) if answer.is_file() else None
    if result is None:
        raise DeployError(
            f"TensorRT-RTX ended with code {child.returncode} while building {options.onnx}. "
            "What it printed is above; --verbose shows all of it."
        )
    if result.get("interrupted"):
        raise KeyboardInterrupt
    if "error" in result:
        raise DeployError(result["error"])
    return Sidecar(**result["record"])
