"""``torch.export`` of converted models: programs for AOTInductor, ExecuTorch or Torch-TensorRT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dwattn
from support.models import FAMILIES, Family, first_tensor
from support.surgery import plan_for

#: The stand-in makes a list of the batch's images.
FIXED_BATCH = {"hub-dinov3"}


class MainOutput(nn.Module):
    """Programs may only return tensors and plain containers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return first_tensor(self.model(images))


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.name.endswith("-both")], ids=str)
def test_every_family(family: Family) -> None:
    model, images = family.build(), family.images(3)
    dwattn.replace(model, plan_for(model))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = None if family.name in FIXED_BATCH else (batch,)
    traced = images if shapes is None else images[:2]
    program = torch.export.export(MainOutput(model), (traced,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(images), MainOutput(model)(images))


@torch.no_grad()
def test_an_exported_program_refuses_a_mask_that_hides_something() -> None:
    """transformers makes every exported layer a mask, whose values only the running program knows."""
    (family,) = (f for f in FAMILIES if f.name == "hf-vit")
    model, images = family.build(), family.images()
    dwattn.replace(model, plan_for(model))
    mask = torch.ones(2, 13, dtype=torch.long)
    try:
        program = torch.export.export(model, (images,), {"attention_mask": mask})
    except TypeError:
        pytest.skip("This transformers has no attention_mask in its ViT.")
    found = program.module()(images, attention_mask=mask)
    torch.testing.assert_close(first_tensor(found), first_tensor(model(images)))
    mask[:, 5] = 0
    with pytest.raises(RuntimeError, match="A replaced layer cannot apply masks"):
        program.module()(images, attention_mask=mask)
