"""What scoring must find, computed from whole maps, and what it must leave alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.adapters import adapter_for, describe
from dwattn.rotary import placed
from support.models import Family

IMAGES = 6


def inputs_of(family: Family, model: nn.Module, count: int = IMAGES) -> Any:
    """Images, or whole inputs for a model with a text tower."""
    images = family.images(count)
    if not hasattr(model, "text_model"):
        return images
    tokens = torch.ones(2, 8, dtype=torch.long)
    return [{"pixel_values": part, "input_ids": tokens} for part in images.split(2)]


def direct(model: nn.Module, data: Any, entries: str = "patches") -> dict[str, tuple[Tensor, ...]]:
    """Per layer Sigma_h, mean map and true rows from all maps at once, in fp64, by hooks on a copy."""
    model = copy.deepcopy(model).double().eval()
    layout = describe(model)
    maps: dict[str, list[Tensor]] = {}
    handles = []
    for site in layout.blocks:
        adapter = adapter_for(site.attention)
        assert adapter is not None
        w, convention = adapter.weights(site.attention), adapter.convention(site.attention)

        def hook(
            module, args, kwargs, output, *, name=site.attention_name, w=w, convention=convention
        ):
            x = convention.tokens(args, kwargs)

            def project(weight: Tensor, bias: Tensor | None) -> Tensor:
                y = x @ weight.T + (0 if bias is None else bias)
                return y.view(*x.shape[:2], w.num_heads, w.head_dim).transpose(1, 2)

            q, k = project(w.wq, w.bq), project(w.wk, w.bk)
            q, k = placed(q, k, w, convention.rotary(kwargs))
            e = torch.softmax(q @ k.transpose(2, 3) * w.scale, -1)
            maps.setdefault(name, []).append(e)

        handles.append(site.attention.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad(), layout.in_raster_order():
        for item in data.double().split(4) if isinstance(data, Tensor) else data:
            if isinstance(item, dict):
                model(**{k: v.double() if v.is_floating_point() else v for k, v in item.items()})
            else:
                model(item)
    for handle in handles:
        handle.remove()
    first = 0 if entries == "all" else layout.num_prefix
    found = {}
    for name, parts in maps.items():
        e = torch.cat(parts)
        std = e.std(0, unbiased=False)[:, first:, first:]
        found[name] = (std.sum((1, 2)), e.mean(0))
    return found


def snapshot(model: nn.Module) -> Any:
    """Everything that scoring could leave behind."""
    modules = [
        (
            name,
            module.training,
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            [
                list(vars(module)[k])
                for k in sorted(vars(module))
                if "hook" in k and vars(module)[k]
            ],
        )
        for name, module in model.named_modules()
    ]
    tensors = [
        (
            name,
            t.dtype,
            t.device,
            t.requires_grad,
            t.data_ptr(),
            None if t.grad is None else t.grad.sum().item(),
        )
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return modules, tensors, torch.get_rng_state().tolist(), torch.is_grad_enabled()
