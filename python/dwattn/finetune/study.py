"""Comparisons by a declared grid: variants, selections, numbers of blocks, recipes and seeds, run resumably.

Every cell is the whole of a task's training (:func:`dwattn.finetune.train_in_stages`) and ends as one small JSON
file; a study that was stopped goes on with the cell, and within it with the step, at which it stopped. Runs of one
seed share their first stage and the scores that are measured after it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwattn.adapters import describe, refusal
from dwattn.errors import DwattnError, TrainingError
from dwattn.files import make_folder, write_atomically
from dwattn.finetune.features import head_count
from dwattn.finetune.gates import Annealing, add_gates, learned_plan, settle
from dwattn.finetune.recipe import Recipe
from dwattn.finetune.stages import train_in_stages
from dwattn.finetune.state import STATE_FILE, remove_leftovers
from dwattn.finetune.study_grid import Cell, Kind, StudyGrid, read_part
from dwattn.finetune.study_results import StudyResult
from dwattn.finetune.tasks import Task, evaluate
from dwattn.finetune.trainer import Callback, Trainer
from dwattn.finetune.views import Views
from dwattn.fingerprint import WEIGHT_TOLERANCE, Fingerprint, fingerprint
from dwattn.plan import Plan
from dwattn.refinement import refine
from dwattn.scores import Scores
from dwattn.scoring import score
from dwattn.selection import select
from dwattn.surgery import replace
from dwattn.surgery_report import ReplacementReport

#: Scores of the backbone as it was when layers were chosen, in the folder of a first stage or of the study.
SCORES = "scores.safetensors"
#: Scores keep whole maps up to this number of patches; the report draws from them how attention varies.
MAP_TOKENS = 300


def run_study(
    grid: StudyGrid,
    make: Callable[[int], Task],
    data: Views,
    test: Views,
    folder: str | Path,
    /,  # ``grid=`` by name is the patch grid of :func:`dwattn.replace`
    *,
    only: Sequence[str] | None = None,
    trainer_options: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
    **replace_options: Any,
) -> StudyResult:
    """Run all cells that are not done yet, and write ``results.json`` and ``results.csv``.

    Args:
        make: a fresh task for a seed (any, for example 0), with the pretrained backbone, not converted.
        data, test: labelled images to train on and to measure on.
        folder: everything is kept here; the same folder continues a study. Comparisons and seeds may be added.
        only: names of the comparisons to run now, default all; with an empty list only the result files are written.
        trainer_options: of :class:`dwattn.finetune.Trainer`.
        note: called with a line of text about each cell.
        replace_options: of :func:`dwattn.replace`.

    Raises:
        DwattnError: a replacement that this model does not allow, before anything is trained.
        TrainingError: the folder belongs to another study, or a callback stopped a run.
    """
    cells, first, root = grid.cells(only), make(0), Path(folder)
    require_replaceable(grid, cells, first.backbone, replace_options)
    make_folder(root / "cells", TrainingError)
    remove_leftovers(root)
    remove_leftovers(root / "cells")
    _claim(root, grid, first, [data, test], replace_options)
    study = _Study(grid, make, data, test, root, trainer_options or {}, replace_options)
    for number, cell in enumerate(cells, start=1):
        if not study.path(cell).exists():
            note(f"{number} of {len(cells)}: {cell.name}")
            _write(study.path(cell), json.dumps(study.run(cell), indent=1))
            study.clean(cell)
    result = StudyResult([study.row(cell) for cell in grid.cells() if study.path(cell).exists()])
    _write(root / "results.json", json.dumps(result.to_dict(), indent=1))
    _write(root / "results.csv", result.csv())
    return result


@dataclass
class _Study:
    """The state that all cells of a study share; runs one cell after another."""

    grid: StudyGrid
    make: Callable[[int], Task]
    data: Views
    test: Views
    root: Path
    trainer_options: dict[str, Any]
    replace_options: dict[str, Any]
    #: Calibration images, read when the first cell wants them.
    images: dict[int, torch.Tensor] = field(default_factory=dict)

    def path(self, cell: Cell) -> Path:
        return self.root / "cells" / f"{cell.name}.json"

    def row(self, cell: Cell) -> dict[str, Any]:
        found: dict[str, Any] = read_part(self.path(cell))
        return found

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure one cell."""
        began = time.process_time()
        recipe = self.grid.recipe.but(seed=cell.seed)
        task, folder = self._task(cell.seed), self.root / "runs" / cell.name
        if cell.kind is None:
            replaced = self._unconverted(cell, task, recipe, folder)
        elif cell.criterion == "dsp-e2e":
            replaced = self._end_to_end(cell, task, recipe, folder)
        else:
            replaced = self._converted(cell, task, recipe, folder)
        with recipe.autocast(next(task.parameters()).device.type):
            metrics = evaluate(task, self.test)
        return {
            "cell": cell.name, "label": list(cell.label), "seed": cell.seed, "replaced": replaced,
            "parameters": sum(p.numel() for p in task.parameters()),
            "trained": sum(p.numel() for p in task.parameters() if p.requires_grad),
            "metrics": metrics, "cpu_seconds": round(time.process_time() - began, 1),
        }  # fmt: skip

    def _task(self, seed: int) -> Task:
        """A fresh task, with the head of its seed."""
        task = self.make(seed)
        if self.grid.head is not None:
            recipe = self.grid.head.but(seed=seed, train="head")
            self._fit(task, recipe, self.root / f"head-seed{seed}")
        return task

    def clean(self, cell: Cell) -> None:
        """Remove the checkpoints of a run that is done; its logs stay."""
        for state in (self.root / "runs" / cell.name).rglob(STATE_FILE):
            state.unlink(missing_ok=True)

    def _unconverted(self, cell: Cell, task: Task, recipe: Recipe, folder: Path) -> list[str]:
        self._fit(task, recipe, self._first(cell))
        if cell.stages != "one-stage":
            self._fit(task, self.grid.second_recipe(cell.seed), folder / "second")
        return []

    def _converted(self, cell: Cell, task: Task, recipe: Recipe, folder: Path) -> list[str]:
        assert cell.kind is not None
        assert cell.kernel_init is not None
        options = _kind_options(cell.kind, self.replace_options)
        if cell.kernel_init == "calibrated":
            options |= {"calibrate": self._plain(self.grid.calibration_images), "progress": False}
            options |= self.grid.calibration
        second = None if cell.stages == "one-stage" else self.grid.second_recipe(cell.seed)
        result = train_in_stages(
            task, self.data, lambda backbone: self._plan(cell, task, backbone), recipe,
            stages=cell.stages, kernel_init=cell.kernel_init, second=second, folder=folder,
            first_folder=self._first(cell), trainer_options=self.trainer_options, **options,
        )  # fmt: skip
        _require_whole(result.complete)
        assert result.replaced is not None
        return _names(result.replaced)

    def _end_to_end(self, cell: Cell, task: Task, recipe: Recipe, folder: Path) -> list[str]:
        """Train gates in the second stage; the layers they choose, and the weights, are final."""
        self._fit(task, recipe, self._first(cell))
        gate = add_gates(task.backbone, cell.count, granularity=cell.unit, seed=cell.seed)  # type: ignore[arg-type]
        task.rebuild()
        second = self.grid.second_recipe(cell.seed)
        self._fit(task, second, folder / "second", Annealing(gate))
        report = settle(task.backbone)
        task.rebuild()
        return _names(report)

    def _plan(self, cell: Cell, task: Task, backbone: nn.Module) -> Plan:
        """Select on the backbone as it is now."""
        if cell.criterion == "dsp":
            path = self._place(cell) / f"dsp-{cell.count}-{cell.unit}-seed{cell.seed}.json"
            if not path.exists():
                self._learned(cell, task).save(path)
            return Plan.load(path)
        scores = self._scores(cell, backbone)
        if cell.criterion == "refine":
            return self._refined(cell, backbone, scores)
        if cell.criterion == "highest-variance":
            # The whole ranking, lowest first; its end is what should not be replaced.
            ranked = sorted(scores.layers, key=lambda layer: layer.sigma_block, reverse=True)
            return select(scores, blocks=cell.count, order=[layer.block for layer in ranked])
        return select(scores, criterion=str(cell.criterion), **{cell.unit: cell.count})  # type: ignore[arg-type]

    def _refined(self, cell: Cell, backbone: nn.Module, scores: Scores) -> Plan:
        """The set of blocks that loses least when it is calibrated on some of the images."""
        assert cell.kind is not None
        kind = str(cell.kind).replace(" ", "-")
        found = refine(
            backbone, scores, self._plain(self.grid.calibration_images), cell.count, variant=cell.kind.variant,
            rank=cell.kind.rank, trials=self._place(cell) / f"refine-{kind}-{cell.count}.json", progress=False,
            **self.grid.calibration,
        )  # fmt: skip
        return found.plan

    def _learned(self, cell: Cell, task: Task) -> Plan:
        """The subset that gates learn on a copy of the task, as long as the second stage."""
        copied = copy.deepcopy(task)
        gate = add_gates(copied.backbone, cell.count, granularity=cell.unit, seed=cell.seed)  # type: ignore[arg-type]
        copied.rebuild()
        self._fit(copied, self.grid.second_recipe(cell.seed), None, Annealing(gate))
        return learned_plan(copied.backbone)

    def _scores(self, cell: Cell, backbone: nn.Module) -> Scores:
        """Of the fine-tuned backbone of a seed, or of the pretrained one, measured once."""
        path = self._place(cell) / SCORES
        if not path.exists():
            images = self._plain(self.grid.score_images)
            height, width = describe(backbone).grid_of(*images.shape[-2:])
            # Of several processes each sees all images, as it does in calibration.
            score(
                backbone, images, num_images=len(images), keep_maps=height * width <= MAP_TOKENS, progress=False,
                distributed=False,
            ).save(path)  # fmt: skip
        return Scores.load(path)

    def _place(self, cell: Cell) -> Path:
        """The folder for scores and choices of the backbone in which the cell replaces layers."""
        return self.root if cell.stages == "one-stage" else self._first(cell)

    def _first(self, cell: Cell) -> Path:
        return self.root / f"first-seed{cell.seed}"

    def _fit(self, task: Task, recipe: Recipe, folder: Path | None, *callbacks: Callback) -> None:
        options = dict(self.trainer_options)
        options["callbacks"] = [*callbacks, *options.get("callbacks", ())]
        trainer = Trainer(task, self.data, recipe, folder=folder, **options)
        _require_whole(trainer.fit(resume=folder is not None).complete)

    def _plain(self, count: int) -> torch.Tensor:
        """The first training images themselves, without labels."""
        if count not in self.images:
            keys = range(min(count, len(self.data)))
            self.images[count] = torch.stack([self.data[index, 0]["pixels"] for index in keys])
        return self.images[count]


