"""Converted models with weights that no initialisation gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dwattn
from dwattn import Plan
from dwattn.adapters import ConvertedAttention
from support.models import randomise, timm_vit

IMAGES = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))


def convert(build: Callable[[], nn.Module] = timm_vit, **options: Any) -> nn.Module:
    model = build()
    plan = Plan.for_layers(model, [0, 2])
    dwattn.replace(model, plan, **options)
    randomise_shims(model)
    return model


def randomise_shims(model: nn.Module) -> None:
    """Values that no initialisation would come up with."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConvertedAttention):
                for parameter in module.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def fresh(build: Callable[[], nn.Module] = timm_vit) -> nn.Module:
    """The same architecture with other weights."""
    return randomise(build(), seed=77)
