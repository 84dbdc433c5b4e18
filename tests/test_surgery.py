"""Replacing and restoring: in place, all or nothing, bit for bit."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn import Plan, surgery
from dwattn.adapters import ConvertedAttention, describe
from dwattn.conversion import Transaction, conversion
from dwattn.errors import CalibrationError, DwattnError, GeometryError, PlanError
from dwattn.initial import mean_init
from dwattn.plan import KernelInit
from dwattn.variants import REPLACEMENTS
from support.models import BY_NAME, FAMILIES, Family, hf_model, hub_vit, timm_vit


class Snapshot:
    """Everything about a model that must not change: objects, values, flags, hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: (id(m), m.training) for name, m in model.named_modules()}
        self.parameters = {
            n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()
        }
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.hooks = self._hooks(model)
        self.attributes = {name: set(vars(m)) for name, m in model.named_modules()}

    @staticmethod
    def _hooks(model: nn.Module) -> dict[str, Any]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return {
            f"{name}.{kind}": list(getattr(m, kind).values())
            for name, m in model.named_modules()
            for kind in kinds
        }

    def check(self) -> None:
        now = Snapshot(self.model)
        assert now.modules == self.modules
        assert now.parameters == self.parameters
        assert list(now.state) == list(self.state)
        assert all(torch.equal(now.state[name], value) for name, value in self.state.items())
        assert now.hooks == self.hooks
        assert now.attributes == self.attributes


def plan_for(model: nn.Module, blocks: list[int] = [0, 2], heads: Any = None) -> Plan:  # noqa: B006
    return Plan.for_layers(model, blocks, heads)


def shims(model: nn.Module) -> dict[str, ConvertedAttention]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ConvertedAttention)}


# --- replace and restore
# ------------------------------------------------------------------------------


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


# --- afterwards: copies, devices, dtypes, compilers
# ---------------------------------------------------


def test_copies_are_independent() -> None:
    model, images = timm_vit(dynamic_img_size=True), torch.randn(1, 3, 32, 24)
    original = model(images)
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        shims(twin)["blocks.0.attn"].layer.kernel.zero_()
    assert not torch.equal(twin(images), model(images))
    # Each has a grid source of its own.
    twin(torch.randn(1, 3, 24, 32))
    assert shims(model)["blocks.0.attn"].layer.grid_source.grid == (4, 3)
    assert shims(twin)["blocks.0.attn"].layer.grid_source.grid == (3, 4)
    dwattn.restore(twin)
    assert torch.equal(twin(images), original)
    assert not shims(twin)
    assert len(shims(model)) == 2
    dwattn.restore(model)
    assert torch.equal(model(images), original)
    assert not model.patch_embed._forward_pre_hooks
    assert not twin.patch_embed._forward_pre_hooks


def test_originals_follow_a_change_of_dtype() -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    expected = copy.deepcopy(model).double()(images.double())
    dwattn.replace(model, plan_for(model))
    model.double()
    assert model(images.double()).dtype == torch.float64
    dwattn.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model(images.double()), expected)


def test_originals_do_not_lose_bits_on_a_detour_through_half() -> None:
    model = timm_vit()
    exact = model.blocks[0].attn.qkv.weight.clone()
    dwattn.replace(model, plan_for(model))
    model.half()
    model.float()
    dwattn.restore(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, exact)


def test_originals_of_mixed_dtypes_come_back_as_they_were() -> None:
    model = timm_vit(qk_norm=True)
    model.blocks[0].attn.q_norm.double()
    before = Snapshot(model)
    dwattn.replace(model, plan_for(model))
    dwattn.restore(model)
    before.check()


