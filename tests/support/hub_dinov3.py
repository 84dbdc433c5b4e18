"""A stand-in with the interface of facebookresearch's DINOv3, which cannot be installed from an index.

Written anew from the interface alone: module and class names, constructor arguments, parameter names, lists of images from
block to block, how blocks call attention. Its classes say that they live where the originals do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.hub_dinov2 import LayerScale, Mlp

Rope = tuple[Tensor, Tensor]


class PatchEmbed(nn.Module):
    def __init__(self, img_size: tuple[int, int], patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, (patch_size, patch_size)
        self.patches_resolution = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class RopePositionEmbedding(nn.Module):
    periods: Tensor

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        exponents = 2 * torch.arange(head_dim // 4) / (head_dim // 2)
        self.register_buffer("periods", base**exponents)

    def forward(self, *, H: int, W: int) -> Rope:
        centres = [(torch.arange(side) + 0.5) / side * 2 - 1 for side in (H, W)]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] / self.periods).flatten(1).repeat(1, 2)
        return angles.sin(), angles.cos()


class LinearKMaskedBias(nn.Linear):
    def __init__(self, dim: int, out: int, bias: bool = True) -> None:
        super().__init__(dim, out, bias)
        third = out // 3
        self.register_buffer("bias_mask", torch.ones(out).index_fill_(0, torch.arange(third, 2 * third), 0))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, mask_k_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = (LinearKMaskedBias if mask_k_bias else nn.Linear)(dim, 3 * dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_bias: Any = None, rope: Rope | None = None) -> Tensor:
        assert attn_bias is None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = (self.turn(t, *rope) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(out))

    @staticmethod
    def turn(t: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """Pairs of channels as complex numbers, where the originals add a rotated copy; in the dtype of the angles, of
        which bf16 has no complex numbers, and back to that of the tokens, as there.
        """
        count, half, dtype = len(sin), t.shape[-1] // 2, t.dtype
        wide = torch.promote_types(sin.dtype, torch.float32)
        t, sin, cos = t.to(wide), sin.to(wide), cos.to(wide)
        prefix, patches = t[..., :-count, :], t[..., -count:, :]
        pairs = torch.complex(patches[..., :half], patches[..., half:])
        pairs = pairs * torch.complex(cos[:, :half], sin[:, :half])
        return torch.cat([prefix, torch.cat([pairs.real, pairs.imag], -1)], -2).to(dtype)

    def forward_list(self, x_list: list[Tensor], rope_list: list[Rope]) -> list[Tensor]:
        return [self.forward(x, rope=rope) for x, rope in zip(x_list, rope_list, strict=True)]


class SelfAttentionBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, init_values: float | None, mask: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = SelfAttention(dim, num_heads, mask), Mlp(dim, 4 * dim)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = 0.0

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return self.forward([x_or_x_list], [rope_or_rope_list])[0]
        ropes = rope_or_rope_list or [None] * len(x_or_x_list)
        out = []
        for x, rope in zip(x_or_x_list, ropes, strict=True):
            middle = x + self.ls1(self.attn(self.norm1(x), rope=rope))
            out.append(middle + self.ls2(self.mlp(self.norm2(middle))))
        return out


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: tuple[int, int] = (32, 24),
        patch_size: int = 8,
        embed_dim: int = 48,
        depth: int = 4,
        num_heads: int = 3,
        layerscale_init: float | None = 1e-5,
        n_storage_tokens: int = 4,
        mask_k_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.n_blocks, self.num_heads, self.patch_size = depth, num_heads, patch_size
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.n_storage_tokens = n_storage_tokens
        if n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, n_storage_tokens, embed_dim))
        self.rope_embed = RopePositionEmbedding(embed_dim // num_heads)
        self.blocks = nn.ModuleList(
            [SelfAttentionBlock(embed_dim, num_heads, layerscale_init, mask_k_bias) for _ in range(depth)]
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Identity()

    def forward_features_list(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        tokens, grids = [], []
        for image in images:
            patches = self.patch_embed(image)
            grids.append(patches.shape[1:3])
            parts = [self.cls_token, self.storage_tokens] if self.n_storage_tokens else [self.cls_token]  # fmt: skip
            rows = [part.expand(len(image), -1, -1) for part in parts]
            tokens.append(torch.cat([*rows, patches.flatten(1, 2)], 1))
        for block in self.blocks:
            tokens = block(tokens, [self.rope_embed(H=h, W=w) for h, w in grids])
        first = 1 + self.n_storage_tokens
        normed = [self.norm(t) for t in tokens]
        return [
            {"x_norm_clstoken": t[:, 0], "x_storage_tokens": t[:, 1:first], "x_norm_patchtokens": t[:, first:]}
            for t in normed
        ]  # fmt: skip

    def forward_features(self, x: Any) -> Any:
        return self.forward_features_list([x])[0] if isinstance(x, Tensor) else self.forward_features_list(x)  # fmt: skip

    def forward(self, x: Tensor, is_training: bool = False) -> Any:
        features = self.forward_features(x)
        return features if is_training else self.head(features["x_norm_clstoken"])


for _kind in (SelfAttention, LinearKMaskedBias):
    _kind.__module__ = "dinov3.layers.attention"
SelfAttentionBlock.__module__ = "dinov3.layers.block"
DinoVisionTransformer.__module__ = "dinov3.models.vision_transformer"
