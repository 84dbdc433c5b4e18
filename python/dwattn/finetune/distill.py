"""Label-free distillation: a converted model learns to reproduce the features of its original."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.adapters import ConvertedAttention, describe
from dwattn.data import Batch
from dwattn.errors import TrainingError
from dwattn.finetune import features as feature_access
from dwattn.finetune.cache import TeacherCache
from dwattn.finetune.features import FeatureReader, Features, first_tensor

OutputLoss = Literal["auto", "kl", "mse", "binary"]


@dataclass(frozen=True)
class Targets:
    """The terms of the distillation loss and their weights; a weight of 0 leaves a term out.

    Args:
        cosine: weight of ``1 - cos`` of the final patch tokens, mean over patches.
        features: weight of the squared error of the final patch tokens, as a share of their variance in the image.
        prefix: weight of ``1 - cos`` of the prefix tokens.
        blocks: weight of the squared error after chosen blocks, as a share of their variance, mean over the blocks.
        block_indices: the blocks; None takes those with replaced layers.
        output: weight of the error of the model's output.
        output_loss: that error: ``kl`` of logits ``(B, classes, ...)``, a mean over images and positions, ``mse`` as a share of the mean
            square of the teacher's output for the image, ``binary`` cross-entropy above its minimum for maps in [0, 1]; ``auto``
            takes ``kl`` for two dimensions and ``mse`` otherwise.
        temperature: of ``kl``; above 0.

    Raises:
        TrainingError: weights that are negative, not finite or all 0, or an unknown ``output_loss``.
    """

    cosine: float = 1.0
    features: float = 0.0
    prefix: float = 0.1
    blocks: float = 0.0
    block_indices: tuple[int, ...] | None = None
    output: float = 0.0
    output_loss: OutputLoss = "auto"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.cosine, self.features, self.prefix, self.blocks, self.output)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise TrainingError(
                f"The weights {weights} of the targets must be at least 0, and one of them above 0."
            )
        if self.output_loss not in ("auto", "kl", "mse", "binary"):
            raise TrainingError(
                f"output_loss={self.output_loss!r} must be auto, kl, mse or binary."
            )
        if not self.temperature > 0:
            raise TrainingError(f"temperature={self.temperature} must be above 0.")


def distill_loss(
    student: Features, teacher: Features, targets: Targets | None = None, *, num_prefix: int = 0
) -> dict[str, Tensor]:
    """The terms of the loss, unweighted and fp32, and their weighted sum under ``loss``.

    Args:
        student, teacher: features of the same images; gradients flow into the student's only.
        num_prefix: prefix tokens ``P`` in front of the patches.

    Raises:
        TrainingError: features of different shapes, without the output or blocks that ``targets`` names, or without
            any term that has a weight.
    """
    targets = targets or Targets()
    _check_pair(student, teacher, targets)
    patches = [f.tokens[:, num_prefix:].float() for f in (student, teacher)]
    terms: dict[str, Tensor] = {"cosine": _cosine_distance(*patches)}
    if targets.features:
        terms["features"] = relative_error(*patches)
    if targets.prefix and num_prefix:
        prefix = [f.tokens[:, :num_prefix].float() for f in (student, teacher)]
        terms["prefix"] = _cosine_distance(*prefix)
    if targets.blocks:
        pairs = zip(student.blocks, teacher.blocks, strict=True)
        terms["blocks"] = torch.stack([relative_error(s, t) for s, t in pairs]).mean()
    if targets.output:
        assert student.output is not None
        assert teacher.output is not None
        terms["output"] = output_loss(student.output, teacher.output, targets)
    if not any(getattr(targets, name) for name in terms):
        raise TrainingError(
            f"targets.prefix={targets.prefix:g} is the only weight, and the model has no prefix tokens; give another "
            f"term a weight."
        )
    loss = sum((getattr(targets, name) * term for name, term in terms.items()), torch.zeros(()))
    return {"loss": loss, **terms}


def _check_pair(student: Features, teacher: Features, targets: Targets) -> None:
    ours, theirs = ([tuple(t.shape) for t in f.tensors()] for f in (student, teacher))
    if ours != theirs:
        raise TrainingError(
            f"Student and teacher have features of shapes {ours} and {theirs}; run both on the same images and "
            f"read the same blocks and outputs."
        )
    if targets.output and student.output is None:
        raise TrainingError("targets.output needs features with output; read them with output=.")
    if targets.blocks and not student.blocks:
        raise TrainingError("targets.blocks needs features of blocks; read them with blocks=.")


def _cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``|s - t|^2 / |t - mean(t)|^2`` of ``(B, N, D)`` tokens in fp32, by image; the mean over images.

    By image, so that the loss of a batch is the mean over its parts however it is divided.
    """
    student, teacher = student.float(), teacher.float()
    energy = (teacher - teacher.mean(1, keepdim=True)).square().sum((1, 2))
    return ((student - teacher).square().sum((1, 2)) / energy.clamp_min(1e-12)).mean()