def test_originals_follow_to_the_meta_device() -> None:
    """The only second device of every machine."""
    model = timm_vit()
    dwattn.replace(model, plan_for(model))
    model.to("meta")
    dwattn.restore(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_restoring_and_replacing_again() -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    plan = plan_for(model)
    dwattn.replace(model, plan)
    first = model(images)
    dwattn.restore(model)
    dwattn.replace(model, plan)
    assert torch.equal(model(images), first)


def test_disjoint_plans_add_up_and_are_restored_together() -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    before = Snapshot(model)
    plans = [plan_for(model, [0]), plan_for(model, [2, 3], [[1], None])]
    for plan in plans:
        dwattn.replace(model, plan)
    assert list(shims(model)) == ["blocks.0.attn", "blocks.2.attn", "blocks.3.attn"]
    record = conversion(model)
    assert record is not None
    assert [layer.name for layer in record.plan.layers] == list(shims(model))
    both = timm_vit()
    dwattn.replace(both, plan_for(both, [0, 2, 3], [None, [1], None]))
    assert torch.equal(model(images), both(images))
    assert len(model.patch_embed._forward_pre_hooks) == 1
    dwattn.restore(model)
    before.check()


def test_a_second_plan_cannot_replace_a_replaced_layer_or_change_the_grid() -> None:
    model = timm_vit(dynamic_img_size=True)
    plan = plan_for(model, [0])
    dwattn.replace(model, plan)
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"blocks.0.attn: It is already replaced.*restore"):
        dwattn.replace(model, plan)
    with pytest.raises(PlanError, match=r"before with grid=\(4, 3\), now dynamic_grid=True"):
        dwattn.replace(model, plan_for(model, [1]), dynamic_grid=True)
    before.check()
    assert list(shims(model)) == ["blocks.0.attn"]


def test_parts_and_wrappers_of_a_converted_model() -> None:
    model = hf_model("ViT", "ViTForImageClassification")
    plan = plan_for(model)
    dwattn.replace(model.vit, plan)
    assert conversion(model) is conversion(model.vit)
    with pytest.raises(PlanError, match=r"part of this model \(ViTModel\)"):
        dwattn.replace(model, plan_for(model, [1]))
    dwattn.restore(model)
    dwattn.replace(model, plan)
    with pytest.raises(PlanError, match="has no layers replaced by dwattn"):
        dwattn.restore(model.vit)


def test_restoring_what_was_not_converted_or_was_tampered_with() -> None:
    model = timm_vit()
    with pytest.raises(PlanError, match="VisionTransformer has no layers replaced by dwattn"):
        dwattn.restore(model)
    dwattn.replace(model, plan_for(model))
    model.blocks[2].attn = nn.Identity()
    with pytest.raises(PlanError, match=r"blocks.2.attn is no longer.*but a Identity"):
        dwattn.restore(model)
    assert list(shims(model)) == ["blocks.0.attn"]


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_converted_models_compile_and_export(dynamic: bool) -> None:
    model = timm_vit(reg_tokens=4, depth=2, dynamic_img_size=dynamic)
    dwattn.replace(model, plan_for(model, [0, 1], [None, [1]]), dynamic_grid=dynamic)
    images = torch.randn(2, 3, 32, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    more = torch.randn(5, 3, 32, 24)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


def test_autocast_and_gradients_of_a_converted_model() -> None:
    model = hub_vit(num_register_tokens=4).train()
    dwattn.replace(model, plan_for(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 56, 56)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None for s in shims(model).values() for p in s.parameters())


# --- initial weights
# ----------------------------------------------------------------------------------


def test_gaussian_start_is_repeatable() -> None:
    kernels = []
    for seed in (0, 0, 1):
        model = timm_vit()
        dwattn.replace(model, plan_for(model, [0, 1]), seed=seed)
        kernels.append([shim.layer.kernel.clone() for shim in shims(model).values()])
    assert torch.equal(kernels[0][0], kernels[1][0])
    assert not torch.equal(kernels[0][0], kernels[0][1])
    assert not torch.equal(kernels[0][0], kernels[2][0])
    assert 0.015 < kernels[0][0].std() < 0.025


def test_replacing_draws_no_random_numbers() -> None:
    model = timm_vit()
    plan = plan_for(model)
    state = torch.get_rng_state()
    dwattn.replace(model, plan)
    assert torch.equal(torch.get_rng_state(), state)


def uniform_model(**options: Any) -> nn.Module:
    """All attention maps of block 1 are uniform: no logits."""
    model = timm_vit(**options)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:96] = 0
        model.blocks[1].attn.qkv.bias[:96] = 0
    return model


