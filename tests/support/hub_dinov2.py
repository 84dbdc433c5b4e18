"""A stand-in with the interface of facebookresearch's DINOv2, which cannot be installed from an
index.

Written anew from the interface alone: module and class names, constructor arguments, parameter
names, how blocks call attention, chunked blocks and nested lists. Its classes say that they live
where the originals do, because that is what dwattn goes by.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        side = img_size // patch_size
        self.patches_resolution = (side, side)
        self.num_patches = side * side
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.patch_size
        assert x.shape[2] % rows == 0, f"height {x.shape[2]} is not a multiple of {rows}"
        assert x.shape[3] % columns == 0, f"width {x.shape[3]} is not a multiple of {columns}"
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MemEffAttention(Attention):
    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:
        if attn_bias is not None:
            raise AssertionError("xFormers is required for using nested tensors")
        return super().forward(x)


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLUFFNFused(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_class: type[nn.Module],
        ffn: str,
        init_values: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn_class(dim, num_heads)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLUFFNFused(dim, 2 * dim) if ffn == "swiglufused" else Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class NestedTensorBlock(Block):
    def forward(self, x_or_x_list: Tensor | list[Tensor]) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list)
        assert isinstance(self.attn, MemEffAttention)
        raise AssertionError("xFormers is required for using nested tensors")


class CausalSelfAttentionBlock(Block):
    pass


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    """``chunks`` is the original's ``block_chunks``: chunk i starts with identities for the blocks
    before it.
    """

    def __init__(
        self,
        img_size: int = 56,
        patch_size: int = 14,
        embed_dim: int = 48,
        depth: int = 4,
        num_heads: int = 3,
        init_values: float | None = 1e-5,
        ffn_layer: str = "mlp",
        block_chunks: int = 0,
        num_register_tokens: int = 0,
        attn_class: type[nn.Module] = MemEffAttention,
        block_class: type[Block] = NestedTensorBlock,
    ) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens, self.n_blocks, self.num_heads = 1, depth, num_heads
        self.patch_size, self.num_register_tokens = patch_size, num_register_tokens
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
            if num_register_tokens
            else None
        )
        blocks = [
            block_class(embed_dim, num_heads, attn_class, ffn_layer, init_values)
            for _ in range(depth)
        ]
        self.chunked_blocks = block_chunks > 0
        if self.chunked_blocks:
            size = depth // block_chunks
            starts = range(0, depth, size)
            chunks = [[nn.Identity()] * i + blocks[i : i + size] for i in starts]
            self.blocks = nn.ModuleList([BlockChunk(chunk) for chunk in chunks])
        else:
            self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        patches = x.shape[1] - 1
        if patches == self.patch_embed.num_patches and height == width:
            return self.pos_embed
        side = math.isqrt(self.patch_embed.num_patches)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        size = (height // self.patch_size, width // self.patch_size)
        grid = F.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        _, _, height, width = x.shape
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        normed = self.norm(x)
        first = self.num_register_tokens + 1
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
            "masks": masks,
        }

    def forward(self, x: Tensor, is_training: bool = False) -> Any:
        features = self.forward_features(x)
        return features if is_training else self.head(features["x_norm_clstoken"])


for _kind in (Attention, MemEffAttention):
    _kind.__module__ = "dinov2.layers.attention"
for _kind in (Block, NestedTensorBlock, CausalSelfAttentionBlock):
    _kind.__module__ = "dinov2.layers.block"
for _kind in (BlockChunk, DinoVisionTransformer):
    _kind.__module__ = "dinov2.models.vision_transformer"
