"""``dwattn score | select | replace | export``: from a pretrained model to an ONNX file, one file
at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

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
    busy,
    command,
    emit,
    grid_option,
    image_size,
    note,
    parse_rank,
    read_images,
    read_model,
)
from dwattn.errors import DwattnError
from dwattn.files import require_writable

#: Fewer calibration photos than this say little about other photos.
FEW_PHOTOS = 32


@command
def score(
    model: ModelArgument,
    images: ImagesOption,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Scores to write (.safetensors).")
    ] = Path("scores.safetensors"),
    num_images: Annotated[
        int,
        typer.Option(min=2, help="Images at most, spread evenly over the folder."),
    ] = 1000,
    size: SizeOption = None,
    weights: WeightsOption = None,
    batch_size: BatchOption = 16,
    amp: AmpOption = "no",
    entries: Annotated[
        str,
        typer.Option(
            help="Attention entries that count: patches, or all (also those of prefix tokens)."
        ),
    ] = "patches",
    residual: Annotated[bool, typer.Option(help="Also compute the residual criterion.")] = True,
    memory_budget: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            help="Memory for the statistics; blocks that do not fit are scored in further passes.",
        ),
    ] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "cpu",
    progress: ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Measure how much every head's attention map varies from image to image."""
    import dwattn

    require_writable(out, DwattnError, [weights])
    loaded = read_model(model, weights, device)
    data = read_images(loaded, model, images, size, mean, std, batch_size, num_images)
    budget = None if memory_budget is None else int(memory_budget * 2**20)
    scores = dwattn.score(
        loaded, data, num_images, batch_size=batch_size, entries=entries, residual=residual,
        memory_budget=budget, amp=cast(Any, amp), progress=progress,
    )  # fmt: skip
    scores.save(out)
    emit(scores, as_json)
    note(f"Wrote {out}.")


@command
def select(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="File written by dwattn score.")],
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Replace this many whole blocks.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Replace this many heads, wherever they are.")
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="Replace the fewest blocks that make the model this many times as fast, for example 1.2."
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="variance, residual or perturbation.")
    ] = "variance",
    order: Annotated[
        str | None,
        typer.Option(metavar="B,B,...", help="Your own ranking of blocks instead, as indices."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to time on this machine, for --target-speedup.")
    ] = None,
    variant: Annotated[
        str, typer.Option(help="What to time for --target-speedup: dw, lowrank_dw, ...")
    ] = "dw",
    rank: RankOption = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Plan to write.")] = Path("plan.json"),
    as_json: JsonOption = False,
) -> None:
    """Choose the blocks or heads whose attention varies least, as a plan that a person can read and
    edit.
    """
    import dwattn

    given = [
        name
        for name, value in (
            ("--blocks", blocks),
            ("--heads", heads),
            ("--target-speedup", target_speedup),
        )
        if value is not None
    ]
    if len(given) > 1 or (not given and order is None):
        raise typer.BadParameter(
            "Give exactly one of --blocks, --heads and --target-speedup, or --order alone; "
            f"got {', '.join(given) or 'none'}."
        )
    if target_speedup is not None and model is None:
        raise typer.BadParameter("--target-speedup times the model; name it with --model.")
    if target_speedup is None and (variant != "dw" or rank is not None):
        raise typer.BadParameter("--variant and --rank say what --target-speedup times.")
    require_writable(out, DwattnError, [scores])
    measured = dwattn.Scores.load(scores)
    ranking = _parse_order(order)
    latency = None
    if target_speedup is not None and model is not None:
        from dwattn.latency import measure_latency

        timed = read_model(model, None, "cpu", pretrained=False)
        latency = measure_latency(timed, grid=measured.grid, variant=variant, rank=parse_rank(rank))
    plan = dwattn.select(
        measured, blocks=blocks, heads=heads, target_speedup=target_speedup, criterion=criterion,
        order=ranking, latency=latency,
    )  # fmt: skip
    plan.save(out)
    emit(json.loads(plan.to_json()) if as_json else _plan_table(plan), as_json)
    note(f"Wrote {out}.")
    if heads is None and order is None:
        _note_close_call(measured, len(plan.layers), criterion)


def _note_close_call(scores: Any, blocks: int, criterion: str) -> None:
    from dwattn.selection import close_call

    close = close_call(scores, blocks, criterion)
    if close is not None:
        last, left = close
        note(
            f"Block {last.block} is chosen and block {left.block} is not, though they score nearly the same: "
            f"dwattn refine --width 1 --criterion {criterion} tries both."
        )


def _parse_order(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--order {text} is not a list of block indices such as 3,1,2."
        ) from None


