"""What a study declares: its file, the runs that comparisons share, and their steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dwattn.errors import TrainingError
from dwattn.finetune import StudyGrid, paper_grid
from dwattn.finetune.study_grid import Cell
from test_finetune_study import GRID, RECIPE


def test_comparisons_share_runs_and_baselines() -> None:
    cells = GRID.model_copy(update={"seeds": (0, 1)}).cells()
    assert len(cells) == len(set(cells)) == 2 * (2 + 6 + 2 + 2 + 2)
    for place, cell in enumerate(cells):
        assert cell.baseline in cells[: place + 1]
    assert [c.name for c in GRID.cells(["stages"])] == [
        "mhsa-one-stage-seed0",
        "dw-variance-2-one-stage-gaussian-seed0",
        "mhsa-two-stage-seed0",
        "dw-variance-2-frozen-gaussian-seed0",
    ]
    paper = paper_grid(24, 16, RECIPE)
    labels = {cell.label for cell in paper.cells()}
    for wanted in (
        ("conv", "variance", "12", "two-stage", "calibrated"),
        ("spvit", "variance", "10", "two-stage", "mean-attention"),
        ("dw", "dsp", "17", "two-stage", "calibrated"),
        ("dw", "variance", "192 heads", "two-stage", "calibrated"),
        ("dw", "highest-variance", "7", "two-stage", "calibrated"),
    ):
        assert wanted in labels


def test_a_grid_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    with pytest.raises(TrainingError, match="No such file"):
        StudyGrid.load(path)
    path.write_text("{")
    with pytest.raises(TrainingError, match="no JSON"):
        StudyGrid.load(path)
    two = {"a": {"blocks": [2]}}
    for wrong, match in (
        ({"recipe": {}}, r"recipe\.steps: Field required"),
        ({"comparisons": {"a": {"blocks": [0]}}}, r"blocks\.0"),
        ({"comparisons": {"a": {}}}, "give blocks, heads or both"),
        ({"comparisons": {"a": {"heads": [2], "kinds": [{"variant": "conv"}]}}}, "not conv"),
        ({"comparisons": {"a": {"blocks": [2], "criteria": ["dsp-e2e"]}}}, "from gaussian"),
        (
            {"comparisons": {"a": {"heads": [2], "criteria": ["refine"]}}},
            "refine: for blocks alone",
        ),
        (
            {
                "comparisons": {
                    "a": {"blocks": [2], "criteria": ["refine"], "kinds": [{"variant": "spvit"}]}
                }
            },
            "spvit has no calibration",
        ),
        (
            {"comparisons": {"a": {"blocks": [2], "kinds": [{"variant": "spvit"}]}}},
            "spvit has no calibration",
        ),
        (
            {
                "comparisons": {
                    "a": {"blocks": [2], "criteria": ["dsp"], "kernel_inits": ["mean-attention"]}
                }
            },
            "dsp measures no mean attention",
        ),
        ({"seeds": [2**63]}, "seeds.0"),
        ({"comparisons": {}}, "comparisons"),
        ({"colour": 1}, "colour"),
        ({"schema_version": 2}, "schema_version"),
    ):
        path.write_text(json.dumps({"comparisons": two, "recipe": {"steps": 2}, **wrong}))
        with pytest.raises(TrainingError, match=match):
            StudyGrid.load(path)
    path.write_text(
        '{"comparisons": {"a": {"blocks": [2]}, "a": {"blocks": [1]}}, "recipe": {"steps": 2}}'
    )
    with pytest.raises(TrainingError, match="'a' is given twice"):
        StudyGrid.load(path)
    odd = {"steps": 2, "batch_size": 3}
    path.write_text(json.dumps({"comparisons": two, "recipe": odd}))
    with pytest.raises(TrainingError, match="batch_size=3 cannot be halved"):
        StudyGrid.load(path)
    assert StudyGrid(comparisons={"a": {"blocks": [2], "stages": ["one-stage"]}}, recipe=odd)
    assert StudyGrid(comparisons=two, recipe=odd, second={"steps": 1})
    path.write_text(GRID.model_dump_json())
    assert StudyGrid.load(path) == GRID


def test_the_steps_that_a_run_adds_to_the_shared_first_stage() -> None:
    grid = GRID.model_copy(
        update={"recipe": GRID.recipe.but(steps=10), "second": GRID.recipe.but(steps=3)}
    )
    dw = next(cell for cell in grid.cells() if cell.kind is not None)
    steps = {
        (stages, criterion): grid.own_steps(replace(dw, stages=stages, criterion=criterion))
        for stages in ("two-stage", "frozen", "one-stage")
        for criterion in ("variance", "dsp")
    }
    assert list(steps.values()) == [3, 6, 3, 6, 10, 13]
    plain = [grid.own_steps(Cell(0, stages)) for stages in ("one-stage", "two-stage")]
    assert plain == [0, 3]
