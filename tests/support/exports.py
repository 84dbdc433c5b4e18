"""Layers and models for the tests of exports: every variant that is a single node, and small models
that hold several of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.plan import Plan
from dwattn.surgery import replace
from support.models import timm_vit

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dw": (dwattn.FusedDWAttention, {}),
    "lowrank_dw": (dwattn.LowRankDWAttention, {"rank": 24}),
    "ens_dw": (dwattn.EnsembleDWAttention, {}),
}
DIM, HEADS, GRID, PREFIX = 48, 4, (3, 5), 5


def layer(variant: str, prefix: str = "exact", **options: Any) -> nn.Module:
    """A layer of width 48 and 4 heads on a 3 x 5 grid with random weights; ``drop``: no prefix tokens."""
    cls, own = VARIANTS[variant]
    module: nn.Module = cls(
        DIM, HEADS, grid=GRID, num_prefix=0 if prefix == "drop" else PREFIX, prefix=prefix,
        **own, **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def tokens(module: nn.Module, batch: int, seed: int = 1) -> Tensor:
    """``(batch, N, 48)``."""
    generator = torch.Generator().manual_seed(seed)
    count = int(module.num_prefix) + GRID[0] * GRID[1]  # type: ignore[arg-type]
    return torch.randn(batch, count, DIM, generator=generator)


def mixed_vit(prefix: str = "exact", dynamic: bool = False, **options: Any) -> nn.Module:
    """A ViT of four blocks on 4 x 3 patches: dw, lowrank_dw, ens_dw and one left alone."""
    options = {"reg_tokens": 4, "no_embed_class": True} | options
    if prefix == "drop":
        options |= {"class_token": False, "reg_tokens": 0, "global_pool": "avg"}
    model = timm_vit(depth=4, num_classes=0, init_values=0.5, dynamic_img_size=dynamic, **options)
    for block, variant in enumerate(VARIANTS):
        chosen = {"rank": 24} if variant == "lowrank_dw" else {}
        plan = Plan.for_layers(model, [block])
        replace(model, plan, variant=variant, prefix=prefix, dynamic_grid=dynamic, **chosen)
    return model


def onnx_run(path: Path, x: Tensor) -> np.ndarray[Any, Any]:
    """The first output of a file on onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return result


def cached_registry() -> Iterator[None]:
    """Body of a fixture: the exporter compiles its operator library at every call, a fifth of an
    export's time.
    """
    with pytest.MonkeyPatch.context() as patch:
        try:
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            cached = functools.cache(onnxscript_apis.get_torchlib_ops)
            patch.setattr(onnxscript_apis, "get_torchlib_ops", cached)
        except (ImportError, AttributeError):  # another torch: slower, not wrong
            pass
        yield
