"""PyTorch's own ``nn.MultiheadAttention``, and the Vision Transformers that are built on it: torchvision's and OpenCLIP's.

Both libraries are recognised by class and module name, never imported.
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
    TupleConvention,
    cannot,
    defined_in,
    kind,
    refuse_projections,
)
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights


class SelfAttentionConvention(TupleConvention):
    """Called with the same tokens as query, key and value; gives ``(output, None)``."""

    #: Of ``nn.MultiheadAttention.forward``, in order.
    arguments = (
        "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights",
        "is_causal",
    )  # fmt: skip
    mask_arguments = (*CallConvention.mask_arguments, "key_padding_mask")

    def call(self, attention: nn.Module, tokens: Tensor, **kwargs: Any) -> Any:
        return attention(tokens, tokens, tokens, need_weights=False, **kwargs)

    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        query, key, value = (given.pop(name, None) for name in self.arguments[:3])
        if key is not query or value is not query:
            raise cannot("with other keys or values than queries", "attends to its own tokens")
        if given.pop("need_weights", True):
            raise cannot("with need_weights=True", "forms no attention weights")
        return super().tokens((query,), given)


class MultiheadAttentionAdapter(AttentionAdapter):
    """``nn.MultiheadAttention``, batch first."""

    name = "torch MultiheadAttention"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def refusal(self, module: nn.Module) -> str | None:
        attention: Any = module
        if not attention.batch_first:
            return (
                "It takes tokens as (N, B, D) because of batch_first=False; build the model batch first (OpenCLIP "
                "does, with OpenAI's weights too)."
            )
        if attention.in_proj_weight is None:
            return "Its keys or values have another width than its queries."
        if attention.bias_k is not None or attention.add_zero_attn:
            return (
                "It attends to a key of its own besides the tokens (add_bias_kv or add_zero_attn)."
            )
        return refuse_projections(attention.out_proj)

    def weights(self, module: nn.Module) -> AttentionWeights:
        attention: Any = module
        wq, wk, wv = attention.in_proj_weight.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        return AttentionWeights(
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scale=attention.head_dim**-0.5,
            wq=wq,
            wk=wk,
            wv=wv,
            wo=attention.out_proj.weight,
            bq=biases[0],
            bk=biases[1],
            bv=biases[2],
            bo=attention.out_proj.bias,
        )

    def convention(self, module: nn.Module) -> CallConvention:
        return SelfAttentionConvention()


class TorchvisionBackboneAdapter(BackboneAdapter):
    """``torchvision.models.VisionTransformer``: a class token, square images of one size."""

    def matches(self, module: nn.Module) -> bool:
        return defined_in(module, "torchvision.models", "VisionTransformer")

    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        model: Any = module
        patch, side = int(model.patch_size), int(model.image_size) // int(model.patch_size)
        return BackboneLayout(
            family=f"torchvision {type(module).__name__}",
            name=name,
            module=module,
            blocks=_blocks(name, "encoder.layers", model.encoder.layers, "self_attention"),
            num_prefix=1,
            grid=(side, side),
            patch_size=(patch, patch),
            patch_embed=model.conv_proj,
            final_norm=model.encoder.ln,
        )


class OpenClipBackboneAdapter(BackboneAdapter):
    """``open_clip``'s ``VisionTransformer``: the image tower of its CLIP and CoCa models."""

    def matches(self, module: nn.Module) -> bool:
        return defined_in(module, "open_clip", "VisionTransformer") and hasattr(
            module, "transformer"
        )

    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        model: Any = module
        rows, columns = model.grid_size
        height, width = model.patch_size
        # Where it stands after the pooling it is no norm of all tokens.
        pooled_first = getattr(model, "final_ln_after_pool", False)
        return BackboneLayout(
            family=f"open_clip {type(module).__name__}",
            name=name,
            module=module,
            blocks=_blocks(name, "transformer.resblocks", model.transformer.resblocks, "attn"),
            num_prefix=1,
            grid=(int(rows), int(columns)),
            patch_size=(int(height), int(width)),
            patch_embed=model.conv1,
            final_norm=None if pooled_first else getattr(model, "ln_post", None),
        )


def _blocks(name: str, path: str, blocks: nn.Module, attention: str) -> tuple[BlockSite, ...]:
    prefix = f"{name}.{path}" if name else path
    return tuple(
        _site(f"{prefix}.{child}", block, attention) for child, block in blocks.named_children()
    )


def _site(name: str, block: Any, attention: str) -> BlockSite:
    if kind(block) not in ("EncoderBlock", "ResidualAttentionBlock"):
        raise UnsupportedAttentionError(
            f"{name} is a {kind(block)}; of torchvision's and OpenCLIP's blocks only the plain ones, with "
            "nn.MultiheadAttention, can be replaced."
        )
    linears = [child for child in block.mlp.children() if isinstance(child, nn.Linear)]
    return BlockSite(
        name=name,
        module=block,
        attention_name=f"{name}.{attention}",
        attention=getattr(block, attention),
        attention_scale=getattr(getattr(block, "ls_1", None), "gamma", None),
        mlp_out=linears[-1] if linears else None,
        mlp_scale=getattr(getattr(block, "ls_2", None), "gamma", None),
    )
