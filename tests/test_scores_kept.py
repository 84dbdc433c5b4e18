"""What a file of scores keeps, what their table shows, and which states do not merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.table import Table

from dwattn.errors import PlanError, ScoreError
from dwattn.plan import ModelInfo
from dwattn.scores import LayerScore, Scores
from dwattn.selection import select
from dwattn.variance import AttentionVariance
from support.models import BY_NAME


def scores() -> Scores:
    kernel = torch.arange(18.0, dtype=torch.float64).view(2, 3, 3) / 500
    layer = LayerScore(
        name="blocks.0.attn",
        block=0,
        sigma=torch.tensor([3.0, 5.0], dtype=torch.float64),
        mean_kernel=kernel,
        prefix_mass=torch.tensor([[0.1, 0.02], [0.2, 0.04]], dtype=torch.float64),
        uniform=torch.tensor([1e-3, 2e-3], dtype=torch.float64),
    )
    model = ModelInfo.of(BY_NAME["timm"].build())
    return Scores([layer], 10, "patches", (4, 3), 2, model, {"blocks.1.attn": "It is masked."})


def cells(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_refused_layers_are_named_after_loading(tmp_path: Path) -> None:
    scores().save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.refused == {"blocks.1.attn": "It is masked."}
    with pytest.raises(PlanError, match=r"only 1 can be replaced.*It is masked\."):
        select(again, blocks=2)


def test_the_table_shows_where_a_patch_looks() -> None:
    """To itself (the middle of the window), to its window, to all prefix tokens; means over the heads."""
    layer, refused = cells(scores().table())
    assert layer == ("0", "blocks.0.attn", "4", "-", "0.017", "0.153", "0.180")
    assert refused == ("-", "blocks.1.attn", "refused", "", "", "", "It is masked.")


def test_an_interrupted_first_update_does_not_merge_as_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its images would be missing without a word."""
    q = torch.randn(2, 1, 5, 4, dtype=torch.float64)  # fp64: in PyTorch
    whole, broken = AttentionVariance(), AttentionVariance()
    whole.update(q, q)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AttentionVariance, "_fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.update(q, q)
    assert broken.count == 0
    with pytest.raises(ScoreError, match="interrupted"):
        whole.merge(broken)
    with pytest.raises(ScoreError, match="interrupted"):
        broken.merge(whole)
