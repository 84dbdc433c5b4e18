"""The steps of the demo, in order. Every number that is shown ends up in one :class:`Results`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

import dwattn
from dwattn import report
from dwattn.adapters import describe
from dwattn.demo import machine, photos, pictures, speed
from dwattn.demo.conversions import HeldOut, Outcome, Spec, carry_out, specs
from dwattn.demo.pretrained import (
    DESCRIPTION,
    DIM,
    HEADS,
    IMAGE_SIZE,
    Library,
    SaliencyModel,
    build,
)
from dwattn.demo.terminal import Narrator
from dwattn.demo.terminal import summary as summary_table
from dwattn.demo.timing import cpu_threads
from dwattn.environment import cores
from dwattn.errors import DataError
from dwattn.fidelity import mask_iou
from dwattn.report.results import (
    BlockScore,
    ExportInfo,
    LayerRow,
    ModelInfo,
    PhotoInfo,
    PictureRow,
    Results,
)
from dwattn.scores import CRITERIA

RESULTS, REPORT, CHECKPOINT, ONNX = (
    "results.json",
    "report.html",
    "student.safetensors",
    "student.onnx",
)
_STEPS = 8


@dataclass(frozen=True)
class Settings:
    """How the demo runs.

    Args:
        out: output folder.
        quick: fewer photos and conversions.
        library: whose classes hold the backbone, ``timm`` or ``transformers``.
        blocks: replaced blocks of the main comparison.
        seed: of the split, the crops and the Gaussian initialisation.
        threads: intra-op threads; default all cores of this process.
        budget_s: an optional conversion is left out if it is not expected to end before this many
            seconds; what comes after them takes up to a minute.
        calibration, held_out: photos; fewer where fewer are installed.
    """

    out: Path
    quick: bool = False
    library: Library = "timm"
    blocks: int = 6
    seed: int = 0
    threads: int | None = None
    budget_s: float = 230.0
    calibration: int = photos.CALIBRATION
    held_out: int = photos.HELD_OUT

    def __post_init__(self) -> None:
        if not 3 <= self.blocks <= 8:
            raise DataError(f"blocks={self.blocks} must be 3 to 8 of the demo model's 12.")

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        return f"dwattn demo --out {self.out}{' --quick' if self.quick else ''}"


@dataclass(frozen=True)
class Data:
    """The photos of a run."""

    info: PhotoInfo
    calibration: Tensor
    held_out_photos: list[photos.Photo]
    held_out: HeldOut


def travel(settings: Settings, *, summary: bool = True) -> Results:
    """Run the demo and write its files to ``settings.out``.

    Args:
        summary: print the tables on stdout at the end.

    Raises:
        DataError: the model or the photos are not installed, or ``out`` cannot be made.
    """
    threads = cores() if settings.threads is None else settings.threads
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot make the folder {settings.out} ({error.strerror}).") from error
    tell = Narrator(_STEPS)
    with cpu_threads(threads):
        results = _travel(settings, tell, threads)
    if summary:
        Console().print(summary_table(results, str(settings.out / REPORT)))
    return results


def _travel(settings: Settings, tell: Narrator, threads: int) -> Results:
    with tell.step("model", f"Loading the model: {DESCRIPTION}"):
        model = build(settings.library)
    with tell.step("photos", "Reading photos and running the original model on the held-out ones"):
        data = _data(settings, model)
        tell.say(
            f"{data.info.calibration} to calibrate, {data.info.held_out} held out: "
            f"{_listed(data.info)}"
        )
    with tell.step("score", f"Scoring attention on {len(data.calibration)} images"):
        scores = dwattn.score(
            model, data.calibration, num_images=len(data.calibration), progress=tell.progress
        )
    wanted = specs(DIM, settings.blocks, settings.quick)
    with tell.step("convert", f"Converting and measuring {len(wanted)} variants"):
        outcomes, skipped = _convert(wanted, model, scores, data, settings, tell)
    main, narrow, gaussian = (outcomes[spec.key] for spec in wanted[:3])
    with tell.step("latency", "Measuring latency, all models in turn"):
        latency = speed.measure(
            model,
            outcomes,
            threads=[1] if settings.quick else sorted({1, threads}),
            rounds=10 if settings.quick else 30,
        )
    with tell.step("export", "Saving and exporting the converted model"):
        dwattn.save(main.model, settings.out / CHECKPOINT)
        exported = _export(main, data.held_out, settings.out / ONNX)
    with tell.step("pictures", "Drawing saliency maps"):
        shown = {
            main.record.label: main,
            narrow.record.label: narrow,
            gaussian.record.label: gaussian,
        }
        rows = _pictures(settings, data, {label: item.saliency for label, item in shown.items()})
    results = Results(
        created=machine.now(),
        command=settings.command,
        seed=settings.seed,
        quick=settings.quick,
        seconds=tell.elapsed,
        environment=machine.environment(threads),
        model=_model_info(model),
        photos=data.info,
        scores=_block_scores(scores),
        selected={c: scores.order(c)[: settings.blocks] for c in CRITERIA},
        headline=main.record.key,
        conversions=[item.record for item in outcomes.values()],
        original_mask_iou=mask_iou(data.held_out.saliency, data.held_out.masks),
        latency=latency,
        layers=_layer_rows(main),
        export=exported,
        pictures=rows,
        steps=tell.steps,
        notes=_notes(data.info, skipped, settings),
    )
    with tell.step("report", "Writing the report"):
        results.save(settings.out / RESULTS)
        report.write(results, settings.out / REPORT)
    results.seconds = tell.elapsed
    results.save(settings.out / RESULTS)
    return results


def _listed(info: PhotoInfo) -> str:
    return ", ".join(f"{count} {name}" for name, count in info.packages.items())


def _data(settings: Settings, model: SaliencyModel) -> Data:
    """Photos on both sides of the split, and the original's outputs on the held-out ones."""
    share = 0.4 if settings.quick else 1.0
    calibration, held_out = round(settings.calibration * share), round(settings.held_out * share)
    found = photos.pool(settings.calibration + settings.held_out, settings.seed)
    fitting, kept = photos.split(found, seed=settings.seed)
    fitting, kept = fitting[:calibration], kept[:held_out]
    views = photos.with_crops(fitting, calibration, settings.seed)
    pixels, _ = photos.load(views)
    held_out_pixels, masks = photos.load(kept)
    info = PhotoInfo(
        calibration=len(fitting),
        held_out=len(kept),
        views=len(views),
        packages=photos.packages([*fitting, *kept]),
        with_mask=sum(mask is not None for mask in masks),
    )
    return Data(info, pixels, kept, HeldOut.of(model, held_out_pixels, masks))


