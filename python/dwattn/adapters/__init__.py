"""Library-specific knowledge, and the registry that a third party can extend.

``describe(model)`` finds the Vision Transformer in a model; ``adapter_for(attention)`` knows its
layers::

    class MyAdapter(dwattn.adapters.AttentionAdapter):
        name = "my Attention"
        def matches(self, module): return type(module) is MyAttention
        def weights(self, module): return AttentionWeights(...)

    dwattn.adapters.register(MyAdapter())
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dwattn.adapters.base import (
    AttentionAdapter,
    BackboneAdapter,
    BackboneLayout,
    BlockSite,
    CallConvention,
    ConvertedAttention,
    TupleConvention,
    wrapped_layer,
)
from dwattn.adapters.dinov2_hub import HubAttentionAdapter, HubBackboneAdapter
from dwattn.adapters.dinov3_hub import DinoV3HubAttentionAdapter, DinoV3HubBackboneAdapter
from dwattn.adapters.multihead import (
    MultiheadAttentionAdapter,
    OpenClipBackboneAdapter,
    TorchvisionBackboneAdapter,
)
from dwattn.adapters.timm import TimmAttentionAdapter, TimmBackboneAdapter
from dwattn.adapters.timm_eva import EvaAttentionAdapter, EvaBackboneAdapter
from dwattn.adapters.transformers import TransformersAttentionAdapter, TransformersBackboneAdapter
from dwattn.adapters.unsupported import is_attention_name, refusal_by_name
from dwattn.errors import UnsupportedAttentionError

__all__ = [
    "AttentionAdapter",
    "BackboneAdapter",
    "BackboneLayout",
    "BlockSite",
    "CallConvention",
    "ConvertedAttention",
    "TupleConvention",
    "adapter_for",
    "describe",
    "refusal",
    "register",
]

_attention_adapters: list[AttentionAdapter] = [
    TimmAttentionAdapter(),
    EvaAttentionAdapter(),
    TransformersAttentionAdapter(),
    HubAttentionAdapter(),
    DinoV3HubAttentionAdapter(),
    MultiheadAttentionAdapter(),
]
_backbone_adapters: list[BackboneAdapter] = [
    TimmBackboneAdapter(),
    EvaBackboneAdapter(),
    TransformersBackboneAdapter(),
    HubBackboneAdapter(),
    DinoV3HubBackboneAdapter(),
    TorchvisionBackboneAdapter(),
    OpenClipBackboneAdapter(),
]


def register(adapter: AttentionAdapter | BackboneAdapter) -> None:
    """Add an adapter; it is asked before the built-in ones."""
    if isinstance(adapter, AttentionAdapter):
        _attention_adapters.insert(0, adapter)
    elif isinstance(adapter, BackboneAdapter):
        _backbone_adapters.insert(0, adapter)
    else:
        raise TypeError(
            f"register takes an AttentionAdapter or BackboneAdapter, got {type(adapter).__name__}."
        )


def adapter_for(module: nn.Module) -> AttentionAdapter | None:
    """The adapter of an attention module, or None."""
    return next((adapter for adapter in _attention_adapters if adapter.matches(module)), None)


def refusal(module: nn.Module) -> str | None:
    """Why an attention module cannot be replaced, as a sentence, or None if it can."""
    if isinstance(module, ConvertedAttention):
        return "It is already replaced; call dwattn.restore(model) first."
    adapter = adapter_for(module)
    if adapter is None:
        return refusal_by_name(type(module).__name__, type(module).__module__)
    reason = adapter.refusal(module)
    if reason is not None:
        return reason
    try:
        weights = adapter.weights(module)
    except UnsupportedAttentionError as error:
        return str(error)
    for name, tensor in vars(weights).items():
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            return f"Its {name} holds NaN or infinite values; load intact weights first."
    return None


def describe(model: nn.Module) -> BackboneLayout:
    """The Vision Transformer in ``model``: the model itself or the first submodule an adapter
    knows.

    Raises:
        UnsupportedAttentionError: no known backbone; names the attention classes that were found
            and why each is not replaceable. Or blocks of it are in wrappers.
    """
    for name, module in model.named_modules():
        for adapter in _backbone_adapters:
            if adapter.matches(module):
                wrapped = wrapped_layer(name, module)
                if wrapped is not None:
                    raise UnsupportedAttentionError(wrapped)
                return adapter.layout(name, module)
    found = {type(m): m for m in model.modules() if is_attention_name(type(m).__name__)}
    sentences = sorted(
        {
            refusal(m) or f"{kind.__name__} is known, but not this model."
            for kind, m in found.items()
        }
    )
    reasons = " ".join(sentences) or "It has no attention layers by the names of its classes."
    raise UnsupportedAttentionError(
        f"{type(model).__name__} is not a Vision Transformer that dwattn knows ({reasons}). "
        "Supported are timm VisionTransformer and Eva (DINOv3), the plain ViTs and CLIP-like vision "
        "towers of transformers, torchvision and open_clip VisionTransformer, and hub DINOv2 and "
        "DINOv3; other classes can be added with dwattn.adapters.register()."
    )
