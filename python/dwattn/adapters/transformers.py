"""transformers 5.x and 4.57: DINOv2 (with registers), DINOv3, ViT, ViT-MAE, ViT-MSN, DeiT, I-JEPA,
Pixio, DPT, ViTPose, and the vision towers of CLIP and its kin (SigLIP, MetaCLIP 2, AltCLIP, Chinese-CLIP,
CLIPSeg, OWL-ViT).

transformers is recognised by class and module name, never imported. 5.x keeps ``q_proj k_proj
v_proj`` beside their output projection and returns ``(output, weights)``; 4.57 nests
``attention.attention`` and returns the output alone. The outer module, the one the block calls, is
replaced in both.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from dwattn.adapters.base import (
    AttentionAdapter,
    BackboneAdapter,
    BackboneLayout,
    BlockSite,
    CallConvention,
    TupleConvention,
    defined_in,
    refuse_projections,
)
from dwattn.adapters.vit_mae import IdentityMasking
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights
from dwattn.rotary import Rotary

_ATTENTION_CLASSES = (
    "Dinov2Attention",
    "Dinov2WithRegistersAttention",
    "DINOv3ViTAttention",
    "ViTAttention",
    "ViTMAEAttention",
    "ViTMSNAttention",
    "DeiTAttention",
    "IJepaAttention",
    "PixioAttention",
    "DPTViTAttention",
    "VitPoseBackboneAttention",
    "CLIPAttention",
    "SiglipAttention",
    "MetaClip2Attention",
    "AltCLIPAttention",
    "ChineseCLIPVisionAttention",
    "CLIPSegAttention",
    "OwlViTAttention",
    "Owlv2Attention",
)
# 4.57 keeps the CLIP and SigLIP towers in ...VisionTransformer, inside ...VisionModel; 5.x has no
# such level.
_BACKBONE_CLASSES = (
    "Dinov2Model",
    "Dinov2Backbone",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersBackbone",
    "DINOv3ViTModel",
    "DINOv3ViTBackbone",
    "ViTModel",
    "ViTMAEModel",
    "ViTMSNModel",
    "DeiTModel",
    "IJepaModel",
    "PixioModel",
    "PixioBackbone",
    "DPTModel",
    "VitPoseBackbone",
    *(
        f"{tower}Vision{level}"
        for tower in (
            "CLIP",
            "Siglip",
            "MetaClip2",
            "AltCLIP",
            "ChineseCLIP",
            "CLIPSeg",
            "OwlViT",
            "Owlv2",
        )
        for level in ("Model", "Transformer")
    ),
)


class SingleTupleConvention(CallConvention):
    """Releases before 4.56: the block takes ``outputs[0]`` and passes the rest on."""

    def pack(self, output: Tensor) -> Any:
        return (output,)


class RotaryTupleConvention(TupleConvention):
    """``position_embeddings=`` is ``(cos, sin)``, each ``(H*W, d_h)``."""

    foreign_rotary = ("rope",)

    def rotary(self, kwargs: dict[str, Any]) -> Rotary | None:
        embedding = kwargs.get("position_embeddings")
        return None if embedding is None else Rotary(*embedding)

    def rotary_arguments(self, patches: int, head_dim: int, like: Tensor) -> dict[str, Any]:
        return {"position_embeddings": (like.new_ones(patches, head_dim),) * 2}


class TransformersAttentionAdapter(AttentionAdapter):
    """The attention classes above, with flat (5.x, CLIP, SigLIP) or nested (4.57) projections."""

    name = "transformers attention"

    def matches(self, module: nn.Module) -> bool:
        kind = type(module)
        return kind.__name__ in _ATTENTION_CLASSES and kind.__module__.startswith("transformers.")

    def refusal(self, module: nn.Module) -> str | None:
        inner = _projections(module)
        if inner is None:
            return (
                f"This {type(module).__name__} has neither q_proj, k_proj, v_proj nor "
                "attention.query, so its weights cannot be mapped; transformers 4.57 and 5.x are "
                "supported."
            )
        if getattr(inner, "is_causal", False):
            return "Causal attention sees only earlier tokens, which a 3x3 neighbourhood does not."
        return refuse_projections(*_linears(module))

    def weights(self, module: nn.Module) -> AttentionWeights:
        inner: Any = _projections(module)
        query, key, value, out = _linears(module)
        return AttentionWeights(
            num_heads=_first(inner, "num_attention_heads", "num_heads"),
            head_dim=_first(inner, "head_dim", "attention_head_size"),
            scale=float(_first(inner, "scaling", "scale")),
            wq=query.weight,
            wk=key.weight,
            wv=value.weight,
            wo=out.weight,
            bq=query.bias,
            bk=key.bias,
            bv=value.bias,
            bo=out.bias,
            rotary=_is_rotary(module),
        )

    def convention(self, module: nn.Module) -> CallConvention:
        convention = _convention(module)
        convention.config = getattr(_projections(module), "config", None)
        convention.masks_exports = True
        return convention


def _convention(module: nn.Module) -> CallConvention:
    if _is_rotary(module):
        return RotaryTupleConvention()
    if hasattr(module, "q_proj"):
        return TupleConvention()
    old = "output_attentions" in inspect.signature(module.forward).parameters
    return SingleTupleConvention() if old else CallConvention()


def _is_rotary(module: nn.Module) -> bool:
    return type(module).__name__ == "DINOv3ViTAttention"


def _projections(module: nn.Module) -> Any:
    """The module that holds query, key and value: the layer itself, or the nested one of 4.57."""
    if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj")):
        return module
    inner = getattr(module, "attention", None)
    return inner if hasattr(inner, "query") and hasattr(inner, "value") else None


def _linears(module: Any) -> tuple[Any, Any, Any, Any]:
    """Query, key, value and output projection."""
    if hasattr(module, "q_proj"):
        out = _first(module, "o_proj", "out_proj")
        return module.q_proj, module.k_proj, module.v_proj, out
    inner = module.attention
    return inner.query, inner.key, inner.value, module.output.dense


def _first(module: Any, *names: str) -> Any:
    """The first attribute that exists; the releases disagree on names, not on meaning."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise UnsupportedAttentionError(
        f"{type(module).__name__} has none of {', '.join(names)}; transformers 4.57 and 5.x are "
        "supported."
    )


