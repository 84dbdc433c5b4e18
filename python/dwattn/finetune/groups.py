"""Which parameters are trained, and how fast."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from dwattn.adapters import ConvertedAttention, describe
from dwattn.errors import TrainingError
from dwattn.finetune.recipe import Scope

#: Parameters of replaced layers that no projection holds: kernels, context terms, ensemble weights, static prefix rows.
KERNELS = frozenset(
    {"kernel", "kappa", "mu", "beta", "gamma", "logits", "prefix_rows.a", "prefix_rows.b"}
)
GATES = frozenset({"gate.scores"})
#: How libraries name positions and tokens that every image gets.
_POSITIONS = (
    "pos_embed",
    "position_embedding",
    "positional_embedding",
    "cls_token",
    "class_token",
    "dist_token",
    "distillation_token",
    "register_token",
    "reg_token",
    "storage_token",
    "mask_token",
)
#: Queries of attention pooling, in timm and in transformers.
_QUERIES = ("latent", "probe")


def param_groups(
    model: nn.Module,
    *,
    lr: float = 2e-5,
    kernel_lr: float = 10.0,
    gate_lr: float = 0.1,
    weight_decay: float = 0.05,
    train: Scope = "all",
    head: nn.Module | None = None,
    head_lr: float = 10.0,
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: ``torch.optim.AdamW(param_groups(model))``.

    Kernels, context terms, ensemble weights, static prefix rows, gates, biases, norms, tokens and position embeddings
    have no weight decay, in the backbone and in the head. Parameters outside ``train`` are frozen
    (``requires_grad=False``), those inside are made trainable.

    Args:
        model: a converted model, or a part of one.
        lr: learning rate; kernel_lr, head_lr: factors on it; gate_lr: of gates' scores, no factor. See
            :class:`dwattn.finetune.Recipe`.
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
    parts = [part for part in (model, head) if part is not None]
    kernels, gates = (_named_in_layers(parts, names) for names in (KERNELS, GATES))
    in_head = set() if head is None else {id(p) for p in head.parameters()}
    scope = _scope(model, train) | in_head
    named = dict(model.named_parameters())
    if head is not None:
        known = {id(p) for p in named.values()}
        named.update({f"head.{n}": p for n, p in head.named_parameters() if id(p) not in known})

    def group_of(name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in gates:
            return "gates"
        part = "head" if id(parameter) in in_head else "weights"
        if id(parameter) in kernels and part == "weights":
            return "kernels"
        decays = id(parameter) not in kernels and not _undecayed(name, parameter)
        return part if decays else f"{part} without decay"

    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        parameter.requires_grad_(id(parameter) in scope and parameter.is_floating_point())
        if parameter.requires_grad:
            groups.setdefault(group_of(name, parameter), []).append(parameter)
    if not groups:
        raise TrainingError(
            f"train={train!r} leaves nothing to train: {type(model).__name__} has no layers replaced by dwattn, or "
            f"no head was given."
        )
    rates = {"kernels": lr * kernel_lr, "gates": gate_lr}
    rates |= dict.fromkeys(("head", "head without decay"), lr * head_lr)
    return [
        {
            "name": kind,
            "params": parameters,
            "lr": rates.get(kind, lr),
            "weight_decay": weight_decay if kind in ("weights", "head") else 0.0,
        }
        for kind, parameters in groups.items()
    ]


def _named_in_layers(parts: list[nn.Module], names: frozenset[str]) -> set[int]:
    """Parameters of replaced layers that have one of these names there."""
    return {
        id(parameter)
        for part in parts
        for module in part.modules()
        if isinstance(module, ConvertedAttention)
        for name, parameter in module.layer.named_parameters()
        if name in names
    }


def _undecayed(name: str, parameter: nn.Parameter) -> bool:
    leaf = name.rpartition(".")[2]
    return parameter.dim() < 2 or leaf in _QUERIES or any(part in name for part in _POSITIONS)


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
