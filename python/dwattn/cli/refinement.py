"""``dwattn refine``: choose blocks by trying out whole sets of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dwattn.cli.common import (
    AmpOption,
    BatchOption,
    DeviceOption,
    ImagesOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    ProgressOption,
    RankOption,
    SizeOption,
    StdOption,
    VariantOption,
    WeightsOption,
    command,
    emit,
    grid_option,
    note,
    parse_rank,
    read_images,
    read_model,
)
from dwattn.errors import DwattnError
from dwattn.files import require_writable


@command
def refine(
    model: ModelArgument,
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="File written by dwattn score.")],
    images: ImagesOption,
    blocks: Annotated[int, typer.Option(min=1, help="Replace this many whole blocks.")],
    judge: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Images on which sets are compared, of other scenes; default: every fourth batch of --images.",
        ),
    ] = None,
    variant: VariantOption = "dw",
    rank: RankOption = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="Criterion of the set the search starts from: variance, residual or perturbation."
        ),
    ] = "residual",
    width: Annotated[
        int,
        typer.Option(
            min=1, help="How many chosen and how many other blocks are tried in an exchange."
        ),
    ] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Exchanges at most.")] = 2,
    num_images: Annotated[
        int, typer.Option(min=1, help="Calibration images, at most; evenly over the folder.")
    ] = 80,
    trials: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of the sets tried so far; a search that was stopped is continued from it.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Plan to write.")] = Path("plan.json"),
    size: SizeOption = None,
    weights: WeightsOption = None,
    batch_size: BatchOption = 16,
    amp: AmpOption = "no",
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "cpu",
    progress: ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Choose blocks by what they lose together: whole sets are calibrated and compared."""
    import dwattn

    require_writable(out, DwattnError, [scores, weights, trials])
    if trials is not None:
        require_writable(trials, DwattnError, [scores, weights])
    loaded = read_model(model, weights, device)
    options = {"variant": variant, "amp": amp, **grid_option(loaded, size)}
    if rank is not None:
        options["rank"] = parse_rank(rank)
    if judge is not None:
        options["judge"] = read_images(
            loaded, model, judge, size, mean, std, batch_size, num_images
        )
    found = dwattn.refine(
        loaded, dwattn.Scores.load(scores),
        read_images(loaded, model, images, size, mean, std, batch_size, num_images), blocks,
        criterion=criterion, width=width, rounds=rounds, num_images=num_images, trials=trials,
        progress=progress, **options,
    )  # fmt: skip
    found.plan.save(out)
    emit(found, as_json)
    note(f"Wrote {out}.")
