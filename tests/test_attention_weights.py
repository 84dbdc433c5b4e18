"""What a replacement takes over from the attention layer: its scale, and the values' bias behind the averaged map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.calibration.layer_fit import true_rows
from dwattn.initial import mean_init
from dwattn.plan import KernelInit
from dwattn.projections import AttentionWeights
from dwattn.rotary import Rotary
from dwattn.variants import build_replacement


def weights(bias: bool = True) -> AttentionWeights:
    draws = torch.randn(4, 12, 12, dtype=torch.float64)
    biases: list[Tensor | None] = [None] * 4
    if bias:
        biases = list(torch.randn(4, 12, dtype=torch.float64))
    return AttentionWeights(3, 4, 0.5, *draws, *biases)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("dw", {}), ("dw", {"heads": [1]}), ("dw", {"heads": [0, 2]}), ("lowrank_dw", {"rank": 8}), ("ens_dw", {})],
)  # fmt: skip
def test_a_scale_of_the_logits_is_kept(variant: str, options: dict[str, Any]) -> None:
    """The same map from queries that are larger and a scale that is smaller."""
    own = weights()
    assert own.bq is not None
    scaled = replace(own, scale=0.1, wq=5 * own.wq, bq=5 * own.bq)
    x, found = torch.randn(2, 14, 12, dtype=torch.float64), []
    for each in (own, scaled):
        layer = build_replacement(variant, each, num_prefix=2, grid=(3, 4), **options)
        found.append(layer)
    found[1].kernel.data.copy_(found[0].kernel.data)
    with torch.no_grad():
        torch.testing.assert_close(found[0](x), found[1](x))


@pytest.mark.parametrize("bias", [True, False])
def test_all_ranks_of_a_low_rank_layer_are_the_layers_action_on_a_uniform_map(bias: bool) -> None:
    own = weights(bias)
    layer: Any = build_replacement("lowrank_dw", own, num_prefix=0, grid=(3, 4), rank=12)
    with torch.no_grad():
        layer.kernel.zero_()
        layer.mu.fill_(1)
        x = torch.randn(2, 12, 12, dtype=torch.float64)
        mean = F.linear(x, own.wv, own.bv).mean(1, keepdim=True).expand(-1, 12, -1)
        torch.testing.assert_close(layer(x), F.linear(mean, own.wo, own.bo))


def test_spvit_starts_finite_where_a_displacement_does_not_exist() -> None:
    """A map of one row has no mass above and below: all heads share that displacement evenly, none has log(0)."""
    layer = build_replacement("spvit", weights(), num_prefix=0, grid=(1, 12))
    kernel = [[[0.0] * 3, [0.1, 0.5, 0.2], [0.0] * 3]] * 3
    mean_init(layer, KernelInit(kernel=kernel, prefix=[[]] * 3, uniform=[0.01] * 3))
    with torch.no_grad():
        assert torch.isfinite(layer(torch.randn(2, 12, 12, dtype=torch.float64))).all()


@pytest.mark.parametrize("heads", [None, [1]])
@pytest.mark.parametrize(
    ("norm", "turned"), [(True, False), (False, True), (True, True), (False, False)]
)
def test_exact_prefix_rows_with_key_biases(
    norm: bool, turned: bool, heads: list[int] | None
) -> None:
    """A key bias cancels in the softmax, but not behind a norm or a rotation."""
    own = replace(weights(), rotary=turned)
    if norm:
        norms = [nn.LayerNorm(4, dtype=torch.float64) for _ in range(2)]
        for each in norms:
            nn.init.normal_(each.weight)
            nn.init.normal_(each.bias)
        own = replace(own, q_norm=norms[0], k_norm=norms[1])
    angle = torch.randn(12, 2, dtype=torch.float64).repeat(1, 2)
    rotary = Rotary(angle.cos(), angle.sin()) if turned else None
    layer = build_replacement("dw", own, num_prefix=2, grid=(3, 4), heads=heads)
    x = torch.randn(2, 14, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = F.linear(true_rows(own, x, rotary)[:, :2], own.wo, own.bo)
        torch.testing.assert_close(layer(x, rotary=rotary)[:, :2], expected)
