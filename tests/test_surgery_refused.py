"""Replacements that fail or are interrupted leave the model as it was; dry runs too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dwattn
from dwattn.conversion import Transaction, conversion
from dwattn.errors import DwattnError, GeometryError, PlanError
from support.models import hf_model, timm_vit
from support.surgery import Snapshot, plan_for, shims

# --- refused, with the model as before ---


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
        ({"variant": "lowrank_dw", "rank": {"fidelty": 0.9}}, "'fidelty': 0.9} must have one key"),
        ({"variant": "lowrank_dw", "rank": {}}, "rank={} must have one key, as in rank={'fid"),
        ({"prefix": "bogus"}, "Unknown prefix mode 'bogus'"),
        ({"prefix": "drop"}, "num_prefix=1.*class_token=False"),
        (
            {"grid": (4, 3), "dynamic_grid": True},
            r"grid=\(4, 3\) fixes.*dynamic_grid=True does not",
        ),
        ({"grid": (4, 0)}, r"grid=\(4, 0\) must be two positive integers"),
        ({"grid": (4, 3, 1)}, "two positive integers"),
        ({"grid": (4.0, 3.0)}, "two positive integers"),
        ({"grid": 4}, "grid=4 must be two positive integers"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be from 0 to 2"),
        ({"batch_size": 4}, "got batch_size.*only calibration uses: pass calibrate=images"),
        ({"varient": "conv"}, "no argument varient=; did you mean variant="),
        ({"calibrate": [], "heldout": 0.5}, "no argument heldout=; did you mean held_out="),
        ({"bogus": 1}, "no argument bogus=; it has allow_stale, amp, batch_size, .*variant, views"),
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


# --- dry run and table ---


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
