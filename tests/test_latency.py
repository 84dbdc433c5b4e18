"""The latency table times what it says."""

from __future__ import annotations

from typing import Any

import pytest

from dwattn import latency
from support.models import BY_NAME

pytest.importorskip("timm")


def test_half_of_the_heads_are_timed_as_half_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    real = latency.build_replacement

    def noting(variant: str, weights: Any, **options: Any) -> Any:
        built.append((variant, options.get("heads"), options["grid"], options["num_prefix"]))
        return real(variant, weights, **options)

    monkeypatch.setattr(latency, "build_replacement", noting)
    model = BY_NAME["timm"].build()
    heads = model.blocks[0].attn.num_heads
    grid = latency.describe(model).geometry().grid
    found = latency.measure_latency(model, rounds=1)
    assert built == [("dw", None, grid, 1), ("dw", list(range(heads // 2)), grid, 1)]
    layer = found.layers["blocks.0.attn"]
    assert layer.half_replaced is not None
    assert min(layer.attention, layer.replaced, layer.half_replaced, found.total) > 0