class TransformersBackboneAdapter(BackboneAdapter):
    """The vision models; heads, ``For...`` classes and wrappers are looked into by ``describe``."""

    def matches(self, module: nn.Module) -> bool:
        return defined_in(module, "transformers", *_BACKBONE_CLASSES) and hasattr(
            module, "embeddings"
        )

    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        model: Any = module
        embeddings = model.embeddings
        path, layers = _layers(model)
        prefix = f"{name}." if name else ""
        blocks = [
            _block(f"{prefix}{path}.{child}", block) for child, block in layers.named_children()
        ]
        patch, image_size, patch_size = _patches(embeddings)
        return BackboneLayout(
            family=f"transformers {type(module).__name__}",
            name=name,
            module=module,
            blocks=tuple(blocks),
            num_prefix=_num_prefix(embeddings),
            grid=(image_size[0] // patch_size[0], image_size[1] // patch_size[1]),
            patch_size=patch_size,
            patch_embed=patch,
            final_norm=next(
                (
                    getattr(model, n)
                    for n in ("layernorm", "post_layernorm", "norm")
                    if hasattr(model, n)
                ),
                None,
            ),
            raster_order=IdentityMasking.of(embeddings),
        )


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    for path in ("layers", "encoder.layer", "encoder.layers", "model.layer", "layer"):
        found = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return path, found
    raise UnsupportedAttentionError(
        f"{type(model).__name__} keeps its blocks neither in layer(s) nor in encoder.layer(s); "
        "transformers 4.57 and 5.x are supported."
    )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _patches(embeddings: Any) -> tuple[nn.Module, tuple[int, int], tuple[int, int]]:
    """The module called with pixels, image size and patch size."""
    patch = _first(embeddings, "patch_embeddings", "patch_embedding")
    # DINOv3's and OWL-ViT's are bare convolutions; the latter's embeddings know no sizes either.
    known: tuple[Any, ...] = (patch, embeddings, getattr(embeddings, "config", None))
    sizes = next(one for one in known if hasattr(one, "image_size"))
    return patch, _pair(sizes.image_size), _pair(sizes.patch_size)


def _num_prefix(embeddings: Any) -> int:
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    found = [getattr(embeddings, name, None) for name in names]
    # (1, tokens, D), of which Pixio's cls_token has several; CLIP's class embedding is (D,).
    return sum(int(t.shape[1]) if t.dim() == 3 else 1 for t in found if t is not None)


def _block(name: str, block: Any) -> BlockSite:
    child = "attention" if hasattr(block, "attention") else "self_attn"
    out = _mlp_out(block)
    # Of a mixture of experts (ViTPose+) fc2 gives only the channels that all experts share.
    whole = isinstance(out, nn.Linear) and not hasattr(getattr(block, "mlp", None), "experts")
    return BlockSite(
        name=name,
        module=block,
        attention_name=f"{name}.{child}",
        attention=getattr(block, child),
        attention_scale=getattr(getattr(block, "layer_scale1", None), "lambda1", None),
        mlp_out=out if whole else None,
        mlp_scale=getattr(getattr(block, "layer_scale2", None), "lambda1", None),
    )


def _mlp_out(block: Any) -> Any:
    """``fc2``, the SwiGLU's last projection, or ViT 4.57's ``output.dense``."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return getattr(getattr(block, "output", None), "dense", None)
    return next(
        (getattr(mlp, n) for n in ("fc2", "down_proj", "weights_out") if hasattr(mlp, n)), None
    )
