"""The bench of distillation: what it keeps and uses again, and what the pages say of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dwattn
from dwattn.demo.conversions import HeldOut

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_distill
import render


def test_distillations_are_written_with_what_they_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = {"cosine": 0.95, "iou": 0.84, "object_cosine": 0.96, "object_iou": 0.88}
    rows = [
        {
            "case": vars(case),
            "method": "closed form",
            "images": 1680,
            "minutes": 8.04,
            "after": after,
        }
        for case in bench_distill.CASES[1:2]
    ]
    photos = {"fitted": 120, "held_out": 80, "with_object": 42}
    found = {"created": "2026-01-02 03:04 UTC", "photos": photos, "environment": {"CPU": "a CPU"}}
    (tmp_path / "distill.json").write_text(json.dumps({**found, "cases": rows}))
    (tmp_path / "distill-refined.json").write_text(json.dumps({**found, "cases": []}))
    for draw, iou in ((1, 0.87), (2, 0.90)):
        row = {**rows[0], "after": {**after, "object_iou": iou}, "replaced": ["blocks.1.attn"]}
        row |= {"choice_minutes": 1.5 * draw, "minutes": 8.0 + draw}
        row |= {"on_fitted_photos": {**after, "iou": 0.86}} if draw == 1 else {}
        options = {"seed": draw, "amp": "bf16" if draw == 2 else "no"}
        drawn = {**found, "options": options, "cases": [row]}
        (tmp_path / f"distill-draw{draw}.json").write_text(json.dumps(drawn))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    written = "| 6 of 12 | `lowrank_dw`, width 96 | closed form | 1680 | 8.0 | 0.950 / 0.840 | 0.960 / 0.880 |"
    assert written in render.distill().splitlines()
    assert "dwattn.refine" in render.distill()
    drawn = {**found, "options": {"seed": 1}, "cases": [{**rows[0], "replaced": ["blocks.6.attn"]}]}
    (tmp_path / "distill-without-exchange.json").write_text(json.dumps(drawn))
    table, beside = render.distill_draws().split("\n\n")
    assert "(draw 1: 0.950 / 0.860 and 0.960 / 0.880)" in beside
    lines = table.splitlines()
    assert (
        "| 1, by score alone | 6 | 1680 | fp32 | 8.0 |  | 0.950 / 0.840 | 0.960 / 0.880 |" in lines
    )
    assert "| 2 | 1 | 1680 | bf16 | 10.0 | 3.0 | 0.950 / 0.840 | 0.960 / 0.900 |" in lines
    assert lines[-1] == "| mean of 1, 2 |  |  |  |  |  | 0.950 / 0.840 | 0.960 / 0.885 |"


def test_a_finished_distillation_is_not_repeated(tmp_path: Path) -> None:
    done: list[str] = []

    class Counted(bench_distill.Bench):
        def __init__(self, rounds: int) -> None:
            self.options = argparse.Namespace(rounds=rounds, progress=False)
            self.work = tmp_path
            pixels = torch.rand(2, 3, 4, 4)
            self.held_out = HeldOut(pixels, [None] * 2, torch.rand(2, 5, 8), torch.rand(2, 1, 4, 4))
            self.amp = "no"

        def own_photos(self) -> HeldOut:
            return self.held_out

        def fitted(self, case: bench_distill.Case) -> Any:
            done.append(case.name)
            model = argparse.Namespace(
                tokens=lambda pixels: torch.rand(len(pixels), 5, 8),
                decode=lambda tokens: torch.rand(len(tokens), 1, 4, 4),
            )
            return model, {"method": "closed form", "images": 8, "minutes": 16.0}

        def choice(self, case: bench_distill.Case) -> dict[str, Any]:
            return {"replaced": [], "trials": []}

    case = bench_distill.CASES[0]
    first = Counted(2).row(case)
    assert not first["in_budget"]
    assert json.loads(json.dumps(first)) == Counted(2).row(case)
    assert "dw-6" in bench_distill.line(first)
    assert done == ["dw-6"]
    Counted(3).row(case)  # other options: another result
    assert done == ["dw-6", "dw-6"]


def test_products_are_rounded_only_where_wanted() -> None:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with bench_distill.products_in_bf16(True):
        assert settings.fp32_precision == "bf16"
    with pytest.raises(ValueError, match="planted"), bench_distill.products_in_bf16(True):
        raise ValueError("planted")
    assert settings.fp32_precision == before
    with bench_distill.products_in_bf16(False):
        assert settings.fp32_precision == before


def test_a_kept_closed_form_is_used_again_for_the_same_options_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept(bench_distill.Bench):
        def __init__(self, light: float) -> None:
            self.options = argparse.Namespace(rounds=2, images=None, light=light, progress=False)
            self.work, self.amp = tmp_path, "no"
            self.views: Any = type("Views", (list,), {"rounds": lambda self, count: iter(())})()

        def plan(self, case: bench_distill.Case) -> Any:
            return None

    calls: list[str] = []
    for name in ("replace", "save", "load"):
        monkeypatch.setattr(dwattn, name, lambda *_, name=name, **__: calls.append(name))
    monkeypatch.setattr(bench_distill, "build", lambda _: None)
    for light, expected in (
        (0.1, ["replace", "save"]),
        (0.1, ["load"]),
        (0.2, ["replace", "save"]),
    ):
        calls.clear()
        Kept(light).closed_form(bench_distill.CASES[0])
        assert calls == expected


def test_gradient_steps_go_on_from_the_closed_form(tmp_path: Path) -> None:
    """The minutes and images of both count, and what the closed form had reached is noted."""
    case = bench_distill.CASES[0]

    class Short(bench_distill.Bench):
        def __init__(self) -> None:
            self.options = argparse.Namespace(
                rounds=2, images=8, polish=3.0, polish_lr=1e-6, progress=False
            )
            self.work = tmp_path
            pixels = torch.rand(2, 3, 4, 4)
            self.held_out = HeldOut(pixels, [None] * 2, torch.rand(2, 5, 8), torch.rand(2, 1, 4, 4))
            self.views: Any = range(5)

        def closed_form(self, case: bench_distill.Case) -> Any:
            model = argparse.Namespace(
                tokens=lambda pixels: torch.rand(len(pixels), 5, 8),
                decode=lambda tokens: torch.rand(len(tokens), 1, 4, 4),
            )
            return model, {"minutes": 1.25, "choice_minutes": 0.5}

        def descend(self, case: Any, student: Any, minutes: float, lr: float) -> dict[str, Any]:
            assert (minutes, lr) == (3.0, 1e-6)
            return {"steps": 4, "images": 32, "minutes": 2.5}

    _, how = Short().fitted(case)
    assert how["method"] == "closed form, gradient"
    assert (how["images"], how["minutes"], how["steps"]) == (40, 3.75, 4)
    assert 0 <= how["closed_form"]["iou"] <= 1
