"""Weights from local files: tensors only, and all of them or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.errors import CheckpointError

_PICKLED = (".pth", ".pt", ".bin")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a local file.

    ``.safetensors`` holds nothing but tensors. A ``.pth`` is a pickle, which can run code when it
    is read; it is opened with ``torch.load(weights_only=True)``, which admits tensors and plain
    containers alone.

    Raises:
        CheckpointError: missing, damaged, of another kind, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no weights file {path}.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                written_here = "dwattn" in (file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}.") from error
        if written_here:
            raise CheckpointError(
                f"{path} was written by dwattn: it holds a converted model, or scores, and not the weights of an "
                "original one. Load a converted model with dwattn.load(model, path), or name it as STUDENT after MODEL."
            )
        return _unwrapped(tensors)
    if path.suffix not in _PICKLED:
        raise CheckpointError(
            f"{path} has the ending {path.suffix or '(none)'!r}; weights are read from "
            f".safetensors, or from {', '.join(_PICKLED)} files that hold tensors only."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds pickled objects besides tensors, which could run code "
            f"when they are read ({reason}). Where you trust its origin, load it yourself and save "
            "it with safetensors.torch.save_file(state_dict, 'weights.safetensors')."
        ) from error
    return _state_dict_in(loaded, path)


def _state_dict_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself, or under one of the names training scripts keep it."""
    for key in ("state_dict", "model", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = (
        isinstance(loaded, dict) and loaded and all(isinstance(v, Tensor) for v in loaded.values())
    )
    if not tensors:
        raise CheckpointError(
            f"{path} holds {type(loaded).__name__}, not a state dict of tensors (alone or under "
            "'state_dict', 'model' or 'teacher')."
        )
    return _unwrapped({str(name): tensor for name, tensor in loaded.items()})


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of the wrappers that a model was saved in: of data parallelism and averages (which count in
    ``n_averaged``), and of ``torch.compile``.
    """
    while True:
        names = [name for name in state if name != "n_averaged"]
        prefix = next(
            (p for p in ("module.", "_orig_mod.") if names and all(n.startswith(p) for n in names)),
            None,
        )
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): state[name] for name in names}


def load_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict whose keys and shapes are exactly the model's.

    Raises:
        CheckpointError: names what is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if missing or unexpected:
        raise CheckpointError(mismatch(source, missing, unexpected))
    if shapes:
        raise CheckpointError(
            f"{source} belongs to a model of other sizes: {'; '.join(shapes[:3])}. Give the "
            "model's options in its name, for example ?img_size=224&num_classes=0."
        )
    model.load_state_dict(state)


def mismatch(source: str, missing: list[str], unexpected: list[str]) -> str:
    """A sentence on keys that a file and a model do not share."""

    def some(names: list[str]) -> str:
        return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

    parts = []
    if missing:
        parts.append(f"{len(missing)} weights of the model are not in the file ({some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} in the file are not in the model ({some(unexpected)})")
    return f"{source} does not fit the model: {' and '.join(parts)}."
