"""Which parameters are trained, and how fast."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from dwattn.adapters import ConvertedAttention, describe
from dwattn.errors import TrainingError
from dwattn.finetune.recipe import Scope

#: Parameters of replaced layers that no projection holds: kernels, context terms, ensemble weights, gates.
KERNELS = frozenset({"kernel", "kappa", "mu", "beta", "gamma", "logits", "gate.scores"})
_POSITIONS = (
    "pos_embed",
    "position_embedding",
    "cls_token",
    "register_token",
    "reg_token",
    "mask_token",
)


def param_groups(
    model: nn.Module,
    *,
    lr: float = 2e-5,
    kernel_lr: float = 10.0,
    weight_decay: float = 0.05,
    train: Scope = "all",
    head: nn.Module | None = None,
    head_lr: float = 10.0,
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: ``torch.optim.AdamW(param_groups(model))``.

    Kernels, context terms, ensemble weights, biases, norms, tokens and position embeddings have no weight decay.
    Parameters outside ``train`` are frozen (``requires_grad=False``), those inside are made trainable.

    Args:
        model: a converted model, or a part of one.
        lr: learning rate; kernel_lr, head_lr: factors on it, see :class:`dwattn.finetune.Recipe`.
        train: ``all``, ``blocks`` (transformer blocks with replaced layers), ``replaced`` (these layers
            alone) or ``head``.
        head: a part of ``model`` (or a module beside it) that is always trained.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out.

    Raises:
        TrainingError: nothing to train, for example ``train="replaced"`` without replaced layers.
    """
    if train not in get_args(Scope):
        raise TrainingError(f"train={train!r} must be one of {', '.join(get_args(Scope))}.")
    kernels = _kernels(model)
    in_head = set() if head is None else {id(p) for p in head.parameters()}
    scope = _scope(model, train) | in_head
    named = dict(model.named_parameters())
    if head is not None:
        known = {id(p) for p in named.values()}
        named.update({f"head.{n}": p for n, p in head.named_parameters() if id(p) not in known})
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        parameter.requires_grad_(id(parameter) in scope and parameter.is_floating_point())
        if not parameter.requires_grad:
            continue
        kind = "kernels" if id(parameter) in kernels else "weights"
        if id(parameter) in in_head:
            kind = "head"
        if kind != "kernels" and _undecayed(name, parameter):
            kind += " without decay"
        groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise TrainingError(
            f"train={train!r} leaves nothing to train: {type(model).__name__} has no layers replaced by dwattn, or "
            f"no head was given."
        )
    factors = {"kernels": kernel_lr, "head": head_lr, "head without decay": head_lr}
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": lr * factors.get(kind, 1.0),
            "weight_decay": weight_decay if kind in ("weights", "head") else 0.0,
        }
        for kind, parameters in groups.items()
    ]


def _kernels(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ConvertedAttention)
        for name, parameter in module.layer.named_parameters()
        if name in KERNELS
    }


def _undecayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() < 2 or any(part in name for part in _POSITIONS)


def _scope(model: nn.Module, train: Scope) -> set[int]:
    if train == "all":
        return {id(p) for p in model.parameters()}
    if train == "head":
        return set()
    modules = converted_blocks(model) if train == "blocks" else _converted(model)
    return {id(p) for module in modules for p in module.parameters()}


def _converted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, ConvertedAttention)]


def converted_blocks(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks whose attention layer was replaced."""
    if not _converted(model):
        return []
    return [s.module for s in describe(model).blocks if isinstance(s.attention, ConvertedAttention)]