@command
def replace(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="File written by dwattn select.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Student to write (.safetensors); needed unless --dry-run."
        ),
    ] = None,
    variant: VariantOption = "dw",
    rank: RankOption = None,
    prefix: Annotated[
        str, typer.Option(help="What CLS and registers get: exact, static or drop.")
    ] = "exact",
    context: Annotated[
        bool | None,
        typer.Option(
            "--context/--no-context",
            help="Add terms of the prefix tokens, the mean patch and a constant to the patches; default: yes, except for spvit.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of images to fit the new weights on (closed form)."
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, help="Calibration images at most, spread evenly over the folder.")
    ] = 120,
    size: SizeOption = None,
    weights: WeightsOption = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch; default: the fastest number.")
    ] = None,
    amp: AmpOption = "no",
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "cpu",
    dynamic_grid: Annotated[
        bool, typer.Option("--dynamic-grid", help="Let the image size vary at run time.")
    ] = False,
    allow_stale: Annotated[
        bool,
        typer.Option(
            "--allow-stale", help="Accept a plan that was made for other weights of this model."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what would be replaced and what is refused, then stop."
        ),
    ] = False,
    progress: ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Replace what the plan names, fit the new weights without training, and write the student."""
    import dwattn
    from dwattn.plan import Plan

    if out is None and not dry_run:
        raise typer.BadParameter(
            "Say where the student goes with --out student.safetensors, or ask for --dry-run."
        )
    if out is not None:
        require_writable(out, DwattnError, [plan, weights])
    wanted_rank = parse_rank(rank)
    chosen = Plan.load(plan)
    loaded = read_model(model, weights, device)
    data = None
    if calibrate is not None and not dry_run:
        data = read_images(loaded, model, calibrate, size, mean, std, batch_size or 16, num_images)
        if len(data.files) < FEW_PHOTOS:
            note(
                f"Note: {len(data.files)} images are few to fit weights on; about a hundred of many scenes make a "
                "student that keeps its quality on others."
            )
    options = {} if dynamic_grid else grid_option(loaded, size)
    if data is not None:
        options.update(batch_size=batch_size, amp=amp)
    report = dwattn.replace(
        loaded, chosen, variant=variant, rank=wanted_rank, calibrate=data, dry_run=dry_run,
        prefix=prefix, context=context, dynamic_grid=dynamic_grid, allow_stale=allow_stale,
        progress=progress, **options,
    )  # fmt: skip
    if out is not None and not dry_run:
        dwattn.save(loaded, out)
    emit(report, as_json)
    if out is not None and not dry_run:
        note(
            f"Wrote {out}."
            + ("" if calibrate else " It is not calibrated; --calibrate DIR fits its weights.")
        )


@command
def export(
    model: ModelArgument,
    student: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDENT]",
            help="File written by dwattn replace; without it MODEL is exported as it is.",
        ),
    ] = None,
    size: SizeOption = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="ONNX file to write.")] = Path(
        "model.onnx"
    ),
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Half-precision weights and activations.")
    ] = False,
    fp32_io: Annotated[
        bool, typer.Option("--fp32-io", help="With --fp16, take and return fp32 tensors.")
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option(
            "--dynamic-size", help="Leave the image size open, to any number of whole patches."
        ),
    ] = False,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch at 1.")
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX opset, 18 to 21; conv2d: 17 or 18.", show_default="the oldest"),
    ] = None,
    lowering: Annotated[
        str,
        typer.Option(
            help="How replaced layers are written. native: standard operators; plugin: nodes of the "
            "TensorRT plugin library; function: the same nodes, defined for onnxruntime; conv2d: a "
            "static graph of 4-D convolutions."
        ),
    ] = "native",
    output: Annotated[
        str | None, typer.Option(help="Export only this output, for example last_hidden_state.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Method to export, for example forward_features.")
    ] = "forward",
    check: Annotated[
        bool, typer.Option(help="Compare with PyTorch on onnxruntime before the file appears.")
    ] = True,
    tolerance: Annotated[
        float | None, typer.Option(help="Bound on the relative error of that comparison.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also measure onnxruntime's CPU latency.")
    ] = False,
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write ONNX, checked against PyTorch on onnxruntime."""
    import dwattn

    if fp32_io and not fp16:
        raise typer.BadParameter("--fp32-io changes nothing without --fp16.")
    for file in (out, f"{out}.data"):
        require_writable(file, DwattnError, [student, weights])
    with busy("Loading the model"):
        loaded = read_model(model, weights, "cpu", pretrained=student is None)
        if student is not None:
            loaded = dwattn.load(loaded, student)
    with busy("Exporting and checking on onnxruntime"):
        report = dwattn.export(
            loaded, out, image_size(loaded, size), lowering=lowering, opset=opset,
            dynamic_batch=False if static_batch else None, dynamic_size=dynamic_size,
            dtype="fp16" if fp16 else "fp32", keep_io_fp32=fp32_io, output=output, method=method, check=check, tolerance=tolerance,
            latency=latency,
        )  # fmt: skip
    emit(report, as_json)
    together = "" if report.data_path is None else ", which belong together"
    note(f"Wrote {' and '.join(map(str, report.files))}{together}.")


def _plan_table(plan: Any) -> Any:
    from rich.table import Table

    by = "in your own order" if plan.criterion == "manual" else f"by {plan.criterion}"
    title = f"Plan for {plan.model.family}, {by}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("layer")
    table.add_column("heads")
    table.add_column("score", justify="right")
    for layer in plan.layers:
        heads = "all" if layer.heads is None else ", ".join(str(head) for head in layer.heads)
        table.add_row(layer.name, heads, "" if layer.score is None else f"{layer.score:.4g}")
    return table