def require_replaceable(
    grid: StudyGrid, cells: Sequence[Cell], backbone: nn.Module, replace_options: dict[str, Any]
) -> None:
    """Refuse before any training what :func:`dwattn.replace` would refuse after the first stage.

    Raises:
        DwattnError: more blocks or heads than can be replaced, or options that do not fit together or the model.
    """
    able = [s.attention_name for s in describe(backbone).blocks if refusal(s.attention) is None]
    most = {"blocks": len(able), "heads": len(able) * head_count(backbone)}
    kinds: dict[tuple[Kind, bool], Cell] = {}
    for cell in cells:
        if cell.count > most[cell.unit]:
            raise TrainingError(
                f"{cell.name}: {cell.unit}={cell.count} were asked for, but only {most[cell.unit]} can be replaced."
            )
        if cell.kind is not None:
            kinds.setdefault((cell.kind, cell.kernel_init == "calibrated"), cell)
    for (kind, calibrated), cell in kinds.items():
        options = _kind_options(kind, replace_options)
        if calibrated:
            options |= {"calibrate": [], **grid.calibration}  # a dry run reads no images
        replace(backbone, Plan.for_layers(backbone, able[: cell.count]), dry_run=True, **options)


def _kind_options(kind: Kind, replace_options: dict[str, Any]) -> dict[str, Any]:
    """Options of :func:`dwattn.replace` for a kind."""
    rank = {} if kind.rank is None else {"rank": kind.rank}
    return {"variant": kind.variant, **replace_options, **rank}


