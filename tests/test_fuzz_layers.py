"""Layers of every variant and the streamed attention statistics, drawn at random and judged in fp64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dwattn import reference
from dwattn.geometry import Geometry
from dwattn.projections import AttentionWeights
from dwattn.variance import AttentionVariance
from dwattn.variants import REPLACEMENTS, build_replacement
from support.fuzzing import LAYOUTS, SEEDS, Draw, fuzz
from support.layers import expected_output

GEOMETRIES = st.builds(
    Geometry, st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 5, 0, 2])
)


@st.composite
def weights(draw: Any) -> AttentionWeights:
    """Pretrained projections: head widths that no vector width divides, biases or none."""
    heads, head_dim, dim = (draw(st.integers(1, most)) for most in (4, 9, 24))
    make = Draw(draw(SEEDS), torch.float32)
    channels = heads * head_dim

    def bias(size: int, there: bool) -> Tensor | None:
        return make(size) if there else None

    qkv, proj = draw(st.booleans()), draw(st.booleans())
    return AttentionWeights(
        heads, head_dim, draw(st.sampled_from([head_dim**-0.5, 0.3])),
        *(make(channels, dim, scale=dim**-0.5) for _ in range(3)), make(dim, channels, scale=0.2),
        bias(channels, qkv), bias(channels, qkv), bias(channels, qkv), bias(dim, proj),
    )  # fmt: skip


@st.composite
def layers(draw: Any) -> tuple[torch.nn.Module, Geometry, AttentionWeights]:
    """A layer in fp32 whose parameters are random, also those that start from zero."""
    pretrained, geometry = draw(weights()), draw(GEOMETRIES)
    variant = draw(st.sampled_from(sorted(REPLACEMENTS)))
    options: dict[str, Any] = {"grid": geometry.grid, "num_prefix": geometry.num_prefix}
    if variant == "lowrank_dw":
        options["rank"] = draw(st.integers(1, pretrained.channels))
    if variant != "spvit":
        options["context"] = draw(st.booleans())
    options["prefix"] = draw(st.sampled_from(["exact", "static"]))
    layer = build_replacement(variant, pretrained, **options)
    randomise(layer, draw(SEEDS))
    return layer, geometry, pretrained


@torch.no_grad()
def randomise(layer: torch.nn.Module, seed: int) -> None:
    make = Draw(seed, torch.float32)
    for parameter in layer.parameters():
        if parameter.dim():
            parameter.copy_(make(*parameter.shape, scale=0.3))


def assert_close(found: Tensor, exact: Tensor, relative: float) -> None:
    scale = exact.abs().max().item() + 1 if exact.numel() else 1
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=relative * scale)


@fuzz(120, made=layers(), batch=st.integers(0, 3), layout=LAYOUTS, seed=SEEDS, single=st.booleans())
@torch.no_grad()
def test_layers(made: Any, batch: int, layout: str, seed: int, single: bool) -> None:
    layer, geometry, pretrained = made
    x = Draw(seed, torch.float32)(batch, geometry.num_tokens, pretrained.dim, layout=layout)
    exact = expected_output(copy.deepcopy(layer).double(), x.double(), geometry)
    if single:
        assert_close(layer(x), exact, 2e-5)
    else:
        assert_close(copy.deepcopy(layer).double()(x.double()), exact, 1e-12)


@fuzz(40, pretrained=weights(), geometry=GEOMETRIES, seed=SEEDS, chosen=st.integers(1, 14))
@torch.no_grad()
def test_scattered_layers(
    pretrained: AttentionWeights, geometry: Geometry, seed: int, chosen: int
) -> None:
    heads = [head for head in range(pretrained.num_heads) if chosen >> head & 1]
    if not 0 < len(heads) < pretrained.num_heads:
        return
    layer = build_replacement(
        "dw", pretrained, num_prefix=geometry.num_prefix, heads=heads, grid=geometry.grid
    )
    with torch.no_grad():
        for name in ("kernel", "kappa", "mu", "beta"):
            if getattr(layer, name) is not None:
                parameter = getattr(layer, name)
                parameter.copy_(Draw(seed, torch.float32)(*parameter.shape))
    layer = layer.double()
    x = Draw(seed, torch.float64)(2, geometry.num_tokens, pretrained.dim)
    wide = {
        name: None if (t := getattr(pretrained, name)) is None else t.double()
        for name in ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo")
    }
    exact = reference.scattered_attention(
        x, wide["wq"], wide["wk"], wide["wv"], wide["wo"], pretrained.num_heads, tuple(heads),
        layer.kernel, geometry, bq=wide["bq"], bk=wide["bk"], bv=wide["bv"], bo=wide["bo"],
        kappa=layer.kappa, mu=layer.mu, beta=layer.beta, scale=pretrained.scale,
    )  # fmt: skip
    assert_close(layer(x), exact, 1e-12)


@fuzz(
    60,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 8)),
    num_prefix=st.integers(0, 4),
    entries=st.sampled_from(["patches", "all"]),
    batches=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    workers=st.integers(1, 3),
    layout=st.sampled_from(["dense", "sliced", "permuted", "strided"]),
    scale=st.sampled_from([None, 0.1, 3.0]),
    seed=SEEDS,
)
def test_attention_statistics(
    sizes: tuple[int, int, int], num_prefix: int, entries: str, batches: list[int], workers: int,
    layout: str, scale: float | None, seed: int,
) -> None:  # fmt: skip
    """Any split into batches and workers gives the mean and M2 of all maps at once."""
    heads, patches, width = sizes
    make = Draw(seed, torch.float32)
    tokens = num_prefix + patches
    states = [AttentionVariance(num_prefix, entries) for _ in range(workers)]
    maps = []
    for index, batch in enumerate(batches):
        q, k, v = (make(batch, heads, tokens, width, layout=layout) for _ in range(3))
        out = states[index % workers].attend(q, k, v, scale)
        factor = width**-0.5 if scale is None else scale
        e = torch.softmax(factor * q.double() @ k.double().transpose(2, 3), dim=-1)
        assert_close(out, e @ v.double(), 1e-5)
        maps.append(e)
    first = states[0]
    for other in states[1:]:
        first.merge(other)
    e = torch.cat(maps)
    kept = e if entries == "all" else e[:, :, num_prefix:, num_prefix:]
    mean = kept.mean(0)
    assert first.count == sum(batches)
    assert_close(first.mean, mean, 1e-6)
    assert_close(first.m2, (kept - mean).square().sum(0), 1e-6)
    assert bool((first.m2 >= -1e-12).all())
    assert_close(first.prefix_mean, e[:, :, num_prefix:, :num_prefix].mean(0), 1e-6)
    restored = AttentionVariance.from_state_dict(first.state_dict())
    assert torch.equal(restored.m2, first.m2)
    assert torch.equal(restored.prefix_mean, first.prefix_mean)
