"""facebookresearch's own DINOv3, from ``torch.hub`` or vendored: ``DinoVisionTransformer`` with rotary positions.

Recognised by class name and by a package called ``dinov3...``; never imported. Its blocks take lists of images of several
sizes; attention is called for each of them with tokens and a pair of sines and cosines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dwattn.adapters.base import BlockSite, CallConvention, in_repository, refuse_projections
from dwattn.adapters.dinov2_hub import HubAttentionAdapter, HubBackboneAdapter
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights
from dwattn.rotary import Rotary


class SineFirstConvention(CallConvention):
    """``rope=`` is ``(sin, cos)``, each ``(H*W, d_h)``."""

    foreign_rotary = ("position_embeddings",)

    def rotary(self, kwargs: dict[str, Any]) -> Rotary | None:
        if kwargs.get("rope") is None:
            return None
        sin, cos = kwargs["rope"]
        return Rotary(cos, sin)

    def rotary_arguments(self, patches: int, head_dim: int, like: Tensor) -> dict[str, Any]:
        return {"rope": (like.new_ones(patches, head_dim),) * 2}


class DinoV3HubAttentionAdapter(HubAttentionAdapter):
    """``SelfAttention``: fused ``qkv``, whose bias may be masked where it belongs to the keys."""

    name = "hub DINOv3 attention"

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ == "SelfAttention" and in_repository(module, "dinov3")

    def refusal(self, module: nn.Module) -> str | None:
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        return refuse_projections(proj if _is_masked(qkv) else qkv, proj)

    def weights(self, module: nn.Module) -> AttentionWeights:
        found = replace(super().weights(module), rotary=True)
        return replace(found, bk=None) if _is_masked(module.qkv) else found

    def convention(self, module: nn.Module) -> CallConvention:
        return SineFirstConvention()


def _is_masked(qkv: Any) -> bool:
    return type(qkv).__name__ == "LinearKMaskedBias" and in_repository(qkv, "dinov3")


class DinoV3HubBackboneAdapter(HubBackboneAdapter):
    """``DinoVisionTransformer``; its registers are called storage tokens."""

    repository, title = "dinov3", "DINOv3"
    block_classes = ("SelfAttentionBlock",)
    registers = "n_storage_tokens"

    def _site(self, name: str, block: Any) -> BlockSite:
        site = super()._site(name, block)
        if getattr(block, "sample_drop_ratio", 0):
            raise UnsupportedAttentionError(
                f"{name} drops samples while training (sample_drop_ratio={block.sample_drop_ratio}), for which it calls "
                "attention with lists of images; build the model with drop_path_rate=0."
            )
        return site