@pytest.mark.parametrize(("variant", "heads"), [("dw", None), ("conv", None), ("dw", [2, 0])])
@pytest.mark.parametrize("num_prefix", [0, 5])
def test_mean_start_is_exact_for_uniform_attention(
    variant: str, heads: Any, num_prefix: int
) -> None:
    prefix = {"reg_tokens": 4} if num_prefix else {"class_token": False, "global_pool": "avg"}
    model, images = uniform_model(**prefix), torch.randn(2, 3, 32, 24)
    before = model(images)
    plan = plan_for(model, [1], [heads])
    count, share = 3 if heads is None else 2, 1 / (12 + num_prefix)
    plan.layers[0].kernel_init = KernelInit(
        kernel=[[[share] * 3] * 3] * count,
        prefix=[[share] * num_prefix] * count,
        uniform=[share] * count,
    )
    dwattn.replace(model, plan, variant=variant)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
    dwattn.restore(model)
    dwattn.replace(model, plan, variant=variant, kernel_init="gaussian")
    assert (model(images) - before).abs().max() > 0.01


def test_mean_start_gives_each_head_its_own_map_in_any_order() -> None:
    plans = []
    for heads in ([0, 2], [2, 0]):
        model = timm_vit()
        plan = plan_for(model, [1], [heads])
        plan.layers[0].kernel_init = KernelInit(
            kernel=[[[0.1 * (h + 1)] * 3] * 3 for h in heads],
            prefix=[[0.01 * h] for h in heads],
            uniform=[0.0 for _ in heads],
        )
        dwattn.replace(model, plan)
        plans.append(shims(model)["blocks.1.attn"].layer)
    for layer in plans:
        assert torch.allclose(layer.kernel[:16], torch.tensor(0.1))
        assert torch.allclose(layer.kernel[16:], torch.tensor(0.3))
        assert torch.allclose(layer.kappa[0, 16:], torch.tensor(0.02))


def test_mean_start_keeps_the_mass_of_a_row() -> None:
    """Kernel, prefix and uniform share of every channel add up to one."""
    layer = dwattn.FusedDWAttention(48, 3, grid=(4, 3), num_prefix=2)
    generator = torch.Generator().manual_seed(0)
    kernel = 0.05 * torch.rand(3, 3, 3, generator=generator)
    init = KernelInit(kernel=kernel.tolist(), prefix=[[0.1, 0.2]] * 3, uniform=[0.01] * 3)
    mean_init(layer, init, None)
    mass = layer.kernel.sum((1, 2)) + layer.kappa.sum(0) + layer.mu
    torch.testing.assert_close(mass, torch.ones(48))


def test_spvit_starts_from_the_share_of_each_head() -> None:
    layer = dwattn.SPViTAttention(48, 3, grid=(4, 3))
    kernel = torch.tensor([0.2, 0.1, 0.1]).reshape(3, 1, 1).expand(3, 3, 3)
    mean_init(layer, KernelInit(kernel=kernel.tolist(), prefix=[[]] * 3, uniform=[0.0] * 3), None)
    share = torch.softmax(layer.logits, 0)
    torch.testing.assert_close(share[:, 0, 0], torch.tensor([0.5, 0.25, 0.25]))


def test_maps_that_are_missing_or_do_not_fit() -> None:
    model = timm_vit()
    plan = plan_for(model, [1])
    with pytest.raises(PlanError, match=r"kernel_init='mean'.*lacks for blocks.1.attn.*gaussian"):
        dwattn.replace(model, plan, kernel_init="mean")
    with pytest.raises(DwattnError, match="kernel_init='zeros' must be one of mean, gaussian"):
        dwattn.replace(model, plan, kernel_init="zeros")
    flat = [[[0.1] * 3] * 3]
    plan.layers[0].kernel_init = KernelInit(
        kernel=flat * 3, prefix=[[0.1, 0.1]] * 3, uniform=[0.0] * 3
    )
    with pytest.raises(
        PlanError, match=r"3 heads with 1 prefix tokens each; it covers 3 heads with \[2\]"
    ):
        dwattn.replace(model, plan)
    plan.layers[0].kernel_init = KernelInit(kernel=flat * 2, prefix=[[0.1]] * 2, uniform=[0.0] * 2)
    with pytest.raises(PlanError, match="must cover 3 heads"):
        dwattn.replace(model, plan)
    assert not shims(model)


