"""The weights of one softmax attention layer, independent of the library it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dwattn.errors import UnsupportedAttentionError


def is_wrapped(weight: object) -> bool:
    """Whether a tensor is a wrapper subclass, such as a quantised weight, whose numbers are in other tensors."""
    return hasattr(type(weight), "__tensor_flatten__")


def is_sharded(weight: object) -> bool:
    """Whether a tensor is one of FSDP2 or tensor parallelism, of which this process has a part."""
    return type(weight).__name__ == "DTensor"


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``module(x)`` is just ``F.linear(x, weight, bias)``, so that the weights may be used without calling it.

    False for adapters (LoRA), quantised layers or weights, layers with hooks (their own or global ones), and instances
    with a ``forward`` of their own (offloading tools set one).
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__ or _has_any_global_hook():
        return False
    forward_hooks = module._forward_hooks or module._forward_pre_hooks
    if forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return not is_wrapped(module.weight)


def is_correctable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the weight can be changed in place: a floating-point parameter, neither quantised nor recomputed from other
    parameters (parametrised or pruned).
    """
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and weight.is_floating_point() and not is_wrapped(weight)


def linear_weights(module: nn.Module, use: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection that is used through them instead of being called.

    Raises:
        UnsupportedAttentionError: it is not a plain linear layer; ``use`` names what needs the weights.
    """
    if not isinstance(module, nn.Linear) or is_wrapped(module.weight):
        found = type(module.weight if isinstance(module, nn.Linear) else module).__name__
        raise UnsupportedAttentionError(
            f"{use} needs the weights of a linear layer, but {found} was put in its place: merge "
            f"the adapter into the weights first (peft: merge_and_unload()), or quantise after this step."
        )
    return module.weight, module.bias


#: Child modules of the replacements that are projections, wherever they are.
_PROJECTIONS = frozenset({"query", "key", "value", "proj", "prefix_value", "prefix_proj"})


def require_linear(layer: nn.Module, use: str) -> None:
    """Raise UnsupportedAttentionError unless every projection of ``layer`` is a linear layer with ordinary weights."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in _PROJECTIONS:
            linear_weights(module, f"{use}: {name}")


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of a multi-head attention layer, views of the model's own parameters where possible.

    Args:
        num_heads, head_dim: ``n_h`` and ``d_h``; ``C = n_h * d_h``.
        scale: factor of the logits, usually ``1 / sqrt(d_h)``.
        wq, wk, wv: ``(C, D)``; wo: ``(D, C)``; biases ``(C,)`` or ``(D,)`` or None.
        q_norm, k_norm: modules applied to ``(B, n_h, N, d_h)`` queries and keys, or None.
        rotary: whether queries and keys of patches are rotated after the norms, by angles that come with each call (see
            :class:`dwattn.rotary.Rotary`).
    """

    num_heads: int
    head_dim: int
    scale: float
    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    bq: Tensor | None = None
    bk: Tensor | None = None
    bv: Tensor | None = None
    bo: Tensor | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    rotary: bool = False

    def __post_init__(self) -> None:
        channels, dim = self.channels, self.wq.shape[1]
        for name in ("wq", "wk", "wv"):
            weight = getattr(self, name)
            if tuple(weight.shape) != (channels, dim):
                raise UnsupportedAttentionError(
                    f"{name} has shape {tuple(weight.shape)}, but num_heads={self.num_heads} and "
                    f"head_dim={self.head_dim} need ({channels}, {dim}). Attention with fewer key/value heads "
                    f"than query heads is not supported."
                )
        if tuple(self.wo.shape) != (dim, channels):
            raise UnsupportedAttentionError(
                f"The output projection has shape {tuple(self.wo.shape)}, expected ({dim}, {channels}): a layer "
                f"whose output width differs from its input cannot be replaced in place."
            )

    @property
    def dim(self) -> int:
        """Model width ``D``."""
        return self.wq.shape[1]

    @property
    def channels(self) -> int:
        """``C = n_h * d_h``."""
        return self.num_heads * self.head_dim

    def head_rows(self, heads: list[int]) -> Tensor:
        """Indices of the channels of ``heads``, in the order given: ``(len(heads) * d_h,)`` int64."""
        starts = torch.tensor(heads, dtype=torch.long) * self.head_dim
        return (starts[:, None] + torch.arange(self.head_dim)).flatten()
