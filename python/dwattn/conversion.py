"""The record of what was done to a model, kept with the model so that it can be undone; and changes that are made
completely or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.adapters import ConvertedAttention
from dwattn.adapters.base import wrapped_layer
from dwattn.errors import PlanError
from dwattn.grid_hook import GridHook
from dwattn.plan import Plan
from dwattn.projections import is_sharded, is_wrapped
from dwattn.untouched import unwrap

ATTRIBUTE = "_dwattn"


class Transaction:
    """A block of changes to a model that are all undone if the block is left by any exception.

    Each change is logged before it is made, and undoing is idempotent, so that Ctrl-C may come at
    any point.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            for undo in reversed(self._undo):
                undo()

    def swap(self, root: nn.Module, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place called ``name``."""
        parent_name, _, child = name.rpartition(".")
        parent = root.get_submodule(parent_name)
        old = getattr(parent, child)
        self._undo.append(lambda: setattr(parent, child, old))
        setattr(parent, child, module)

    @torch.no_grad()
    def copy(self, target: Tensor, value: Tensor) -> None:
        """Overwrite a parameter or buffer in place."""
        old = target.detach().clone()
        self._undo.append(lambda: _copy(target, old))
        target.copy_(value)

    def set(self, owner: object, name: str, value: Any) -> None:
        """Set a plain attribute that lives in ``vars(owner)``; None deletes it."""
        missing = name not in vars(owner)
        old = vars(owner).get(name)
        self._undo.append(lambda: _set(owner, name, None if missing else old))
        _set(owner, name, value)

    def hook(self, hook: GridHook, module: nn.Module, *, remove: bool = False) -> None:
        """Install or remove the hook at the patch embedding."""
        undo, do = (hook.install, hook.remove) if remove else (hook.remove, hook.install)
        self._undo.append(lambda: undo(module))
        do(module)


@torch.no_grad()
def _copy(target: Tensor, value: Tensor) -> None:
    target.copy_(value)


def _set(owner: object, name: str, value: Any) -> None:
    if value is not None:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


@dataclass
class ReplacedLayer:
    """One replaced layer: ``name`` is its dotted path, ``original`` the layer it replaced (None after loading a file)."""

    name: str
    variant: str
    original: nn.Module | None
    converted: ConvertedAttention
    training: bool
    placement: tuple[torch.device, torch.dtype]


@dataclass
class Conversion:
    """The record of a converted model; it is part of no state dict and follows a deep copy of the
    model.

    Args:
        plan: of all layers replaced so far.
        backbone: dotted path of the ViT.
        layers: by dotted name.
        updates: original values of other parameters that calibration changed, by name.
        hook: at the patch embedding, and the module it is on.
        raster_order: module and attribute of the override that keeps the patches in raster order.
        source: the file the model was loaded from; its original weights are not at hand then.
    """

    plan: Plan
    backbone: str
    layers: dict[str, ReplacedLayer] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)
    hook: tuple[GridHook, nn.Module] | None = None
    raster_order: tuple[nn.Module, str] | None = None
    source: str | None = None


def find_conversions(model: nn.Module) -> list[tuple[nn.Module, str, Conversion]]:
    """Every submodule that was converted, its dotted path in ``model``, and the record."""
    marked = ((m, name, vars(m).get(ATTRIBUTE)) for name, m in model.named_modules())
    return [(m, name, record) for m, name, record in marked if isinstance(record, Conversion)]


def find_conversion(model: nn.Module) -> tuple[nn.Module, str, Conversion] | None:
    """The first of :func:`find_conversions`; None if there is none."""
    return next(iter(find_conversions(model)), None)


def conversion(model: nn.Module) -> Conversion | None:
    """The record of what was replaced in ``model``, or None if it is not converted."""
    found = find_conversion(model)
    return None if found is None else found[2]


def of_another_record(modules: Iterable[nn.Module], record: Conversion | None) -> bool:
    """Whether ``modules`` contain a replaced layer that is not in the record (or any at all, if that is None)."""
    known = {id(layer.converted) for layer in record.layers.values()} if record else set()
    return any(isinstance(m, ConvertedAttention) and id(m) not in known for m in modules)


def recorded_elsewhere(model: nn.Module) -> str:
    """The error message for a model of which :func:`of_another_record` is true."""
    return (
        f"{type(model).__name__} has layers that dwattn replaced through a model that contains "
        f"this one; pass that model instead."
    )


def placement(layer: ConvertedAttention) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a replaced layer: of its kernel, since its projections may be quantised."""
    own = next(layer.layer.parameters(recurse=False))
    return own.device, own.dtype


def restore(model: nn.Module) -> nn.Module:
    """Put the original attention layers and weights back, in place, bit for bit.

    The originals come back as they were, with their hooks and flags. What was done to the whole model since is applied to
    them: its device, its dtype, and train() or eval(). Weights that calibration changed get their old values; all others keep
    their current ones, so a model that was trained after the conversion does not become the one before it.

    Returns:
        ``model``.

    Raises:
        PlanError: the model is not converted, was loaded from a file (which does not hold the
            originals), is a part of the one that was converted, or its replaced layers or corrected
            weights were exchanged since. The model is then unchanged.
    """
    found = find_conversions(unwrap(model))
    if not found and of_another_record(model.modules(), None):
        raise PlanError(recorded_elsewhere(model))
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no layers replaced by dwattn; pass the model that "
            f"dwattn.replace() was called on, or one that contains it."
        )
    for holder, name, record in found:
        if record.source is not None:
            part = f"The model's part {name}" if name else "The model"
            raise PlanError(
                f"{part} was loaded from {record.source!r}, which does not hold the original "
                f"attention weights; build the original model anew instead."
            )
        _check_places(holder, name, record)
    with Transaction() as change:
        for holder, _, record in found:
            _restore(change, holder, record)
    return model