@pytest.mark.parametrize(
    ("rank", "width"), [(None, 16), (8, 8), (13, 13), (0.5, 24), (0.01, 8), (1.0, 48), (48, 48)]
)
def test_ranks(rank: Any, width: int) -> None:
    model = timm_vit()
    dwattn.replace(model, plan_for(model), variant="lowrank_dw", rank=rank)
    assert {shim.layer.inner_dim for shim in shims(model).values()} == {width}


# --- refused, with the model as before
# ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "linear"}, "Unknown variant 'linear'.*dw, lowrank_dw"),
        ({"variant": "mhsa"}, "Unknown variant 'mhsa'"),
        ({"rank": 8}, "rank=8 is an option of variant='lowrank_dw', not of 'dw'"),
        ({"variant": "lowrank_dw", "rank": 0}, "rank=0 must be a width"),
        ({"variant": "lowrank_dw", "rank": -0.5}, "rank=-0.5 must be"),
        ({"variant": "lowrank_dw", "rank": 1.5}, "rank=1.5 is more than all channels"),
        ({"variant": "lowrank_dw", "rank": float("nan")}, "rank=nan must be"),
        ({"variant": "lowrank_dw", "rank": True}, "rank=True must be"),
        ({"variant": "lowrank_dw", "rank": "half"}, "rank='half' must be"),
        ({"variant": "lowrank_dw", "rank": 64}, "rank=64 is more than the layer's 48 channels"),
        ({"variant": "lowrank_dw", "rank": {"fidelity": 0.9}}, "pass calibrate=images"),
        ({"prefix": "bogus"}, "Unknown prefix mode 'bogus'"),
        ({"prefix": "drop"}, "num_prefix=1.*class_token=False"),
        (
            {"grid": (4, 3), "dynamic_grid": True},
            r"grid=\(4, 3\) fixes.*dynamic_grid=True does not",
        ),
        ({"grid": (4, 0)}, r"grid=\(4, 0\) must be two positive integers"),
        ({"grid": (4, 3, 1)}, "two positive integers"),
        ({"grid": (4.0, 3.0)}, "two positive integers"),
        ({"batch_size": 4}, "got batch_size.*only calibration uses: pass calibrate=images"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_options_that_do_not_fit(options: dict[str, Any], message: str, dry_run: bool) -> None:
    model = timm_vit()
    plan = plan_for(model)
    before = Snapshot(model)
    with pytest.raises(DwattnError, match=message):
        dwattn.replace(model, plan, dry_run=dry_run, **options)
    before.check()


@pytest.mark.parametrize("variant", ["lowrank_dw", "conv", "ens_dw", "spvit"])
def test_only_dw_can_be_scattered(variant: str) -> None:
    model = timm_vit()
    with pytest.raises(DwattnError, match=f"'{variant}' replaces whole layers; got heads="):
        dwattn.replace(model, plan_for(model, [0, 1], [None, [1]]), variant=variant)
    with pytest.raises(DwattnError, match=r"prefix='static'.*single heads of blocks.1.attn"):
        dwattn.replace(model, plan_for(model, [0, 1], [None, [1]]), prefix="static")
    assert not shims(model)


def test_heads_that_do_not_exist() -> None:
    model = timm_vit()
    with pytest.raises(PlanError, match=r"heads \[0, 3\] of blocks.1.attn, which has heads 0 to 2"):
        dwattn.replace(model, plan_for(model, [1], [[0, 3]]))


def test_a_stale_plan_leaves_the_model_alone() -> None:
    model = timm_vit()
    plan = plan_for(model)
    with torch.no_grad():
        model.blocks[3].attn.qkv.weight.normal_()
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"stale.*blocks.3.attn"):
        dwattn.replace(model, plan)
    before.check()
    dwattn.replace(model, plan, allow_stale=True)


