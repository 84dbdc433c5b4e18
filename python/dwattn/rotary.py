"""Rotary position embedding (RoPE): queries and keys of patches rotated by angles that depend on their position."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dwattn.errors import UnsupportedAttentionError


class Rotary(NamedTuple):
    """The rotation of one call, the same for all heads; prefix tokens are not turned.

    A replaced layer needs it for its exact prefix rows alone: what it gives to patches depends on their neighbourhood,
    not on their place.

    Args:
        cos, sin: ``(H*W, d_h)``, of the angle of each channel.
        interleaved: whether channels ``2i`` and ``2i + 1`` are turned together, instead of ``i`` and ``i + d_h/2``.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def rotate(self, t: Tensor) -> Tensor:
        """Queries or keys ``(B, n_h, N, d_h)``, the last ``H*W`` tokens turned, in the dtype of ``t``.

        Raises:
            UnsupportedAttentionError: the embedding is not one angle per patch and channel.
        """
        count, width = self.cos.shape[-2:]
        if self.cos.dim() != 2 or width != t.shape[-1] or count > t.shape[-2]:
            raise UnsupportedAttentionError(
                f"A rotary embedding of shape {tuple(self.cos.shape)} does not fit queries and keys of shape "
                f"{tuple(t.shape)}: one angle per patch and channel, {(t.shape[-2], t.shape[-1])} without prefix tokens, "
                f"is supported; rotations that differ between heads, blocks or images are not."
            )
        prefix, patches = t.split([t.shape[-2] - count, count], dim=-2)
        (first, second), (cos, cos2), (sin, sin2) = map(self._pairs, (patches, self.cos, self.sin))
        turned = (first * cos - second * sin, second * cos2 + first * sin2)
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat([prefix, joined.to(t.dtype)], dim=-2)

    def _pairs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that are turned together, first and second of each pair."""
        if self.interleaved:
            return t[..., ::2], t[..., 1::2]
        half = t.shape[-1] // 2
        return t[..., :half], t[..., half:]


class Norms(Protocol):
    """Query and key norms on ``(B, n_h, N, d_h)``, or None."""

    @property
    def q_norm(self) -> nn.Module | None: ...

    @property
    def k_norm(self) -> nn.Module | None: ...


def placed(q: Tensor, k: Tensor, norms: Norms, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(B, n_h, N, d_h)`` as attention multiplies them: normalised, then turned."""
    q = q if norms.q_norm is None else norms.q_norm(q)
    k = k if norms.k_norm is None else norms.k_norm(k)
    return (q, k) if rotary is None else (rotary.rotate(q), rotary.rotate(k))
