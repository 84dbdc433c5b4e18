"""What is exported: the model as a function of one input, with its sizes checked before any work is
done.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.adapters import BackboneLayout, describe
from dwattn.conversion import find_conversions
from dwattn.errors import ExportError
from dwattn.export.symbolic_sizes import keep_sizes_symbolic
from dwattn.scattered import SelfAttention
from dwattn.token_grid import Grid, TokenGridModule

Size = tuple[int, int]


@dataclass
class Target:
    """A private fp32 copy of the user's model on the CPU, and how it is called.

    Args:
        module: the copy in eval mode; :func:`lower_layers` changes it.
        layout: its backbone, or None for a bare attention layer.
        size: ``(H, W)`` in pixels, or in patches for a bare layer.
        grid: patch grid of that size.
        dynamic: whether the size may vary at run time.
        method, kwargs: what is called, and its keyword arguments beside the input.
        num_prefix, channels: prefix tokens; image channels, or the token width of a bare layer.
    """

    module: nn.Module
    layout: BackboneLayout | None
    size: Size
    grid: Grid
    dynamic: bool
    method: str
    kwargs: dict[str, Any]
    num_prefix: int
    channels: int

    @property
    def input_name(self) -> str:
        """``pixel_values (B, 3, H, W)``, or ``tokens (B, N, D)`` of a bare layer."""
        return "tokens" if self.layout is None else "pixel_values"

    @property
    def patch(self) -> tuple[int, int]:
        """Pixels of a patch."""
        return (1, 1) if self.layout is None else self.layout.patch_size

    def example(self, batch: int, grid: Grid, seed: int = 0) -> Tensor:
        """A reproducible fp32 input of ``batch`` images on a patch grid."""
        generator = torch.Generator().manual_seed(seed)
        if self.layout is None:
            tokens = self.num_prefix + grid[0] * grid[1]
            return torch.randn(batch, tokens, self.channels, generator=generator)
        sides = (grid[0] * self.patch[0], grid[1] * self.patch[1])
        return torch.randn(batch, self.channels, *sides, generator=generator)

    def call(self, x: Tensor) -> Any:
        """The model's raw result for one input."""
        return getattr(self.module, self.method)(x, **self.kwargs)


def make_target(model: nn.Module, size: int | Size, *, dynamic: bool, method: str) -> Target:
    """Check everything that can be checked without running, then copy the model.

    Raises:
        ExportError: a size that does not fit the model or its replaced layers, a model that cannot
            vary its size, or a method it does not have; the message holds the numbers.
    """
    sides = size if isinstance(size, Sized) else (size, size)
    size = (int(sides[0]), int(sides[1]))
    if not callable(getattr(model, method, None)):
        raise ExportError(
            f"{type(model).__name__} has no method {method!r}; use 'forward' or a method it has."
        )
    if isinstance(model, (TokenGridModule, SelfAttention)):
        return _bare_layer(model, size, dynamic, method)
    layout = describe(model)
    grid = _check_size(layout, model, size, dynamic)
    module = _private_copy(model)
    layout = describe(module)
    if layout.raster_order is not None:
        embeddings, override = layout.raster_order
        setattr(embeddings, override.attribute, override)
    _without_masks(module)
    kwargs = _size_arguments(module, method, resized=dynamic or grid != layout.grid)
    if dynamic:
        keep_sizes_symbolic(module)
    return Target(
        module,
        layout,
        size,
        grid,
        dynamic,
        method,
        kwargs,
        layout.num_prefix,
        layout.image_channels,
    )


def replaced_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The replacement layers of a model by name; a bare layer's own name is empty."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TokenGridModule)}


def lower_layers(target: Target, lower: Callable[[nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """Swap the copy's replacement layers for their export form; the new ones by name."""
    lowered = {name: lower(layer) for name, layer in replaced_layers(target.module).items()}
    for name, layer in lowered.items():
        parent, _, child = name.rpartition(".")
        if name:
            setattr(target.module.get_submodule(parent), child, layer)
        else:
            target.module = layer
    return lowered


def flatten_outputs(result: Any, output: str | int | None = None) -> dict[str, Tensor]:
    """Named tensors of a model's result: a tensor, a sequence, a dict or a transformers
    ``ModelOutput``.

    A single tensor is called ``output``; members of a sequence ``output_0, output_1``; fields keep
    their names (nested sequences are numbered). Absent fields and integer tensors are left out.
    ``output`` picks one.

    Raises:
        ExportError: nothing to export, or no output of that name.
    """
    named = dict(_walk(result, ""))
    if output is not None:
        key = str(output) if str(output) in named else f"output_{output}"
        if key not in named:
            raise ExportError(
                f"The model returns no tensor called {output!r}; it returns "
                f"{', '.join(named) or 'no tensor'}."
            )
        return {key: named[key]}
    floats = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
    floats.pop(
        "mask", None
    )  # ViT-MAE's mask of dropped patches; nothing is dropped in an exported model
    if not floats:
        raise ExportError(
            f"The model returned {type(result).__name__} without a floating-point tensor to export."
        )
    return floats


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name or 'output'}_{index}")


def _bare_layer(model: nn.Module, size: Size, dynamic: bool, method: str) -> Target:
    if dynamic:
        raise ExportError(
            "dynamic_size needs pixels: the token count of a bare attention layer does not say "
            "height and width. Export the whole model, or the layer once for each grid."
        )
    fixed = getattr(model, "grid", None)
    if fixed is not None and fixed != size:
        raise ExportError(
            f"size={size} is the patch grid of a bare attention layer, and this one is built for "
            f"{fixed[0]} x {fixed[1]} patches."
        )
    module: Any = _private_copy(model)
    if isinstance(module, TokenGridModule):
        module.grid = size
    num_prefix = getattr(module, "num_prefix", 0)
    return Target(module, None, size, size, False, method, {}, num_prefix, module.dim)


def _private_copy(model: nn.Module) -> nn.Module:
    """An fp32 copy on the CPU in eval mode. The records of the surgery are shared, not copied: they
    hold originals.
    """
    memo: dict[int, Any] = {id(record): record for _, _, record in find_conversions(model)}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} could not be copied for export ({error}); remove hooks and "
            "cached tensors that are not leaves from the model."
        ) from error
    return copied.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)


