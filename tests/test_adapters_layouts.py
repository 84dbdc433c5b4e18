"""Which layer of each block writes to the residual stream: calibration corrects it, silently less where it is not found."""

from __future__ import annotations

import pytest
from torch import nn

from dwattn.adapters import describe
from support.models import FAMILIES, Family
from support.more_families import MORE_HF, MULTIHEAD


@pytest.mark.parametrize(
    "family", [*FAMILIES, *MORE_HF, *MULTIHEAD], ids=lambda family: family.name
)
def test_the_last_layer_of_the_mlp_is_found(family: Family) -> None:
    layout = describe(family.build())
    for site in layout.blocks:
        assert isinstance(site.mlp_out, nn.Linear), site.name
        inside = [m for m in site.module.modules() if isinstance(m, nn.Linear)]
        assert site.mlp_out in inside
        width = layout.blocks[0].mlp_out.out_features
        assert site.mlp_out.out_features == width