def _check_places(holder: nn.Module, path: str, record: Conversion) -> None:
    """Refuse to restore unless replaced layers and corrected weights are where they were.

    Args:
        path: of ``holder`` in the user's model.
    """
    place = f"{path}." if path else ""
    wrapped = wrapped_layer(path, holder)
    if wrapped is not None:
        raise PlanError(wrapped)
    modules = dict(holder.named_modules(remove_duplicate=False))
    for layer in record.layers.values():
        found = modules.get(layer.name)
        if found is not layer.converted:
            now = "no module at all" if found is None else f"a {type(found).__name__}"
            raise PlanError(
                f"{place}{layer.name} is no longer the layer that dwattn put there but {now}; put that "
                f"back before restoring."
            )
    tensors = dict([*holder.named_parameters(), *holder.named_buffers()])
    for name, value in record.updates.items():
        tensor = tensors.get(name)
        if is_sharded(tensor):
            raise PlanError(
                f"Calibration changed {place}{name}, which is a DTensor now, of which this process has a part. Restore "
                f"before the model is sharded (fully_shard), or build the original model anew."
            )
        if tensor is None or is_wrapped(tensor) or tensor.shape != value.shape:
            now = "gone" if tensor is None else f"a {type(tensor).__name__} {tuple(tensor.shape)}"
            raise PlanError(
                f"Calibration changed {place}{name}, which is {now} now and cannot be set back; undo what "
                f"was done to it (quantising, pruning) before restoring."
            )


def _restore(change: Transaction, holder: nn.Module, record: Conversion) -> None:
    tensors = dict([*holder.named_parameters(), *holder.named_buffers()])
    for layer in record.layers.values():
        assert layer.original is not None
        now = placement(layer.converted)
        if now != layer.placement:
            layer.original.to(device=now[0], dtype=now[1])
        if layer.converted.training != layer.training:
            layer.original.train(layer.converted.training)
        change.swap(holder, layer.name, layer.original)
    for name, value in record.updates.items():
        change.copy(tensors[name], value)
    if record.hook is not None:
        change.hook(*record.hook, remove=True)
    if record.raster_order is not None:
        change.set(*record.raster_order, None)
    change.set(holder, ATTRIBUTE, None)
