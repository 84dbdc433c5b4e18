"""A run's state in one safetensors file with JSON in its header: written whole or not at all, no pickle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dwattn.errors import CheckpointError
from dwattn.files import write_tensors
from dwattn.finetune.ema import Average
from dwattn.finetune.recipe import Recipe
from dwattn.plan import problems

STATE_FILE = "state.safetensors"
_KEY = "dwattn-training"


class Progress(BaseModel):
    """Everything of a state besides its tensors.

    Args:
        step: steps that are done.
        seconds: they took, over all sittings.
        data: fingerprint of the images; images: their number.
        losses: of the last step; settings: of the training module.
        scaler: of fp16 training.
    """

    # A term of the loss with the weight 0 may be NaN; as null it could not be read again.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    kind: Literal["dwattn-training"] = "dwattn-training"
    schema_version: Literal[1] = 1
    step: int
    seconds: float
    recipe: Recipe
    data: str
    images: int
    losses: dict[str, float] = {}
    settings: dict[str, Any] = {}
    scaler: dict[str, float | int] = {}


def save_state(
    folder: Path,
    progress: Progress,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> Path:
    """Write ``folder/state.safetensors``; the older one stays until the new one is complete.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full.
    """
    tensors = {f"model.{name}": t for name, t in _weights(module)}
    tensors |= {f"optimizer.{name}": t for name, t in _moments(module, optimizer)}
    if average is not None:
        tensors |= {f"average.{name}": t for name, t in average.values.items()}
    plain = {
        k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()
    }
    path = folder / STATE_FILE
    write_tensors(path, plain, CheckpointError, {_KEY: progress.model_dump_json()})
    return path


def read_progress(folder: Path) -> Progress | None:
    """Progress of the run in ``folder``, or None if there is none yet.

    Raises:
        CheckpointError: the file is damaged, or of another kind or version.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    with _opened(path) as file:
        text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise CheckpointError(
            f"{str(path)!r} is not a training state of dwattn; give an empty folder."
        )
    try:
        return Progress.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(
            f"The training state {str(path)!r} cannot be read by this dwattn: {problems(error)}."
        ) from None


@torch.no_grad()
def load_state(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None
) -> None:
    """Put weights, moments and averages back, to the last bit. Nothing random has a state.

    Raises:
        CheckpointError: the file belongs to another model, or averages other parameters.
    """
    path = folder / STATE_FILE
    with _opened(path) as file:
        stored: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = dict(_weights(module))
    expected = {f"model.{name}" for name in weights}
    if average is not None:
        expected |= {f"average.{name}" for name in average.values}
    _check_names(path, {k for k in stored if not k.startswith("optimizer.")}, expected)
    for name, target in weights.items():
        value = stored[f"model.{name}"]
        if value.shape != target.shape:
            raise CheckpointError(
                f"{str(path)!r} holds {name} as {tuple(value.shape)} instead of {tuple(target.shape)}."
            )
        target.copy_(value)
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in module.named_parameters():
        prefix = f"optimizer.{name}#"
        found = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        if found:
            # The step counter lives on the CPU, unless the optimiser is fused.
            optimizer.state[parameter] = {
                k: t.to(parameter.device) if fused or t.dim() else t for k, t in found.items()
            }
    if average is not None:
        for name, value in average.values.items():
            value.copy_(stored[f"average.{name}"])


#: Names of half-written files: those of :func:`dwattn.files.write_atomically`, and of safetensors itself.
_HALF_WRITTEN = (".*.tmp", ".tmp??????")


def remove_leftovers(folder: Path) -> None:
    """Delete half-written files of a process that was killed."""
    for pattern in _HALF_WRITTEN:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}#{key}", torch.as_tensor(value)


def _check_names(path: Path, stored: set[str], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - stored)[:3], sorted(stored - expected)[:3]
    if missing or unexpected:
        raise CheckpointError(
            f"{str(path)!r} belongs to another model: it lacks {missing} and also holds {unexpected}. Resume with the "
            f"same model, task and trained parameters, or start in an empty folder."
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a readable training state ({error}); remove it to start again."
        ) from error
