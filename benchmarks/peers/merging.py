"""Token merging (ToMe, Bolya et al., ICLR 2023) for ViTs of timm. Ours, from the paper: no package has it for ViTs.

Between the attention and the MLP of every block, ``r`` tokens disappear. Tokens alternate between two sets; each
one of the first set is joined to the token of the second whose keys (mean over heads) have the largest cosine with
its own; the ``r`` closest pairs become one token, the mean weighted by how many patches each stands for. Attention
adds the logarithm of that number to its logits, so that a token counts as often as it has patches. CLS never merges.

For dense features every patch gets the token that it ended in (:func:`unmerge`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import SizedModel


@dataclass(frozen=True)
class Pairs:
    """Which tokens of the even places go where.

    Args:
        kept: ``(B, A - r)`` even places (counted among themselves) that stay, in order.
        gone: ``(B, r)`` those that are merged; into: ``(B, r)`` the odd places they go to.
        odd: number of odd places.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    odd: int

    def places(self) -> Tensor:
        """``(B, T)``: where each token is after merging, for the order ``[kept, odd]``."""
        batch, stay = self.kept.shape
        tokens = stay + self.gone.shape[1] + self.odd
        even = self.kept.new_empty(batch, tokens - self.odd)
        even = even.scatter(1, self.kept, torch.arange(stay).expand(batch, -1))
        even = even.scatter(1, self.gone, self.into + stay)
        odd = torch.arange(stay, stay + self.odd).expand(batch, -1)
        place = torch.arange(tokens)
        return torch.cat([even, odd], 1)[:, place // 2 + place % 2 * (tokens - self.odd)]


def match(keys: Tensor, count: int, protected: int) -> Pairs:
    """The ``count`` closest pairs of tokens.

    Args:
        keys: ``(B, T, d)``; count: at most half of the tokens that may merge are merged.
        protected: leading tokens that never merge.
    """
    unit = F.normalize(keys, dim=-1)
    even, odd = unit[:, ::2], unit[:, 1::2]
    count = min(count, (keys.shape[1] - protected) // 2)
    place = torch.arange(keys.shape[1])
    barred = (place[::2, None] < protected) | (place[None, 1::2] < protected)
    closest, partner = (even @ odd.transpose(1, 2)).masked_fill(barred, -torch.inf).max(-1)
    order = closest.argsort(1, descending=True)
    gone, kept = order[:, :count], order[:, count:].sort(1).values
    return Pairs(kept, gone, partner.gather(1, gone), odd.shape[1])


def merge(tokens: Tensor, sizes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, T, D)`` and the patches they stand for ``(B, T, 1)``, after merging."""
    if pairs.gone.shape[1] == 0:
        return tokens, sizes
    total, number = (_add(part, pairs) for part in (tokens * sizes, sizes))
    return total / number, number


def _add(values: Tensor, pairs: Pairs) -> Tensor:
    even, odd = values[:, ::2], values[:, 1::2]
    wide = (-1, -1, values.shape[-1])
    kept, gone = (
        even.gather(1, index.unsqueeze(-1).expand(wide)) for index in (pairs.kept, pairs.gone)
    )
    return torch.cat([kept, odd.scatter_add(1, pairs.into.unsqueeze(-1).expand(wide), gone)], 1)


def unmerge(tokens: Tensor, trace: Tensor) -> Tensor:
    """``(B, N, D)``: for every original token the one that it is part of.

    Args:
        trace: ``(B, N)`` places in ``tokens``.
    """
    return tokens.gather(1, trace.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def attend(layer: nn.Module, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """A timm attention layer whose tokens count ``sizes`` times; also its keys, mean over heads."""
    batch, count, _ = x.shape
    q, k, v = layer.qkv(x).view(batch, count, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = None if sizes is None else sizes.log().view(batch, 1, 1, count)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return layer.proj(y.transpose(1, 2).flatten(2)), k.mean(1)


class MergedViT(nn.Module):
    """A timm ViT without rotary embedding, distillation token or q/k norm, with merging in its blocks.

    Args:
        vit: whose weights are used; count: tokens that disappear in each block.
        first: the first block that merges. Those before it see the whole grid, so their attention can be replaced.
    """

    def __init__(self, vit: nn.Module, count: int, first: int = 0) -> None:
        super().__init__()
        self.vit, self.count, self.first = vit, count, first

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Tokens after the final norm, unmerged: ``(B, 1 + H*W, D)``."""
        x, trace, _ = self.merged(pixels)
        return unmerge(x, trace)

    def merged(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(B, T, D)`` after the final norm, the place ``(B, N)`` of every original token, and sizes."""
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
        trace = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        sizes = x.new_ones(*x.shape[:2], 1)
        for block in vit.blocks[: self.first]:
            x = block(x)
        for index, block in enumerate(vit.blocks[self.first :]):
            y, keys = attend(block.attn, block.norm1(x), sizes if index and self.count else None)
            x = x + block.ls1(y)
            if self.count:
                pairs = match(keys, self.count, vit.num_prefix_tokens)
                x, sizes = merge(x, sizes, pairs)
                trace = pairs.places().gather(1, trace)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return vit.norm(x), trace, sizes


def merged_model(model: SizedModel, count: int, first: int = 0) -> SizedModel:
    """``model`` with ``count`` tokens merged in every block from ``first`` on; the weights are shared."""
    return SizedModel(MergedViT(model.backbone, count, first), model.decoder, model.size).eval()
