"""``dwattn study``: compare variants, selections and recipes on a task of the user's."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dwattn.cli.common import (
    BatchOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    ProgressOption,
    SizeOption,
    StdOption,
    WeightsOption,
    command,
    emit,
    image_size,
    normalisation,
    note,
)
from dwattn.cli.tasks import (
    LABELLED,
    ClassesOption,
    ColourOption,
    MasksOption,
    PoolOption,
    TaskImages,
    TestMasksOption,
    TrainingDeviceOption,
    WorkersOption,
    check_labels,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dwattn.finetune import Estimate, StudyGrid, StudyResult, Task


@command
def study(
    model: ModelArgument,
    grid: Annotated[
        str,
        typer.Argument(
            metavar="GRID",
            help="JSON file that declares the comparisons, or paper: those of the paper, for this model.",
        ),
    ],
    *,
    task: Annotated[str, typer.Option(help="classify or segment.")],
    images: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Training images; for classify one subfolder per class."),
    ],
    test_images: Annotated[
        Path, typer.Option(metavar="DIR", help="Images on which the results are measured.")
    ],
    masks: MasksOption = None,
    test_masks: TestMasksOption = None,
    classes: ClassesOption = None,
    pool: PoolOption = "mean",
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of the runs; a study that was stopped is continued there."
        ),
    ] = Path("study"),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run only this comparison; may be repeated."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="paper: epochs of the first stage.")] = 10,
    batch_size: BatchOption = 16,
    lr: Annotated[float, typer.Option(help="paper: peak learning rate.")] = 2e-5,
    seeds: Annotated[int, typer.Option(min=1, help="paper: number of seeds.")] = 3,
    colour: ColourOption = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs that are left, then stop.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Time the models and write report.html.")
    ] = True,
    size: SizeOption = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: TrainingDeviceOption = None,
    workers: WorkersOption = 0,
    progress: ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Compare variants, selections and recipes on a task, over several seeds, as GRID declares."""
    from dwattn.finetune import Augment, Recipe, estimate, run_study, steps_for
    from dwattn.finetune.study import require_replaceable
    from dwattn.models import load_model

    if task not in LABELLED:
        raise typer.BadParameter(f"--task {task} must be classify or segment.")
    check_labels(task, masks, classes, test_images, test_masks)
    first = load_model(model, weights)
    pixels, norm = image_size(first, size), normalisation(first, model, mean, std)
    reader = TaskImages(task, pixels, norm, classes, seed=0)
    data = reader.read(images, masks, Augment(colour=colour))
    test = reader.read(test_images, test_masks, None)
    steps = steps_for(epochs, len(data), batch_size)
    wanted = _grid(grid, first, Recipe.of(steps=steps, batch_size=batch_size, lr=lr), seeds)

    def make(seed: int) -> Task:
        return reader.task_of(load_model(model, weights), pool, split=False, seed=seed)

    if dry_run:
        require_replaceable(wanted, wanted.cells(only or None), first, {})
        _plan(wanted, only, out, estimate(make(0), data, wanted.recipe, device=device), as_json)
        return
    options = {"device": device, "workers": workers, "progress": progress}
    result = run_study(
        wanted, make, data, test, out, only=only or None, trainer_options=options, note=note
    )
    emit(result, as_json)
    written = [out / "results.json", out / "results.csv"]
    if report:
        setting = {**wanted.shared()["recipe"], "images": len(data), "test images": len(test)}
        image = test[0, 0]["pixels"][None]
        written.append(_report(out, result, wanted, first, image, device, setting))
    note(f"Wrote {', '.join(str(path) for path in written)}.")


def _report(
    out: Path,
    result: StudyResult,
    grid: StudyGrid,
    model: nn.Module,
    image: Tensor,
    device: str | None,
    setting: dict[str, Any],
) -> Path:
    """Time the study's models on one image ``(1, 3, H, W)``, and write tables and figures."""
    import torch

    from dwattn.finetune.study_latency import study_latency
    from dwattn.report.study import StudyReport, write_study

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    entries = study_latency(grid, model.to(where), image.to(where), out)
    command_line = shlex.join(["dwattn", *sys.argv[1:]])
    page = StudyReport.of(
        out, result, command=command_line, setting=setting, latency=entries, machine=where
    )
    return write_study(page, out / "report.html")


def _plan(grid: StudyGrid, only: list[str] | None, out: Path, one: Estimate, as_json: bool) -> None:
    """Say which runs are left and how long their training takes here."""
    cells = grid.cells(only or None)
    left = [cell for cell in cells if not (out / "cells" / f"{cell.name}.json").exists()]
    firsts = {cell.seed for cell in left if not (out / f"first-seed{cell.seed}").exists()}
    steps = len(firsts) * grid.recipe.steps + sum(grid.own_steps(cell) for cell in left)
    seconds = one.seconds / grid.recipe.steps * steps
    names = [cell.name for cell in left]
    if as_json:
        emit({"left": names, "runs": len(cells), "seconds": seconds, "memory": one.memory}, True)
    else:
        print(*names, sep="\n")
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    note(
        f"{len(left)} of {len(cells)} runs are left: about {time} of training, {one.memory / 2**20:.0f} MiB."
    )


def _grid(name: str, model: nn.Module, recipe: object, seeds: int) -> StudyGrid:
    from dwattn.adapters import describe
    from dwattn.finetune import StudyGrid, paper_grid
    from dwattn.finetune.features import head_count

    if name != "paper":
        return StudyGrid.load(name)
    depth = len(describe(model).blocks)
    return paper_grid(depth, head_count(model), recipe, seeds=tuple(range(seeds)))  # type: ignore[arg-type]
