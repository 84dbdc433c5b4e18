"""Replacing and restoring: in place, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dwattn
from dwattn.errors import GeometryError
from dwattn.variants import REPLACEMENTS
from support.models import BY_NAME, FAMILIES, Family, timm_vit
from support.surgery import Snapshot, plan_for, shims


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_every_family_converts_and_comes_back(family: Family) -> None:
    model, images = family.build(), family.images()
    before = Snapshot(model)
    original = family.tokens(model, images)
    report = dwattn.replace(model, plan_for(model, [0, 2], [None, [1]]))
    assert len(report.replaced) == 2
    assert list(shims(model)) == report.replaced
    converted = family.tokens(model, images)
    assert converted.shape == original.shape
    assert torch.isfinite(converted).all()
    assert (converted - original).abs().max() > 0.01
    dwattn.restore(model)
    before.check()
    if family.name != "hf-vit-mae":  # which shuffles its patches again
        assert torch.equal(family.tokens(model, images), original)


@pytest.mark.parametrize(
    "name", ["timm-reg4", "timm-no-bias", "timm-qk-norm", "hf-siglip", "hub-reg4"]
)
@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_every_variant(variant: str, name: str) -> None:
    family = BY_NAME[name]
    model, images = family.build(), family.images()
    before = Snapshot(model)
    dwattn.replace(model, plan_for(model), variant=variant)
    assert {shim.layer.variant for shim in shims(model).values()} == {variant}
    out = family.tokens(model, images)
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    assert all(p.grad is not None for s in shims(model).values() for p in s.parameters())
    model.zero_grad()
    dwattn.restore(model)
    before.check()


@pytest.mark.parametrize("prefix", ["exact", "static"])
def test_prefix_modes(prefix: str) -> None:
    model = timm_vit(reg_tokens=4)
    dwattn.replace(model, plan_for(model), prefix=prefix)
    assert {shim.layer.prefix for shim in shims(model).values()} == {prefix}
    assert torch.isfinite(model(torch.randn(1, 3, 32, 24))).all()


def test_a_path_is_a_plan_too(tmp_path: Any) -> None:
    model = timm_vit()
    plan_for(model, [3]).save(tmp_path / "plan.json")
    assert dwattn.replace(model, tmp_path / "plan.json").replaced == ["blocks.3.attn"]


def test_all_heads_by_number_are_the_whole_layer() -> None:
    model = timm_vit()
    dwattn.replace(model, plan_for(model, [0, 1], [[2, 0, 1], [0]]))
    kinds = [type(shim.layer).__name__ for shim in shims(model).values()]
    assert kinds == ["FusedDWAttention", "ScatteredDWAttention"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = timm_vit().to(dtype)
    dwattn.replace(model, plan_for(model, [0, 2], [None, [1]]))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 3, 32, 24, dtype=dtype)).dtype == dtype


def test_mode_is_kept_layer_by_layer() -> None:
    model = timm_vit()
    model.train()
    model.blocks[2].eval()
    before = Snapshot(model)
    dwattn.replace(model, plan_for(model))
    assert [shim.training for shim in shims(model).values()] == [True, False]
    assert [shim.layer.value.training for shim in shims(model).values()] == [True, False]
    dwattn.restore(model)
    before.check()


def test_mode_changes_meanwhile_reach_the_originals() -> None:
    model = timm_vit().train()
    dwattn.replace(model, plan_for(model))
    model.eval()
    dwattn.restore(model)
    assert not any(module.training for module in model.modules())


def test_frozen_weights_stay_frozen() -> None:
    model = timm_vit(qk_norm=True)
    model.blocks[0].attn.requires_grad_(False)
    model.blocks[2].attn.proj.requires_grad_(False)
    model.blocks[2].attn.q_norm.requires_grad_(False)
    before = Snapshot(model)
    dwattn.replace(model, plan_for(model))
    first, second = shims(model).values()
    assert not any(p.requires_grad for p in first.parameters())
    frozen = {n for n, p in second.layer.named_parameters() if not p.requires_grad}
    assert frozen == {
        "proj.weight",
        "proj.bias",
        "prefix_rows.q_norm.weight",
        "prefix_rows.q_norm.bias",
    }
    dwattn.restore(model)
    before.check()


def test_hooks_and_flags_of_the_originals_come_back() -> None:
    model = timm_vit()
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda *_: None)
    model.patch_embed.register_forward_pre_hook(lambda *_: None)
    before = Snapshot(model)
    images = torch.randn(1, 3, 32, 24)
    dwattn.replace(model, plan_for(model))
    model(images)
    assert not calls
    dwattn.restore(model)
    before.check()
    model(images)
    assert calls


def test_training_the_converted_model_does_not_touch_the_originals() -> None:
    model = timm_vit(qk_norm=True)
    originals = {
        n: copy.deepcopy(m.state_dict()) for n, m in model.named_modules() if n.endswith("attn")
    }
    dwattn.replace(model, plan_for(model))
    optimizer = torch.optim.SGD([p for s in shims(model).values() for p in s.parameters()], lr=0.5)
    model(torch.randn(2, 3, 32, 24)).square().sum().backward()
    optimizer.step()
    dwattn.restore(model)
    for name, state in originals.items():
        now = model.get_submodule(name).state_dict()
        assert all(torch.equal(now[key], value) for key, value in state.items())


@pytest.mark.parametrize("place", ["attn", "attn.qkv"])
def test_the_table_tells_of_hooks_that_a_replacement_leaves_out(place: str) -> None:
    model, called = timm_vit(), []
    hooked = model.blocks[2].get_submodule(place)
    hooked.register_forward_hook(lambda *_: called.append(place))
    dry = dwattn.replace(model, plan_for(model), dry_run=True)
    report = dwattn.replace(model, plan_for(model))
    assert [row.reason for row in dry.rows] == [row.reason for row in report.rows]
    assert [bool(row.reason) for row in report.rows] == [False, False, True, False]
    assert not report.refused
    assert "not called until it is restored" in str(report)
    model(torch.randn(1, 3, 32, 24))
    assert not called
    dwattn.restore(model)
    model(torch.randn(1, 3, 32, 24))
    assert called


def test_a_model_that_drops_patches_is_told_so() -> None:
    model = timm_vit(patch_drop_rate=0.25)
    dwattn.replace(model, plan_for(model))
    model(torch.randn(1, 3, 32, 24))
    with pytest.raises(GeometryError, match=r"N=10 tokens.*make 13.*patch_drop_rate=0\."):
        model.train()(torch.randn(1, 3, 32, 24))
