"""Floating-point operations and parameters of one attention layer, by variant.

``FLOPs = 2 * MAC``, projections included, biases and softmax not counted: with 576 tokens, width 1024 and
16 heads these are the digits of Table 1 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dwattn.errors import DwattnError

TAPS = 9  # a 3x3 kernel


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer: ``tokens`` N (prefix included), ``dim`` D, heads n_h of ``head_dim`` d_h."""

    tokens: int
    dim: int
    num_heads: int
    head_dim: int
    num_prefix: int = 0
    rank: int | None = None

    @property
    def channels(self) -> int:
        """``C = n_h * d_h``."""
        return self.num_heads * self.head_dim

    @property
    def patches(self) -> int:
        return self.tokens - self.num_prefix


def _linear(tokens: int, d_in: int, d_out: int) -> int:
    return 2 * tokens * d_in * d_out


def _exact_prefix(s: LayerShape) -> int:
    """Absorbed prefix attention: q, q Wk, logits, pooling, Wv and Wo for the P prefix rows."""
    if s.num_prefix == 0:
        return 0
    projections = 4 * _linear(s.num_prefix, s.dim, s.channels)
    return projections + 2 * 2 * s.num_prefix * s.num_heads * s.tokens * s.dim


def _depthwise(s: LayerShape, inner: int) -> int:
    return (
        _linear(s.tokens, s.dim, inner)
        + 2 * TAPS * s.patches * inner
        + _linear(s.patches, inner, s.dim)
    )


def _mhsa(s: LayerShape) -> int:
    return 4 * _linear(s.tokens, s.dim, s.channels) + 2 * 2 * s.tokens**2 * s.channels


def _dw(s: LayerShape) -> int:
    return _depthwise(s, s.channels) + _exact_prefix(s)


def _lowrank(s: LayerShape) -> int:
    if s.rank is None:
        raise DwattnError(
            "The cost of lowrank_dw depends on its inner width: pass rank=, for example dim // 4."
        )
    return _depthwise(s, s.rank) + _exact_prefix(s)


def _conv(s: LayerShape) -> int:
    dense = 2 * TAPS * s.patches * s.dim * s.channels
    return dense + _linear(s.patches, s.channels, s.dim) + _exact_prefix(s)


def _ens_dw(s: LayerShape) -> int:
    return _depthwise(s, s.head_dim) + _exact_prefix(s)


def _spvit(s: LayerShape) -> int:
    dense = 2 * TAPS * s.patches * s.dim * s.head_dim
    return dense + _linear(s.patches, s.head_dim, s.dim) + _exact_prefix(s)


_FLOPS: dict[str, Callable[[LayerShape], int]] = {
    "mhsa": _mhsa,
    "dw": _dw,
    "lowrank_dw": _lowrank,
    "conv": _conv,
    "ens_dw": _ens_dw,
    "spvit": _spvit,
}


def _shape(
    variant: str,
    tokens: int,
    dim: int,
    num_heads: int,
    head_dim: int | None,
    num_prefix: int,
    rank: int | None,
) -> LayerShape:
    if variant not in _FLOPS:
        raise DwattnError(f"Unknown variant {variant!r}; choose one of {', '.join(_FLOPS)}.")
    sizes = {"tokens": tokens, "dim": dim, "num_heads": num_heads}
    if any(value < 1 for value in sizes.values()) or not 0 <= num_prefix < tokens:
        raise DwattnError(
            f"Sizes must be positive with 0 <= num_prefix < tokens, got {sizes}, num_prefix={num_prefix}."
        )
    if head_dim is None:
        if dim % num_heads:
            raise DwattnError(
                f"dim={dim} is not a multiple of num_heads={num_heads}; pass head_dim= explicitly."
            )
        head_dim = dim // num_heads
    return LayerShape(tokens, dim, num_heads, head_dim, num_prefix, rank)


def flops(
    variant: str,
    *,
    tokens: int,
    dim: int,
    num_heads: int,
    head_dim: int | None = None,
    num_prefix: int = 0,
    rank: int | None = None,
) -> int:
    """FLOPs (``2 * MAC``) of one layer on one image.

    Args:
        variant: ``mhsa``, ``dw``, ``lowrank_dw``, ``conv``, ``ens_dw`` or ``spvit``.
        tokens: ``N = P + H*W``, prefix tokens included.
        num_prefix: prefix rows that keep exact attention (absorbed, see ``reference.exact_prefix_rows``).
        rank: inner width of ``lowrank_dw``.

    Raises:
        DwattnError: unknown variant, sizes out of range, ``lowrank_dw`` without ``rank``.
    """
    shape = _shape(variant, tokens, dim, num_heads, head_dim, num_prefix, rank)
    return _FLOPS[variant](shape)


def params(
    variant: str,
    *,
    dim: int,
    num_heads: int,
    head_dim: int | None = None,
    rank: int | None = None,
) -> int:
    """Trainable parameters of one layer without biases, context terms and prefix rows (Table 1).

    ``ens_dw`` and ``spvit`` are counted as trained, with all heads' projections; folding for deployment
    leaves ``2 * dim * head_dim`` plus the kernel.
    """
    s = _shape(variant, 1, dim, num_heads, head_dim, 0, rank)
    projections = 2 * s.dim * s.channels
    if variant == "mhsa":
        return 2 * projections
    if variant == "lowrank_dw":
        if rank is None:
            raise DwattnError("The size of lowrank_dw depends on its inner width: pass rank=.")
        return rank * (2 * s.dim + TAPS)
    kernel = {
        "dw": TAPS * s.channels,
        "conv": TAPS * s.num_heads,
        "ens_dw": TAPS * s.head_dim + s.num_heads,
        "spvit": TAPS * s.num_heads,
    }[variant]
    return projections + kernel
