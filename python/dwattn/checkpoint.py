"""A converted model in one safetensors file: weights, plan, and how each layer was converted. No
pickle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import dwattn
from dwattn.adapters import BackboneLayout, BlockSite, ConvertedAttention, describe
from dwattn.conversion import (
    Conversion,
    Transaction,
    find_conversion,
    find_conversions,
    of_another_record,
    recorded_elsewhere,
)
from dwattn.errors import CheckpointError, DwattnError
from dwattn.files import parse_json, write_tensors
from dwattn.fingerprint import Fingerprint, fingerprint, relative_name
from dwattn.grid_hook import GridHook
from dwattn.plan import Plan, problems
from dwattn.projections import is_sharded, is_wrapped, require_linear
from dwattn.replacements import build_shim, finish
from dwattn.surgery import install
from dwattn.token_grid import Grid, GridSource
from dwattn.untouched import ordinary_tensors, unwrap

METADATA_KEY = "dwattn"
_LISTED = 8


class LayerRecord(BaseModel):
    """How one layer was converted; ``name`` is relative to the backbone."""

    model_config = ConfigDict(extra="forbid")

    name: str
    variant: str
    config: dict[str, Any]


class Record(BaseModel):
    """Everything besides the tensors.

    Args:
        grid: the fixed patch grid, or None for a dynamic one.
        aliases: state-dict keys that share their tensor with another one, and that one.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["dwattn-checkpoint"] = "dwattn-checkpoint"
    schema_version: Literal[1] = 1
    dwattn_version: str
    family: str
    grid: Grid | None = None
    fingerprint: Fingerprint
    layers: list[LayerRecord]
    plan: Plan
    aliases: dict[str, str] = {}


def record_of(model: nn.Module) -> Record:
    """What :func:`save` writes beside the tensors.

    Raises:
        CheckpointError: the model has no replaced layers, some outside of its first ViT, or they
            were replaced through a model that contains it.
    """
    found = find_conversions(model)
    if not found and of_another_record(model.modules(), None):
        raise CheckpointError(recorded_elsewhere(model))
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} has no layers replaced by dwattn; call dwattn.replace(model, plan) first, or "
            "save an unconverted model with its own library."
        )
    conversion = found[0][2]
    layout = describe(model)
    own = {id(site.attention) for site in layout.blocks}
    if any(isinstance(m, ConvertedAttention) and id(m) not in own for m in model.modules()):
        raise CheckpointError(_in_parts(model, found))
    if of_another_record((site.attention for site in layout.blocks), conversion):
        raise CheckpointError(recorded_elsewhere(model))
    for layer in conversion.layers.values():
        require_linear(layer.converted, f"Saving {layer.name}")
    replaced = {id(layer.converted) for layer in conversion.layers.values()}
    layers = [
        LayerRecord(
            name=relative_name(layout, site.attention_name),
            variant=site.attention.layer.variant,
            config=site.attention.layer.config(),
        )
        for site in layout.blocks
        if isinstance(site.attention, ConvertedAttention) and id(site.attention) in replaced
    ]
    if len(layers) != len(replaced):
        raise CheckpointError(
            f"{len(replaced)} layers were replaced by dwattn, but {len(layers)} of them are still in the model; "
            "restore it and replace again."
        )
    return Record(
        dwattn_version=dwattn.__version__,
        family=layout.family,
        grid=None if conversion.hook is None else conversion.hook[0].fixed,
        fingerprint=fingerprint(layout),
        layers=layers,
        plan=conversion.plan,
    )


