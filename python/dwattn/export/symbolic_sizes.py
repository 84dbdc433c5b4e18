"""Model code that makes numbers of an image's size, which would write the traced size into the graph.

While a graph is traced with a variable size, height and width are symbolic integers; ``int()`` and ``float()`` fix them. The
methods that do so are rebound on the private copy that is exported, with stand-ins that leave symbolic integers alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def keep_sizes_symbolic(module: nn.Module) -> None:
    """Rebind what is known to cast sizes: transformers' resampling of position embeddings (``torch_int``), and the grid
    of timm's rotary embedding for DINOv3 (``float``).
    """
    for part in module.modules():
        method = getattr(type(part), "interpolate_pos_encoding", None)
        if isinstance(method, types.FunctionType) and "torch_int" in method.__globals__:
            rebound = _with_names(method, torch_int=_unless_symbolic(int))
            part.interpolate_pos_encoding = types.MethodType(rebound, part)  # type: ignore[assignment]
        method = getattr(type(part), "_create_embed", None)
        build = getattr(method, "__globals__", {}).get("_build_grid")
        if isinstance(method, types.FunctionType) and isinstance(build, types.FunctionType):
            grid = _with_names(build, float=_unless_symbolic(float))
            rebound = _with_names(method, _build_grid=grid)
            part._create_embed = types.MethodType(rebound, part)  # type: ignore[assignment]


def _with_names(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """The same function where some of its global names mean something else."""
    made = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _unless_symbolic(cast: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, torch.SymInt) else cast(value)
