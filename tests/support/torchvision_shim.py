"""Make a CUDA build of torchvision importable under CPU torch, where the package index offers no other.

torchvision registers the fakes of two operators that only its binary declares, and the binary does not
load. Declaring them first lets the pure Python parts, which timm needs, import.
"""

from __future__ import annotations

import contextlib

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def install() -> None:
    """Declare the operators; does nothing under CUDA torch, or where they exist already."""
    global _library
    if torch.version.cuda is not None or _library is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        with contextlib.suppress(RuntimeError):  # declared already: this torchvision's binary loads
            _library.define(schema)
