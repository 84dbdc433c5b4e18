"""Faster pretrained Vision Transformers: attention that hardly varies between images is replaced by a
fixed 3x3 aggregation of the values.

::

    scores = dwattn.score(model, loader, num_images=1000)
    plan = dwattn.select(scores, blocks=6, criterion="residual")
    dwattn.replace(model, plan, calibrate=loader)
    dwattn.save(model, "student.safetensors")

Names are loaded when they are first used: ``import dwattn`` alone imports nothing but the standard
library.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwattn import adapters, finetune, variance
    from dwattn.attention import (
        ConvAttention,
        EnsembleDWAttention,
        FusedDWAttention,
        LowRankDWAttention,
        SPViTAttention,
    )
    from dwattn.checkpoint import load, save
    from dwattn.conversion import restore
    from dwattn.costs import flops, params
    from dwattn.errors import DwattnError
    from dwattn.export import export
    from dwattn.geometry import Geometry
    from dwattn.plan import Plan
    from dwattn.refinement import refine
    from dwattn.scattered import ScatteredDWAttention, SelfAttention
    from dwattn.scores import Scores
    from dwattn.scoring import score
    from dwattn.selection import select
    from dwattn.surgery import replace

_WHERE = {
    "ConvAttention": "attention",
    "EnsembleDWAttention": "attention",
    "FusedDWAttention": "attention",
    "LowRankDWAttention": "attention",
    "SPViTAttention": "attention",
    "load": "checkpoint",
    "save": "checkpoint",
    "restore": "conversion",
    "flops": "costs",
    "params": "costs",
    "DwattnError": "errors",
    "export": "export",
    "Geometry": "geometry",
    "Plan": "plan",
    "refine": "refinement",
    "ScatteredDWAttention": "scattered",
    "SelfAttention": "scattered",
    "Scores": "scores",
    "score": "scoring",
    "select": "selection",
    "replace": "surgery",
}
_MODULES = ("adapters", "finetune", "variance")

__all__ = [
    "ConvAttention",
    "DwattnError",
    "EnsembleDWAttention",
    "FusedDWAttention",
    "Geometry",
    "LowRankDWAttention",
    "Plan",
    "SPViTAttention",
    "ScatteredDWAttention",
    "Scores",
    "SelfAttention",
    "adapters",
    "export",
    "finetune",
    "flops",
    "load",
    "params",
    "refine",
    "replace",
    "restore",
    "save",
    "score",
    "select",
    "variance",
]


def _version() -> str:
    # dwattn-deploy is the part of this package that a Jetson needs, installed alone.
    for distribution in ("dwattn", "dwattn-deploy"):
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return "0.0.0"  # a source tree that was put on the path without being installed


__version__ = _version()


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"dwattn.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"dwattn.{name}":
            raise
        raise ImportError(
            f"dwattn.{name} is not part of dwattn-deploy, which is installed here and holds what devices need "
            "(dwattn.deploy). Install dwattn in its place."
        ) from None


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(_module(_WHERE[name]), name)
    elif name in _MODULES:
        value = _module(name)
    else:
        raise AttributeError(f"module 'dwattn' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps ``dwattn.export`` the function: importing the submodule of that name would bind the
    module over it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
