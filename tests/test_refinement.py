"""Choosing blocks by exchanges: the search, what it judges by, and going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dwattn
from dwattn import refinement
from dwattn.errors import DataError, PlanError
from dwattn.refinement import Blocks, exchanges
from dwattn.scores import Scores
from dwattn.selection import rank_blocks
from support.models import BY_NAME, Family

FAMILY = BY_NAME["hub-reg4"]
OPTIONS: dict[str, Any] = {"width": 2, "rounds": 2, "progress": False}


def scored(family: Family = FAMILY) -> tuple[torch.nn.Module, torch.Tensor, Scores]:
    model, images = family.build(), family.images(24)
    return model, images, dwattn.score(model, images, 24, progress=False)


def landscape(monkeypatch: pytest.MonkeyPatch, drift: Callable[[Blocks], float]) -> list[Blocks]:
    """Let sets have these drifts without being carried out; the list gets every set that is tried."""
    tried: list[Blocks] = []

    def try_out(search: Any, blocks: Blocks) -> None:
        if blocks not in search.drift:
            tried.append(blocks)
            search.drift[blocks] = drift(blocks)

    monkeypatch.setattr(refinement._Search, "try_out", try_out)
    return tried


@torch.no_grad()
def last_patches(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Patch tokens behind the last block, fp64."""
    ends: list[torch.Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda _, __, output: ends.append(output))
    model(images)
    handle.remove()
    return ends[0][:, FAMILY.num_prefix :].double()


def test_exchanges_are_those_nearest_to_the_border() -> None:
    ranked = [4, 2, 0, 5, 1, 3]
    assert exchanges((0, 2, 4), ranked, 1) == [(2, 4, 5)]
    assert exchanges((0, 2, 4), ranked, 2) == [(2, 4, 5), (1, 2, 4), (0, 4, 5), (0, 1, 4)]
    assert len(exchanges((0, 2, 4), ranked, 9)) == 9
    assert exchanges((0, 1, 2, 3, 4, 5), ranked, 3) == []


def test_the_search_goes_downhill_and_ends_where_nothing_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images, scores = scored()
    ranked = [layer.block for layer in rank_blocks(scores, "residual")]
    best = tuple(sorted(ranked[2:]))  # two exchanges away from the start
    tried = landscape(monkeypatch, lambda blocks: 1.0 + len({*best} - {*blocks}))
    found = dwattn.refine(model, scores, images, 2, **OPTIONS)
    assert found.start == tuple(sorted(ranked[:2]))
    assert found.blocks == best
    assert len(tried) == len(set(tried))
    assert [FAMILY.attention.replace("0", str(b)) for b in best] == [
        layer.name for layer in found.plan.layers
    ]
    assert found.plan.criterion == "refined"
    one = dwattn.refine(model, scores, images, 2, **{**OPTIONS, "rounds": 1})
    assert len({*best} - {*one.blocks}) == 1
    # What helps too little to be told from chance is not taken.
    landscape(monkeypatch, lambda blocks: 1.0 if blocks == found.start else 0.995)
    assert dwattn.refine(model, scores, images, 2, **OPTIONS).blocks == found.start


@pytest.mark.parametrize("variant", ["dw", "lowrank_dw"])
def test_a_trial_is_the_drift_of_a_calibrated_copy(variant: str) -> None:
    model, images, scores = scored()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    options = {**OPTIONS, "rounds": 1, "width": 1, "variant": variant}
    found = dwattn.refine(
        model, scores, images[:16], 2, judge=images[16:], num_images=12, **options
    )
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert len(found.drift) == 2
    assert found.drift[found.blocks] == min(found.drift.values())
    for blocks, drift in found.drift.items():
        student = FAMILY.build()
        plan = dwattn.Plan.for_layers(student, list(blocks))
        dwattn.replace(
            student, plan, variant=variant, calibrate=images[:12], views=1, progress=False
        )
        wanted, got = last_patches(model, images[16:]), last_patches(student, images[16:])
        expected = (got - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
        assert drift == pytest.approx(expected.item(), rel=1e-3)


def test_batches_to_compare_on_are_not_calibrated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, scores = scored()
    seen: list[int] = []
    real = refinement.replace

    def spy(*args: Any, **options: Any) -> Any:
        seen.extend(int(x.flatten()[0] * 1e6) for batch in options["calibrate"] for x in batch)
        return real(*args, **options)

    monkeypatch.setattr(refinement, "replace", spy)
    dwattn.refine(model, scores, images, 2, rounds=1, width=1, progress=False)
    kept = {int(x.flatten()[0] * 1e6) for x in images[12:16]}
    assert len(set(seen)) == 20
    assert not kept & set(seen)
    # A loader's batches stay whole.
    dwattn.refine(model, scores, list(images.split(12)), 2, rounds=1, width=1, progress=False)


def test_a_search_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, images, scores = scored()
    options = {**OPTIONS, "trials": tmp_path / "trials.json"}
    whole = dwattn.refine(model, scores, images, 2, **OPTIONS)
    real, calls = refinement.replace, []

    def stops(*args: Any, **rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **rest)

    monkeypatch.setattr(refinement, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        dwattn.refine(model, scores, images, 2, **options)
    resumed = dwattn.refine(model, scores, images, 2, **options)
    assert resumed.blocks == whole.blocks
    assert resumed.drift == pytest.approx(whole.drift)
    assert len(calls) == len(whole.drift) + 1
    for other in ({"variant": "lowrank_dw"}, {"criterion": "variance"}, {"num_images": 20}):
        with pytest.raises(PlanError, match="another search"):
            dwattn.refine(model, scores, images, 2, **{**options, **other})
    with pytest.raises(PlanError, match="another search"):
        dwattn.refine(model, scores, images.flip(-1) * 1.1, 2, **options)
    for text in (
        "",
        "{}",
        '{"kind": "dwattn-trials"',
        json.dumps({"kind": 1, "schema_version": 1}),
    ):
        (tmp_path / "trials.json").write_text(text)
        with pytest.raises(PlanError, match=r"trials.json"):
            dwattn.refine(model, scores, images, 2, **options)


@pytest.mark.parametrize("family", ["timm-clip", "hf-dinov2", "hf-vit", "hub-chunked"])
def test_other_families(family: str) -> None:
    model, images, scores = scored(BY_NAME[family])
    found = dwattn.refine(model, scores, images, 2, rounds=1, width=1, progress=False)
    assert len(found.drift) == 2
    assert all(0 < drift < 2 for drift in found.drift.values())


def test_bad_input() -> None:
    model, images, scores = scored()
    with pytest.raises(DataError, match="judge"):
        dwattn.refine(model, scores, images[:3], 2, progress=False)
    with pytest.raises(PlanError, match="width=0"):
        dwattn.refine(model, scores, images, 2, width=0)
    with pytest.raises(PlanError, match="only 4 can be replaced"):
        dwattn.refine(model, scores, images, 9)
    with pytest.raises(DataError, match="images"):
        dwattn.refine(model, scores, [], 2)
    broken = images.clone()
    broken[20] = float("nan")
    with pytest.raises(DataError):
        dwattn.refine(model, scores, broken, 2)
