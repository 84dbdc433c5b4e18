"""Comparisons by a declared grid: variants, selections, numbers of blocks, recipes and seeds, run resumably.

Every cell is the whole of a task's training (:func:`dwattn.finetune.train_in_stages`) and ends as one small JSON
file; a study that was stopped goes on with the cell, and within it with the step, at which it stopped. Runs of one
seed that begin with the same first stage share it.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table
from torch import nn

from dwattn.errors import DwattnError, TrainingError
from dwattn.files import write_atomically
from dwattn.finetune.gates import Annealing, add_gates, learned_plan
from dwattn.finetune.recipe import Recipe
from dwattn.finetune.stages import KernelInit, Stages, train_in_stages
from dwattn.finetune.tasks import Task, evaluate
from dwattn.finetune.trainer import Trainer
from dwattn.finetune.views import Views
from dwattn.plan import Plan, problems
from dwattn.scoring import score
from dwattn.selection import select

Criterion = Literal["variance", "residual", "perturbation", "highest-variance", "dsp"]
BASELINE = "mhsa"
_SETTINGS = ("attention", "criterion", "blocks", "stages", "init")
#: Two-sided 95% quantiles of Student's t by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Kind(BaseModel):
    """A replacement: ``variant`` and, of ``lowrank_dw``, ``rank``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = "dw"
    rank: int | float | None = None

    def __str__(self) -> str:
        return self.variant if self.rank is None else f"{self.variant} {self.rank}"


class Grid(BaseModel):
    """What is compared: the product of all lists, and the unconverted model (``mhsa``) for every seed.

    Args:
        kinds, criteria, blocks, stages, kernel_inits, seeds: values to combine.
        score_images: to measure the criteria on; calibration_images: for ``calibrated``.
        recipe: of the first (or only) stage; its seed is replaced by the cell's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["dwattn-study"] = "dwattn-study"
    schema_version: Literal[1] = 1
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = (Kind(),)
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)] = ("variance",)
    blocks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    stages: Annotated[tuple[Stages, ...], Field(min_length=1)] = ("two-stage",)
    kernel_inits: Annotated[tuple[KernelInit, ...], Field(min_length=1)] = ("calibrated",)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    score_images: Annotated[int, Field(ge=2)] = 1000
    calibration_images: Annotated[int, Field(ge=1)] = 120
    recipe: Recipe

    @classmethod
    def load(cls, path: str | Path) -> Grid:
        """Read a grid file (JSON).

        Raises:
            TrainingError: missing, not JSON, or fields that are wrong, each named.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise TrainingError(f"Cannot read the study {str(path)!r}: {error.strerror}.") from None
        except ValidationError as error:
            raise TrainingError(
                f"The study {str(path)!r} is malformed: {problems(error)}."
            ) from None

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed, the baseline first."""
        for seed in self.seeds:
            yield Cell(None, None, 0, None, None, seed)
            for stages in self.stages:
                for criterion in self.criteria:
                    for count in self.blocks:
                        for kind in self.kinds:
                            for init in self.kernel_inits:
                                yield Cell(kind, criterion, count, stages, init, seed)


@dataclass(frozen=True)
class Cell:
    """One training run of a study; without ``kind`` the unconverted model."""

    kind: Kind | None
    criterion: Criterion | None
    blocks: int
    stages: Stages | None
    kernel_init: KernelInit | None
    seed: int

    @property
    def label(self) -> tuple[str, ...]:
        """Everything but the seed, for tables."""
        if self.kind is None:
            return (BASELINE, "", "", "", "")
        return (
            str(self.kind), str(self.criterion), str(self.blocks), str(self.stages), str(self.kernel_init)
        )  # fmt: skip

    @property
    def name(self) -> str:
        """A file name."""
        words = "-".join(word for word in self.label if word).replace(" ", "-r")
        return f"{words}-seed{self.seed}"


@dataclass(frozen=True)
class StudyResult:
    """Measurements by cell: ``{"cell": name, "label": [...], "seed": s, "metrics": {...}, ...}``."""

    rows: list[dict[str, Any]]

    def summary(self) -> list[dict[str, Any]]:
        """One entry a setting: mean, 95% interval over seeds, and difference to the unconverted model."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row["label"]), []).append(row)
        baseline = groups.get((BASELINE, "", "", "", ""), [])
        base = {row["seed"]: row["metrics"] for row in baseline}
        summary = []
        for label, rows in groups.items():
            for metric in rows[0]["metrics"]:
                values = [row["metrics"][metric] for row in rows]
                paired = [
                    row["metrics"][metric] - base[row["seed"]][metric]
                    for row in rows
                    if row["seed"] in base
                ]
                mean, half = _interval(values)
                loss, loss_half = _interval(paired)
                summary.append(
                    {
                        "label": list(label), "metric": metric, "runs": len(values), "mean": mean,
                        "interval": half, "difference": loss, "difference_interval": loss_half,
                    }
                )  # fmt: skip
        return summary

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"runs": self.rows, "summary": self.summary()}

    def table(self) -> Table:
        """For people, in points (hundredths); settings that are the same everywhere are left out."""
        entries = self.summary()
        labels = [entry["label"] for entry in entries if entry["label"][0] != BASELINE]
        shown = [place for place in range(1, 5) if len({label[place] for label in labels}) > 1]
        table = Table(title="Study", title_justify="left")
        for column in ("attention", *(_SETTINGS[place] for place in shown), "metric"):
            table.add_column(column, no_wrap=True)
        for column in ("mean", "difference", "runs"):
            table.add_column(column, justify="right", no_wrap=True)
        for entry in entries:
            label, baseline = entry["label"], entry["label"][0] == BASELINE
            table.add_row(
                label[0], *(label[place] for place in shown), entry["metric"],
                _points(entry["mean"], entry["interval"]),
                "" if baseline else _points(entry["difference"], entry["difference_interval"], sign=True),
                str(entry["runs"]),
            )  # fmt: skip
        return table

    def csv(self) -> str:
        """The runs as CSV."""
        metrics = sorted({name for row in self.rows for name in row["metrics"]})
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_SETTINGS, "seed", "replaced", *metrics])
        for row in self.rows:
            replaced = " ".join(row["replaced"])
            values = [row["metrics"].get(name, "") for name in metrics]
            writer.writerow([*row["label"], row["seed"], replaced, *values])
        return text.getvalue()