def _in_parts(model: nn.Module, found: list[tuple[nn.Module, str, Conversion]]) -> str:
    """The error message for a model in which other parts than its first ViT are converted."""
    parts = [f"model.{name or record.backbone}" for _, name, record in found]
    whole = [part for part, (_, name, _) in zip(parts, found, strict=True) if not name]
    return (
        f"A file holds the conversion of a model's first Vision Transformer, but layers of this "
        f"{type(model).__name__} were replaced in {', '.join(parts)}. "
        + (f"Call dwattn.restore(model) and replace {whole[0]} by itself: it was replaced through "
           f"the whole model. " if whole else "")
        + f"Save every part to a file of its own, and load it into the same part: "
        f"{', '.join(f'dwattn.save({part}, ...)' for part in parts)}."
    )  # fmt: skip


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all parameters and buffers, the plan and the conversion to one file.

    The file appears under its name only when it is complete; an older one stays if writing fails.
    A bare ``state_dict()`` does not record how the layers were converted, and it fits only a model whose layers have the
    same weights: calibrated layers have ``prefix_proj``, others do not.

    Raises:
        CheckpointError: nothing is converted, or another part than the model's first ViT (name the
            part: ``save(model.vision, ...)``), the layers were replaced through a model that
            contains this one, the state is not only plain tensors, or the file cannot be written.
        UnsupportedAttentionError: a projection of a replaced layer is an adapter or quantised.
    """
    model = unwrap(model)
    sharded = next((n for n, p in model.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise CheckpointError(
            f"{sharded} is a DTensor, of which this process has a part. Gather the weights "
            f"(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load them into "
            f"a copy of the converted model that is not sharded, and save that."
        )
    record = record_of(model)
    tensors, record.aliases = _distinct(model.state_dict())
    # One key only: safetensors writes several in random order, and equal models should give equal
    # files.
    metadata = {METADATA_KEY: record.model_dump_json(exclude_none=True)}
    write_tensors(path, tensors, CheckpointError, metadata)


def _distinct(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, contiguous and in memory of its own, and the keys that share one."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or is_wrapped(value):
            raise CheckpointError(
                f"The model's state {name!r} is a {type(value).__name__}; only plain tensors can "
                f"be saved without pickle."
            )
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values to save.")
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        storage = value.untyped_storage().data_ptr()
        overlapping = (
            storage in storages
            or value.numel() != value.untyped_storage().nbytes() // value.element_size()
        )
        storages.add(storage)
        value = value.detach()
        tensors[name] = (
            value.clone(memory_format=torch.contiguous_format)
            if overlapping
            else value.contiguous()
        )
    return tensors, aliases


@ordinary_tensors
def load(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Convert a fresh model as the file says and load all its weights, or leave it exactly as it
    was.

    Args:
        model: an unconverted model of the architecture that was saved (with any weights), or a
            function that makes one. Weights are cast to its dtype and moved to its device.
        path: written by :func:`save`.

    Returns:
        The model, converted. Its original attention weights are not in the file, so
        :func:`dwattn.restore` refuses it.

    Raises:
        CheckpointError: missing, truncated or foreign file, another schema version, another
            architecture, keys and shapes that do not match, by name, or a model on the meta device.
    """
    name = os.fspath(path)
    with _opened(path) as file:
        record = _parse(file.metadata(), name)
    made = _fresh(model)
    model = unwrap(made)
    layout = describe(model)
    shims, hook = _rebuild(layout, record, name)
    with _opened(path) as file:
        targets = _match(model, shims, file, record, name)
        weights = {key: file.get_tensor(record.aliases.get(key, key)) for key in targets}
    _finite(weights, shims, name)
    conversion = Conversion(plan=record.plan, backbone=layout.name, source=name)
    with Transaction() as change:
        for name, tensor in targets.items():
            change.copy(tensor, weights[name])
        install(model, layout, shims, {}, conversion, hook, keep_originals=False)
    return made


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    name = os.fspath(path)
    if Path(path).is_dir():
        raise CheckpointError(
            f"{name!r} is a directory. dwattn.save() writes one file; save_pretrained() cannot describe a "
            "converted model, so load the original with from_pretrained() and then the file into it."
        )
    if not Path(path).is_file():
        raise CheckpointError(f"There is no checkpoint to load: {name!r} does not exist.")
    try:
        # safetensors takes a file that may not be read for a missing one.
        Path(path).open("rb").close()
        with safe_open(name, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is not a readable safetensors file ({error}); it may be truncated. Copy or "
            f"save it again."
        ) from error


