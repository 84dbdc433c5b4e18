"""Results of a run that never happened, with every part a report can show."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from dwattn.report.results import (
    BlockScore,
    ConversionInfo,
    ExportInfo,
    FidelityInfo,
    Latency,
    LatencyInfo,
    LayerRow,
    ModelInfo,
    PhotoInfo,
    PictureCell,
    PictureRow,
    Results,
    Step,
)

BLOCKS, HEADS = 12, 6


def _score(index: int, rng: random.Random) -> BlockScore:
    heads = [rng.uniform(1, 60) for _ in range(HEADS)]
    return BlockScore(
        index=index,
        name=f"backbone.blocks.{index}.attn",
        sigma=sum(heads) / HEADS,
        residual=rng.uniform(0.05, 0.45),
        head_sigma=heads,
        mean_kernel=[[[rng.random() / 9 for _ in range(3)] for _ in range(3)] for _ in heads],
    )


def _conversion(criterion: str, variant: str, method: str, blocks: list[int]) -> ConversionInfo:
    quality = {"calibrated": 0.99, "mean-map": 0.8, "gaussian": 0.4}[method] - 0.008 * len(blocks)
    return ConversionInfo(
        key=f"{criterion}-{len(blocks)}-{variant}-{method}",
        label=f"{variant}, {method}",
        variant=variant,
        rank=96 if variant == "lowrank_dw" else None,
        criterion=criterion,
        blocks=blocks,
        method=method,
        fidelity=FidelityInfo(
            cosine=quality,
            prefix_cosine=quality,
            iou=quality - 0.1,
            mae=0.03,
            empty=1,
            images=60,
            mask_iou=0.6,
        ),
        seconds=12.3,
    )


def _pictures(folder: Path, rows: int, rng: random.Random) -> list[PictureRow]:
    labels = ("photo", "original", "dw", "lowrank_dw", "Gaussian")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    made = []
    for row in range(rows):
        cells = []
        for column, label in enumerate(labels):
            file = f"pictures/{row}-{column}.png"
            colour = tuple(rng.randrange(256) for _ in range(3))
            Image.new("RGB", (64, 64), colour).save(folder / file)
            cells.append(
                PictureCell(label=label, file=file, iou=rng.random() if column > 1 else None)
            )
        made.append(PictureRow(photo=f"package/photo-{row}.jpg <&>", cells=cells))
    return made


def make_results(folder: Path, rows: int = 3, seed: int = 0) -> Results:
    """Full synthetic results; the pictures are written below ``folder``."""
    rng = random.Random(seed)
    scores = [_score(index, rng) for index in range(BLOCKS)]
    plans = {count: list(range(1, count + 1)) for count in (4, 6, 9)}
    conversions = [
        _conversion(criterion, variant, method, blocks)
        for criterion in ("residual", "variance")
        for variant, method in (
            ("dw", "calibrated"),
            ("lowrank_dw", "calibrated"),
            ("dw", "mean-map"),
            ("dw", "gaussian"),
        )
        for blocks in plans.values()
    ]
    bars = {"original": 61.2, "dw": 50.1, "lowrank_dw": 48.3, "removed": 47.5}
    labels = {"removed": "ceiling: layers removed", "original": "original"}
    return Results(
        created="2025-01-01 12:00 UTC",
        command="dwattn demo --out demo-output --seed 0",
        seed=seed,
        quick=False,
        seconds=245.0,
        environment={"CPU": "some CPU", "torch": "2.13.0", "Python": "3.11"},
        model=ModelInfo(
            description="a ViT",
            family="timm VisionTransformer",
            num_blocks=BLOCKS,
            num_heads=HEADS,
            dim=384,
            tokens=257,
            num_prefix=1,
            grid=(16, 16),
            image_size=224,
            parameters=22_000_000,
        ),
        photos=PhotoInfo(
            calibration=120,
            held_out=60,
            views=120,
            packages={"scikit-image": 80, "tuxpaint-stamps-default": 100},
            with_mask=27,
        ),
        scores=scores,
        selected={"residual": plans[6], "variance": [0, 2, 3, 4, 5, 6]},
        headline="residual-6-dw-calibrated",
        conversions=conversions,
        original_mask_iou=0.71,
        latency=[
            LatencyInfo(
                what="Backbone, 224 px",
                batch=1,
                threads=threads,
                rounds=40,
                entries=[
                    Latency(
                        key=key,
                        label=labels.get(key, key),
                        median_ms=value / threads,
                        p20_ms=0.97 * value / threads,
                        p80_ms=1.04 * value / threads,
                    )
                    for key, value in bars.items()
                ],
            )
            for threads in (1, 2)
        ],
        layers=[
            LayerRow(
                layer=f"backbone.blocks.{index}.attn",
                outcome="replaced" if index in plans[6] else "kept",
                detail="dw",
            )
            for index in range(BLOCKS)
        ],
        export=ExportInfo(
            file="model.onnx", bytes=90_000_000, opset=18, max_difference=3e-6, images=8
        ),
        pictures=_pictures(folder, rows, rng),
        steps=[Step(name="score", seconds=21.0), Step(name="calibrate", seconds=90.0)],
        notes=["A note about this run."],
    )
