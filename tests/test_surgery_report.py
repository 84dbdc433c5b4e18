"""The report names what cannot be replaced also where nobody asked for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwattn
from dwattn.plan import Plan
from support.models import BY_NAME

pytest.importorskip("timm")


def test_layers_that_the_plan_leaves_out_are_refused_with_their_reason() -> None:
    model = BY_NAME["timm"].build()
    model.blocks[2].attn.proj = nn.Sequential(model.blocks[2].attn.proj)
    report = dwattn.replace(model, Plan.for_layers(model, [0]), dry_run=True)
    assert [row.action for row in report.rows] == ["replaced", "kept", "refused", "kept"]
    assert list(report.refused) == ["blocks.2.attn"]
    assert "plain nn.Linear" in report.refused["blocks.2.attn"]
    assert [row.planned for row in report.rows] == [True, False, False, False]
    with torch.no_grad():
        assert torch.isfinite(model(BY_NAME["timm"].images(1))).all()
