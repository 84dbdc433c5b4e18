"""A stand-in with the interface of OpenCLIP's image tower, whose package has dependencies that the tests do without.

Written anew from the interface alone: class and parameter names, and how blocks call ``nn.MultiheadAttention``. Its
classes say that they live where the originals do, because that is what dwattn goes by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ResidualAttentionBlock(nn.Module):
    def __init__(self, dim: int, heads: int, scale: float | None, batch_first: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=batch_first)
        self.ls_1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.ls_2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, 2 * dim))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class CustomResidualAttentionBlock(ResidualAttentionBlock):
    """With normalised queries and keys in the original."""


class Transformer(nn.Module):
    def __init__(self, block: type, layers: int, *options: object) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([block(*options) for _ in range(layers)])
        self.batch_first = options[-1]

    def forward(self, x: Tensor) -> Tensor:
        if not self.batch_first:
            x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, attn_mask=None)
        return x if self.batch_first else x.transpose(0, 1)


class VisionTransformer(nn.Module):
    def __init__(
        self,
        image_size: tuple[int, int] = (32, 24),
        patch_size: int = 8,
        width: int = 48,
        heads: int = 3,
        *,
        scale: float | None = None,
        batch_first: bool = True,
        block: type = ResidualAttentionBlock,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        positions = self.grid_size[0] * self.grid_size[1] + 1
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(block, 4, width, heads, scale, batch_first)
        self.final_ln_after_pool = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x))


for _class in (VisionTransformer, ResidualAttentionBlock, CustomResidualAttentionBlock):
    _class.__module__ = "open_clip.transformer"
