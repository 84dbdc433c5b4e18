"""Calibration where grids vary, prefix rows are static, or a layer is of another kind: what each fit must give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.calibration.ridge import CorrectionFit
from dwattn.plan import Plan

timm = pytest.importorskip("timm")


def tiny_vit(**options: Any) -> nn.Module:
    """2 blocks, 2 heads of 8 channels, a 4 x 6 grid."""
    settings: dict[str, Any] = {
        "img_size": (16, 24), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0,
    }  # fmt: skip
    model = timm.models.vision_transformer.VisionTransformer(**{**settings, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.3)
    return model


def make_static(model: nn.Module, block: int) -> None:
    """Zero queries: every token attends evenly to all tokens."""
    with torch.no_grad():
        model.blocks[block].attn.qkv.weight[:16] = 0
        model.blocks[block].attn.qkv.bias[:16] = 0


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
