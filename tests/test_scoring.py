"""score(): the numbers, the untouched model, and what is refused."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dwattn
from dwattn.adapters import adapter_for, describe
from dwattn.errors import DataError, DwattnError, ScoreError, UnsupportedAttentionError
from dwattn.residual import image_keys, residual_shares, sample_positions, unexplained
from dwattn.scores import Scores, map_statistics
from support.models import BY_NAME, FAMILIES, Family, hf_model, timm_vit

IMAGES = 6


def inputs_of(family: Family, model: nn.Module, count: int = IMAGES) -> Any:
    """Images, or whole inputs for a model with a text tower."""
    images = family.images(count)
    if not hasattr(model, "text_model"):
        return images
    tokens = torch.ones(2, 8, dtype=torch.long)
    return [{"pixel_values": part, "input_ids": tokens} for part in images.split(2)]


def direct(model: nn.Module, data: Any, entries: str = "patches") -> dict[str, tuple[Tensor, ...]]:
    """Per layer Sigma_h, mean map and true rows from all maps at once, in fp64, by hooks on a copy."""
    model = copy.deepcopy(model).double().eval()
    layout = describe(model)
    maps: dict[str, list[Tensor]] = {}
    handles = []
    for site in layout.blocks:
        adapter = adapter_for(site.attention)
        assert adapter is not None
        w, convention = adapter.weights(site.attention), adapter.convention(site.attention)

        def hook(
            module, args, kwargs, output, *, name=site.attention_name, w=w, convention=convention
        ):
            x = convention.tokens(args, kwargs)

            def project(weight: Tensor, bias: Tensor | None) -> Tensor:
                y = x @ weight.T + (0 if bias is None else bias)
                return y.view(*x.shape[:2], w.num_heads, w.head_dim).transpose(1, 2)

            q, k = project(w.wq, w.bq), project(w.wk, w.bk)
            q, k = (t if n is None else n(t) for t, n in ((q, w.q_norm), (k, w.k_norm)))
            e = torch.softmax(q @ k.transpose(2, 3) * w.scale, -1)
            maps.setdefault(name, []).append(e)

        handles.append(site.attention.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad(), layout.in_raster_order():
        for item in data.double().split(4) if isinstance(data, Tensor) else data:
            if isinstance(item, dict):
                model(**{k: v.double() if v.is_floating_point() else v for k, v in item.items()})
            else:
                model(item)
    for handle in handles:
        handle.remove()
    first = 0 if entries == "all" else layout.num_prefix
    found = {}
    for name, parts in maps.items():
        e = torch.cat(parts)
        std = e.std(0, unbiased=False)[:, first:, first:]
        found[name] = (std.sum((1, 2)), e.mean(0))
    return found


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
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


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
        ScoreError, match=rf"memory_budget={layer - 1} bytes is less than the {layer}"
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


# --- the model afterwards


def snapshot(model: nn.Module) -> Any:
    """Everything that scoring could leave behind."""
    modules = [
        (
            name,
            module.training,
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            [
                list(vars(module)[k])
                for k in sorted(vars(module))
                if "hook" in k and vars(module)[k]
            ],
        )
        for name, module in model.named_modules()
    ]
    tensors = [
        (
            name,
            t.dtype,
            t.device,
            t.requires_grad,
            t.data_ptr(),
            None if t.grad is None else t.grad.sum().item(),
        )
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return modules, tensors, torch.get_rng_state().tolist(), torch.is_grad_enabled()


def test_the_model_is_exactly_as_before() -> None:
    family = BY_NAME["hf-dinov2-reg"]
    model, images = family.build(), family.images(IMAGES)
    model.train()
    model.layernorm.eval()
    model.encoder.layer[1].attention.requires_grad_(False)
    attention = model.encoder.layer[2].attention
    attention.forward = attention.forward  # an instance attribute of somebody else's
    attention.register_forward_hook(lambda *_: None)
    model(pixel_values=images[:2]).last_hidden_state.sum().backward()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    model_output = copy.deepcopy(model).eval()(pixel_values=images).last_hidden_state
    dwattn.score(model, images, IMAGES, progress=False)
    assert snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(pixel_values=images).last_hidden_state, model_output)


class Stop(BaseException):
    """Like KeyboardInterrupt."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_the_model_is_as_before_after_an_exception(error: type[BaseException]) -> None:
    family = BY_NAME["timm"]
    model, images = family.build().train(), family.images(IMAGES)
    before = snapshot(model)

    def batches() -> Iterator[Tensor]:
        yield images[:2]
        torch.rand(3)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        dwattn.score(model, batches(), IMAGES, progress=True)
    assert snapshot(model) == before


