"""Label-free distillation within 15 minutes on 2 CPU cores: the demo's model and photos.

The recipe is closed form: the layers are fitted to what the original makes of ``--rounds`` different views of every photo
(crops of the full resolution, cut-outs, mosaics, other light). Gradient steps take as long an image and gain less; they
are what the paper's Gaussian start gets, for as many minutes. Each case is compared with the original on held-out photos.
Finished cases and the gradient run's checkpoints are kept in ``--work``: a bench that was stopped goes on. Needs what
``bench_fidelity.py`` needs, and the ``train`` extra::

    python benchmarks/bench_distill.py --json benchmarks/results/distill.json     # all cases: 40 minutes
    python benchmarks/bench_distill.py --only dw-6 --rounds 24                    # the most of 15 minutes
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dwattn
from dwattn.demo import machine, photos
from dwattn.demo.conversions import HeldOut, outputs
from dwattn.demo.pretrained import DESCRIPTION, DIM, SaliencyModel, build
from dwattn.demo.variety import PhotoViews, free_cutouts
from dwattn.finetune import Distillation, Recipe, Targets, Trainer, estimate
from dwattn.finetune.state import read_progress

CALIBRATION, HELD_OUT = 120, 80
BUDGET_MINUTES = 15
#: Options that change nothing about the results.
HOW_IT_RUNS = ("work", "json", "only", "progress")


@dataclass(frozen=True)
class Case:
    """One conversion; ``wanted`` is the cosine and IoU that it should reach."""

    name: str
    variant: str
    blocks: int
    rank: int | None = None
    gaussian: bool = False
    wanted: tuple[float, float] | None = None


CASES = (
    Case("dw-6", "dw", 6, wanted=(0.96, 0.89)),
    Case("lowrank-6", "lowrank_dw", 6, DIM // 4, wanted=(0.95, 0.87)),
    Case("lowrank-9", "lowrank_dw", 9, DIM // 4, wanted=(0.91, 0.81)),
    Case("dw-6-gaussian", "dw", 6, gaussian=True),
)


class Bench:
    """The model, its photos, and the folder in which everything is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.model = build("timm")
        pool = photos.pool(CALIBRATION + HELD_OUT, options.seed)
        self.fitting, kept = photos.split(
            pool, calibration=CALIBRATION, held_out=HELD_OUT, seed=options.seed
        )
        self.held_out = HeldOut.of(self.model, *photos.load(kept))
        self.views = PhotoViews(self.fitting, free_cutouts(kept), options.seed)

    def plan(self, blocks: int) -> dwattn.Plan:
        """Of the original's scores, measured once."""
        path = self.work / "scores.safetensors"
        if not path.exists():
            images, _ = photos.load(self.fitting)
            dwattn.score(self.model, images, num_images=len(images), progress=False).save(path)
        return dwattn.select(
            dwattn.Scores.load(path), blocks=blocks, criterion=self.options.criterion
        )

    def row(self, case: Case) -> dict[str, Any]:
        """Carry out one case, or take what an earlier run with the same options found."""
        path, settings = self.work / f"{case.name}.json", self.settings()
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if found["options"] == settings:
                return found
        carry_out = self.trained if case.gaussian else self.fitted
        student, how = carry_out(case)
        fidelity = self.held_out.fidelity(*outputs(student, self.held_out.pixels))
        row = {
            "case": vars(case), "options": settings, **how, "after": fidelity.model_dump(),
            "in_budget": how["minutes"] <= BUDGET_MINUTES,
            "reached": case.wanted is None
            or (fidelity.cosine >= case.wanted[0] and fidelity.iou >= case.wanted[1]),
        }  # fmt: skip
        path.write_text(json.dumps(row, indent=1), encoding="utf-8")
        return row

    def settings(self) -> dict[str, Any]:
        """Options on which the results depend."""
        return {k: v for k, v in vars(self.options).items() if k not in HOW_IT_RUNS}

    def fitted(self, case: Case) -> tuple[SaliencyModel, dict[str, Any]]:
        """Closed form on as many rounds of views as wanted; making the views is part of the time."""
        plan, student, rounds = self.plan(case.blocks), build("timm"), self.options.rounds
        began = time.perf_counter()
        dwattn.replace(
            student, plan, variant=case.variant, rank=case.rank, calibrate=self.views.rounds(rounds),
            photos=len(self.views), views=1, progress=self.options.progress,
        )  # fmt: skip
        minutes = (time.perf_counter() - began) / 60
        dwattn.save(student, self.work / f"{case.name}.safetensors")
        images = rounds * len(self.views)
        return student, {"method": "closed form", "images": images, "minutes": round(minutes, 2)}

    def trained(self, case: Case) -> tuple[SaliencyModel, dict[str, Any]]:
        """The paper's start and gradient steps on views that never repeat, for as many minutes."""
        student = build("timm")
        dwattn.replace(
            student, self.plan(case.blocks), variant=case.variant, rank=case.rank,
            kernel_init="gaussian", context=True, progress=False,
        )  # fmt: skip
        module = Distillation(
            student, build("timm"), targets=Targets(output=1.0, output_loss="binary")
        )
        folder = self.work / case.name
        recipe = self.recipe(module, folder)
        trainer = Trainer(
            module, self.views, recipe, folder=folder, save_minutes=1, device="cpu",
            progress=self.options.progress,
        )  # fmt: skip
        result = trainer.fit(resume=True)
        return student.eval(), {
            "method": "gradient", "steps": result.steps, "images": result.steps * recipe.batch_size,
            "minutes": round(result.seconds / 60, 2), "recipe": recipe.model_dump(),
        }  # fmt: skip

    def recipe(self, module: Distillation, folder: Path) -> Recipe:
        """As many steps as the minutes allow; those of the run in ``folder`` if there is one."""
        found = read_progress(folder)
        if found is not None:
            return found.recipe
        o = self.options
        recipe = Recipe.of(
            steps=1, batch_size=8, lr=o.lr, weight_decay=0.0, warmup=0.1, seed=o.seed
        )
        step = estimate(module, self.views, recipe).seconds_per_step
        return recipe.but(steps=max(10, int(60 * o.minutes / step)))


def line(row: dict[str, Any]) -> str:
    """One case for the terminal."""
    case, after = row["case"], row["after"]
    objects = ""
    if after["object_iou"] is not None:
        objects = f"  with object {after['object_cosine']:.3f} / {after['object_iou']:.3f}"
    return (
        f"{case['name']:15} {row['method']:12} {row['images']:5} images {row['minutes']:5.1f} min  "
        f"{after['cosine']:.3f} / {after['iou']:.3f}{objects}  wanted {case['wanted']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=14, help="views of each photo that are fitted"
    )
    parser.add_argument("--minutes", type=float, default=8, help="of gradient steps")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the gradient steps")
    parser.add_argument("--criterion", default="residual", help="by which blocks are chosen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="distill-runs", help="folder of the runs")
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(c.name for c in CASES)}")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    bench = Bench(options)
    rows = []
    for case in CASES:
        if options.only is None or case.name in options.only:
            rows.append(bench.row(case))
            print(line(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "created": machine.now(),
            "environment": machine.environment(torch.get_num_threads()),
            "model": DESCRIPTION,
            "photos": {
                "fitted": len(bench.fitting),
                "cutouts": len(bench.views.cutouts),
                "held_out": len(bench.held_out.pixels),
                "with_object": sum(mask is not None for mask in bench.held_out.masks),
            },
            "options": bench.settings(),
            "cases": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
