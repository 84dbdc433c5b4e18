"""The heads of tasks: a linear classifier, the paper's decoder, ViT-Split heads.

A head takes :class:`dwattn.finetune.Features` and the :class:`dwattn.Geometry` of its tokens; ``blocks`` says which
blocks' outputs it wants besides the final tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.adapters import describe
from dwattn.errors import TrainingError
from dwattn.finetune.features import Features, token_width
from dwattn.geometry import Geometry
from dwattn.token_grid import TokenGridModule


class Head(nn.Module):
    """Base: ``forward(features, geometry) -> logits``."""

    blocks: tuple[int, ...] = ()

    def forward(self, features: Features, geometry: Geometry) -> Tensor:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """JSON-able options that its weights do not show: what it reads and how."""
        return {"kind": type(self).__name__, "blocks": list(self.blocks)}


def patch_map(tokens: Tensor, geometry: Geometry) -> Tensor:
    """``(B, P + H*W, D)`` tokens to a ``(B, D, H, W)`` map of the patches."""
    geometry.check(tokens.shape[1])
    patches = tokens[:, geometry.num_prefix :].transpose(1, 2)
    return patches.unflatten(2, (geometry.height, geometry.width))


class LinearHead(Head):
    """One linear layer on the mean of the patch tokens or on the CLS token: ``(B, classes)``.

    Args:
        dim: token width ``D``.
        pool: ``mean`` or ``cls``.
    """

    def __init__(self, dim: int, classes: int, pool: str = "mean") -> None:
        super().__init__()
        if pool not in ("mean", "cls"):
            raise TrainingError(f"pool={pool!r} must be 'mean' or 'cls'.")
        self.pool = pool
        self.linear = nn.Linear(dim, classes)

    def forward(self, features: Features, geometry: Geometry) -> Tensor:
        if self.pool == "cls" and not geometry.num_prefix:
            raise TrainingError("pool='cls' needs a model with a CLS token; use pool='mean'.")
        tokens = features.tokens
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, geometry.num_prefix :].mean(1)
        logits: Tensor = self.linear(pooled)
        return logits

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "pool": self.pool}


class SegmentationDecoder(Head):
    """The paper's decoder: three transposed convolutions with GroupNorm and GELU, then two convolutions.

    Eight times the patch grid: ``(B, classes, 8H, 8W)``; 336 x 336 pixels in 14 x 14 patches give 192 x 192, and
    336 x 448 give 192 x 256.

    Args:
        dim: token width ``D``.
        widths: channels after the transposed convolutions, multiples of ``groups``.
    """

    def __init__(
        self, dim: int, classes: int, widths: Sequence[int] = (256, 128, 64), groups: int = 8
    ) -> None:
        super().__init__()
        if any(width % groups for width in widths):
            raise TrainingError(f"widths={tuple(widths)} must be multiples of groups={groups}.")
        steps: list[nn.Module] = []
        for before, after in pairwise((dim, *widths)):
            steps += [
                nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(groups, after),
                nn.GELU(),
            ]
        self.up = nn.Sequential(*steps)
        last = widths[-1]
        self.out = nn.Sequential(
            nn.Conv2d(last, last, 3, padding=1), nn.GELU(), nn.Conv2d(last, classes, 1)
        )

    def forward(self, features: Features, geometry: Geometry) -> Tensor:
        return self.decode(patch_map(features.tokens, geometry))

    def decode(self, patches: Tensor) -> Tensor:
        """Logits of a ``(B, D, H, W)`` map."""
        logits: Tensor = self.out(self.up(patches))
        return logits


class SplitHead(Head):
    """ViT-Split (arXiv 2506.03433): the backbone stays frozen, two heads learn beside it.

    The task head is a trainable copy of the last blocks, run on the frozen tokens in front of them and called as the
    backbone called the originals; the prior head reads frozen tokens of several depths with small convolutions. Both
    are fused and handed to ``inner``.

    Args:
        backbone: the model whose last blocks are copied.
        inner: a :class:`LinearHead` or :class:`SegmentationDecoder` for the backbone's width.
        task_blocks: how many of the last blocks are copied, fewer than there are.
        prior_blocks: blocks whose tokens the prior head reads; default: four, evenly spread.
        width: of the prior head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner: Head,
        *,
        task_blocks: int = 2,
        prior_blocks: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        layout = describe(backbone)
        depth = len(layout.blocks)
        if not 0 < task_blocks < depth:
            raise TrainingError(f"task_blocks={task_blocks} must lie between 1 and {depth - 1}.")
        if prior_blocks is None:
            prior_blocks = sorted({round(depth * k / 4) - 1 for k in range(1, 5)} - {-1})
        self.blocks = (depth - task_blocks - 1, *prior_blocks)
        self.copies = nn.ModuleList(_copy(site.module) for site in layout.blocks[-task_blocks:])
        self.norm = copy.deepcopy(layout.final_norm) or nn.Identity()
        self.norm.requires_grad_(True)
        dim = token_width(backbone)
        self.prior = nn.Sequential(
            nn.Conv2d(dim * len(prior_blocks), width, 1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, dim, 1),
        )  # fmt: skip
        self.fuse = nn.Conv2d(2 * dim, dim, 1)
        self.inner = inner

    def forward(self, features: Features, geometry: Geometry) -> Tensor:
        tokens, *priors = features.blocks
        calls = features.calls[-len(self.copies) :]
        for block, call in zip(self.copies, calls, strict=True):
            tokens = call(block, tokens)
        task = patch_map(self.norm(tokens), geometry)
        prior = self.prior(torch.cat([patch_map(t, geometry) for t in priors], 1))
        fused = self.fuse(torch.cat([task, prior], 1)).flatten(2).transpose(1, 2)
        logits: Tensor = self.inner(Features(fused), Geometry(geometry.height, geometry.width, 0))
        return logits

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "inner": self.inner.settings()}


def _copy(block: nn.Module) -> nn.Module:
    """A trainable copy that learns the grid of the images from where the original does."""
    copied = copy.deepcopy(block).requires_grad_(True)
    for mine, theirs in zip(copied.modules(), block.modules(), strict=True):
        if isinstance(theirs, TokenGridModule):
            assert isinstance(mine, TokenGridModule)
            mine.grid_source = theirs.grid_source
    return copied
