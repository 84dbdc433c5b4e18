"""Models that hold several Vision Transformers, of which more than one is converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.adapters import ConvertedAttention
from dwattn.errors import CheckpointError, PlanError, TrainingError
from dwattn.finetune.features import teacher
from dwattn.plan import Plan
from support.models import timm_vit

pytest.importorskip("timm")
X = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))


class Towers(nn.Module):
    """Two ViTs of different depth on the same image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = timm_vit()
        self.second = timm_vit(class_token=False, global_pool="avg", depth=3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.second(x)
        return out


def convert(part: nn.Module, **options: Any) -> None:
    dwattn.replace(part, Plan.for_layers(part, [1]), progress=False, **options)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)  # type: ignore[no-any-return]


def converted() -> tuple[Towers, Tensor]:
    """Both parts converted, and the result before."""
    model = Towers().eval()
    before = run(model)
    convert(model.first, calibrate=X)
    convert(model.second)
    return model, before


def test_restore_undoes_every_part() -> None:
    model, before = converted()
    assert not torch.equal(run(model), before)
    dwattn.restore(model)
    assert torch.equal(run(model), before)
    assert not any(isinstance(m, ConvertedAttention) for m in model.modules())


def test_restore_changes_no_part_if_one_cannot_be_restored(tmp_path: Path) -> None:
    model, _ = converted()
    dwattn.save(model.second, tmp_path / "second.safetensors")
    fresh = Towers().eval()
    convert(fresh.first)
    dwattn.load(fresh.second, tmp_path / "second.safetensors")
    now = run(fresh)
    with pytest.raises(PlanError, match="part second was loaded from"):
        dwattn.restore(fresh)
    assert torch.equal(run(fresh), now)
    with pytest.raises(TrainingError, match="was loaded from"):
        teacher(fresh)

    layer = model.second.blocks[1].attn
    model.second.blocks[1].attn = nn.Identity()
    with pytest.raises(PlanError, match=r"^second\.blocks\.1\.attn is no longer"):
        dwattn.restore(model)
    assert isinstance(model.first.blocks[1].attn, ConvertedAttention)
    model.second.blocks[1].attn = layer
    dwattn.restore(model)


def test_parts_are_saved_one_by_one(tmp_path: Path) -> None:
    model, _ = converted()
    path = tmp_path / "both.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.first, model\.second.*save\(model\.first"):
        dwattn.save(model, path)
    assert not path.exists()
    fresh = Towers().eval()
    for name in ("first", "second"):
        dwattn.save(getattr(model, name), tmp_path / name)
        dwattn.load(getattr(fresh, name), tmp_path / name)
    assert torch.equal(run(fresh), run(model))


def test_a_second_part_alone_is_saved_by_its_name(tmp_path: Path) -> None:
    model = Towers().eval()
    convert(model.second)
    with pytest.raises(CheckpointError, match=r"were replaced in model\.second\..*save\(model\.s"):
        dwattn.save(model, tmp_path / "second.safetensors")


def test_a_part_replaced_through_the_whole_model_is_restored_first(tmp_path: Path) -> None:
    model = Towers().eval()
    convert(model)
    convert(model.second)
    with pytest.raises(CheckpointError, match=r"restore\(model\) and replace model\.first by its"):
        dwattn.save(model, tmp_path / "both.safetensors")
    dwattn.restore(model)
    convert(model.first)
    dwattn.save(model.first, tmp_path / "first.safetensors")


def test_a_first_part_alone_is_saved_with_the_whole_model(tmp_path: Path) -> None:
    model, fresh = Towers().eval(), Towers().eval()
    convert(model.first)
    dwattn.save(model, tmp_path / "first.safetensors")
    dwattn.load(fresh, tmp_path / "first.safetensors")
    assert torch.equal(run(fresh), run(model))
