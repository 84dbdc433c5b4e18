"""Label-free distillation within 15 minutes on 2 CPU cores: the demo's model and photos.

The recipe is closed form: the layers are fitted to what the original makes of ``--rounds`` different views of every photo
(crops of the full resolution, cut-outs, mosaics, other light); with ``--photos``, of more photos than the demo has,
which show more than rooms and scenes. ``--polish`` adds minutes of gradient steps on views that
never repeat, in bf16 where that is faster on this CPU. The paper's Gaussian start gets ``--minutes`` of such steps alone.
Each case is compared with the original on held-out photos. Finished cases, closed forms and checkpoints
are kept in ``--work``: a bench that was stopped goes on. Needs what ``bench_fidelity.py`` needs, and the ``train`` extra::

    python benchmarks/more_photos.py more-photos
    python benchmarks/bench_distill.py --photos more-photos --json benchmarks/results/distill.json
    python benchmarks/bench_distill.py --photos more-photos --refine --rounds 5 --only lowrank-9 --work refined --json benchmarks/results/distill-refined.json
    python benchmarks/bench_distill.py --photos more-photos --own 3 --cutouts 0.7 --light 0.12 --rounds 6 --images 3300 --refine 1 --only dw-6 --seed 0 --work draw0 --json benchmarks/results/distill-draw0.json
    python benchmarks/bench_distill.py --photos more-photos --own 3 --cutouts 0.7 --light 0.12 --rounds 4 --images 1950 --refine 1 --only dw-6 --seed 1 --work draw1 --json benchmarks/results/distill-draw1.json
    python benchmarks/bench_distill.py --only dw-6 --rounds 14        # the demo's photos alone
    python benchmarks/bench_distill.py --only dw-6 dw-6-gaussian --rounds 10 --json benchmarks/results/distill-gaussian.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import more_photos
import torch
from augmented_photos import CUTOUTS, LIGHT, AugmentedPhotos, free_cutouts, with_repeats

import dwattn
from dwattn.demo import machine, photos
from dwattn.demo.conversions import HeldOut, outputs
from dwattn.demo.pretrained import DESCRIPTION, DIM, SaliencyModel, build
from dwattn.finetune import Distillation, Recipe, Targets, Trainer, estimate
from dwattn.finetune.state import read_progress
from dwattn.library import native

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
        self.own = self.fitting[:]
        if options.photos is not None:
            self.fitting += more_photos.photos(options.photos)
            random.Random(options.seed).shuffle(self.fitting)
        self.photos = len(self.fitting)
        self.fitting = with_repeats(self.fitting, set(self.own), options.own)
        self.views = self.views_of(free_cutouts(kept), options.seed)
        self.amp = "bf16" if faster_in_bf16() else "no"

    def views_of(self, cutouts: list[Path], seed: int) -> AugmentedPhotos:
        """Of all photos that are fitted."""
        share, light = self.options.cutouts, self.options.light
        return AugmentedPhotos(self.fitting, cutouts, seed, share=share, light=light)

    @property
    def images(self) -> int:
        """Views that the closed form is fitted to."""
        every: int = self.options.rounds * len(self.views)
        return min(every, self.options.images or every)

    def plan(self, case: Case) -> dwattn.Plan:
        """By the original's scores, measured once; with ``--refine`` by trying sets out on the demo's photos."""
        path, criterion = self.work / "scores.safetensors", self.options.criterion
        if not path.exists():
            images, _ = photos.load(self.fitting[: self.photos])
            dwattn.score(self.model, images, num_images=len(images), progress=False).save(path)
        scores = dwattn.Scores.load(path)
        if not self.options.refine or case.gaussian:
            return dwattn.select(scores, blocks=case.blocks, criterion=criterion)
        # Judged on scenes that are not fitted.
        fitted, judged = photos.split(self.own, calibration=80, held_out=40, seed=1)
        found = dwattn.refine(
            self.model, scores, photos.load(fitted)[0], case.blocks, judge=photos.load(judged)[0],
            criterion=criterion, width=self.options.refine, variant=case.variant, rank=case.rank, seed=self.options.seed,
            amp=self.amp, trials=self.trials(case), progress=self.options.progress,
        )  # fmt: skip
        return found.plan

    def row(self, case: Case) -> dict[str, Any]:
        """Carry out one case, or take what an earlier run with the same options found."""
        path, settings = self.work / f"{case.name}.json", self.settings()
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if found["options"] == settings:
                return found
        carry_out = self.trained if case.gaussian else self.fitted
        student, how = carry_out(case)
        fidelity, fitted = (
            group.fidelity(*outputs(student, group.pixels))
            for group in (self.held_out, self.own_photos())
        )
        row = {
            "case": vars(case), "options": settings, **self.choice(case), **how, "after": fidelity.model_dump(),
            "on_fitted_photos": fitted.model_dump(),
            "in_budget": how["minutes"] <= BUDGET_MINUTES,
            "reached": case.wanted is None
            or (fidelity.cosine >= case.wanted[0] and fidelity.iou >= case.wanted[1]),
        }  # fmt: skip
        path.write_text(json.dumps(row, indent=1), encoding="utf-8")
        return row

    def own_photos(self) -> HeldOut:
        """The demo's photos that are fitted, as they are: what a student keeps of them bounds what more photos can give."""
        return HeldOut.of(self.model, *photos.load(self.own))

    def choice(self, case: Case) -> dict[str, Any]:
        """The replaced layers, and the sets that were tried if any were."""
        replaced, trials = [layer.name for layer in self.plan(case).layers], self.trials(case)
        tried = json.loads(trials.read_text("utf-8"))["trials"] if trials.exists() else []
        return {"replaced": replaced, "trials": tried}

    def trials(self, case: Case) -> Path:
        """Where the sets are kept that ``--refine`` tried."""
        return self.work / f"{case.name}-trials.json"

    def settings(self) -> dict[str, Any]:
        """Options on which the results depend, and what products have: it depends on the CPU."""
        given = {k: v for k, v in vars(self.options).items() if k not in HOW_IT_RUNS}
        return {**given, "amp": self.amp}

    def fitted(self, case: Case) -> tuple[SaliencyModel, dict[str, Any]]:
        """Closed form, and gradient steps from there if wanted; making the views is part of the time."""
        student, timed = self.closed_form(case)
        how: dict[str, Any] = {"method": "closed form", "images": self.images, **timed}
        if not self.options.polish:
            return student, how
        start = self.held_out.fidelity(*outputs(student, self.held_out.pixels))
        steps = self.descend(case, student, self.options.polish, self.options.polish_lr)
        return student, {
            **how, **steps, "method": "closed form, gradient", "closed_form": start.model_dump(),
            "images": how["images"] + steps["images"], "minutes": round(how["minutes"] + steps["minutes"], 2),
        }  # fmt: skip

    def closed_form(self, case: Case) -> tuple[SaliencyModel, dict[str, float]]:
        """The layers fitted to as many rounds of views as wanted, and the minutes it took, with those of choosing the
        blocks apart; kept for a later run.
        """
        rounds, settings = self.options.rounds, self.settings()
        path = self.work / f"{case.name}-{rounds}.safetensors"
        noted = path.with_suffix(".json")
        known = json.loads(noted.read_text("utf-8")) if noted.exists() else {}
        if known.get("options") == settings:
            return dwattn.load(build("timm"), path), {
                k: v for k, v in known.items() if k != "options"
            }
        began = time.perf_counter()
        plan, student = self.plan(case), build("timm")
        chosen = time.perf_counter()
        with products_in_bf16(self.amp == "bf16"):
            dwattn.replace(
                student, plan, variant=case.variant, rank=case.rank, calibrate=self.views.rounds(rounds),
                photos=len(self.views), views=1, num_images=self.images, amp=self.amp,
                progress=self.options.progress,
            )  # fmt: skip
        timed = {
            "minutes": round((time.perf_counter() - chosen) / 60, 2),
            "choice_minutes": round((chosen - began) / 60, 2),
        }
        dwattn.save(student, path)
        noted.write_text(json.dumps({**timed, "options": settings}), encoding="utf-8")
        return student, timed

    def trained(self, case: Case) -> tuple[SaliencyModel, dict[str, Any]]:
        """The paper's start and gradient steps alone, for the minutes of ``--minutes``."""
        student = build("timm")
        dwattn.replace(
            student, self.plan(case), variant=case.variant, rank=case.rank,
            kernel_init="gaussian", context=True, progress=False,
        )  # fmt: skip
        steps = self.descend(case, student, self.options.minutes, self.options.lr)
        return student, {"method": "gradient", **steps}

    def descend(
        self, case: Case, student: SaliencyModel, minutes: float, lr: float
    ) -> dict[str, Any]:
        """Gradient steps on views that never repeat; the student is changed."""
        module = Distillation(
            student, build("timm"), targets=Targets(output=1.0, output_loss="binary")
        )
        folder = self.work / case.name
        # Another seed, so that none of the views was fitted before.
        views = self.views_of(self.views.cutouts, self.options.seed + 1)
        recipe = self.recipe(module, views, folder, minutes, lr)
        trainer = Trainer(
            module, views, recipe, folder=folder, save_minutes=1, device="cpu",
            progress=self.options.progress,
        )  # fmt: skip
        result = trainer.fit(resume=True)
        student.eval()
        return {
            "steps": result.steps, "images": result.steps * recipe.batch_size,
            "minutes": round(result.seconds / 60, 2), "recipe": recipe.model_dump(),
        }  # fmt: skip

    def recipe(
        self, module: Distillation, views: AugmentedPhotos, folder: Path, minutes: float, lr: float
    ) -> Recipe:
        """As many steps as the minutes allow; those of the run in ``folder`` if there is one."""
        found = read_progress(folder)
        if found is not None:
            return found.recipe
        recipe = Recipe.of(
            steps=1, batch_size=self.options.batch, lr=lr, weight_decay=0.0, warmup=0.1,
            amp=self.amp, seed=self.options.seed,
        )  # fmt: skip
        step = estimate(module, views, recipe, device="cpu").seconds_per_step
        return recipe.but(steps=max(10, int(60 * minutes / step)))