def _convert(
    wanted: list[Spec],
    model: SaliencyModel,
    scores: Any,
    data: Data,
    settings: Settings,
    tell: Narrator,
) -> tuple[dict[str, Outcome], list[Spec]]:
    """All conversions but the optional ones that the time no longer allows."""
    outcomes: dict[str, Outcome] = {}
    skipped: list[Spec] = []
    # Seconds, of those that are fitted and of the others.
    longest: defaultdict[bool, float] = defaultdict(float)
    for spec in wanted:
        fitted = spec.method == "calibrated"
        if spec.optional and tell.elapsed + longest[fitted] > settings.budget_s:
            skipped.append(spec)
            continue
        start = tell.elapsed
        outcome = carry_out(
            spec,
            model,
            scores,
            data.calibration,
            data.held_out,
            quick=settings.quick,
            seed=settings.seed,
            progress=tell.progress,
        )
        fidelity = outcome.record.fidelity
        tell.say(
            f"{spec.label}, {spec.blocks} blocks by {spec.criterion}: cosine {fidelity.cosine:.3f}, IoU "
            f"{fidelity.iou:.3f}, {outcome.record.seconds:.1f} s"
        )
        longest[fitted] = max(longest[fitted], tell.elapsed - start)
        outcomes[spec.key] = outcome if spec.keep else _lean(outcome, model)
    return outcomes, skipped


def _lean(outcome: Outcome, original: SaliencyModel) -> Outcome:
    """The outcome without the converted weights, 100 MB each."""
    return Outcome(outcome.record, outcome.report, original, outcome.saliency)


def _export(main: Outcome, held_out: HeldOut, path: Path) -> ExportInfo:
    """Export, then compare with PyTorch once more on real photos."""
    import onnxruntime

    written = dwattn.export(main.model, path, size=(IMAGE_SIZE, IMAGE_SIZE))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = min(8, len(held_out.pixels))
    got = session.run(None, {session.get_inputs()[0].name: held_out.pixels[:images].numpy()})[0]
    difference = float(np.abs(got - main.saliency[:images].numpy()).max())
    return ExportInfo(
        file=path.name,
        bytes=written.bytes,
        opset=written.opset,
        max_difference=difference,
        images=images,
    )


def _pictures(settings: Settings, data: Data, maps: dict[str, Tensor]) -> list[PictureRow]:
    chosen = pictures.choose(
        data.held_out_photos, data.held_out.saliency, 6 if settings.quick else 8
    )
    return pictures.save(settings.out, data.held_out_photos, chosen, data.held_out.saliency, maps)


def _model_info(model: SaliencyModel) -> ModelInfo:
    layout = describe(model)
    geometry = layout.geometry()
    return ModelInfo(
        description=DESCRIPTION,
        family=layout.family,
        num_blocks=len(layout.blocks),
        num_heads=HEADS,
        dim=DIM,
        tokens=geometry.num_tokens,
        num_prefix=geometry.num_prefix,
        grid=geometry.grid,
        image_size=IMAGE_SIZE,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _block_scores(scores: Any) -> list[BlockScore]:
    return [
        BlockScore(
            index=layer.block,
            name=layer.name,
            sigma=layer.sigma_block,
            residual=layer.block_residual,
            perturbation=None if layer.perturbation is None else float(layer.perturbation.sum()),
            head_sigma=layer.sigma.tolist(),
            mean_kernel=layer.mean_kernel.tolist(),
        )
        for layer in scores.layers
    ]


def _layer_rows(main: Outcome) -> list[LayerRow]:
    rows = []
    for row in main.report.rows:
        detail = row.reason
        if row.action == "replaced" and row.parameters:
            detail = f"{row.variant}; {row.parameters[0]:,} → {row.parameters[1]:,} parameters"
        rows.append(LayerRow(layer=row.name, outcome=row.action, detail=detail))
    return rows


def _notes(info: PhotoInfo, skipped: list[Spec], settings: Settings) -> list[str]:
    notes = []
    if info.calibration < settings.calibration // 2 and not settings.quick:
        notes.append(
            f"Only {info.calibration} photos were there to calibrate on; more of them give better fits. On Debian "
            f"or Ubuntu, python -m dwattn.demo.debian {photos.LOCAL_FOLDER} fetches more, without root."
        )
    if settings.quick:
        notes.append(
            "A quick run: fewer photos, and of the layers that write to the residual stream only the "
            "replaced ones were corrected. A full run keeps more of the original."
        )
    if skipped:
        counts = sorted({spec.blocks for spec in skipped})
        notes.append(
            f"{len(skipped)} optional conversions (with {', '.join(map(str, counts))} blocks) were left out "
            "because the run took long on this machine."
        )
    return notes