def run_study(
    grid: Grid,
    make: Callable[[int], Task],
    data: Views,
    test: Views,
    folder: str | Path,
    *,
    first_stages: str | Path | None = None,
    trainer_options: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
    **replace_options: Any,
) -> StudyResult:
    """Run all cells that are not done yet, and write ``results.json`` and ``results.csv``.

    Args:
        make: a fresh task for a seed, with the pretrained backbone, not converted.
        data, test: labelled images to train on and to measure on.
        folder: everything is kept here; give the same one to go on.
        first_stages: where first stages are kept, if several studies of the same task share them.
        trainer_options: of :class:`dwattn.finetune.Trainer`.
        note: is told about each cell.
        replace_options: of :func:`dwattn.replace`.

    Raises:
        TrainingError: the folder belongs to another study.
    """
    root = Path(folder)
    firsts = root if first_stages is None else Path(first_stages)
    (root / "cells").mkdir(parents=True, exist_ok=True)
    _claim(root, grid, data, test)
    rows, cells = [], list(grid.cells())
    for number, cell in enumerate(cells, start=1):
        path = root / "cells" / f"{cell.name}.json"
        if not path.exists():
            note(f"{number} of {len(cells)}: {cell.name}")
            place = (root / "runs" / cell.name, firsts / f"first-seed{cell.seed}")
            row = _run(cell, grid, make, data, test, place, trainer_options or {}, replace_options)
            _write(path, json.dumps(row, indent=1))
        rows.append(json.loads(path.read_text(encoding="utf-8")))
    result = StudyResult(rows)
    _write(root / "results.json", json.dumps(result.to_dict(), indent=1))
    _write(root / "results.csv", result.csv())
    return result


