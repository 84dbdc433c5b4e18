"""How much of the original a short label-free distillation brings back, on 2 CPU cores: the demo's model and photos.

Each case is converted, trained for ``--minutes`` of computing (the teacher's pass over the photos included), and
compared with the original on held-out photos. Everything is kept in ``--work``: a run that was stopped goes on, and
``--sitting`` ends it after so many seconds on its own. Needs what ``bench_fidelity.py`` needs, and the ``train``
extra::

    python benchmarks/bench_distill.py --json benchmarks/results/distill.json
    python benchmarks/bench_distill.py --only dw-6 --minutes 2 --work /tmp/distill
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dwattn
from dwattn.demo import machine, photos
from dwattn.demo.conversions import HeldOut, outputs
from dwattn.demo.pretrained import DESCRIPTION, DIM, IMAGE_SIZE, SaliencyModel, build
from dwattn.finetune import (
    Augment,
    Callback,
    Distillation,
    Recipe,
    Targets,
    Trainer,
    Views,
    estimate,
)
from dwattn.finetune.cache import FILL_BATCH
from dwattn.finetune.state import read_progress

CALIBRATION, HELD_OUT = 120, 80
#: Photos are kept larger than the model takes them, so that crops stay sharp.
KEPT_SIZE = 336
CACHE = 4 << 30
#: Options that change nothing about the results.
HOW_IT_RUNS = ("work", "json", "only", "sitting", "progress")


@dataclass(frozen=True)
class Case:
    """One conversion to train; ``wanted`` is the cosine and IoU that it should reach."""

    name: str
    variant: str
    blocks: int
    rank: int | None = None
    calibrated: bool = True
    wanted: tuple[float, float] | None = None


CASES = (
    Case("dw-6", "dw", 6, wanted=(0.96, 0.89)),
    Case("lowrank-6", "lowrank_dw", 6, DIM // 4, wanted=(0.95, 0.87)),
    Case("lowrank-9", "lowrank_dw", 9, DIM // 4, wanted=(0.91, 0.81)),
    Case("dw-6-gaussian", "dw", 6, calibrated=False),
)


class Sitting(Callback):
    """Ends a run after so many seconds; it goes on the next time."""

    def __init__(self, seconds: float | None) -> None:
        self.until = None if seconds is None else time.perf_counter() + seconds

    def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
        if self.until is not None and time.perf_counter() > self.until:
            trainer.stop()


class Bench:
    """The model, its photos, and the folder in which everything is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = build("timm")
        pool = photos.pool(CALIBRATION + HELD_OUT, options.seed)
        self.fitting, self.kept = photos.split(
            pool, calibration=CALIBRATION, held_out=HELD_OUT, seed=options.seed
        )

    def scores(self) -> Any:
        """Scores of the original, measured once."""
        path = self.work / "scores.safetensors"
        if not path.exists():
            images, _ = photos.load(self.fitting)
            dwattn.score(self.model, images, num_images=len(images), progress=False).save(path)
        return dwattn.Scores.load(path)

    def held_out(self) -> HeldOut:
        """Held-out photos, and what the original makes of them."""
        return HeldOut.of(self.model, *photos.load(self.kept[: self.options.held_out]))

    def start(self, case: Case) -> tuple[SaliencyModel, float]:
        """The converted model, made once, and the seconds that took."""
        path, note = self.work / f"{case.name}.safetensors", self.work / f"{case.name}.json"
        if path.exists():
            return dwattn.load(build("timm"), path), json.loads(note.read_text())["seconds"]  # type: ignore[return-value]
        plan = dwattn.select(self.scores(), blocks=case.blocks, criterion=self.options.criterion)
        images, _ = photos.load(self.fitting[: self.options.photos])
        chosen: dict[str, Any] = {"variant": case.variant, "rank": case.rank}
        if case.calibrated:
            chosen |= {"calibrate": images, "views": self.options.views}
        else:
            chosen |= {"kernel_init": "gaussian", "context": True}
        student, began = build("timm"), time.perf_counter()
        dwattn.replace(student, plan, progress=self.options.progress, **chosen)
        seconds = time.perf_counter() - began
        note.write_text(json.dumps({"seconds": seconds}))
        dwattn.save(student, path)
        return student, seconds

    def views(self) -> Views:
        """The calibration photos as random crops."""
        rendered = [
            photos.to_pixels(p.render(KEPT_SIZE)[0]) for p in self.fitting[: self.options.photos]
        ]
        augment = Augment(size=(IMAGE_SIZE, IMAGE_SIZE))
        return Views(torch.stack(rendered), augment, self.options.seed)

    def recipe(self, module: Distillation, data: Views, folder: Path) -> Recipe:
        """As many steps as the budget allows; those of the run in ``folder`` if there is one."""
        found = read_progress(folder)
        if found is not None:
            return found.recipe
        o = self.options
        recipe = Recipe.of(
            steps=1, batch_size=o.batch_size, lr=o.lr, kernel_lr=o.kernel_lr, weight_decay=0.0, warmup=o.warmup,
            views=o.repeat, seed=o.seed, ema=o.ema,
        )  # fmt: skip
        step = estimate(module, data, recipe).seconds_per_step
        began = time.perf_counter()
        module.taught(torch.stack([data[i, 0]["pixels"] for i in range(FILL_BATCH)]))
        taught = (time.perf_counter() - began) / FILL_BATCH
        seconds = 60 * o.minutes - taught * o.repeat * len(data)
        return recipe.but(steps=max(10, int(seconds / (step - taught * o.batch_size))))

    def run(self, case: Case, held_out: HeldOut) -> dict[str, Any]:
        """Train one case as far as the sitting goes."""
        student, converting = self.start(case)
        before = held_out.fidelity(*outputs(student, held_out.pixels))
        o = self.options
        targets = Targets(
            cosine=o.cosine, features=o.features, output=o.output, output_loss="binary"
        )
        module, data = (
            Distillation(student, build("timm"), targets=targets, cache=CACHE),
            self.views(),
        )
        folder = self.work / case.name
        recipe = self.recipe(module, data, folder)
        trainer = Trainer(
            module, data, recipe, folder=folder, callbacks=[Sitting(o.sitting)], save_minutes=1,
            device="cpu", progress=o.progress,
        )  # fmt: skip
        result = trainer.fit(resume=True)
        after = held_out.fidelity(*outputs(_eval(student), held_out.pixels))
        row = {
            "case": vars(case), "steps": result.steps, "of": recipe.steps,
            "minutes": round(result.seconds / 60, 2), "converting_seconds": round(converting, 1),
            "complete": result.complete, "recipe": recipe.model_dump(), "targets": vars(targets),
            "before": before.model_dump(), "after": after.model_dump(),
            "reached": case.wanted is None
            or (after.cosine >= case.wanted[0] and after.iou >= case.wanted[1]),
        }  # fmt: skip
        print(
            f"{case.name:15} {result.steps:5}/{recipe.steps} steps {result.seconds / 60:5.1f} min  "
            f"{before.cosine:.3f} / {before.iou:.3f} -> {after.cosine:.3f} / {after.iou:.3f}  "
            f"wanted {case.wanted}",
            flush=True,
        )
        return row


