"""timm's ``Eva``: DINOv3, EVA-02, the Perception Encoder and other Vision Transformers with rotary positions.

Its blocks are called with the rotary embedding, sines and cosines of all patches in one tensor, and hand it on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dwattn.adapters.base import (
    AttentionAdapter,
    BackboneAdapter,
    BackboneLayout,
    BlockSite,
    CallConvention,
    defined_in,
    refuse_projections,
)
from dwattn.adapters.timm import norm_or_none, refuse_additions, split_fused, vit_layout
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights
from dwattn.rotary import Rotary

_ATTENTION = {
    "EvaAttention": "timm.models.eva",
    "AttentionRope": "timm.layers.attention",
}


class EvaConvention(CallConvention):
    """``rope=`` is ``(H*W, 2 d_h)``, sines before cosines."""

    foreign_rotary = ("position_embeddings",)

    def __init__(self, interleaved: bool) -> None:
        self.interleaved = interleaved

    def rotary(self, kwargs: dict[str, Any]) -> Rotary | None:
        embedding: Tensor | None = kwargs.get("rope")
        if embedding is None:
            return None
        sin, cos = embedding.chunk(2, dim=-1)
        return Rotary(cos, sin, self.interleaved)

    def rotary_arguments(self, patches: int, head_dim: int, like: Tensor) -> dict[str, Any]:
        return {"rope": like.new_ones(patches, 2 * head_dim)}


class EvaAttentionAdapter(AttentionAdapter):
    """``EvaAttention`` and ``AttentionRope``, with one fused projection or three."""

    name = "timm EvaAttention"

    def matches(self, module: nn.Module) -> bool:
        return _ATTENTION.get(type(module).__name__) == type(module).__module__

    def refusal(self, module: nn.Module) -> str | None:
        return refuse_additions(module) or refuse_projections(*_linears(module))

    def weights(self, module: nn.Module) -> AttentionWeights:
        attention: Any = module
        return AttentionWeights(
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scale=float(attention.scale),
            wo=attention.proj.weight,
            bo=attention.proj.bias,
            q_norm=norm_or_none(attention.q_norm),
            k_norm=norm_or_none(attention.k_norm),
            rotary=True,
            **_projections(attention),  # type: ignore[arg-type]
        )

    def convention(self, module: nn.Module) -> CallConvention:
        return EvaConvention(interleaved=not getattr(module, "rotate_half", False))


def _linears(module: Any) -> tuple[Any, ...]:
    if module.qkv is not None:
        return module.qkv, module.proj
    return module.q_proj, module.k_proj, module.v_proj, module.proj


def _projections(attention: Any) -> dict[str, Tensor | None]:
    """``wq wk wv bq bk bv``; the zeros that EVA keeps in the place of a key bias are no parameter."""
    if attention.qkv is None:
        linears = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        weights = {f"w{name}": linear.weight for name, linear in linears.items()}
        return weights | {f"b{name}": linear.bias for name, linear in linears.items()}
    found = split_fused(attention.qkv)
    if getattr(attention, "q_bias", None) is not None:
        found |= {"bq": attention.q_bias, "bv": attention.v_bias}
    return found


class EvaBackboneAdapter(BackboneAdapter):
    """``timm.models.eva.Eva``."""

    def matches(self, module: nn.Module) -> bool:
        return defined_in(module, "timm.models.eva", "Eva") and hasattr(module, "blocks")

    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        if getattr(module, "rope_mixed", False):
            raise UnsupportedAttentionError(
                f"This {type(module).__name__} learns rotary frequencies of its own for each block and head, which "
                "are not supported; axial rotary embeddings (DINOv3, EVA-02) are."
            )
        return vit_layout(name, module, _block)


def _block(name: str, block: Any) -> BlockSite:
    out = getattr(block.mlp, "fc2", None)
    return BlockSite(
        name=name,
        module=block,
        attention_name=f"{name}.attn",
        attention=block.attn,
        attention_scale=getattr(block, "gamma_1", None),
        mlp_out=out if isinstance(out, nn.Linear) else None,
        mlp_scale=getattr(block, "gamma_2", None),
        pre_norm=type(block).__name__ == "EvaBlock",
    )