def faster_in_bf16() -> bool:
    """Whether this CPU has products of bf16 matrices; where it has not, they are slower than those of fp32."""
    return native is not None and native.cpu_info()["bf16_products"] == "bfloat16"


@contextmanager
def products_in_bf16(wanted: bool) -> Iterator[None]:
    """Round the factors of fp32 products, those of the fit, to bf16 where oneDNN gains from it; sums stay fp32. The
    closed form is as good with them.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if wanted else before
    try:
        yield
    finally:
        settings.fp32_precision = before


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="views of each photo that are fitted")
    parser.add_argument(
        "--polish", type=float, default=0, help="minutes of gradient steps after the closed form"
    )
    parser.add_argument(
        "--polish-lr", type=float, default=1e-6, help="learning rate of these steps"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=14,
        help="minutes of gradient steps from the Gaussian start",
    )
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of these steps")
    parser.add_argument("--batch", type=int, default=16, help="images per gradient step")
    parser.add_argument(
        "--photos", help="folder of more photos to fit to; more_photos.py fetches one"
    )
    parser.add_argument(
        "--own",
        type=int,
        default=1,
        help="how many times as many views the demo's own photos get as others",
    )
    parser.add_argument(
        "--cutouts",
        type=float,
        default=CUTOUTS,
        help="share of the photos in views that get a cut-out",
    )
    parser.add_argument(
        "--light", type=float, default=LIGHT, help="bound of the views' change in light"
    )
    parser.add_argument("--images", type=int, help="views at most; the last round is cut short")
    parser.add_argument(
        "--criterion", default="residual", help="criterion by which blocks are chosen"
    )
    parser.add_argument(
        "--refine",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="WIDTH",
        help="then exchange blocks if that helps (dwattn.refine); timed separately",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="distill-runs", help="folder of the runs")
    parser.add_argument(
        "--only", nargs="*", help=f"cases to run, of {', '.join(c.name for c in CASES)}"
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
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
                "fitted": bench.photos,
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
