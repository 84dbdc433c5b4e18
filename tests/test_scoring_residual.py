"""The residual and the perturbation of a layer, and where its projections are found."""

from __future__ import annotations

import copy

import pytest
import torch

import dwattn
from dwattn.errors import ScoreError
from dwattn.residual import image_keys, residual_shares, sample_positions, unexplained
from support.models import BY_NAME, timm_vit
from support.scoring import IMAGES


def test_residual_is_that_of_a_ridge_regression_on_the_features() -> None:
    """A layer whose output is a static replacement of V leaves nothing; noise leaves everything."""
    from dwattn.geometry import Geometry
    from dwattn.reference import dw_aggregate
    from dwattn.residual import StaticFit

    geometry, channels = Geometry(6, 5, 2), 4
    v = torch.randn(80, geometry.num_tokens, channels, dtype=torch.float64)
    kernel, kappa = torch.randn(channels, 3, 3).double(), torch.randn(2, channels).double()
    mu, beta = torch.randn(2, channels, dtype=torch.float64)
    rows = torch.cat([v[:, :2], dw_aggregate(v, kernel, geometry, kappa, mu, beta)], 1)
    noise = torch.randn_like(rows)
    keys = image_keys(torch.randn(80, 3, 8, 8))
    weight = torch.ones(channels, dtype=torch.float64)
    for target, low, high in ((rows, 0, 1e-4), (noise, 0.95, 1.1), (rows + noise * 3, 0.2, 0.9)):
        fit = StaticFit(channels, 2, torch.device("cpu"))
        for part in range(0, 80, 16):
            s = slice(part, part + 16)
            fit.update(v[s], target[s], sample_positions(keys[s], geometry, v.device))
        heads, block = residual_shares(*unexplained(fit.grams), weight, 2)
        assert low <= block <= high
        assert heads.shape == (2,)
        assert low <= heads.min() <= block <= heads.max() <= high


def test_few_images_do_not_make_a_layer_look_better_than_it_is() -> None:
    from dwattn.geometry import Geometry
    from dwattn.residual import StaticFit

    geometry = Geometry(6, 5, 2)
    v, noise = torch.randn(2, 6, geometry.num_tokens, 64, dtype=torch.float64)
    sample = sample_positions(image_keys(torch.randn(6, 3, 8, 8)), geometry, v.device)
    assert sum(count > 0 for count in sample.folds) > 1
    fit = StaticFit(64, 2, v.device)
    fit.update(v, noise, sample)
    error, power = unexplained(fit.grams)
    assert error.sum() / power.sum() > 1  # 96 samples, 13 weights: judged on itself it is 0.86
    in_sample = unexplained(fit.grams.sum(0, keepdim=True))
    assert in_sample[0].sum() / in_sample[1].sum() < 0.9


def test_sampled_positions_depend_on_the_pixels_alone() -> None:
    from dwattn.geometry import Geometry

    geometry = Geometry(7, 9, 3)
    pixels = torch.randn(40, 3, 8, 8)
    keys = image_keys(pixels)
    assert torch.equal(image_keys(pixels.flip(0)), keys.flip(0))
    assert len(set(keys.tolist())) == 40
    assert not torch.equal(image_keys(pixels.flip(3)), keys)
    sample = sample_positions(keys, geometry, torch.device("cpu"))
    alone = sample_positions(keys[5:6], geometry, torch.device("cpu"))
    place = sample.images.tolist().index(5)
    assert torch.equal(sample.queries[place], alone.queries[0])
    assert sample.queries.min() >= 3
    assert sample.queries.max() < geometry.num_tokens
    for row in sample.queries:
        assert len(set(row.tolist())) == len(row)
    assert sorted(sample.images.tolist()) == list(range(40))
    assert sum(sample.folds) == 40
    assert min(sample.folds) > 0
    assert len(set(sample.queries.flatten().tolist())) == geometry.num_patches


def test_channels_are_weighted_by_their_share_of_the_output() -> None:
    error, power = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 10.0, 10.0, 10.0])
    heads, block = residual_shares(error, power, torch.tensor([1.0, 0.0, 1.0, 3.0]), 2)
    assert heads.tolist() == pytest.approx([0.1, 15 / 40])
    assert block == pytest.approx(16 / 50)


def test_without_residual() -> None:
    family = BY_NAME["timm"]
    scores = dwattn.score(
        family.build(), family.images(IMAGES), IMAGES, residual=False, progress=False
    )
    assert scores.residual_blocks == [None] * 4
    with pytest.raises(ScoreError, match=r"blocks\.0\.attn has no residual score"):
        scores.order("residual")


def test_a_fused_weight_is_recognised_and_neighbours_in_memory_are_not() -> None:
    from dwattn.scoring_run import joined

    whole = torch.randn(12, 5)
    assert torch.equal(joined(*whole.chunk(3)), whole)
    assert torch.equal(joined(*whole[:6].chunk(3)), whole[:6])
    q, k, v = whole.chunk(3)
    for parts in (
        (q, v, k),
        (k, v, q),
        (q, k, q),
        (q, k, v.clone()),
        (q, k, v[:2]),
        (q, k, v.double()),
    ):
        assert joined(*parts) is None
    columns = torch.randn(5, 12).t().chunk(3)
    assert joined(*columns) is None
    # Two allocations that happen to touch: the second one is not part of the first one's storage.
    pool = torch.randn(24)
    halves = [torch.empty(0).set_(pool.untyped_storage(), i * 12, (4, 3)) for i in range(2)]
    assert joined(halves[0], halves[1]) is not None
    assert joined(halves[1], torch.randn(4, 3)) is None


def test_perturbation_is_the_residual_seen_through_the_next_norm() -> None:
    """Scaling a layer's output scales its perturbation by the square; the residual share stays."""
    model = timm_vit()
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder.blocks[0].attn.proj.weight.mul_(3)
    height, width = model.patch_embed.img_size
    x = torch.randn(12, 3, height, width)
    quiet_scores = dwattn.score(model, x, progress=False)
    loud_scores = dwattn.score(louder, x, progress=False)
    first, loud = quiet_scores.layers[0], loud_scores.layers[0]
    assert first.perturbation is not None
    assert loud.perturbation is not None
    torch.testing.assert_close(loud.perturbation, 9 * first.perturbation, rtol=1e-5, atol=0)
    assert loud.block_residual == pytest.approx(first.block_residual, rel=1e-5)
    assert quiet_scores.order("perturbation") != []
