"""facebookresearch's own DINOv2, from ``torch.hub`` or vendored: ``DinoVisionTransformer``.

Recognised by class name and by a package called ``dinov2...``; never imported. Blocks may be
chunked for FSDP, each chunk padded with ``nn.Identity`` so that a block keeps its global index.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dwattn.adapters.base import (
    AttentionAdapter,
    BackboneAdapter,
    BackboneLayout,
    BlockSite,
    in_repository,
    kind,
    refuse_projections,
)
from dwattn.adapters.timm import split_fused
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights


class HubAttentionAdapter(AttentionAdapter):
    """``Attention`` and ``MemEffAttention``: fused ``qkv``, called with tokens and at most an
    ``attn_bias``.
    """

    name = "hub DINOv2 attention"

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("Attention", "MemEffAttention") and in_repository(
            module, "dinov2"
        )

    def refusal(self, module: nn.Module) -> str | None:
        return refuse_projections(getattr(module, "qkv", None), getattr(module, "proj", None))

    def weights(self, module: nn.Module) -> AttentionWeights:
        attention: Any = module
        return AttentionWeights(
            num_heads=attention.num_heads,
            head_dim=attention.qkv.out_features // 3 // attention.num_heads,
            scale=float(attention.scale),
            wo=attention.proj.weight,
            bo=attention.proj.bias,
            **split_fused(attention.qkv),  # type: ignore[arg-type]
        )


class HubBackboneAdapter(BackboneAdapter):
    """``DinoVisionTransformer``, with or without registers, chunked or not.

    The class attributes are what DINOv2 and DINOv3 have in different words.
    """

    repository, title = "dinov2", "DINOv2"
    block_classes: tuple[str, ...] = ("Block", "NestedTensorBlock")
    registers = "num_register_tokens"

    def matches(self, module: nn.Module) -> bool:
        kinds = [cls.__name__ for cls in type(module).__mro__]
        known = "DinoVisionTransformer" in kinds and hasattr(module, "blocks")
        return known and in_repository(module, self.repository)

    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        model: Any = module
        prefix = f"{name}." if name else ""
        blocks = _flat_blocks(model.blocks)
        patch = model.patch_embed
        grid, size = patch.patches_resolution, patch.patch_size
        return BackboneLayout(
            family=f"hub {self.title} {type(module).__name__}",
            name=name,
            module=module,
            blocks=tuple(self._site(f"{prefix}blocks.{path}", block) for path, block in blocks),
            num_prefix=1 + int(getattr(model, self.registers, 0)),
            grid=(int(grid[0]), int(grid[1])),
            patch_size=(int(size[0]), int(size[1])),
            patch_embed=patch,
            final_norm=getattr(model, "norm", None),
        )

    def _site(self, name: str, block: Any) -> BlockSite:
        if kind(block) not in self.block_classes:
            raise UnsupportedAttentionError(
                f"{name} is a {kind(block)}; of hub {self.title} only "
                f"{' and '.join(self.block_classes)} can be replaced (causal blocks see only earlier tokens)."
            )
        out = next((getattr(block.mlp, n) for n in ("fc2", "w3") if hasattr(block.mlp, n)), None)
        return BlockSite(
            name=name,
            module=block,
            attention_name=f"{name}.attn",
            attention=block.attn,
            attention_scale=getattr(block.ls1, "gamma", None),
            mlp_out=out if isinstance(out, nn.Linear) else None,
            mlp_scale=getattr(block.ls2, "gamma", None),
        )


def _flat_blocks(blocks: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and blocks in depth order, without the padding of chunks."""
    flat: list[tuple[str, nn.Module]] = []
    for name, child in blocks.named_children():
        if isinstance(child, nn.ModuleList):
            flat += [(f"{name}.{path}", block) for path, block in _flat_blocks(child)]
        elif not isinstance(child, nn.Identity):
            flat.append((name, child))
    return flat
