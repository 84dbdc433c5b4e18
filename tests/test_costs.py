"""FLOPs and parameters against Table 1 of the paper, to its printed digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dwattn
from dwattn.errors import DwattnError

TABLE_1 = {"tokens": 576, "dim": 1024, "num_heads": 16}
ALL = {"mhsa": {}, "dw": {}, "lowrank_dw": {"rank": 64}, "conv": {}, "ens_dw": {}, "spvit": {}}


@pytest.mark.parametrize(
    ("variant", "giga"),
    [("mhsa", 6.19), ("conv", 12.08), ("dw", 2.43), ("spvit", 0.75), ("ens_dw", 0.15)],
)
def test_flops_of_table_1(variant: str, giga: float) -> None:
    printed = dwattn.flops(variant, **TABLE_1) / 1e9
    # 12.0795... is printed as 12.08 and 0.7549... as 0.75; every other digit is plain rounding too.
    assert f"{printed:.2f}" == f"{giga:.2f}"


def test_parameters_of_table_1() -> None:
    assert f"{dwattn.params('mhsa', dim=1024, num_heads=16) / 1e6:.1f}" == "4.2"
    assert f"{dwattn.params('dw', dim=1024, num_heads=16) / 1e6:.2f}" == "2.11"


@pytest.mark.parametrize("variant", ALL)
def test_parameters_are_those_of_the_module(variant: str) -> None:
    """Weights of the layer itself, without biases, context terms and prefix rows."""
    from dwattn.variants import REPLACEMENTS

    options: dict[str, Any] = {"qkv_bias": False, "proj_bias": False}
    if variant == "mhsa":
        module: torch.nn.Module = dwattn.SelfAttention(48, 3, **options)
    else:
        module = REPLACEMENTS[variant](48, 3, context=False, grid=(2, 2), **options, **ALL[variant])
    counted = sum(p.numel() for p in module.parameters())
    assert dwattn.params(variant, dim=48, num_heads=3, **ALL[variant]) == counted


@pytest.mark.parametrize("variant", ["mhsa", "dw", "lowrank_dw", "ens_dw"])
def test_flops_are_those_that_torch_counts(variant: str) -> None:
    """torch counts matrix products and convolutions; the aggregation is a depthwise convolution."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from dwattn import backends
    from dwattn.variants import REPLACEMENTS

    grid = (6, 4)
    options = {"qkv_bias": False, "proj_bias": False}
    if variant == "mhsa":
        module: torch.nn.Module = dwattn.SelfAttention(48, 3, **options)
    else:
        module = REPLACEMENTS[variant](48, 3, context=False, grid=grid, **options, **ALL[variant])
    if variant == "ens_dw":
        module = module.fold()  # as it is deployed
    plain = sdpa_kernel(SDPBackend.MATH)  # CPU flash attention is not counted
    with torch.no_grad(), plain, backends.use("torch"), FlopCounterMode(display=False) as counter:
        module(torch.randn(1, 24, 48))
    expected = dwattn.flops(variant, tokens=24, dim=48, num_heads=3, **ALL[variant])
    assert counter.get_total_flops() == expected


def test_prefix_tokens_cost_their_exact_attention() -> None:
    plain = dwattn.flops("dw", tokens=256, dim=384, num_heads=6)
    one = dwattn.flops("dw", tokens=257, dim=384, num_heads=6, num_prefix=1)
    five = dwattn.flops("dw", tokens=261, dim=384, num_heads=6, num_prefix=5)
    assert plain < one < five
    assert (five - plain) / (one - plain) == pytest.approx(5, rel=0.05)


def test_narrow_layers_are_cheaper_in_proportion() -> None:
    full, half = (dwattn.flops("lowrank_dw", **TABLE_1, rank=rank) for rank in (1024, 512))
    assert full == 2 * half == dwattn.flops("dw", **TABLE_1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "linear"}, "Unknown variant 'linear'.*mhsa, dw"),
        ({"variant": "lowrank_dw"}, "pass rank="),
        ({"variant": "dw", "tokens": 0}, "'tokens': 0"),
        ({"variant": "dw", "num_heads": 15}, "dim=1024 is not a multiple of num_heads=15"),
        ({"variant": "dw", "num_prefix": 576}, "num_prefix=576"),
    ],
)
def test_wrong_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    kwargs = {**TABLE_1, **arguments}
    with pytest.raises(DwattnError, match=message):
        dwattn.flops(kwargs.pop("variant"), **kwargs)
