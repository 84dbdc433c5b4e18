"""The options of ``dwattn finetune``, each with its help; those of its tasks are in :mod:`dwattn.cli.tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TrainedStudentArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[STUDENT]",
        help="File written by dwattn replace; without it (tasks only) MODEL is trained as it is.",
    ),
]
TrainingImagesOption = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Training images; for classify one subfolder per class."),
]
OutOption = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for checkpoints, train.csv and the trained student."),
]
TaskOption = Annotated[
    str, typer.Option(help="distill (learn from MODEL, without labels), classify or segment.")
]
TestImagesOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Tasks: images on which the result is measured."),
]
SplitOption = Annotated[
    bool, typer.Option("--split", help="Tasks: ViT-Split heads beside a frozen backbone.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Length in optimiser steps.")]
EpochsOption = Annotated[float | None, typer.Option(help="Length in epochs; default: 10.")]
MinutesOption = Annotated[
    float | None,
    typer.Option(help="Length in minutes: the steps that this machine makes in that time."),
]
LrOption = Annotated[float, typer.Option(help="Peak learning rate.")]
KernelLrOption = Annotated[float, typer.Option(help="Factor on --lr for the kernels.")]
WeightDecayOption = Annotated[
    float | None, typer.Option(help="Weight decay; default: 0 for distill, 0.05 for tasks.")
]
WarmupOption = Annotated[float, typer.Option(help="Warm-up, as a share of the steps.")]
TrainOption = Annotated[
    str,
    typer.Option(
        help="What is trained: all, blocks (those with replaced layers), replaced (these layers alone) or head."
    ),
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(min=1, help="Images per forward pass of a process; fewer need less memory."),
]
EmaOption = Annotated[
    float | None,
    typer.Option(help="Keep an exponential moving average of the weights, with this decay."),
]
ViewsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of different crops of an image; default: a new one each time."
    ),
]
FeaturesOption = Annotated[
    float,
    typer.Option(
        help="distill: weight of the squared error of the final patch tokens, beside their cosine."
    ),
]
BlocksOption = Annotated[float, typer.Option(help="distill: weight of the error after each block.")]
OutputOption = Annotated[
    float, typer.Option(help="distill: weight of the error of the model's output.")
]
OutputLossOption = Annotated[str, typer.Option(help="Loss of --output: auto, kl, mse or binary.")]
CacheOption = Annotated[
    int,
    typer.Option(
        min=0, metavar="MB", help="distill: memory in which the original's features are kept."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
SaveMinutesOption = Annotated[float, typer.Option(min=0.0, help="Minutes between checkpoints.")]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in --out, with the recipe it began with."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Measure the time and memory of the run, then stop.")
]
