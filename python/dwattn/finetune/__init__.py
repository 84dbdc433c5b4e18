"""Training of converted models: label-free distillation from the original, tasks, learned selection.

::

    student = Distillation(model)              # its teacher: the original, as it was before replace()
    data = Views(images, Augment())
    Trainer(student, data, Recipe(steps=600)).fit()
    dwattn.save(model, "student.safetensors")

Who wants the loop to himself takes :func:`param_groups` and :func:`distill_loss` alone.
"""

from __future__ import annotations

from dwattn.finetune.distill import Distillation, Targets, distill_loss
from dwattn.finetune.features import FeatureReader, Features, first_tensor, teacher
from dwattn.finetune.groups import param_groups
from dwattn.finetune.recipe import Recipe, steps_for
from dwattn.finetune.trainer import Callback, Evaluate, Trainer, TrainingResult
from dwattn.finetune.views import Augment, Order, Views

__all__ = [
    "Augment",
    "Callback",
    "Distillation",
    "Evaluate",
    "FeatureReader",
    "Features",
    "Order",
    "Recipe",
    "Targets",
    "Trainer",
    "TrainingResult",
    "Views",
    "distill_loss",
    "first_tensor",
    "param_groups",
    "steps_for",
    "teacher",
]
