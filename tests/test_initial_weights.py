"""Kernels before calibration: Gaussian, or from the mean attention map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dwattn
from dwattn.errors import DwattnError, PlanError
from dwattn.initial import mean_init
from dwattn.plan import KernelInit, Plan
from support.models import timm_vit
from support.surgery import plan_for, shims


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


@pytest.mark.parametrize("size", [(8, 64), (64, 8), (16, 32)])
def test_mean_start_of_scores_is_exact_on_narrow_grids(size: tuple[int, int]) -> None:
    """Neighbours that a grid of one row or column lacks take nothing from the uniform share."""
    model, images = uniform_model(img_size=size), torch.randn(4, 3, *size)
    scores = dwattn.score(model, images, 4, residual=False, progress=False)
    before = model(images)
    dwattn.replace(model, dwattn.select(scores, order=[1]))
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)


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


def test_heads_listed_in_a_plan_of_whole_layers_start_from_their_own_maps() -> None:
    model = timm_vit()
    scores = dwattn.score(model, torch.randn(4, 3, 32, 24), 4, progress=False)
    plan = dwattn.select(scores, blocks=1)
    name, whole = plan.layers[0].name, plan.layers[0].kernel_init
    assert whole is not None
    text = plan.to_json().replace(f'"name": "{name}",', f'"name": "{name}", "heads": [2, 0],', 1)
    dwattn.replace(model, Plan.from_json(text))
    layer = shims(model)[name].layer
    assert list(layer.replaced) == [0, 2]
    for part, head in ((slice(0, 16), 0), (slice(16, None), 2)):
        expected = torch.tensor(whole.kernel[head]) - whole.uniform[head]
        torch.testing.assert_close(layer.kernel[part], expected.expand(16, 3, 3))
    by_heads = plan_for(model := timm_vit(), [1], [[0]])
    by_heads.layers[0].kernel_init = whole.of([0, 1])
    with pytest.raises(PlanError, match=r"the 1 listed heads \[0\], or all 3 heads,.*take it out"):
        dwattn.replace(model, by_heads)


def test_mean_start_keeps_the_mass_of_a_row() -> None:
    """Kernel, prefix and uniform share of every channel add up to one."""
    layer = dwattn.FusedDWAttention(48, 3, grid=(4, 3), num_prefix=2)
    generator = torch.Generator().manual_seed(0)
    kernel = 0.05 * torch.rand(3, 3, 3, generator=generator)
    init = KernelInit(kernel=kernel.tolist(), prefix=[[0.1, 0.2]] * 3, uniform=[0.01] * 3)
    mean_init(layer, init)
    mass = layer.kernel.sum((1, 2)) + layer.kappa.sum(0) + layer.mu
    torch.testing.assert_close(mass, torch.ones(48))


def test_spvit_starts_from_the_share_of_each_head() -> None:
    layer = dwattn.SPViTAttention(48, 3, grid=(4, 3))
    kernel = torch.tensor([0.2, 0.1, 0.1]).reshape(3, 1, 1).expand(3, 3, 3)
    mean_init(layer, KernelInit(kernel=kernel.tolist(), prefix=[[]] * 3, uniform=[0.0] * 3))
    share = torch.softmax(layer.logits, 0)
    torch.testing.assert_close(share[:, 0, 0], torch.tensor([0.5, 0.25, 0.25]))


def test_maps_that_are_missing_or_do_not_fit() -> None:
    model = timm_vit()
    plan = plan_for(model, [1])
    with pytest.raises(
        PlanError, match=r"kernel_init='mean-attention'.*lacks for blocks.1.attn.*gaussian"
    ):
        dwattn.replace(model, plan, kernel_init="mean-attention")
    with pytest.raises(
        DwattnError, match="kernel_init='zeros' must be one of mean-attention, gaussian"
    ):
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
    with pytest.raises(PlanError, match="must cover all 3 heads"):
        dwattn.replace(model, plan)
    assert not shims(model)


@pytest.mark.parametrize(
    ("rank", "width"), [(None, 16), (8, 8), (13, 13), (0.5, 24), (0.01, 8), (1.0, 48), (48, 48)]
)
def test_ranks(rank: Any, width: int) -> None:
    model = timm_vit()
    dwattn.replace(model, plan_for(model), variant="lowrank_dw", rank=rank)
    assert {shim.layer.inner_dim for shim in shims(model).values()} == {width}