def _check_size(layout: BackboneLayout, model: nn.Module, size: Size, dynamic: bool) -> Grid:
    rows, columns = layout.patch_size
    if size[0] < rows or size[1] < columns or size[0] % rows or size[1] % columns:
        near = tuple(
            max(1, round(side / patch)) * patch
            for side, patch in zip(size, (rows, columns), strict=True)
        )
        raise ExportError(
            f"size={size} is not a multiple of the {rows} x {columns} patch; the nearest is {near}."
        )
    grid = (size[0] // rows, size[1] // columns)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TokenGridModule)}
    fixed = {name: layer.grid for name, layer in layers.items() if layer.grid is not None}
    wrong = next(((name, own) for name, own in fixed.items() if dynamic or own != grid), None)
    if wrong is not None:
        name, own = wrong
        asked = (
            "dynamic_size=True (--dynamic-size)"
            if dynamic
            else f"size={size} makes a {grid[0]} x {grid[1]} patch grid"
        )
        raise ExportError(
            f"{asked}, but {name} was converted for a fixed grid of {own[0]} x {own[1]} patches "
            f"({own[0] * rows} x {own[1] * columns} pixels). Export at that size, or convert with "
            "replace(..., dynamic_grid=True) (dwattn replace --dynamic-grid)."
        )
    reason = _fixed_size_reason(layout, dynamic)
    if reason is not None and (dynamic or (layout.grid is not None and layout.grid != grid)):
        own = layout.grid or grid
        raise ExportError(
            f"{layout.family} takes images of {own[0] * rows} x {own[1] * columns} pixels ({own[0]} x {own[1]} "
            f"patches) only, but size={size}{' with dynamic_size=True' if dynamic else ''} was asked for: {reason}"
        )
    return grid


def _fixed_size_reason(layout: BackboneLayout, dynamic: bool) -> str | None:
    """Why a backbone cannot take (dynamic: vary) another image size than it is configured for, or
    None.
    """
    model: Any = layout.module
    if layout.family.startswith("timm"):
        if getattr(model, "dynamic_img_size", False):
            return None
        return "create it with dynamic_img_size=True, or with img_size= for another fixed size."
    if layout.family.startswith("hub DINOv2"):
        if dynamic:
            return "its position embedding is resampled by Python numbers; export one file a size."
        return None
    embeddings = getattr(model, "embeddings", model)
    if hasattr(embeddings, "interpolate_pos_encoding") or any(
        hasattr(model, name) for name in ("rope_embeddings", "rope_embed")
    ):
        return None
    return "its position embedding cannot be resampled."


def _size_arguments(module: nn.Module, method: str, *, resized: bool) -> dict[str, Any]:
    """transformers models other than DINOv2 resample their position embedding only when they are
    told to.
    """
    if (
        not resized
        or "interpolate_pos_encoding" not in inspect.signature(getattr(module, method)).parameters
    ):
        return {}
    return {"interpolate_pos_encoding": True}


def _without_masks(module: nn.Module) -> None:
    """Keep transformers from building an all-true attention mask, which it does only while exporting.

    An attention implementation that it has no mask function for gets no mask; this one is its own
    ``sdpa`` under another name. Only the copy's configuration refers to it.
    """
    library: Any = sys.modules.get("transformers")
    configured = [m.config for m in module.modules() if hasattr(m, "config")]
    named = [config for config in configured if hasattr(config, "_attn_implementation")]
    if library is None or not named or not hasattr(library, "AttentionInterface"):
        return
    name = "dwattn_export"
    sdpa = library.AttentionInterface()["sdpa"]
    library.AttentionInterface.register(name, sdpa)
    for config in named:
        config._attn_implementation = name
