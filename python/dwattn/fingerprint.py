"""Which model a plan or a checkpoint belongs to: the shape of its attention layers and a sketch of
their weights.

The sketch survives a change of dtype or device and small changes of the weights, and tells other
weights apart by how far they are away.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator
from torch import Tensor, nn

from dwattn.adapters import BackboneLayout, BlockSite, ConvertedAttention, adapter_for, describe
from dwattn.errors import DwattnError, UnsupportedAttentionError

if TYPE_CHECKING:
    from dwattn.projections import AttentionWeights

SKETCH_LENGTH = 8
_SAMPLES = 2048
#: Relative change of the attention weights above which they count as other weights. bf16 rounding
#: is 0.002.
WEIGHT_TOLERANCE = 0.05


class LayerPrint(BaseModel):
    """One attention layer: ``name`` relative to the backbone, class, sizes and weight sketch.

    Layers that cannot be replaced have sizes of 0 and an empty sketch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    dim: int
    num_heads: int
    head_dim: int
    sketch: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _sketch_is_whole(self) -> LayerPrint:
        if len(self.sketch) not in (0, SKETCH_LENGTH + 1):
            raise ValueError(
                f"the sketch of {self.name} has {len(self.sketch)} numbers instead of "
                f"{SKETCH_LENGTH + 1} (or none)"
            )
        return self

    def shape(self) -> dict[str, Any]:
        """Everything but the weights."""
        return self.model_dump(exclude={"sketch"})


class Fingerprint(BaseModel):
    """Of one backbone, in depth order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_prefix: int
    grid: tuple[int, int] | None = None
    layers: tuple[LayerPrint, ...]

    @property
    def architecture(self) -> str:
        """Hash of layer names, classes and sizes, prefix tokens and grid; weights do not enter."""
        text = json.dumps(
            [self.num_prefix, self.grid, [layer.shape() for layer in self.layers]], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def architecture_difference(self, other: Fingerprint) -> str | None:
        """How ``other`` (the model at hand) is built differently, as a clause, or None."""
        if len(self.layers) != len(other.layers):
            return f"it has {len(other.layers)} blocks instead of {len(self.layers)}"
        if self.num_prefix != other.num_prefix:
            return f"it has {other.num_prefix} prefix tokens instead of {self.num_prefix}"
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            known = mine.dim and theirs.dim  # not a layer that is refused anyway
            for key, value in mine.shape().items() if known else [("name", mine.name)]:
                found = getattr(theirs, key)
                if found != value:
                    return f"{key} of layer {theirs.name} is {found!r} instead of {value!r}"
        if self.grid != other.grid:
            return f"its patch grid is {other.grid} instead of {self.grid}"
        return None

    def weight_distance(self, other: Fingerprint) -> tuple[float, str]:
        """Largest relative change of a layer's attention weights, and the layer; same architecture
        only.
        """
        changes = [
            (_distance(mine.sketch, theirs.sketch), theirs.name)
            for mine, theirs in zip(self.layers, other.layers, strict=True)
            if mine.sketch and theirs.sketch
        ]
        return max(changes, default=(0.0, ""))


def fingerprint(model: nn.Module | BackboneLayout) -> Fingerprint:
    """Fingerprint of the model as it was before any layer was replaced.

    Args:
        model: a model, or its layout from :func:`dwattn.adapters.describe`.

    Raises:
        UnsupportedAttentionError: the model has no known backbone.
    """
    layout = model if isinstance(model, BackboneLayout) else describe(model)
    return Fingerprint(
        num_prefix=layout.num_prefix,
        grid=layout.grid,
        layers=tuple(
            _layer_print(relative_name(layout, site.attention_name), site) for site in layout.blocks
        ),
    )


def relative_name(layout: BackboneLayout, name: str) -> str:
    """``name`` without the path of the backbone, so that wrapping a model changes nothing."""
    return name.removeprefix(f"{layout.name}.") if layout.name else name


def _layer_print(name: str, site: BlockSite) -> LayerPrint:
    attention = site.attention
    if isinstance(attention, ConvertedAttention):
        if attention.original_print is None:
            raise DwattnError(
                f"{site.attention_name} is a replaced layer of unknown origin; restore the model "
                "first."
            )
        return LayerPrint.model_validate(attention.original_print)
    weights = _weights(attention)
    return LayerPrint(
        name=name,
        kind=type(attention).__name__,
        dim=0 if weights is None else weights.dim,
        num_heads=0 if weights is None else weights.num_heads,
        head_dim=0 if weights is None else weights.head_dim,
        sketch=() if weights is None else _sketch(weights),
    )


def _weights(attention: nn.Module) -> AttentionWeights | None:
    adapter = adapter_for(attention)
    if adapter is None or adapter.refusal(attention) is not None:
        return None
    try:
        return adapter.weights(attention)
    except UnsupportedAttentionError:
        return None


@lru_cache(maxsize=8)
def _waves(length: int) -> Tensor:
    """``(SKETCH_LENGTH, length)`` cosines of incommensurable frequencies, of mean square 1/2."""
    frequency = torch.tensor(
        [math.sqrt(p) for p in (2, 3, 5, 7, 11, 13, 17, 19)], dtype=torch.float64
    )
    return torch.cos(frequency[:, None] * torch.arange(1, length + 1, dtype=torch.float64))


@torch.no_grad()
def _sketch(weights: AttentionWeights) -> tuple[float, ...]:
    """Projections of an evenly spread sample of the four matrices, relative to its norm."""
    parts = []
    for matrix in (weights.wq, weights.wk, weights.wv, weights.wo):
        flat = matrix.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        parts.append(flat[::step][:_SAMPLES].to("cpu", torch.float64))
    sample = torch.cat(parts)
    if not bool(torch.isfinite(sample).all()):
        return ()
    norm = sample.norm().clamp_min(torch.finfo(torch.float64).tiny)
    projected = _waves(sample.numel()) @ sample / norm
    # An even norm is not enough: scaled weights must differ too.
    return tuple(round(value, 6) for value in (*projected.tolist(), math.log(float(norm))))


def _distance(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    *a, norm_a = first
    *b, norm_b = second
    turn = math.dist(a, b) / math.sqrt(SKETCH_LENGTH / 2)
    return max(turn, abs(norm_a - norm_b))