def output_loss(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Distance of two outputs as ``targets.output_loss`` says; 0 where they agree."""
    kind = targets.output_loss
    if kind == "auto":
        kind = "kl" if student.dim() == 2 else "mse"
    student, teacher = student.float(), teacher.float()
    if kind == "mse":
        # By image, so that it does not depend on what else is in the batch.
        pair = (student - teacher, teacher)
        errors, energies = (t.square().reshape(len(t), -1).mean(1) for t in pair)
        return (errors / energies.clamp_min(1e-12)).mean()
    if kind == "kl":
        t = targets.temperature
        ours, theirs = (F.log_softmax(logits / t, dim=1) for logits in (student, teacher))
        places = ours[:, 0].numel()  # images, or the positions of all images
        return F.kl_div(ours, theirs, log_target=True, reduction="sum") / places * t * t
    low, high = (bound for bound in teacher.detach().aminmax())
    if low < 0 or high > 1:
        raise TrainingError(
            f"output_loss='binary' needs outputs in [0, 1], got {low:.3g} to {high:.3g}; use 'mse', or 'kl' for logits."
        )
    eps = 1e-6
    student, teacher = student.clamp(eps, 1 - eps), teacher.clamp(eps, 1 - eps)
    return F.binary_cross_entropy(student, teacher) - F.binary_cross_entropy(teacher, teacher)


class Distillation(nn.Module):
    """The training module: ``forward(batch)`` gives the terms of :func:`distill_loss`.

    The student stays in eval mode, as the teacher is: both are compared without dropout.

    Args:
        student: the converted model; only it is part of the module's parameters and state.
        teacher: the original, which is frozen; by default :func:`dwattn.finetune.teacher` of the student, taken now.
        targets: see :class:`Targets`.
        output: gets a tensor out of the model's result where ``targets.output`` is used.
        cache: bytes of memory for the teacher's features of views that come again; 0 for none.

    Raises:
        TrainingError: the teacher is the student, or the model has nothing of what ``targets`` names.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        targets: Targets | None = None,
        output: Callable[[Any], Tensor] = first_tensor,
        cache: int = 0,
    ) -> None:
        super().__init__()
        if teacher is student:
            raise TrainingError("The teacher is the student itself; pass the original model.")
        self.targets = targets or Targets()
        self.student = student
        original = feature_access.teacher(student) if teacher is None else teacher.eval()
        parameter = next(student.parameters())
        original = original.requires_grad_(False).to(parameter.device)
        self._indices = blocks = self._blocks(student)
        wanted = output if self.targets.output else None
        self._read = FeatureReader(student, blocks, wanted)
        chosen = self.targets
        if not any(
            (chosen.cosine, chosen.features, chosen.blocks, chosen.output, self._read.num_prefix)
        ):
            raise TrainingError(
                f"prefix={chosen.prefix} is the only target, and {type(student).__name__} has no prefix tokens; give "
                f"cosine= or another target a weight above 0."
            )
        # In a tuple, so that the teacher is neither in the state nor among the parameters.
        self._teacher = (original, FeatureReader(original, blocks, wanted))
        self.cache = TeacherCache(cache)

    def _blocks(self, student: nn.Module) -> Sequence[int]:
        if not self.targets.blocks:
            return ()
        if self.targets.block_indices is not None:
            return self.targets.block_indices
        sites = describe(student).blocks
        found = [i for i, s in enumerate(sites) if isinstance(s.attention, ConvertedAttention)]
        return found or range(len(sites))

    def train(self, mode: bool = True) -> Distillation:
        """The module's own flag only; student and teacher stay in eval mode."""
        self.training = mode
        self.student.eval()
        return self

    def prepare(self, device: torch.device) -> None:
        """Move the teacher beside the student."""
        self._teacher[0].to(device)

    def settings(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with its beginning."""
        return {"targets": {**asdict(self.targets), "block_indices": list(self._indices)}}

    def held_bytes(self) -> int:
        """Memory beside the student's: the teacher's weights, and the cache when it is full."""
        return self.cache.limit + sum(
            t.numel() * t.element_size() for t in self._teacher[0].state_dict().values()
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of ``{"pixels": (B, 3, H, W), "keys": B (image, view) pairs}``."""
        pixels: Tensor = batch["pixels"]
        theirs = self.taught(pixels, batch.get("keys"))
        ours = self._read(Batch(pixels, len(pixels), pixels))
        return distill_loss(ours, theirs, self.targets, num_prefix=self._read.num_prefix)

    def taught(self, pixels: Tensor, keys: Sequence[tuple[int, int]] | None = None) -> Features:
        """The teacher's features, out of the cache where it has them.

        What is not there is computed as the student is: under autocast the rounding of both is alike, and a teacher in
        full precision would take as long as the student's own steps.
        """
        return self.cache.get(keys, pixels, self._teach)

    def _teach(self, pixels: Tensor) -> Features:
        return feature_access.teach(self._teacher[1], Batch(pixels, len(pixels), pixels))
