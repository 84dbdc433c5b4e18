"""What surgery must leave alone, and small helpers to look at converted models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dwattn import Plan
from dwattn.adapters import ConvertedAttention


class Snapshot:
    """Everything about a model that must not change: objects, values, flags, hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name: (id(m), m.training) for name, m in model.named_modules()}
        self.parameters = {
            n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()
        }
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.hooks = self._hooks(model)
        self.attributes = {name: set(vars(m)) for name, m in model.named_modules()}

    @staticmethod
    def _hooks(model: nn.Module) -> dict[str, Any]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return {
            f"{name}.{kind}": list(getattr(m, kind).values())
            for name, m in model.named_modules()
            for kind in kinds
        }

    def check(self) -> None:
        now = Snapshot(self.model)
        assert now.modules == self.modules
        assert now.parameters == self.parameters
        assert list(now.state) == list(self.state)
        assert all(torch.equal(now.state[name], value) for name, value in self.state.items())
        assert now.hooks == self.hooks
        assert now.attributes == self.attributes


def plan_for(model: nn.Module, blocks: Sequence[int] = (0, 2), heads: Any = None) -> Plan:
    """Blocks 0 and 2, or others."""
    return Plan.for_layers(model, blocks, heads)


def shims(model: nn.Module) -> dict[str, ConvertedAttention]:
    """The replaced layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ConvertedAttention)}
