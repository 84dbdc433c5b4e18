"""Calibration where grids vary, prefix rows are static, or a layer is of another kind: what each fit must give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
import test_calibration
from dwattn.calibration.ridge import CorrectionFit
from dwattn.plan import Plan
from test_calibration import images, make_static

pytest.importorskip("timm")


def tiny_vit(**options: Any) -> nn.Module:
    """2 blocks without LayerScale."""
    return test_calibration.tiny_vit(**{"depth": 2, "init_values": None, **options})


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_features(x)


def test_a_dynamic_grid_is_calibrated_on_that_of_the_images() -> None:
    """Images of 16 x 24 pixels have 4 x 6 patches; taken for 6 x 4 or 6 x 6 the neighbourhoods would be others."""
    x, found = torch.randn(16, 3, 16, 24), []
    original = tiny_vit(dynamic_img_size=True)
    for options in ({"grid": (4, 6)}, {"dynamic_grid": True}):
        model = copy.deepcopy(original)
        plan = Plan.for_layers(model, [0, 1])
        dwattn.replace(model, plan, calibrate=x, progress=False, views=1, **options)
        found.append(tokens(model, x))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("rank", [8, 16])
def test_static_prefix_rows_of_narrow_layers_are_fitted_to_the_kept_channels(rank: int) -> None:
    model = tiny_vit(reg_tokens=2)
    make_static(model, 1)
    with torch.no_grad():  # so that 8 of the 16 channels are all there is
        model.blocks[1].attn.proj.weight[:, 4:8] = model.blocks[1].attn.proj.weight[:, 12:] = 0
    x = torch.randn(32, 3, 16, 24)
    before = tokens(model, x)[:, :3]
    dwattn.replace(
        model, Plan.for_layers(model, [1]), variant="lowrank_dw", rank=rank, prefix="static", calibrate=x,
        refit="none", progress=False, views=1,
    )  # fmt: skip
    assert model.blocks[1].attn.layer.inner_dim == rank
    after = tokens(model, x)[:, :3]
    assert (after - before).norm() / before.norm() < 5e-2


def test_a_fidelity_target_is_met_by_no_more_channels_than_there_are() -> None:
    """12 channels: the next multiple of 8 would be 16."""
    model = tiny_vit(embed_dim=12)
    x = torch.randn(16, 3, 16, 24)
    dwattn.replace(
        model, Plan.for_layers(model, [1]), variant="lowrank_dw", rank={"fidelity": 1.0}, calibrate=x,
        progress=False, views=1,
    )  # fmt: skip
    assert model.blocks[1].attn.layer.inner_dim == 12
    assert torch.isfinite(tokens(model, x)).all()


@pytest.mark.parametrize(
    ("refit", "kinds", "updated"),
    [
        ("none", {"stencil"}, set()),
        ("attention", {"stencil", "output"}, set()),
        ("replaced", {"stencil", "output", "mlp output"}, {"blocks.1.mlp.fc2"}),
        (
            "all",
            {"stencil", "output", "mlp output", "attention output"},
            {"blocks.1.mlp.fc2", "blocks.2.attn.proj", "blocks.2.mlp.fc2"},
        ),
    ],
)
def test_refit_says_which_layers_may_change(refit: str, kinds: set[str], updated: set[str]) -> None:
    model = tiny_vit(depth=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(64, 3, 16, 24)
    plan = Plan.for_layers(model, [1])
    calibration = dwattn.replace(model, plan, calibrate=x, refit=refit, progress=False).calibration
    assert {note.kind for note in calibration.notes} == kinds
    corrected = {name.rpartition(".")[0] for name in calibration.updates}
    # What helps too little on held-out images stays as it is: of the later layers some, with these images.
    assert corrected <= updated
    assert bool(corrected) == bool(updated)
    after = model.state_dict()
    changed = {n for n, v in before.items() if n in after and not torch.equal(v, after[n])}
    assert {name.rpartition(".")[0] for name in changed} == corrected
    assert torch.equal(
        model.blocks[1].attn.layer.proj.weight, before["blocks.1.attn.proj.weight"]
    ) == (refit == "none")


def test_layer_scale_is_taken_out_of_what_is_fitted_behind_it() -> None:
    """Corrections are fitted in the residual stream; in front of LayerScale they are larger by its inverse."""
    model = tiny_vit(depth=3, init_values=1.0)
    x, found = torch.randn(64, 3, 16, 24), []
    for scale in (1.0, 1e-3):
        scaled = copy.deepcopy(model)
        with torch.no_grad():  # the same function
            for block in scaled.blocks:
                for layer_scale, linear in (
                    (block.ls1, block.attn.proj),
                    (block.ls2, block.mlp.fc2),
                ):
                    layer_scale.gamma.mul_(scale)
                    linear.weight.div_(scale)
                    linear.bias.div_(scale)
        dwattn.replace(scaled, Plan.for_layers(scaled, [1]), calibrate=x, progress=False, views=1)
        found.append(tokens(scaled, x))
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=2e-3)


def test_where_a_layer_has_no_bias_none_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that is fitted and thrown away would leave weights that are right only with it."""
    biases = []

    class Noting(CorrectionFit):
        def __init__(self, *args: Any, bias: bool = True) -> None:
            biases.append(bias)
            super().__init__(*args, bias=bias)

    monkeypatch.setattr("dwattn.calibration.sweep.CorrectionFit", Noting)
    for proj_bias in (False, True):
        model, x = tiny_vit(depth=3, proj_bias=proj_bias), torch.randn(64, 3, 16, 24)
        if not proj_bias:  # timm's option is for the MLP, too
            assert model.blocks[1].mlp.fc2.bias is None
        calibration = dwattn.replace(
            model, Plan.for_layers(model, [1]), calibrate=x, progress=False
        ).calibration
        kinds = [note.kind for note in calibration.notes]
        assert {"output", "mlp output", "attention output"} <= set(kinds)
        assert set(biases) == {proj_bias}
        biases.clear()


@pytest.mark.parametrize("rank", [12, 16])
def test_prefix_rows_are_exact_at_every_rank(rank: int) -> None:
    """Also at the full width the factors' rows are mixed: they are not the channels of heads."""
    model = tiny_vit()
    attention = copy.deepcopy(model.blocks[1].attn)
    plan = Plan.for_layers(model, ["blocks.1.attn"])
    options = {"variant": "lowrank_dw", "rank": rank, "views": 1, "refit": "none"}
    dwattn.replace(model, plan, calibrate=images(), progress=False, **options)
    x = torch.randn(2, 25, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.blocks[1].attn(x)[:, 0], attention(x)[:, 0])


def test_low_rank_keeps_the_mean_where_no_bias_can_take_it() -> None:
    model = tiny_vit(proj_bias=False)
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[32:].normal_(std=3.0)
    seen: list[tuple[Tensor, Tensor]] = []
    model.blocks[1].attn.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(images())
    plan = Plan.for_layers(model, ["blocks.1.attn"])
    options = {"variant": "lowrank_dw", "rank": 8, "views": 1, "refit": "none"}
    dwattn.replace(model, plan, calibrate=images(), progress=False, **options)
    x, wanted = seen[0]
    with torch.no_grad():
        lost = (model.blocks[1].attn(x) - wanted)[:, 1:].square().sum()
    assert lost < 0.05 * wanted[:, 1:].square().sum()
