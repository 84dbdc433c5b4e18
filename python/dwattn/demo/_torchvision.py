"""Makes a CUDA-built torchvision importable under a CPU-only torch, for the demo and the tests
alone.

The torchvision wheel of the package index is built for CUDA. Under CPU torch its compiled part does
not load, and its import fails at ``torchvision::nms does not exist`` because two operators' meta
functions are registered unconditionally; timm, which imports torchvision, fails with it. Declaring
the two schemas first lets everything that is plain Python import. The operators themselves stay
unavailable, and nothing here calls them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def needs_schemas() -> bool:
    """Whether torch has no CUDA, torchvision was built with it, and nobody has imported it yet."""
    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    text = version.read_text("utf-8") if version.is_file() else ""
    return re.search(r"^__version__\s*=.*\+cu\d", text, re.MULTILINE) is not None


def make_importable() -> None:
    """Declare the two schemas where :func:`needs_schemas` says so; safe to call more than once."""
    global _library
    if _library is not None or not needs_schemas():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        # Somebody else may have declared them for the same reason.
        with contextlib.suppress(RuntimeError):
            _library.define(schema)
