"""A plan is for models of its sizes: each of them is part of the fingerprint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dwattn
from dwattn.errors import CalibrationError, PlanError
from dwattn.fingerprint import fingerprint
from dwattn.plan import Plan

timm = pytest.importorskip("timm")


def vit(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0,
    }  # fmt: skip
    return timm.models.vision_transformer.VisionTransformer(**{**settings, **options}).eval()


def test_sizes_of_layers() -> None:
    for layer in fingerprint(vit()).layers:
        assert (layer.kind, layer.dim, layer.num_heads, layer.head_dim) == ("Attention", 24, 2, 12)
        assert len(layer.sketch) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "num_heads of layer blocks.0.attn is 3 instead of 2"),
        ({"embed_dim": 32}, "dim of layer blocks.0.attn is 32 instead of 24"),
        ({"depth": 3}, "3 blocks instead of 2"),
        ({"reg_tokens": 2}, "3 prefix tokens instead of 1"),
        ({"img_size": (16, 20)}, r"grid is \(4, 5\) instead of \(4, 4\)"),
    ],
)
def test_a_plan_for_other_sizes_is_refused(options: dict[str, Any], words: str) -> None:
    """Also where somebody allows for other weights: their sizes must be the same."""
    plan = Plan.for_layers(vit(), [0])
    for allow_stale in (False, True):
        with pytest.raises(PlanError, match=words):
            dwattn.replace(vit(**options), plan, allow_stale=allow_stale)


def test_calibration_images_of_two_sizes_are_refused() -> None:
    model = vit(dynamic_img_size=True)
    images = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 20)]
    with pytest.raises(CalibrationError, match=r"\[17, 21\] tokens"):
        dwattn.replace(
            model, Plan.for_layers(model, [0]), calibrate=images, dynamic_grid=True, progress=False
        )
