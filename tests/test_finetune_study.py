"""Studies: every cell is run once, in any number of sittings, and the table is what the runs say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dwattn.cli import app
from dwattn.errors import DwattnError, TrainingError
from dwattn.finetune import (
    Augment,
    Callback,
    LabelledViews,
    Recipe,
    StudyGrid,
    StudyResult,
    Trainer,
    classifier,
    run_study,
)
from dwattn.finetune import study as study_module
from dwattn.finetune import study_latency as latency_module
from support.models import BY_NAME
from test_cli import FACTORY
from test_finetune_tasks import coloured
from test_labelled_images import save_image

pytest.importorskip("accelerate", reason="training needs the train extra")
pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")

FAMILY = BY_NAME["hub-reg4"]
RECIPE = Recipe(steps=4, batch_size=4, lr=1e-3)
GRID = StudyGrid(
    comparisons={
        "all": {
            "kinds": ({"variant": "dw"}, {"variant": "lowrank_dw", "rank": 16}),
            "criteria": ("variance", "dsp", "highest-variance"),
            "blocks": (2,),
            "kernel_inits": ("gaussian",),
        },
        "stages": {
            "blocks": (2,),
            "stages": ("one-stage", "frozen"),
            "kernel_inits": ("gaussian",),
        },
        "gates": {
            "blocks": (2,),
            "heads": (3,),
            "criteria": ("dsp-e2e",),
            "kernel_inits": ("gaussian",),
        },
        "heads": {"heads": (3,), "criteria": ("variance", "dsp"), "kernel_inits": ("gaussian",)},
    },
    seeds=(0,),
    score_images=8,
    recipe=RECIPE,
)
OPTIONS = {"device": "cpu", "progress": False}


def run(
    folder: Path,
    grid: StudyGrid = GRID,
    images: int = 12,
    build: Any = FAMILY.build,
    pool: str = "mean",
    **options: Any,
) -> StudyResult:
    data = LabelledViews(*coloured(images), 3, Augment())
    test = LabelledViews(*coloured(9), 3)
    return run_study(
        grid, lambda seed: classifier(build(), 3, pool=pool, seed=seed), data, test, folder,
        trainer_options=OPTIONS, **options,
    )  # fmt: skip


def measured(result: StudyResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in result.rows]


def test_head_and_second_stage_have_recipes_of_their_own(tmp_path: Path) -> None:
    grid = StudyGrid(
        comparisons={"one": {"blocks": (2,), "kernel_inits": ("gaussian",)}},
        seeds=(0,), score_images=8, recipe=RECIPE,
        head=Recipe(steps=3, batch_size=6, lr=1e-2), second=Recipe(steps=2, batch_size=6, lr=1e-4),
    )  # fmt: skip
    run(tmp_path, grid)

    def log(*parts: str) -> list[str]:
        return tmp_path.joinpath(*parts, "train.csv").read_text().splitlines()[1:]

    assert len(log("head-seed0")) == 3
    assert len(log("first-seed0")) == 4
    for cell in ("mhsa-two-stage-seed0", "dw-variance-2-two-stage-gaussian-seed0"):
        assert len(log("runs", cell, "second")) == 2
    # The head alone moved before the first stage, and the first stage began with that head.
    fitted = load_file(tmp_path / "head-seed0" / "state.safetensors")
    fresh = classifier(FAMILY.build(), 3, seed=0).state_dict()
    changed = {
        name for name, value in fresh.items() if not torch.equal(fitted[f"model.{name}"], value)
    }
    assert changed == {"head.linear.weight", "head.linear.bias"}
    (seen,) = {float(log("first-seed0")[0].split(",")[1])}
    untouched = run(tmp_path / "without", grid.model_copy(update={"head": None}))
    assert untouched.rows
    first = (tmp_path / "without" / "first-seed0" / "train.csv").read_text().splitlines()[1]
    assert seen < float(first.split(",")[1])


def test_a_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    train, calls = study_module.train_in_stages, [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(study_module, "train_in_stages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    parts = run(tmp_path / "parts")
    assert calls[0] == 11
    assert measured(parts) == measured(whole)
    run(tmp_path / "parts")
    assert calls[0] == 11
    by_cell = {row["cell"]: row["replaced"] for row in whole.rows}
    low, high = (by_cell[f"dw-{c}-2-two-stage-gaussian-seed0"] for c in ("variance", "highest-variance"))  # fmt: skip
    assert sorted(low + high) == [f"blocks.{i}.attn" for i in range(4)]
    # Layers share what the gates learned, and one stage has its own scores.
    assert by_cell["dw-dsp-2-two-stage-gaussian-seed0"] == by_cell["lowrank_dw-16-dsp-2-two-stage-gaussian-seed0"]  # fmt: skip
    heads = [name.split(":")[1] for name in by_cell["dw-variance-3-heads-two-stage-gaussian-seed0"] if ":" in name]  # fmt: skip
    assert heads
    assert (tmp_path / "parts" / "scores.safetensors").exists()
    assert not list((tmp_path / "parts" / "runs").rglob("state.safetensors"))
    table = (tmp_path / "parts" / "results.csv").read_text().splitlines()
    assert table[0] == "attention,criterion,count,stages,init,seed,replaced,top1"
    assert len(table) == 1 + 2 + 6 + 2 + 2 + 2
    with pytest.raises(TrainingError, match="another grid"):
        run(tmp_path / "parts", GRID.model_copy(update={"recipe": RECIPE.but(lr=1e-4)}))
    with pytest.raises(TrainingError, match="another images"):
        run(tmp_path / "parts", images=9)
    with pytest.raises(TrainingError, match="no comparison none; there are all, stages"):
        GRID.cells(["none"])


def test_a_study_is_of_one_model_with_one_set_of_options(tmp_path: Path) -> None:
    none: dict[str, Any] = {"only": ()}
    run(tmp_path, **none, dynamic_grid=True, prefix="static")
    run(tmp_path, **none, dynamic_grid=True, prefix="static")
    with pytest.raises(TrainingError, match="another replace_options"):
        run(tmp_path, **none, dynamic_grid=True)
    with pytest.raises(TrainingError, match="another model"):
        run(tmp_path, **none, build=lambda: scaled(1.5), dynamic_grid=True, prefix="static")
    with pytest.raises(TrainingError, match="another head"):
        run(tmp_path, **none, pool="cls", dynamic_grid=True, prefix="static")
    kept = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({k: kept[k] for k in ("grid", "images")}))
    run(tmp_path, **none)


def scaled(factor: float) -> torch.nn.Module:
    model = FAMILY.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def test_callbacks_go_into_all_runs_and_a_stopped_one_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once(Callback):
        """Stops the first run with gates."""

        ends = 0
        stopped = False

        def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
            gated = len(trainer.callbacks) > 1
            if gated and not self.stopped:
                self.stopped = True
                trainer.stop()

        def on_end(self, trainer: Trainer) -> None:
            self.ends += 1

    once = Once()
    monkeypatch.setitem(OPTIONS, "callbacks", [once])
    grid = GRID.model_copy(update={"comparisons": {"gates": GRID.comparisons["gates"]}})
    with pytest.raises(TrainingError, match="stopped a run of the study"):
        run(tmp_path, grid)
    done = [path.stem for path in (tmp_path / "cells").iterdir()]
    assert sorted(done) == ["mhsa-one-stage-seed0", "mhsa-two-stage-seed0"]
    assert len(run(tmp_path, grid).rows) == 4
    assert once.ends == 8


def test_scores_are_of_the_images_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool | None] = []
    real = study_module.score

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options.get("distributed"))
        return real(*args, **options)

    monkeypatch.setattr(study_module, "score", watched)
    one_stage = GRID.comparisons["stages"].model_copy(update={"stages": ("one-stage",)})
    run(tmp_path, GRID.model_copy(update={"comparisons": {"one": one_stage}}))
    assert asked == [False]


def test_refined_sets_are_searched_once_for_each_kind_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dw, narrow = {"variant": "dw"}, {"variant": "lowrank_dw", "rank": 16}
    grid = StudyGrid(
        comparisons={
            "a": {"kinds": (dw, narrow), "blocks": (2,), "criteria": ("refine", "residual")},
            "b": {"blocks": (2,), "criteria": ("refine",), "kernel_inits": ("mean-attention",)},
        },
        seeds=(0,), score_images=8, calibration_images=8, calibration={"views": 1}, recipe=RECIPE,
    )  # fmt: skip
    searches: list[dict[str, Any]] = []
    search = study_module.refine

    def watched(*args: Any, **options: Any) -> Any:
        found = search(*args, **options)
        written = options["trials"].stat().st_mtime_ns
        searches.append(
            {**options, "start": found.start, "found": found.blocks, "written": written}
        )
        return found

    monkeypatch.setattr(study_module, "refine", watched)
    result = run(tmp_path, grid)
    by_cell = {row["cell"]: row["replaced"] for row in result.rows}
    assert [s["variant"] for s in searches] == ["dw", "lowrank_dw", "dw"]
    for cell, searched in zip(
        ("dw-refine-2-two-stage-calibrated-seed0", "lowrank_dw-16-refine-2-two-stage-calibrated-seed0",
         "dw-refine-2-two-stage-mean-attention-seed0"), searches, strict=True,
    ):  # fmt: skip
        assert by_cell[cell] == [f"blocks.{block}.attn" for block in searched["found"]]
    start = by_cell["dw-residual-2-two-stage-calibrated-seed0"]
    assert start == [f"blocks.{block}.attn" for block in searches[0]["start"]]
    assert searches[1]["rank"] == 16
    # The third search found all that the first had tried, and wrote nothing.
    assert searches[2]["trials"] == searches[0]["trials"]
    assert searches[2]["written"] == searches[0]["written"]


SHORT = StudyGrid(
    comparisons={"one": {"blocks": (2,), "kernel_inits": ("gaussian",)}},
    seeds=(0,), score_images=8, recipe=RECIPE.but(steps=12),
)  # fmt: skip
RUN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from dwattn.demo._torchvision import make_importable
make_importable()
import test_finetune_study as studies
torch.set_num_threads(1)
studies.run(Path(sys.argv[1]), studies.SHORT, note=lambda text: print(text, flush=True))
"""