def _run(
    cell: Cell,
    grid: Grid,
    make: Callable[[int], Task],
    data: Views,
    test: Views,
    place: tuple[Path, Path],
    trainer_options: dict[str, Any],
    replace_options: dict[str, Any],
) -> dict[str, Any]:
    recipe = grid.recipe.but(seed=cell.seed)
    task, (folder, first) = make(cell.seed), place
    replaced: list[str] = []
    if cell.kind is None:
        Trainer(task, data, recipe, folder=first, **trainer_options).fit(resume=True)
    else:
        assert cell.stages is not None
        assert cell.kernel_init is not None
        options: dict[str, Any] = {"variant": cell.kind.variant, **replace_options}
        if cell.kind.rank is not None:
            options["rank"] = cell.kind.rank
        if cell.kernel_init == "calibrated":
            options["calibrate"] = _plain(data, grid.calibration_images)
        result = train_in_stages(
            task, data, lambda backbone: _plan(cell, grid, task, backbone, data, trainer_options),
            recipe, stages=cell.stages, kernel_init=cell.kernel_init, folder=folder,
            first_folder=first, trainer_options=trainer_options, progress=False, **options,
        )  # fmt: skip
        replaced = result.replaced.replaced
    return {
        "cell": cell.name, "label": list(cell.label), "seed": cell.seed, "replaced": replaced,
        "metrics": evaluate(task, test),
    }  # fmt: skip


def _plan(
    cell: Cell,
    grid: Grid,
    task: Task,
    backbone: nn.Module,
    data: Views,
    trainer_options: dict[str, Any],
) -> Plan:
    """Select on the backbone as it is now."""
    if cell.criterion == "dsp":
        return _learned(cell, grid, task, data, trainer_options)
    images = _plain(data, grid.score_images)
    scores = score(backbone, images, num_images=len(images), progress=False)
    if cell.criterion == "highest-variance":
        # The whole ranking, lowest first; its end is what should not be replaced.
        ranked = sorted(scores.layers, key=lambda layer: layer.sigma_block, reverse=True)
        order = [layer.block for layer in ranked]
        return select(scores, blocks=cell.blocks, order=order)
    return select(scores, blocks=cell.blocks, criterion=str(cell.criterion))


def _learned(
    cell: Cell, grid: Grid, task: Task, data: Views, trainer_options: dict[str, Any]
) -> Plan:
    """The subset that gates learn on a copy of the task, as long as the second stage."""
    copied = copy.deepcopy(task)
    gate = add_gates(copied.backbone, cell.blocks, seed=cell.seed)
    copied.rebuild()
    Trainer(
        copied,
        data,
        grid.recipe.but(seed=cell.seed),
        callbacks=[Annealing(gate)],
        **trainer_options,
    ).fit()
    return learned_plan(copied.backbone)


def _plain(data: Views, count: int) -> torch.Tensor:
    """The first images themselves, without labels."""
    return torch.stack([data[index, 0]["pixels"] for index in range(min(count, len(data)))])


def _claim(root: Path, grid: Grid, data: Views, test: Views) -> None:
    """Note what the folder holds, or check that it is this."""
    path = root / "study.json"
    mine = {
        "grid": grid.model_dump(mode="json"),
        "images": [data.fingerprint(), test.fingerprint()],
    }
    if not path.exists():
        _write(path, json.dumps(mine, indent=1))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in ("images", "grid"):
        if found.get(key) != mine[key]:
            raise TrainingError(
                f"{root} holds a study with another {key}; give a new folder, or the same {key}."
            )


def _write(path: Path, text: str) -> None:
    with write_atomically(path, DwattnError) as temporary:
        temporary.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8")


def _interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95% interval (None for a single value)."""
    if not values:
        return math.nan, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    return mean, quantile * math.sqrt(variance / len(values))


def _points(value: float, half: float | None, *, sign: bool = False) -> str:
    text = f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"
    return text if half is None else f"{text} ± {100 * half:.2f}"