def test_scoring_runs_in_eval_mode_without_gradients_or_noise() -> None:
    model = timm_vit(proj_drop_rate=0.5, drop_path_rate=0.5).train()
    images = BY_NAME["timm"].images(IMAGES)
    seen = []
    model.blocks[1].mlp.register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.requires_grad))
    )
    first = dwattn.score(model, images, IMAGES, progress=False)
    assert set(seen) == {(False, False)}
    assert dwattn.score(model, images, IMAGES, progress=False).sigma_blocks == first.sigma_blocks


def test_the_model_computes_what_it_computes_without_scoring() -> None:
    family = BY_NAME["timm-qk-norm"]
    model, images = family.build(), family.images(IMAGES)
    outputs = []
    handle = model.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    dwattn.score(model, images, IMAGES, batch_size=IMAGES, progress=False)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], model(images), rtol=1e-4, atol=1e-5)


def test_wrapped_models() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(IMAGES)
    plain = dwattn.score(model, images, IMAGES, progress=False)

    class Preprocessing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(x - 0.0)

    inside = dwattn.score(Preprocessing(), images, IMAGES, progress=False)
    assert inside.sigma_blocks == plain.sigma_blocks
    assert inside.layers[0].name == "vit.blocks.0.attn"
    compiled = torch.compile(model, backend="eager")
    assert dwattn.score(compiled, images, IMAGES, progress=False).layers[0].name == "blocks.0.attn"
    assert compiled(images).shape == (IMAGES, 5)
    assert dwattn.score(compiled, images, IMAGES, progress=False).sigma_blocks == plain.sigma_blocks
    parallel = dwattn.score(nn.DataParallel(model), images, IMAGES, progress=False)
    assert parallel.sigma_blocks == plain.sigma_blocks


def test_compiled_blocks() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(IMAGES)
    plain = dwattn.score(model, images, IMAGES, progress=False)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        before = model(images)
        again = dwattn.score(model, images, IMAGES, progress=False)
        assert again.sigma_blocks == pytest.approx(plain.sigma_blocks, rel=1e-6)
        torch.testing.assert_close(model(images), before)