def _names(report: ReplacementReport) -> list[str]:
    """Replaced layers; where only some heads were, ``name:0,2`` lists them."""
    return [
        row.name if row.heads is None else f"{row.name}:{','.join(map(str, row.heads))}"
        for row in report.rows
        if row.action == "replaced"
    ]


def _require_whole(complete: bool) -> None:
    """Raise unless the run went to its end: a stopped one has no result."""
    if not complete:
        raise TrainingError("A callback stopped a run of the study; call it again to go on.")


def _claim(
    root: Path, grid: StudyGrid, task: Task, images: list[Views], replace_options: dict[str, Any]
) -> None:
    """Record which study the folder holds, or check that it is this one.

    Raises:
        TrainingError: it holds another study.
    """
    path = root / "study.json"
    model = fingerprint(task.backbone)
    # What JSON does not know, such as a function, is known by its class.
    options = json.dumps(replace_options, default=lambda value: type(value).__name__)
    mine = {
        "grid": grid.shared(), "images": [data.fingerprint() for data in images],
        "replace_options": json.loads(options), "model": model.model_dump(mode="json"),
        "head": task.settings(),
    }  # fmt: skip
    if not path.exists():
        _write(path, json.dumps(mine, indent=1))
        return
    found = {**mine, **read_part(path)}
    other = [
        key for key in ("images", "grid", "replace_options", "head") if found[key] != mine[key]
    ]
    kept = Fingerprint.model_validate(found["model"])
    if kept.architecture_difference(model) or kept.weight_distance(model)[0] > WEIGHT_TOLERANCE:
        other.append("model")
    if other:
        raise TrainingError(
            f"{root} holds a study with another {other[0]}; give a new folder, or the same {other[0]}."
        )


def _write(path: Path, text: str) -> None:
    with write_atomically(path, DwattnError) as temporary:
        temporary.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8")