@pytest.mark.slow
def test_a_study_survives_kill_9(tmp_path: Path) -> None:
    """Killed while it trains its second run."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "parts")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert all(process.stdout.readline() for _ in range(2))
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # What a kill leaves that meets the end of a run.
    for folder in (tmp_path / "parts", tmp_path / "parts" / "cells"):
        (folder / ".results.json.o02eiqi3.tmp").touch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts, whole = run(tmp_path / "parts", SHORT), run(tmp_path / "whole", SHORT)
    finally:
        torch.set_num_threads(threads)
    assert measured(parts) == measured(whole)
    assert len(parts.rows) == 3
    left = [p.name for p in (tmp_path / "parts").rglob("*") if p.name.endswith(".tmp")]
    assert not left


def test_the_patch_grid_of_replace_is_an_option_of_a_study(tmp_path: Path) -> None:
    def collect(size: tuple[int, int]) -> None:
        views = [LabelledViews(*coloured(count), 3) for count in (12, 9)]
        run_study(
            GRID, lambda seed: classifier(FAMILY.build(), 3, seed=seed), *views, tmp_path, only=[], grid=size
        )  # fmt: skip

    collect((4, 4))
    with pytest.raises(TrainingError, match="study with another"):
        collect((4, 3))


@pytest.mark.parametrize(
    ("comparison", "calibration", "match"),
    [
        ({"blocks": [9]}, {}, "blocks=9 were asked for, but only 4"),
        ({"heads": [99]}, {}, "heads=99 were asked for, but only 12"),
        ({"blocks": [1], "kinds": [{"variant": "dww"}]}, {}, "Unknown variant 'dww'"),
        ({"blocks": [1], "kinds": [{"variant": "dw", "rank": 0.5}]}, {}, "rank=0.5 is an option"),
        ({"blocks": [1], "kinds": [{"variant": "lowrank_dw", "rank": 4000}]}, {}, "48 channels"),
        ({"blocks": [1]}, {"refitt": "none"}, "did you mean refit="),
        ({"blocks": [1]}, {"refit": "nonsense"}, "refit='nonsense'"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_the_training(
    comparison: Any, calibration: Any, match: str, tmp_path: Path
) -> None:
    grid = {"comparisons": {"a": comparison}, "calibration": calibration, "recipe": RECIPE}
    with pytest.raises(DwattnError, match=match):
        run(tmp_path / "study", StudyGrid(**grid))
    assert not (tmp_path / "study").exists()


def test_a_folder_of_a_study_that_is_none_and_files_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="Cannot make the folder"):
        run(tmp_path / "file")
    grid = StudyGrid(comparisons={"a": {"blocks": [1], "stages": ["one-stage"]}}, recipe=RECIPE)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{")
    with pytest.raises(TrainingError, match=r"study\.json of the study cannot be read.*remove it"):
        run(tmp_path / "study", grid)


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "factory.py").write_text(FACTORY)
    for index in range(8):
        save_image(tmp_path / "images" / "ab"[index % 2] / f"{index}.png", (60, 64), seed=index)
    some = {"some": {"kinds": ({"variant": "dw"}, {"variant": "lowrank_dw", "rank": 16}), "blocks": (2,),
                     "kernel_inits": ("gaussian",)}}  # fmt: skip
    grid = StudyGrid(**{**GRID.model_dump(), "comparisons": some})
    (tmp_path / "grid.json").write_text(grid.model_dump_json())
    arguments = [
        "study", f"{tmp_path / 'factory.py'}:make", tmp_path / "grid.json", "--task", "classify",
        "--images", tmp_path / "images", "--test-images", tmp_path / "images", "--size", 56,
        "--out", tmp_path / "out", "--device", "cpu", "--no-progress",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert [row["cell"] for row in found["runs"]] == [
        "mhsa-one-stage-seed0",
        "mhsa-two-stage-seed0",
        "dw-variance-2-two-stage-gaussian-seed0",
        "lowrank_dw-16-variance-2-two-stage-gaussian-seed0",
    ]
    table = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert table.exit_code == 0
    assert "lowrank_dw" in table.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lowrank_dw 16" in page
    for figure in ("replaced blocks", "Accuracy against time", "Figures 2", "Figure 3", "Figure A.2", "Figure A.4"):  # fmt: skip
        assert figure in page, figure
    assert page.count("<svg") == page.count("<figcaption>") == 6
    timed = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert {entry["attention"] for entry in timed} == {"dw", "lowrank_dw 16"}
    assert all(entry["ms"] > 0 and entry["ratio"] > 0 for entry in timed)
    left = CliRunner().invoke(app, [*map(str, arguments), "--dry-run"])
    assert "0 of 4 runs are left" in left.output
    wrong = CliRunner().invoke(app, [*map(str, arguments), "--task", "distill"])
    assert wrong.exit_code == 2


def test_models_are_timed_once_for_each_size_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = next(cell for cell in GRID.cells(["stages"]) if cell.kind is not None)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{cell.name}.json").write_text('{"replaced": ["blocks.1.attn"]}')
    timed: list[tuple[list[int], int]] = []
    real = latency_module.measure_cells

    def counted(backbone: Any, pixels: Any, cells: Any, **options: Any) -> list[dict[str, Any]]:
        timed.append((list(pixels.shape[-2:]), len(cells)))
        return real(backbone, pixels, cells, **options)

    monkeypatch.setattr(latency_module, "measure_cells", counted)
    large, small = FAMILY.images(1), torch.zeros(1, 3, 28, 28)
    assert small.shape != large.shape

    def measure(pixels: torch.Tensor) -> list[dict[str, Any]]:
        options = {"rounds": 2, "dynamic_grid": True}
        return latency_module.study_latency(GRID, FAMILY.build(), pixels, tmp_path, **options)

    first, again, other = measure(large), measure(large), measure(small)
    assert first == again
    assert [entry["size"] for entry in (*first, *other)] == [list(large.shape[-2:]), [28, 28]]
    assert timed == [(list(large.shape[-2:]), 1), (list(large.shape[-2:]), 0), ([28, 28], 1)]
    kept = json.loads((tmp_path / "latency.json").read_text())
    assert kept == [*first, *other]
    (tmp_path / "latency.json").write_text("[{")
    with pytest.raises(
        TrainingError, match=r"latency\.json of the study cannot be read.*remove it"
    ):
        measure(large)
