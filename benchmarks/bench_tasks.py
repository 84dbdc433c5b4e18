"""The paper's comparisons on two small tasks, with the demo's backbone at a low resolution.

``classify``: Fashion-MNIST. ``segment``: photographed cut-outs of eight kinds on photographs. Both come as Debian
packages (dataset-fashion-mnist; tuxpaint-stamps-default and opencv-doc), installed or unpacked under
``$DWATTN_DEMO_DATA``. A study is kept in ``--work`` and goes on there, whenever and however it was stopped; without
names all comparisons of :func:`dwattn.finetune.paper_grid` are run. On one core a run of the default size takes two
to six minutes (``--list`` says which are left, ``--collect`` writes what is done), on a GPU the same studies run larger::

    python benchmarks/bench_tasks.py segment main --json benchmarks/results/study-segment.json
    python benchmarks/bench_tasks.py classify --size 224 --steps 2000 --batch-size 64 --train-images 60000 --test-images 10000
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import task_images
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from dwattn.demo import machine
from dwattn.demo.pretrained import DEPTH, DESCRIPTION, HEADS, PATCH, timm_backbone
from dwattn.finetune import (
    Recipe,
    StudyGrid,
    StudyResult,
    Task,
    Views,
    classifier,
    paper_grid,
    run_study,
    segmenter,
)
from dwattn.finetune.study_latency import study_latency
from dwattn.report.study import StudyReport, write_study

COMMAND = shlex.join(
    ["python", "benchmarks/bench_tasks.py", *(word for word in sys.argv[1:] if word != "--collect")]
)
#: What the options are where they are not given. Rates are those of the backbone; ``head_rate`` is that of the first fit of
#: the head, to the frozen backbone, and ``head_lr`` the head's, as a multiple of the backbone's, when both are trained.
DEFAULTS: dict[str, dict[str, float]] = {
    "classify": {
        "train_images": 4000, "test_images": 3000, "batch_size": 32,
        "head_steps": 150, "head_rate": 1e-2, "head_lr": 10,
        "steps": 120, "lr": 3e-5, "second_steps": 80, "second_lr": 5e-6,
    },
    "segment": {
        "train_images": 4096, "test_images": 800, "batch_size": 16,
        "head_steps": 400, "head_rate": 2e-3, "head_lr": 33,
        "steps": 600, "lr": 3e-5, "second_steps": 100, "second_lr": 5e-6,
    },
}  # fmt: skip
#: Of the decoder: half of the default, which at this resolution would cost more than the backbone.
WIDTHS = (128, 64, 32)
#: Options that change nothing about the results.
HOW_IT_RUNS = ("comparisons", "work", "json", "report", "list", "collect", "progress")


def views(options: argparse.Namespace) -> tuple[Views, Views]:
    """Images to train on and to measure on."""
    wanted = (options.train_images, options.test_images, options.size)
    if options.task == "classify":
        return task_images.fashion(*wanted, validation=options.validation)
    return task_images.cutouts(*wanted, validation=options.validation, known=options.known_cutouts)


def make(task: str, classes: int, size: int, seed: int) -> Task:
    """A fresh task with the pretrained backbone."""
    if task == "classify":
        return classifier(timm_backbone(size), classes, seed=seed)
    return segmenter(timm_backbone(size), classes, widths=WIDTHS, seed=seed)


def grid(options: argparse.Namespace) -> StudyGrid:
    """The comparisons and the recipes that the options say."""
    first = Recipe.of(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        head_lr=options.head_lr,
        warmup=0.1,
        amp=options.amp,
    )
    head = first.but(
        steps=options.head_steps, head_lr=options.head_rate / options.lr, train="head", warmup=0.05
    )
    second = first.but(steps=options.second_steps, lr=options.second_lr)
    return paper_grid(
        DEPTH, HEADS, first, second=second, head=head, seeds=tuple(range(options.seeds)),
        score_images=options.score_images, calibration_images=options.calibration_images,
        calibration={"views": 1, "refit": options.refit},
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=sorted(DEFAULTS))
    parser.add_argument("comparisons", nargs="*", help="names; all if there are none")
    parser.add_argument("--size", type=int, default=98, help=f"pixels, a multiple of {PATCH}")
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--test-images", type=int)
    parser.add_argument(
        "--validation",
        action="store_true",
        help="measure on images held back from the training images, to choose the other options",
    )
    parser.add_argument(
        "--known-cutouts",
        action="store_true",
        help="segment: measure on the training cut-outs, at other places on other photos",
    )
    parser.add_argument("--batch-size", type=int, help="batch size of all stages")
    parser.add_argument(
        "--head-steps", type=int, help="steps that fit the head to the frozen backbone"
    )
    parser.add_argument("--head-rate", type=float, help="learning rate of these steps")
    parser.add_argument(
        "--head-lr",
        type=float,
        help="the head's learning rate over the backbone's, after these steps",
    )
    parser.add_argument("--steps", type=int, help="steps of the first stage")
    parser.add_argument("--lr", type=float, help="learning rate of the first stage")
    parser.add_argument("--second-steps", type=int, help="steps of the second stage")
    parser.add_argument("--second-lr", type=float, help="learning rate of the second stage")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--amp",
        choices=("no", "bf16"),
        default="bf16",
        help="'no' is faster on a CPU without bf16 units",
    )
    parser.add_argument("--score-images", type=int, default=200)
    parser.add_argument("--calibration-images", type=int, default=600)
    parser.add_argument(
        "--refit", default="all", help="which layers calibration corrects, see dwattn.calibration"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--work", default="task-studies", help="folder of the runs")
    parser.add_argument(
        "--json", type=Path, help="write the results to this file, and a .csv beside it"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help="time the models, and write tables and figures to this HTML file",
    )
    parser.add_argument(
        "--latency-size",
        type=int,
        help="pixels of the image that they are timed on; default: --size",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the runs that are left, then stop"
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="run nothing, only write the results of finished runs",
    )
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    if options.known_cutouts and options.task != "segment":
        parser.error("--known-cutouts is of the task 'segment'")
    for name, value in {**DEFAULTS[options.task], "latency_size": options.size}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """The options that the results depend on."""
    return {k: v for k, v in vars(options).items() if k not in HOW_IT_RUNS}


def report(
    options: argparse.Namespace, study: StudyGrid, result: StudyResult, work: Path
) -> list[dict[str, Any]]:
    """Time what was not timed yet on this machine, write the page, and return the times."""
    where, size = options.device or "cpu", options.latency_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(where)
    latency = study_latency(study, timm_backbone(size).to(where), image, work)
    cpu = machine.environment(torch.get_num_threads())["CPU"]
    page = StudyReport.of(
        work, result, command=COMMAND, setting=setting(options), latency=latency,
        machine=f"{cpu}, {size} x {size} pixels",
    )  # fmt: skip
    options.report.parent.mkdir(parents=True, exist_ok=True)
    write_study(page, options.report)
    return latency


def main() -> None:
    options = parse()
    study, work = grid(options), Path(options.work) / options.task
    only = [] if options.collect else options.comparisons or None
    if options.list:
        cells = study.cells(only)
        left = [c.name for c in cells if not (work / "cells" / f"{c.name}.json").exists()]
        print(*left, f"{len(left)} of {len(cells)} runs are left.", sep="\n")
        return
    data, test = views(options)
    classes: int = data.classes  # type: ignore[attr-defined]
    # With so few tokens PyTorch's fused attention is slower than its parts on a CPU, backwards twice as slow.
    cpu = options.device == "cpu" or not torch.cuda.is_available()
    with sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext():
        result = run_study(
            study, lambda seed: make(options.task, classes, options.size, seed), data, test, work, only=only,
            trainer_options={"device": options.device, "progress": options.progress},
            note=lambda text: print(text, flush=True),
        )  # fmt: skip
    Console().print(result.table())
    latency = report(options, study, result, work) if options.report else None
    if options.json:
        document = {
            "created": machine.now(),
            "command": COMMAND,
            "environment": machine.environment(torch.get_num_threads()),
            "model": DESCRIPTION,
            "setting": setting(options),
            "grid": study.model_dump(mode="json"),
            "latency": latency,
            **result.to_dict(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        options.json.with_suffix(".csv").write_text(result.csv(), encoding="utf-8")


if __name__ == "__main__":
    main()
