"""timm 1.x: ``VisionTransformer`` (DINOv2, registers, CLIP pre-norm, MAE, DeiT, SigLIP, ...) and
its ``Attention``.

timm is recognised by class and module name, never imported: a model made by timm implies it is
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dwattn.adapters.base import (
    AttentionAdapter,
    BackboneAdapter,
    BackboneLayout,
    BlockSite,
    defined_in,
    kind,
    refuse_projections,
)
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights


def norm_or_none(norm: nn.Module | None) -> nn.Module | None:
    """None for an absent or identity norm."""
    return None if norm is None or isinstance(norm, nn.Identity) else norm


def split_fused(qkv: nn.Linear) -> dict[str, Tensor | None]:
    """Views of a fused ``(3C, D)`` projection as ``wq wk wv bq bk bv``."""
    weights = qkv.weight.chunk(3, dim=0)
    biases = (None,) * 3 if qkv.bias is None else qkv.bias.chunk(3)
    return dict(zip(("wq", "wk", "wv", "bq", "bk", "bv"), (*weights, *biases), strict=True))


def refuse_additions(module: nn.Module) -> str | None:
    """A sentence where timm's attention does more to its output than to project it."""
    if getattr(module, "gate", None) is not None:
        return (
            "Gated attention multiplies its output by a sigmoid gate, which the replacement "
            "does not have."
        )
    if norm_or_none(getattr(module, "norm", None)) is not None:
        return (
            "scale_norm normalises all heads together before the output projection, which "
            "cannot be replaced."
        )
    return None


_MODULES = ("timm.layers.attention", "timm.models.vision_transformer")


class TimmAttentionAdapter(AttentionAdapter):
    """``timm.layers.Attention`` and the older ``timm.models.vision_transformer.Attention``."""

    name = "timm Attention"

    def matches(self, module: nn.Module) -> bool:
        # Other timm models (BEiT, LeViT, ...) have an Attention of their own that computes more.
        return type(module).__name__ == "Attention" and type(module).__module__ in _MODULES

    def refusal(self, module: nn.Module) -> str | None:
        reason = refuse_additions(module)
        if reason is not None:
            return reason
        if getattr(module, "rope", None) is not None:
            return (
                "Rotary position embedding makes queries and keys depend on the position, which "
                "is not supported."
            )
        return refuse_projections(getattr(module, "qkv", None), getattr(module, "proj", None))

    def weights(self, module: nn.Module) -> AttentionWeights:
        attention: Any = module
        head_dim = getattr(
            attention, "head_dim", attention.qkv.out_features // 3 // attention.num_heads
        )
        return AttentionWeights(
            num_heads=attention.num_heads,
            head_dim=head_dim,
            scale=float(attention.scale),
            wo=attention.proj.weight,
            bo=attention.proj.bias,
            q_norm=norm_or_none(getattr(attention, "q_norm", None)),
            k_norm=norm_or_none(getattr(attention, "k_norm", None)),
            **split_fused(attention.qkv),  # type: ignore[arg-type]
        )


class TimmBackboneAdapter(BackboneAdapter):
    """``timm.models.vision_transformer.VisionTransformer`` and its subclasses."""

    def matches(self, module: nn.Module) -> bool:
        return defined_in(module, "timm.models", "VisionTransformer") and hasattr(module, "blocks")

    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        model: Any = module
        if getattr(model, "rope", None) is not None:
            raise UnsupportedAttentionError(
                f"{type(module).__name__} uses rotary position embedding, which cannot be replaced."
            )
        return vit_layout(name, module, _block)


def vit_layout(name: str, model: Any, site: Callable[[str, Any], BlockSite]) -> BackboneLayout:
    """A model with timm's ``patch_embed`` and ``blocks``; ``site`` describes a block by its dotted path."""
    prefix = f"{name}." if name else ""
    patch = model.patch_embed
    grid = getattr(patch, "grid_size", None)
    # Hybrid embeddings put patches on the features of a CNN; feat_ratio is in pixels for both.
    size = patch.feat_ratio(as_scalar=False)
    return BackboneLayout(
        family=f"timm {type(model).__name__}",
        name=name,
        module=model,
        blocks=tuple(
            site(f"{prefix}blocks.{child}", block) for child, block in model.blocks.named_children()
        ),
        num_prefix=int(model.num_prefix_tokens),
        grid=None if grid is None else (int(grid[0]), int(grid[1])),
        patch_size=(int(size[0]), int(size[1])),
        patch_embed=patch,
        final_norm=norm_or_none(getattr(model, "norm", None)),
        padded=bool(getattr(patch, "dynamic_img_pad", False)),
    )


def _block(name: str, block: Any) -> BlockSite:
    if kind(block) not in ("Block", "ResPostBlock"):
        raise UnsupportedAttentionError(
            f"{name} is a {kind(block)}; only timm's sequential Block (and ResPostBlock) "
            "has an attention layer of its own that can be replaced."
        )
    mlp = getattr(block, "mlp", None)
    out = getattr(mlp, "fc2", None)
    return BlockSite(
        name=name,
        module=block,
        attention_name=f"{name}.attn",
        attention=block.attn,
        attention_scale=getattr(getattr(block, "ls1", None), "gamma", None),
        mlp_out=out if isinstance(out, nn.Linear) else None,
        mlp_scale=getattr(getattr(block, "ls2", None), "gamma", None),
        pre_norm=kind(block) == "Block",
    )