def _parse(metadata: dict[str, str] | None, path: str) -> Record:
    if not metadata or METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path!r} holds tensors but no conversion: it was not written by dwattn.save(). Load plain weights "
            "into the model with its own library, then call dwattn.replace()."
        )
    try:
        data = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(f"The conversion in {path!r} is not valid JSON: {error}.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != 1:
        raise CheckpointError(
            f"{path!r} has schema_version={version!r}, this dwattn {dwattn.__version__} reads version 1; use the "
            "dwattn that wrote it."
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(
            f"The conversion in {path!r} is malformed: {problems(error)}."
        ) from None


def _fresh(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    made = model if isinstance(model, nn.Module) or not callable(model) else model()
    if not isinstance(made, nn.Module):
        raise CheckpointError(
            f"load() needs a model or a function that makes one, got a {type(made).__name__}; "
            f"dwattn.models.load_model() makes one from a name."
        )
    if find_conversion(made) is not None:
        raise CheckpointError(
            "The model is already converted; load into a fresh one, or dwattn.restore(model) first."
        )
    return made


def _rebuild(
    layout: BackboneLayout, record: Record, path: str
) -> tuple[dict[str, ConvertedAttention], GridHook]:
    """Replacements of the recorded shapes beside the fresh model; their weights come later."""
    current = fingerprint(layout)
    difference = record.fingerprint.architecture_difference(current)
    if difference is not None:
        raise CheckpointError(
            f"{path!r} was saved from another model ({record.family}) than this: {difference}."
        )
    sites = {relative_name(layout, site.attention_name): site for site in layout.blocks}
    names = [relative_name(layout, site.attention_name) for site in layout.blocks]
    source = GridSource()
    shims = {}
    for layer in record.layers:
        if layer.name not in sites:
            raise CheckpointError(
                f"{path!r} converts {layer.name}, which this {layout.family} does not have."
            )
        printed = record.fingerprint.layers[names.index(layer.name)]
        shims[sites[layer.name].attention_name] = _shim(
            sites[layer.name], layout, layer, printed, path
        )
        finish(shims[sites[layer.name].attention_name], sites[layer.name], source)
    return shims, GridHook(source, layout.patch_size, layout.padded, fixed=record.grid)


def _shim(
    site: BlockSite, layout: BackboneLayout, layer: LayerRecord, printed: Any, path: str
) -> ConvertedAttention:
    choices = dict(layer.config)
    heads = choices.pop("heads", None)
    try:
        return build_shim(site, printed, layout.num_prefix, layer.variant, heads, choices)
    except (DwattnError, TypeError, ValueError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{path!r}: {layer.name} cannot be rebuilt: {error}") from error


def _finite(weights: dict[str, Tensor], shims: dict[str, ConvertedAttention], path: str) -> None:
    for key, tensor in weights.items():
        if key.startswith(tuple(shims)) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{path!r} holds NaN or infinite values in {key}; save the model again."
            )


def _match(
    model: nn.Module,
    shims: dict[str, ConvertedAttention],
    file: Any,
    record: Record,
    path: str,
) -> dict[str, Tensor]:
    """The tensors to fill, of the model with its replacements, by state-dict key; checked against
    the file.
    """
    prefixes = tuple(f"{name}." for name in shims)
    targets = {k: v for k, v in _state(model).items() if not k.startswith(prefixes)}
    for name, shim in shims.items():
        targets.update({f"{name}.{key}": tensor for key, tensor in _state(shim).items()})
    stored = set(file.keys())
    saved = stored | set(record.aliases)
    holder = _holder(set(targets), saved)
    if holder is not None:
        raise CheckpointError(
            f"{path!r} was saved from a model that holds one like this as its part {holder!r}: it lacks "
            f"{min(targets)} and has {holder}.{min(targets)}. Load it into a model that holds this one in the "
            f"same way, or convert and save that part alone."
        )
    empty = next((name for name, tensor in targets.items() if tensor.is_meta), None)
    if empty is not None:
        raise CheckpointError(
            f"{empty} of the model is on the meta device, which keeps no values. Make the model on the CPU or a "
            f"GPU, then load {path!r} into it."
        )
    _names(path, "lacks", sorted(set(targets) - saved))
    _names(path, "also holds", sorted(saved - set(targets)))
    _names(path, "lacks", sorted(set(record.aliases.values()) - stored))
    wrong = []
    for name, tensor in targets.items():
        entry = file.get_slice(record.aliases.get(name, name))
        shape, floating = tuple(entry.get_shape()), entry.get_dtype().startswith(("F", "BF"))
        if (shape, floating) != (tuple(tensor.shape), tensor.is_floating_point()):
            found = f"{entry.get_dtype()} {shape}"
            wrong.append(f"{name} as {found} instead of {tensor.dtype} {tuple(tensor.shape)}")
    _names(path, "holds", wrong)
    return targets


def _holder(wanted: set[str], saved: set[str]) -> str | None:
    """Dotted path of the part of the saved model whose keys are the wanted ones; None if they are there as they are."""
    if not wanted or wanted & saved:
        return None
    first = min(wanted)
    parts = {name.removesuffix(f".{first}") for name in saved if name.endswith(f".{first}")}
    return next((p for p in sorted(parts) if {f"{p}.{name}" for name in wanted} <= saved), None)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """State dict whose tensors are the module's own."""
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def _names(path: str, what: str, names: Iterable[str]) -> None:
    listed = list(names)
    if listed:
        more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        raise CheckpointError(
            f"{path!r} does not fit this model: it {what} {', '.join(listed[:_LISTED])}{more}. Load into a model "
            "built the same way as the one that was saved."
        )
