"""Training of converted models: label-free distillation from the original, tasks, learned selection.

::

    student = Distillation(model)              # its teacher: the original, as it was before replace()
    data = Views(images, Augment())
    Trainer(student, data, Recipe(steps=600)).fit()
    dwattn.save(model, "student.safetensors")

For a training loop of your own, :func:`param_groups` and :func:`distill_loss` are enough.
"""

from __future__ import annotations

from dwattn.finetune.distill import Distillation, Targets, distill_loss
from dwattn.finetune.estimate import Estimate, estimate
from dwattn.finetune.features import FeatureReader, Features, first_tensor, teacher
from dwattn.finetune.gates import Annealing, SubsetGate, add_gates, learned_plan, settle
from dwattn.finetune.groups import param_groups
from dwattn.finetune.heads import Head, LinearHead, SegmentationDecoder, SplitHead
from dwattn.finetune.labelled import LabelledViews, MaskedViews, MaskFolder, labelled_folder
from dwattn.finetune.recipe import Recipe, steps_for
from dwattn.finetune.stages import StagedResult, second_stage, train_in_stages
from dwattn.finetune.study import run_study
from dwattn.finetune.study_grid import Comparison, Kind, StudyGrid, paper_grid
from dwattn.finetune.study_results import StudyResult
from dwattn.finetune.tasks import Task, classifier, evaluate, segmenter
from dwattn.finetune.trainer import Callback, Evaluate, Trainer, TrainingResult
from dwattn.finetune.views import Augment, Order, Views

__all__ = [
    "Annealing",
    "Augment",
    "Callback",
    "Comparison",
    "Distillation",
    "Estimate",
    "Evaluate",
    "FeatureReader",
    "Features",
    "Head",
    "Kind",
    "LabelledViews",
    "LinearHead",
    "MaskFolder",
    "MaskedViews",
    "Order",
    "Recipe",
    "SegmentationDecoder",
    "SplitHead",
    "StagedResult",
    "StudyGrid",
    "StudyResult",
    "SubsetGate",
    "Targets",
    "Task",
    "Trainer",
    "TrainingResult",
    "Views",
    "add_gates",
    "classifier",
    "distill_loss",
    "estimate",
    "evaluate",
    "first_tensor",
    "labelled_folder",
    "learned_plan",
    "paper_grid",
    "param_groups",
    "run_study",
    "second_stage",
    "segmenter",
    "settle",
    "steps_for",
    "teacher",
    "train_in_stages",
]
