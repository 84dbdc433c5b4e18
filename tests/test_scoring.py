"""score(): the numbers, against a direct computation from whole maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dwattn
from dwattn.errors import DataError, ScoreError
from dwattn.scores import map_statistics
from support.models import BY_NAME, FAMILIES, Family
from support.scoring import IMAGES, direct, inputs_of


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_agrees_with_a_direct_computation(family: Family) -> None:
    model = family.build()
    data = inputs_of(family, model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = dwattn.score(model, data, num_images=IMAGES, batch_size=4, progress=False)
    expected = direct(model, data)
    assert scores.num_images == IMAGES
    assert scores.grid == family.grid
    assert [layer.name for layer in scores.layers] == list(expected)
    prefix = family.num_prefix
    for layer in scores.layers:
        sigma, mean = expected[layer.name]
        torch.testing.assert_close(layer.sigma, sigma, rtol=1e-6, atol=0)
        mass = mean[:, prefix:, :prefix].mean(1)
        torch.testing.assert_close(layer.prefix_mass, mass, rtol=1e-5, atol=0)
        kernel, uniform = slow_map_statistics(mean[:, prefix:, prefix:], *family.grid)
        torch.testing.assert_close(layer.mean_kernel, kernel, rtol=1e-5, atol=0)
        torch.testing.assert_close(layer.uniform, uniform, rtol=1e-5, atol=0)
        assert layer.sigma_block == pytest.approx(sigma.mean().item(), rel=1e-6)
        assert layer.block_residual is not None
        assert 0 < layer.block_residual < 2
        assert layer.perturbation is not None
        assert float(layer.perturbation.min()) > 0  # the stream in front of the block was seen
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["timm", "hf-clip", "hub-reg4"])
def test_a_model_in_half_precision_scores_alike(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    seen = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    data = inputs_of(family, model)
    plain, half = (dwattn.score(model, data, num_images=IMAGES, amp=amp, progress=False) for amp in ("no", "bf16"))  # fmt: skip
    assert set(seen) == {torch.float32, torch.bfloat16}
    for a, b in zip(plain.layers, half.layers, strict=True):
        assert b.sigma.dtype == torch.float64
        torch.testing.assert_close(b.sigma, a.sigma, rtol=0.03, atol=0)
        assert b.block_residual == pytest.approx(a.block_residual, rel=0.03)
        assert not torch.equal(a.sigma, b.sigma)


def slow_map_statistics(mean: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The definition, entry by entry."""
    heads = mean.shape[0]
    taps: list[list[list[list[float]]]] = [
        [[[] for _ in range(3)] for _ in range(3)] for _ in range(heads)
    ]
    rest: list[list[float]] = [[] for _ in range(heads)]
    for h in range(heads):
        for a in range(height * width):
            for b in range(height * width):
                dr, dc = b // width - a // width, b % width - a % width
                near = abs(dr) <= 1 and abs(dc) <= 1
                (taps[h][dr + 1][dc + 1] if near else rest[h]).append(mean[h, a, b].item())

    def average(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    kernel = [[[average(cell) for cell in row] for row in head] for head in taps]
    return torch.tensor(kernel, dtype=mean.dtype), torch.tensor(
        [average(x) for x in rest], dtype=mean.dtype
    )


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (3, 5)])
def test_map_statistics_on_small_grids(grid: tuple[int, int]) -> None:
    mean = torch.rand(2, grid[0] * grid[1], grid[0] * grid[1], dtype=torch.float64)
    for got, expected in zip(
        map_statistics(mean, *grid), slow_map_statistics(mean, *grid), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("entries", ["patches", "all"])
def test_fp64_model(entries: str) -> None:
    family = BY_NAME["timm-reg4"]
    model, images = family.build().double(), family.images(IMAGES)
    scores = dwattn.score(model, images, IMAGES, batch_size=4, entries=entries, progress=False)
    for layer, (sigma, _) in zip(
        scores.layers, direct(model, images, entries).values(), strict=True
    ):
        torch.testing.assert_close(layer.sigma, sigma, rtol=1e-11, atol=0)


def test_batches_and_order_do_not_matter() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(11)
    whole = dwattn.score(model, images, 11, batch_size=11, progress=False)
    for other in (
        dwattn.score(model, images, 11, batch_size=3, progress=False),
        dwattn.score(model, list(images.flip(0)), 11, batch_size=4, progress=False),
        dwattn.score(model, [(x, 0) for x in images.split([1, 10])], 11, progress=False),
        dwattn.score(model, images.repeat(2, 1, 1, 1), 11, progress=False),
    ):
        for a, b in zip(whole.layers, other.layers, strict=True):
            torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-6, atol=0)
            torch.testing.assert_close(a.residual, b.residual, rtol=1e-4, atol=1e-6)


def test_several_passes_give_the_same_scores_as_one() -> None:
    family = BY_NAME["timm-reg4"]
    model, images = family.build(), family.images(IMAGES)
    one = dwattn.score(model, images, IMAGES, batch_size=4, progress=False, keep_maps=True)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    # One layer of 3 heads and 12 patches with 5 prefix tokens: maps and Gram matrices.
    layer = 3 * 12 * (2 * 12 + 5) * 8 + 4 * 48 * 17**2 * 8
    for budget, passes in ((layer, 4), (2 * layer, 2), (3 * layer + 5, 2), (4 * layer, 1)):
        calls.clear()
        many = dwattn.score(
            model,
            images,
            IMAGES,
            batch_size=4,
            progress=False,
            memory_budget=budget,
            keep_maps=True,
        )
        assert len(calls) == passes * 2
        for a, b in zip(one.layers, many.layers, strict=True):
            assert a.name == b.name
            # Layers that wait for their pass run as they are: their output has other roundings.
            torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-6, atol=0)
            torch.testing.assert_close(a.std_map, b.std_map, rtol=1e-4, atol=1e-6)
            assert a.block_residual == pytest.approx(b.block_residual, rel=1e-4)
    handle.remove()
    with pytest.raises(
        ScoreError, match=rf"memory_budget={layer - 1} bytes \(.* is less than the {layer}"
    ):
        dwattn.score(model, images, IMAGES, progress=False, memory_budget=layer - 1)
    once = iter(images.split(4))
    with pytest.raises(DataError, match=r"one-shot iterator.*splits the layers over 4 passes"):
        dwattn.score(model, once, IMAGES, progress=False, memory_budget=layer)
    assert len(next(once)) == 2  # refused before the rest of the data was read


def test_a_generator_is_enough_for_one_pass() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(IMAGES)
    generated = dwattn.score(model, (b for b in images.split(4)), IMAGES, progress=False)
    assert (
        generated.sigma_blocks
        == dwattn.score(model, list(images.split(4)), IMAGES, progress=False).sigma_blocks
    )
