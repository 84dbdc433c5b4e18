"""The paper's comparisons on small tasks: photographed cut-outs on photographs, to segment or to classify.

Cut-outs of eight kinds (tuxpaint-stamps-default) are pasted on photos; a pixel is one of the kinds or background, an
image has the kind of its cut-out. Cut-outs and photos of the test images are in no training image. The backbone is
the demo's. Studies are kept in ``--work`` and go on there; on two cores each takes hours, on a GPU minutes::

    python benchmarks/bench_tasks.py segment variants selection recipes more --json benchmarks/results/segment.json
    python benchmarks/bench_tasks.py classify variants --steps 20 --seeds 1 --train-images 64 --test-images 32
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dwattn.demo import machine, photos, stamps
from dwattn.demo.pretrained import DESCRIPTION, build
from dwattn.errors import DataError
from dwattn.finetune import (
    Augment,
    Grid,
    LabelledViews,
    MaskedViews,
    Recipe,
    Task,
    Views,
    classifier,
    run_study,
    segmenter,
)

KINDS = ("animals", "food", "hobbies", "household", "plants", "sports", "town", "vehicles")
#: What the decoder makes of 16 x 16 patches.
MASK_SIZE = (128, 128)


@dataclass(frozen=True)
class Images:
    """Composed images ``(M, 3, 224, 224)``, their masks ``(M, 224, 224)`` and the kinds of their cut-outs ``(M,)``."""

    pixels: Tensor
    masks: Tensor
    kinds: Tensor


def compose(
    backgrounds: list[photos.Photo], cutouts: list[list[Path]], count: int, seed: int
) -> Images:
    """``count`` cut-outs, of each kind as many, each on a photo; all come in turn."""
    rng = random.Random(seed)
    pixels, masks, kinds = [], [], []
    for index in range(count):
        kind = index % len(cutouts)
        stamp = cutouts[kind][index // len(cutouts) % len(cutouts[kind])]
        photo = backgrounds[index % len(backgrounds)]
        place = photos.Photo(
            photo.name, photo.package, photo.scene, photo.path, stamp, rng.randrange(1 << 30)
        )
        image, mask = place.render()
        assert mask is not None
        pixels.append(photos.to_pixels(image))
        masks.append(torch.from_numpy(mask).to(torch.uint8) * (kind + 1))
        kinds.append(kind)
    return Images(torch.stack(pixels), torch.stack(masks), torch.tensor(kinds))


def datasets(train: int, test: int, seed: int) -> tuple[Images, Images]:
    """Training and test images without a common photo or cut-out.

    Raises:
        DataError: there are no cut-outs or too few photos.
    """
    folder = next(
        (root / photos.STAMPS for root in photos.data_folders() if (root / photos.STAMPS).is_dir()),
        None,
    )
    if folder is None:
        raise DataError(
            "The cut-outs of tuxpaint-stamps-default are needed; see dwattn.demo.debian."
        )
    plain = [photo for photo in photos.pool(200, seed) if photo.stamp is None]
    fitting, kept = photos.split(
        plain, calibration=2 * len(plain) // 3, held_out=len(plain) // 3, seed=seed
    )
    rng = random.Random(seed)
    fit_cutouts, test_cutouts = [], []
    for name in KINDS:
        paths = [
            path
            for path in sorted((folder / name).rglob("*.png"))
            if "mirror" not in path.name
            and "cartoon" not in path.as_posix()
            and stamps.is_photograph(path)
        ]
        if len(paths) < 4:
            raise DataError(
                f"{folder / name} holds {len(paths)} photographed cut-outs; 4 are needed."
            )
        rng.shuffle(paths)
        test_cutouts.append(paths[: len(paths) // 4])
        fit_cutouts.append(paths[len(paths) // 4 :])
    return compose(fitting, fit_cutouts, train, seed), compose(kept, test_cutouts, test, seed + 1)


def grids(recipe: Recipe, seeds: int) -> dict[str, dict[str, Grid]]:
    """The comparisons by name; each is one or more studies, because not everything combines with everything."""
    common: dict[str, Any] = {"recipe": recipe, "seeds": tuple(range(seeds)), "score_images": 200}
    dw, narrow = {"variant": "dw"}, {"variant": "lowrank_dw", "rank": 0.25}

    def grid(**fields: Any) -> Grid:
        return Grid.model_validate({**common, **fields})

    return {
        # The paper's counts of 24 blocks, scaled to 12.
        "variants": {
            "whole": grid(kinds=(dw, narrow, {"variant": "conv"}), blocks=(6,)),
            "ensemble": grid(kinds=({"variant": "ens_dw"},), blocks=(5,)),
            "spvit": grid(kinds=({"variant": "spvit"},), blocks=(5,), kernel_inits=("mean-attention",)),
        },
        "selection": {
            "criteria": grid(
                kinds=(dw,), blocks=(6,), criteria=("variance", "residual", "dsp", "highest-variance")
            ),
        },
        "recipes": {
            "stages": grid(kinds=(dw,), blocks=(6,), stages=("two-stage", "one-stage", "frozen")),
            "inits": grid(kinds=(dw,), blocks=(6,), kernel_inits=("calibrated", "mean-attention", "gaussian")),
        },
        "more": {
            "blocks": grid(
                kinds=(dw, narrow, {"variant": "lowrank_dw", "rank": 0.125}), blocks=(8, 9, 10), criteria=("residual",)
            ),
        },
    }  # fmt: skip


def views(task: str, images: Images, augment: Augment | None) -> Views:
    """The images with what the task needs."""
    if task == "classify":
        return LabelledViews(images.pixels, images.kinds, len(KINDS), augment)
    return MaskedViews(images.pixels, images.masks, len(KINDS) + 1, augment, mask_size=MASK_SIZE)


def task_maker(task: str) -> Callable[[int], Task]:
    """A fresh task with the pretrained backbone, for a seed."""

    def make(seed: int) -> Task:
        backbone: Any = build("timm").backbone
        if task == "classify":
            return classifier(backbone, len(KINDS), seed=seed)
        return segmenter(backbone, len(KINDS) + 1, seed=seed)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=("segment", "classify"))
    parser.add_argument("studies", nargs="+", help="variants, selection, recipes, more")
    parser.add_argument("--steps", type=int, default=400, help="of the first stage")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-images", type=int, default=800)
    parser.add_argument("--test-images", type=int, default=200)
    parser.add_argument("--device", help="cpu or cuda; default: what is there")
    parser.add_argument("--work", default="task-studies", help="folder of the runs")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    recipe = Recipe.of(steps=options.steps, batch_size=options.batch_size, lr=options.lr)
    known = grids(recipe, options.seeds)
    unknown = sorted(set(options.studies) - set(known))
    if unknown:
        parser.error(f"unknown studies {', '.join(unknown)}; there are {', '.join(known)}")
    train, test = datasets(options.train_images, options.test_images, seed=0)
    augment = Augment(colour=0.2) if options.task == "segment" else Augment()
    data, held_out = views(options.task, train, augment), views(options.task, test, None)
    work, found = Path(options.work) / options.task, {}
    for name in options.studies:
        for part, grid in known[name].items():
            result = run_study(
                grid, task_maker(options.task), data, held_out, work / f"{name}-{part}",
                first_stages=work, trainer_options={"device": options.device}, note=print,
            )  # fmt: skip
            found[f"{name}-{part}"] = {"grid": grid.model_dump(mode="json"), **result.to_dict()}
            Console().print(result.table())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "created": machine.now(),
            "environment": machine.environment(torch.get_num_threads()),
            "model": DESCRIPTION,
            "images": {"training": len(data), "test": len(held_out), "kinds": KINDS},
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "studies": found,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
