"""Calibration as surgery sees it: what it gets, and what becomes of its results."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn import surgery
from dwattn.adapters import ConvertedAttention, describe
from dwattn.errors import CalibrationError, GeometryError
from support.models import BY_NAME, DINOV3, hf_model, timm_eva, timm_vit
from support.surgery import Snapshot, plan_for, shims


@pytest.fixture
def fake_calibration(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    """Put a function in the place of the real calibration; returns what it was called with."""

    def install(function: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def calibrate(model: Any, layout: Any, shims: Any, data: Any, **options: Any) -> Any:
            seen.update(model=model, layout=layout, shims=shims, data=data, options=options)
            return types.SimpleNamespace(updates=function(model, shims) or {})

        monkeypatch.setattr(surgery, "calibrate", calibrate)
        return seen

    return install


def test_calibration_gets_the_shims_and_its_updates_are_installed(fake_calibration: Any) -> None:
    model, images = timm_vit(), torch.randn(4, 3, 32, 24)
    before = Snapshot(model)

    def fill(model: nn.Module, shims: dict[str, ConvertedAttention]) -> dict[str, Tensor]:
        assert "_dwattn" not in vars(model)
        with torch.no_grad():
            shims["blocks.0.attn"].layer.beta.fill_(0.5)
        return {
            "blocks.0.mlp.fc2.weight": torch.ones(48, 192),
            "blocks.1.attn.proj.bias": torch.ones(48),
        }

    seen = fake_calibration(fill)
    dwattn.replace(model, plan_for(model), calibrate=images, batch_size=3, seed=7, progress=False)
    assert seen["model"] is model
    assert seen["data"] is images
    assert seen["options"] == {"batch_size": 3, "seed": 7, "progress": False}
    assert list(seen["shims"]) == ["blocks.0.attn", "blocks.2.attn"]
    assert (shims(model)["blocks.0.attn"].layer.beta == 0.5).all()
    assert (model.blocks[0].mlp.fc2.weight == 1).all()
    # A second replacement that changes the same parameter must not become what restore gives back.
    fake_calibration(lambda *_: {"blocks.0.mlp.fc2.weight": torch.zeros(48, 192)})
    dwattn.replace(model, plan_for(model, [3]), calibrate=images, allow_stale=True)
    assert (model.blocks[0].mlp.fc2.weight == 0).all()
    dwattn.restore(model)
    before.check()


def test_calibration_may_exchange_layers(fake_calibration: Any) -> None:
    """A fidelity target decides the width only then; flags, mode and grid must still be right."""
    model = timm_vit(dynamic_img_size=True).train()
    model.blocks[0].attn.requires_grad_(False)

    def exchange(model: nn.Module, shims: dict[str, ConvertedAttention]) -> None:
        for shim in shims.values():
            wide = shim.layer
            shim.layer = dwattn.LowRankDWAttention(48, 3, rank=24, num_prefix=1).eval()
            shim.layer.prefix_rows = wide.prefix_rows

    seen = fake_calibration(exchange)
    options = {"variant": "lowrank_dw", "rank": {"fidelity": 0.9}, "dynamic_grid": True}
    dwattn.replace(model, plan_for(model), calibrate=torch.zeros(1), **options)
    assert seen["options"]["rank"] == {"fidelity": 0.9}
    first, second = shims(model).values()
    assert first.layer.training
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())
    assert model(torch.randn(1, 3, 24, 32)).shape == (1, 5)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _nan_layer(model: nn.Module, shims: dict[str, ConvertedAttention]) -> None:
    list(shims.values())[1].layer.mu.data.fill_(float("nan"))


BAD_RESULTS = {
    "interrupted": (_interrupt, KeyboardInterrupt, None),
    "NaN layer": (_nan_layer, CalibrationError, "attn: mu would hold NaN"),
    "unknown parameter": (
        lambda *_: {"blocks.9.w": torch.ones(1)},
        CalibrationError,
        r"blocks\.9\.w.*is no parameter",
    ),
    "wrong shape": (
        lambda *_: {"blocks.0.mlp.fc2.bias": torch.ones(3)},
        CalibrationError,
        r"shape \(3,\).*is \(48,\)",
    ),
    "NaN update": (
        lambda *_: {"blocks.0.mlp.fc2.bias": torch.full((48,), float("nan"))},
        CalibrationError,
        r"blocks\.0\.mlp\.fc2\.bias NaN",
    ),
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_failed_calibration_leaves_the_model_alone(name: str, fake_calibration: Any) -> None:
    function, error, message = BAD_RESULTS[name]
    model = timm_vit()
    before = Snapshot(model)
    fake_calibration(function)
    with pytest.raises(error, match=message):
        dwattn.replace(model, plan_for(model), calibrate=torch.zeros(1))
    before.check()


def test_interrupted_calibration_takes_its_hook_and_patch_order_back(fake_calibration: Any) -> None:
    model = hf_model("ViTMAE", mask_ratio=0.0)
    before = Snapshot(model)

    def interrupt(model: nn.Module, shims: Any) -> None:
        assert "random_masking" in vars(model.embeddings)
        assert len(model.embeddings.patch_embeddings._forward_pre_hooks) == 1
        raise KeyboardInterrupt

    fake_calibration(interrupt)
    with pytest.raises(KeyboardInterrupt):
        dwattn.replace(model, plan_for(model), calibrate=torch.zeros(1))
    before.check()


@pytest.mark.parametrize("variant", ["dw", "lowrank_dw"])
@torch.no_grad()
def test_real_calibration_beats_the_gaussian_start(variant: str) -> None:
    family = BY_NAME["timm-reg4"]
    model, images = family.build(), family.images(48)
    before, original = Snapshot(model), model(images)
    errors = {}
    for name, options in (("gaussian", {}), ("fitted", {"calibrate": images, "progress": False})):
        dwattn.replace(model, plan_for(model), variant=variant, **options)
        errors[name] = (model(images) - original).norm().item()
        dwattn.restore(model)
        before.check()
    assert errors["fitted"] < 0.8 * errors["gaussian"]


def test_calibration_images_of_another_grid_are_refused() -> None:
    model = timm_vit(dynamic_img_size=True)
    before = Snapshot(model)
    with pytest.raises(GeometryError, match=r"grid of 3 x 4.*converted for 4 x 3"):
        dwattn.replace(model, plan_for(model), calibrate=torch.randn(4, 3, 24, 32), progress=False)
    before.check()


def test_describe_sees_the_same_model_after_conversion() -> None:
    model = timm_vit(reg_tokens=4)
    names = [block.attention_name for block in describe(model).blocks]
    dwattn.replace(model, plan_for(model))
    layout = describe(model)
    assert [block.attention_name for block in layout.blocks] == names
    assert layout.num_prefix == 5


def test_numbers_of_numpy() -> None:
    images = torch.randn(4, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    options = {
        "grid": (4, 3),
        "rank": 16,
        "seed": 2**63 - 1,
        "batch_size": 2,
        "views": 2,
        "num_images": 4,
    }
    of_numpy = {name: np.array(value)[()] for name, value in options.items()}
    results = []
    for given in (options, of_numpy, {**of_numpy, "rank": np.float32(1 / 3)}):
        model = timm_vit()
        plan = plan_for(model)
        dwattn.replace(model, plan, variant="lowrank_dw", calibrate=images, progress=False, **given)
        results.append(model(images))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_a_layer_that_no_plan_can_name_keeps_its_output_projection() -> None:
    """One with fewer key and value heads, which is refused by its weights only."""
    grouped = {"attn_type": "rope", "num_kv_heads": (3, 1, 3, 3), "qkv_fused": False}
    model = timm_eva(**{**DINOV3, **grouped, "init_values": 1.0})
    images = torch.randn(8, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    report = dwattn.replace(model, plan_for(model, [0]), calibrate=images, progress=False)
    assert report.replaced == ["blocks.0.attn"]
    tried = {note.name for note in report.calibration.notes}
    assert tried == {"blocks.0.attn", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