def test_the_wrong_grid_is_noticed_at_the_first_image() -> None:
    model = timm_vit(dynamic_img_size=True)
    dwattn.replace(model, plan_for(model), grid=(3, 4))
    with pytest.raises(
        GeometryError, match=r"grid of 4 x 3.*converted for 3 x 4.*dynamic_grid=True"
    ):
        model(torch.randn(1, 3, 32, 24))
    assert model(torch.randn(1, 3, 24, 32)).shape == (1, 5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize(
    ("step", "at"), [("hook", 1), ("swap", 1), ("swap", 2), ("set", 1), ("set", 2)]
)
def test_an_interrupted_replacement_is_undone(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: str, at: int
) -> None:
    """The interruption comes after the step has had its effect, the worst moment."""
    model = hf_model("ViTMAE", mask_ratio=0.0) if step == "set" else timm_vit()
    plan = plan_for(model)
    before = Snapshot(model)
    real, calls = getattr(Transaction, step), []

    def interrupted(self: Transaction, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        calls.append(step)
        if len(calls) == at:
            raise error

    monkeypatch.setattr(Transaction, step, interrupted)
    with pytest.raises(error):
        dwattn.replace(model, plan)
    assert len(calls) == at
    monkeypatch.undo()
    before.check()
    dwattn.replace(model, plan)
    dwattn.restore(model)
    before.check()


def test_an_interrupted_restore_leaves_the_model_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    original = model(images)
    dwattn.replace(model, plan_for(model))
    converted = model(images)
    before = Snapshot(model)
    real, calls = Transaction.swap, []

    def interrupted(self: Transaction, *args: Any) -> None:
        real(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Transaction, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dwattn.restore(model)
    monkeypatch.undo()
    before.check()
    assert torch.equal(model(images), converted)
    dwattn.restore(model)
    assert torch.equal(model(images), original)


# --- dry run and table
# --------------------------------------------------------------------------------


def test_a_dry_run_touches_nothing() -> None:
    model = timm_vit()
    plan = plan_for(model, [0, 2], [None, [1]])
    before, state = Snapshot(model), torch.get_rng_state()
    report = dwattn.replace(model, plan, dry_run=True)
    before.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert conversion(model) is None
    assert report.dry_run
    assert report.replaced == ["blocks.0.attn", "blocks.2.attn"]
    real = dwattn.replace(model, plan)
    assert [r.action for r in real.rows] == [r.action for r in report.rows]
    assert [r.parameters for r in real.rows] == [r.parameters for r in report.rows]


def test_the_table_says_what_and_why() -> None:
    from timm.layers import Attention

    model = timm_vit()
    model.blocks[1].attn = Attention(48, num_heads=3, qkv_bias=True, gated=True)
    plan = plan_for(model, [0, 1, 2], [None, None, [1]])
    plan.layers[0].score = 0.125
    report = dwattn.replace(model, plan, dry_run=True)
    text = str(report)
    assert "timm VisionTransformer: 2 of 4 layers would be replaced" in text
    lines = {row.block: next(x for x in text.splitlines() if row.name in x) for row in report.rows}
    assert "would be -> dw" in lines[0]
    assert "0.125" in lines[0]
    assert "all" in lines[0]
    assert "refused" in lines[1]
    assert "sigmoid gate" in " ".join(text.split())
    assert "kept" in lines[3]
    data = report.to_dict()
    assert data["layers"][2]["heads"] == (1,)
    assert data["layers"][1]["planned"]
    assert [row["action"] for row in data["layers"]] == ["replaced", "refused", "replaced", "kept"]


# --- calibration, as surgery sees it
# ------------------------------------------------------------------


@pytest.fixture
def fake_calibration(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    """Put a function in the place of the real calibration; returns what it was called with."""

    def install(function: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def calibrate(model: Any, layout: Any, shims: Any, data: Any, **options: Any) -> Any:
            seen.update(model=model, layout=layout, shims=shims, data=data, options=options)
            return types.SimpleNamespace(updates=function(model, shims) or {})

        module = types.SimpleNamespace(calibrate=calibrate)
        real = surgery.importlib.import_module
        monkeypatch.setattr(
            surgery.importlib,
            "import_module",
            lambda name: module if name == "dwattn.calibration" else real(name),
        )
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


def test_missing_calibration_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm_vit()

    def missing(name: str) -> Any:
        raise ImportError("No module named 'dwattn.calibration'")

    monkeypatch.setattr(surgery.importlib, "import_module", missing)
    with pytest.raises(CalibrationError, match=r"dwattn.calibration, which cannot be imported"):
        dwattn.replace(model, plan_for(model), calibrate=torch.zeros(1))
    assert not shims(model)


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
