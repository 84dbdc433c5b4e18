"""How a model is trained: a validated, recorded set of numbers, and the learning rate they give at each step."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwattn.amp import Amp, autocast
from dwattn.errors import TrainingError
from dwattn.plan import problems

Scope = Literal["all", "blocks", "replaced", "head"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
#: What PyTorch's generators take.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Recipe(BaseModel):
    """AdamW with linear warm-up and cosine decay; everything random follows from ``seed``.

    Args:
        steps: optimiser steps.
        batch_size: images a step, over all processes and micro-batches together.
        micro_batch: images that go through the model at once in one process; None for all of its share.
        lr: peak learning rate of the weights.
        kernel_lr: factor on ``lr`` for kernels and context terms, which are few and start near a solution.
        gate_lr: peak learning rate of the scores of :class:`SubsetGate`, no factor on ``lr``: they start level and must
            come apart by more than their noise, whose deviation is 1.3, in 75 % of the steps. More for runs below
            about 150 steps.
        head_lr: factor on ``lr`` for a task's head, which starts from nothing.
        weight_decay: of matrices; never of kernels, context terms, biases, norms, tokens and positions.
        betas: of AdamW.
        warmup: share of the steps over which the rate rises from 0.
        final_lr: share of the peak rate that is left at the end.
        clip: gradient norm, or None.
        ema: decay of the averaged weights that the run ends with, or None.
        amp: autocast dtype.
        train: ``all`` parameters, the ``blocks`` that hold replaced layers, or the ``replaced`` layers alone
            (frozen backbone); a task's ``head`` is trained in any case.
        views: distinct augmented views of each image, after which they repeat; None never repeats.
        seed: of order, augmentation, initial heads and gates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 8
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    lr: Positive = 2e-5
    kernel_lr: Positive = 10.0
    gate_lr: Positive = 0.1
    head_lr: Positive = 10.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    betas: tuple[Share, Share] = (0.9, 0.999)
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Positive | None = 1.0
    ema: Share | None = None
    amp: Amp = "no"
    train: Scope = "all"
    views: Annotated[int, Field(ge=1)] | None = None
    seed: Seed = 0

    @classmethod
    def of(cls, **fields: Any) -> Recipe:
        """A recipe, with one sentence instead of pydantic's report if a field is wrong.

        Raises:
            TrainingError: names every wrong field and its value.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise TrainingError(f"The recipe is wrong: {problems(error)}.") from None

    def but(self, **changes: Any) -> Recipe:
        """A copy with other values, validated like :meth:`of`."""
        return self.of(**{**self.model_dump(), **changes})

    def rate(self, step: int) -> float:
        """Factor on the peak learning rate at ``step``, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        progress = (step - rising) / max(1, self.steps - rising)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    def autocast(self, device: str) -> AbstractContextManager[None]:
        """The context in which a model computes on a device type, as ``amp`` says."""
        return autocast(self.amp, device)

    def differences(self, other: Recipe) -> str:
        """Fields in which two recipes differ, as text; empty where they agree."""
        mine, theirs = self.model_dump(), other.model_dump()
        return ", ".join(
            f"{name}={theirs[name]!r} instead of {value!r}"
            for name, value in mine.items()
            if theirs[name] != value
        )


def steps_for(epochs: float, images: int, batch_size: int) -> int:
    """Steps in which ``images`` are seen ``epochs`` times, at least one.

    Raises:
        TrainingError: ``epochs`` is not a number above 0.
    """
    if not 0 < epochs < math.inf:
        raise TrainingError(f"epochs={epochs:g} must be a number above 0.")
    return max(1, math.ceil(epochs * images / batch_size))