def test_scoring_does_not_import_the_compiler() -> None:
    """It would take seconds and more memory than the statistics of a small model."""
    code = (
        "import sys, torch, dwattn; from support.models import BY_NAME; f = BY_NAME['hub']; "
        "dwattn.score(f.build(), f.images(4), 4, progress=False); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_half_precision_model_takes_fp32_images() -> None:
    family = BY_NAME["timm"]
    images = family.images(IMAGES)
    scores = dwattn.score(family.build().bfloat16(), images, IMAGES, progress=False)
    exact = dwattn.score(family.build(), images, IMAGES, progress=False)
    for a, b in zip(scores.sigma_blocks, exact.sigma_blocks, strict=True):
        assert a == pytest.approx(b, rel=0.05)


def test_dynamic_resolution_uses_the_grid_of_the_images() -> None:
    model = BY_NAME["timm-dynamic"].build()
    scores = dwattn.score(model, torch.randn(4, 3, 24, 40), 4, progress=False)
    assert scores.grid == (3, 5)
    with pytest.raises(
        DataError, match=r"32 x 24 pixels \(4 x 3 patches\) came after images of 3 x 5"
    ):
        dwattn.score(
            model, [torch.randn(2, 3, 24, 40), torch.randn(2, 3, 32, 24)], 4, progress=False
        )


# --- the residual


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


# --- projections


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


# --- what is refused


def test_images_that_are_too_few() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(3)
    before = snapshot(model)
    with pytest.raises(DataError, match="holds no images"):
        dwattn.score(model, images[:0], progress=False)
    with pytest.raises(DataError, match="holds no images"):
        dwattn.score(model, [], progress=False)
    with pytest.raises(ScoreError, match="The data held 1 image: the variance"):
        dwattn.score(model, images[:1], progress=False)
    for number in (1, 0, -3):
        with pytest.raises(ScoreError, match=f"num_images={number}"):
            dwattn.score(model, images, num_images=number, progress=False)
    with pytest.warns(UserWarning, match="held 3 images, fewer than num_images=1000"):
        assert dwattn.score(model, images, progress=False).num_images == 3
    assert snapshot(model) == before


def test_nan_activations_name_the_layer() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(4)
    for tensor, message in (
        (model.blocks[2].norm1.weight, r"blocks\.2\.attn: q has NaN or infinite"),
        (model.blocks[1].mlp.fc2.bias, r"blocks\.2\.attn: q has NaN or infinite"),
        (model.blocks[2].attn.qkv.weight, r"blocks\.2\.attn: its weight qkv\.weight holds NaN"),
        (model.blocks[3].attn.proj.bias, r"blocks\.3\.attn: its weight proj\.bias holds NaN"),
    ):
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[7] = math.nan
        before = snapshot(model)
        with pytest.raises(ScoreError, match=message):
            dwattn.score(model, images, 4, progress=False)
        assert snapshot(model) == before
        with torch.no_grad():
            tensor.copy_(kept)


def test_nan_pixels() -> None:
    family = BY_NAME["timm"]
    images = family.images(4)
    images[2, 0, 3, 3] = math.nan
    with pytest.raises(DataError, match=r"Images \[2\].*NaN"):
        dwattn.score(family.build(), images, 4, progress=False)


def test_refused_layers_are_left_alone_and_named() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(4)
    plain = dwattn.score(model, images, 4, progress=False)

    class CausalAttention(type(model.blocks[1].attn)):  # type: ignore[misc]
        pass

    model.blocks[1].attn.__class__ = CausalAttention
    scores = dwattn.score(model, images, 4, progress=False)
    assert [layer.block for layer in scores.layers] == [0, 2, 3]
    assert list(scores.refused) == ["blocks.1.attn"]
    assert scores.layers[1].sigma_block == pytest.approx(plain.layers[2].sigma_block, rel=1e-5)
    for block in model.blocks:
        block.attn.__class__ = CausalAttention
    with pytest.raises(UnsupportedAttentionError, match=r"No attention layer.*blocks\.3\.attn"):
        dwattn.score(model, images, 4, progress=False)


def test_calls_that_cannot_be_scored() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(4)

    class Twice(nn.Module):
        def __init__(self, call: Any) -> None:
            super().__init__()
            self.vit, self.call = model, call

        def forward(self, x: Tensor) -> Any:
            return self.call(self.vit, x)

    mask = torch.zeros(13, 13)
    for call, error, message in (
        (lambda vit, x: x, ScoreError, "did not run its attention layers"),
        (lambda vit, x: vit.patch_embed(x), ScoreError, "did not run its attention layers"),
        (
            lambda vit, x: vit.blocks[0].attn(vit._pos_embed(vit.patch_embed(x)), attn_mask=mask),
            UnsupportedAttentionError,
            r"blocks\.0\.attn: .*attn_mask",
        ),
        (
            lambda vit, x: vit.blocks[0].attn(vit.patch_embed(x)),
            DwattnError,
            r"vit\.blocks\.0\.attn: The sequence has N=12 tokens",
        ),
        (
            lambda vit, x: vit.blocks[0].attn(torch.zeros(7, 13, 48)),
            ScoreError,
            "before the patch embedding",
        ),
        (
            lambda vit, x: [vit.blocks[0].attn(vit._pos_embed(vit.patch_embed(x))) for _ in "ab"],
            ScoreError,
            r"see each image once",
        ),
    ):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            dwattn.score(Twice(call), images, 4, progress=False)
        assert snapshot(model) == before


def test_other_bad_arguments() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(4)
    with pytest.raises(ScoreError, match="entries='rows'"):
        dwattn.score(model, images, 4, entries="rows", progress=False)
    with pytest.raises(DataError, match="batch_size=0"):
        dwattn.score(model, images, 4, batch_size=0, progress=False)
    with pytest.raises(ScoreError, match="needs a process group"):
        dwattn.score(model, images, 4, distributed=True, progress=False)
    with pytest.raises(UnsupportedAttentionError, match="not a Vision Transformer"):
        dwattn.score(nn.Linear(3, 3), images, 4, progress=False)
    masked = hf_model("ViTMAE", mask_ratio=0.5)
    with pytest.raises(UnsupportedAttentionError, match=r"mask_ratio=0\.5"):
        dwattn.score(masked, torch.randn(4, 3, 32, 32), 4, progress=False)


# --- files


@pytest.fixture(scope="module")
def scored() -> Scores:
    family = BY_NAME["timm-reg4"]
    images = family.images(IMAGES)
    return dwattn.score(family.build(), images, IMAGES, keep_maps=True, progress=False)


def test_save_and_load(scored: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored.save(path)
    again = Scores.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert again.to_dict() == scored.to_dict()
    assert again.model == scored.model
    for a, b in zip(again.layers, scored.layers, strict=True):
        assert torch.equal(a.std_map, b.std_map)
        assert torch.equal(a.mean_map, b.mean_map)
        assert torch.equal(a.sigma, b.sigma)
        assert a.block_residual == b.block_residual
    torch.testing.assert_close(again.layers[0].std_map.sum((1, 2)).double(), again.layers[0].sigma)
    assert "blocks.3.attn" in str([list(column.cells) for column in again.table().columns])


def rewrite(path: Path, tensors: Any = None, metadata: Any = None) -> None:
    """Write the file again with changed tensors or header."""
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    found = load_file(path)
    if tensors:
        tensors(found)
    save_file(found, path, metadata=metadata(header) if metadata else header)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "not a readable safetensors file"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
        (lambda p: p.unlink(), "There is no scores file"),
        (lambda p: rewrite(p, metadata=lambda h: {}), "holds no dwattn scores"),
        (lambda p: rewrite(p, metadata=lambda h: {"dwattn": "[1]"}), "holds no dwattn scores"),
        (
            lambda p: rewrite(
                p, metadata=lambda h: {"dwattn": h["dwattn"].replace('version":1', 'version":9', 1)}
            ),
            "schema_version=9",
        ),
        (
            lambda p: rewrite(
                p,
                metadata=lambda h: {
                    "dwattn": h["dwattn"].replace('"num_images":6', '"num_images":"x"')
                },
            ),
            "num_images: .*integer",
        ),
        (
            lambda p: rewrite(p, lambda t: t.pop("layers.1.sigma")),
            r"sigma of blocks\.1\.attn is missing",
        ),
        (
            lambda p: rewrite(p, lambda t: t.update({"layers.2.mean_kernel": torch.zeros(3, 9)})),
            r"mean_kernel of blocks\.2\.attn is of shape \(3, 9\), expected \(3, 3, 3\)",
        ),
    ],
)
def test_damaged_files(scored: Scores, tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "scores.safetensors"
    scored.save(path)
    damage(path)
    with pytest.raises(ScoreError, match=message):
        Scores.load(path)


def test_a_file_that_cannot_be_written_leaves_nothing(scored: Scores, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="Cannot write"):
        scored.save(tmp_path / "missing" / "scores.safetensors")
    with pytest.raises(ScoreError, match="it is a directory"):
        scored.save(tmp_path)
    assert not list(tmp_path.iterdir())


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
