"""Print the include directory of a PyTorch that has the stable-ABI headers; torch is not imported.

Under pip's build isolation site-packages is hidden from ``sys.path``, but the environment that pip
installs into is still known by its prefix, so torch is looked for there by path.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MINIMUM = (2, 11)


def environment_directories() -> Iterator[Path]:
    """site-packages of the environment that is being installed into."""
    yield Path(sysconfig.get_path("platlib"))
    yield Path(sysconfig.get_path("purelib"))
    yield from map(Path, site.getsitepackages())
    yield Path(site.getusersitepackages())
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "lib" / python / "site-packages"


def candidates() -> Iterator[Path]:
    """Include directories in order of preference."""
    if os.environ.get("DWATTN_TORCH_INCLUDE"):
        yield Path(os.environ["DWATTN_TORCH_INCLUDE"])
        return
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    for location in (spec.submodule_search_locations or []) if spec else []:
        yield Path(location) / "include"
    for directory in environment_directories():
        yield directory / "torch" / "include"


def version(include: Path) -> tuple[int, int] | None:
    """(major, minor) of the headers in this directory, or None without stable-ABI headers."""
    header = include / "torch" / "headeronly" / "version.h"
    if not header.is_file() or not (include / "torch/csrc/stable/library.h").is_file():
        return None
    text = header.read_text(encoding="utf-8")
    numbers = [re.search(rf"TORCH_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if not all(numbers):
        return None
    return int(numbers[0][1]), int(numbers[1][1])  # type: ignore[index]


def main() -> str:
    """The include directory; exits with the places looked at and the remedy when there is none."""
    looked: dict[str, str] = {}
    for include in candidates():
        found = version(include)
        if found is not None and found >= MINIMUM:
            return str(include)
        state = "not there" if found is None else f"PyTorch {found[0]}.{found[1]}"
        looked[str(include)] = state if include.is_dir() else "not there"
    places = "\n".join(f"  {place}: {state}" for place, state in looked.items())
    sys.exit(
        f"dwattn needs the headers of PyTorch >= {MINIMUM[0]}.{MINIMUM[1]} to build, and found none:\n"
        f"{places}\n"
        "Install PyTorch first (the CPU build is enough: pip install 'torch>=2.11'), then dwattn "
        "again in the same environment. If PyTorch lives elsewhere, set DWATTN_TORCH_INCLUDE to its "
        "include directory."
    )


if __name__ == "__main__":
    print(main())
