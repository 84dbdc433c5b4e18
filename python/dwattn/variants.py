"""The variants by name, and how one is built from a pretrained attention layer."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from dwattn.attention import (
    ConvAttention,
    EnsembleDWAttention,
    FusedDWAttention,
    LowRankDWAttention,
    ReplacementAttention,
    SPViTAttention,
)
from dwattn.errors import DwattnError
from dwattn.projections import AttentionWeights
from dwattn.scattered import ScatteredDWAttention, SelfAttention

REPLACEMENTS: dict[str, type[ReplacementAttention]] = {
    cls.variant: cls
    for cls in (
        FusedDWAttention,
        LowRankDWAttention,
        ConvAttention,
        EnsembleDWAttention,
        SPViTAttention,
    )
}
VARIANTS = (SelfAttention.variant, *REPLACEMENTS)

Replacement = ReplacementAttention | ScatteredDWAttention


def build_replacement(
    variant: str,
    weights: AttentionWeights,
    *,
    num_prefix: int,
    heads: list[int] | None = None,
    **options: Any,
) -> Replacement:
    """A replacement layer that holds the pretrained weights, on their device and in their dtype.

    Args:
        variant: a key of ``REPLACEMENTS``.
        weights: the layer's projections.
        num_prefix: prefix tokens ``P``.
        heads: replaced heads; None or all of them replaces the whole layer. A subset is scattered ``dw``.
        options: ``grid``, ``prefix``, ``own_prefix_value``, ``own_prefix_proj``, ``context``, ``rank`` (``lowrank_dw``).

    Raises:
        DwattnError: an unknown variant, or a variant that cannot be scattered.
    """
    if variant not in REPLACEMENTS:
        raise DwattnError(f"Unknown variant {variant!r}; choose one of {', '.join(REPLACEMENTS)}.")
    common: dict[str, Any] = {
        "num_prefix": num_prefix,
        "head_dim": weights.head_dim,
        "scale": weights.scale,
        "qkv_bias": any(b is not None for b in (weights.bq, weights.bk, weights.bv)),
        "proj_bias": weights.bo is not None,
        "q_norm": _private_copy(weights.q_norm),
        "k_norm": _private_copy(weights.k_norm),
        "rotary": weights.rotary,
        "device": weights.wv.device,
        "dtype": weights.wv.dtype,
    }
    layer: Replacement
    if heads is None or len(heads) == weights.num_heads:
        layer = REPLACEMENTS[variant](weights.dim, weights.num_heads, **common, **options)
    elif variant == "dw":
        scattered = {k: v for k, v in options.items() if k in ("grid", "context")}
        layer = ScatteredDWAttention(
            weights.dim, weights.num_heads, heads=list(heads), **common, **scattered
        )
    else:
        raise DwattnError(
            f"Only 'dw' can replace some heads of a layer, {variant!r} replaces whole layers; got heads={heads} of "
            f"{weights.num_heads}. Select blocks= instead of heads=, or use variant='dw'."
        )
    layer.load_attention(weights)
    return layer


def _private_copy(norm: nn.Module | None) -> nn.Module | None:
    """Norms are copied so that training the replacement cannot change the original kept for ``restore``."""
    return None if norm is None else copy.deepcopy(norm)