def _eval(module: nn.Module) -> Any:
    return module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=15, help="of training for each case")
    parser.add_argument("--sitting", type=float, help="stop after so many seconds; go on next time")
    parser.add_argument("--work", default="distill-runs", help="folder of the runs")
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(c.name for c in CASES)}")
    parser.add_argument("--criterion", default="residual", help="by which blocks are chosen")
    parser.add_argument("--photos", type=int, default=CALIBRATION, help="to calibrate and train on")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="photos to measure on")
    parser.add_argument("--views", type=int, default=3, help="of a photo in calibration")
    parser.add_argument(
        "--repeat", type=int, default=12, help="different crops of a photo in training"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--kernel-lr", type=float, default=10.0)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--ema", type=float)
    parser.add_argument("--cosine", type=float, default=1.0)
    parser.add_argument("--features", type=float, default=0.0)
    parser.add_argument("--output", type=float, default=1.0, help="weight of the saliency map")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    bench = Bench(options)
    held_out = bench.held_out()
    rows = [
        bench.run(case, held_out)
        for case in CASES
        if options.only is None or case.name in options.only
    ]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "created": machine.now(),
            "environment": machine.environment(torch.get_num_threads()),
            "model": DESCRIPTION,
            "photos": {
                "training": len(bench.fitting[: options.photos]),
                "held_out": len(held_out.pixels),
            },
            "options": {k: v for k, v in vars(options).items() if k not in HOW_IT_RUNS},
            "cases": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
