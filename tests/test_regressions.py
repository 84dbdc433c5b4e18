"""What went wrong in the authors' release of the method, one test for each defect.

Each fails if the defect is put into dwattn; where the release was silently wrong, the test compares
values.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dwattn
from dwattn import Plan, reference
from dwattn.adapters import describe
from dwattn.errors import CheckpointError, GeometryError
from dwattn.geometry import Geometry
from support.models import BY_NAME, hub_vit, timm_vit
from support.surgery import shims

IMAGES = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def first_input(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Tokens that the attention layer ``name`` is called with."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(images)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_scattered_mode_runs_and_computes_what_it_should() -> None:
    """It crashed."""
    model = timm_vit(reg_tokens=4).double()
    images = IMAGES.double()
    attention = model.blocks[1].attn
    x = first_input(model, "blocks.1.attn", images)
    wq, wk, wv = attention.qkv.weight.chunk(3)
    bq, bk, bv = attention.qkv.bias.chunk(3)
    wo, bo = attention.proj.weight, attention.proj.bias
    dwattn.replace(model, Plan.for_layers(model, [1], [[0, 2]]))
    layer = model.blocks[1].attn.layer
    for parameter in (layer.kappa, layer.mu, layer.beta):
        parameter.normal_()
    expected = reference.scattered_attention(
        x, wq, wk, wv, wo, 3, (0, 2), layer.kernel, Geometry(4, 3, 5),
        bq=bq, bk=bk, bv=bv, bo=bo, kappa=layer.kappa, mu=layer.mu, beta=layer.beta,
    )  # fmt: skip
    torch.testing.assert_close(model.blocks[1].attn(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel_init", ["gaussian", None])
def test_what_is_reported_as_replaced_is_replaced(kernel_init: str | None) -> None:
    """With its convolution initialisation off, scattered mode reported success and converted 0
    heads.
    """
    model = timm_vit()
    before = model(IMAGES)
    plan = Plan.for_layers(model, [0, 2], [[1], [0, 2]])
    report = dwattn.replace(model, plan, kernel_init=kernel_init)
    layers = shims(model)
    assert report.replaced == list(layers)
    assert [row.heads for row in report.rows if row.heads] == [(1,), (0, 2)]
    assert [shim.layer.replaced for shim in layers.values()] == [[1], [0, 2]]
    assert [shim.layer.inner_dim for shim in layers.values()] == [16, 32]
    # Queries and keys of the replaced heads are gone from the patch rows' computation.
    assert [shim.layer.query.out_features for shim in layers.values()] == [32, 16]
    assert (model(IMAGES) - before).abs().max() > 0.01


@torch.no_grad()
def test_a_3x4_grid_is_not_read_as_4x3() -> None:
    """It was, silently."""
    for size, grid in (((24, 32), (3, 4)), ((32, 24), (4, 3))):
        model = timm_vit(img_size=size, reg_tokens=4)
        dwattn.replace(model, Plan.for_layers(model, [0]), context=False)
        layer = model.blocks[0].attn.layer
        assert layer.grid == grid
        layer.kernel.zero_()
        layer.kernel[:, 1, 2] = 1  # the patch to the right
        x = torch.randn(1, 17, 48)
        values = layer.value(x)[:, 5:].unflatten(1, grid)
        shifted = layer.patch_features(x, Geometry(*grid, 5)).unflatten(1, grid)
        torch.testing.assert_close(shifted[:, :, :-1], values[:, :, 1:])
        assert shifted[:, :, -1].abs().max() == 0


@torch.no_grad()
def test_images_of_the_other_orientation_are_not_taken_for_the_same_grid() -> None:
    model = timm_vit(dynamic_img_size=True)
    dwattn.replace(model, Plan.for_layers(model, [0]))
    with pytest.raises(GeometryError, match=r"grid of 3 x 4.*converted for 4 x 3"):
        model(IMAGES.mT)


@pytest.mark.parametrize("name", ["timm-reg4", "hf-dinov2-reg", "hub-reg4", "timm-dinov3"])
@torch.no_grad()
def test_register_tokens_do_not_become_a_grid_row(name: str) -> None:
    """Four of them did, silently. 4x4 patches and 4 registers would also be a 5x4 grid."""
    family = BY_NAME[name]
    model = family.build()
    layout = describe(model)
    dwattn.replace(model, Plan.for_layers(model, [0]), context=False)
    layer = model.get_submodule(layout.blocks[0].attention_name).layer
    assert (layer.num_prefix, layer.grid) == (5, family.grid)
    height, width = family.grid
    x = torch.randn(1, 5 + height * width, 48)
    moved = x.clone()
    moved[:, 1:5] += 1  # registers only
    change = (layer(moved) - layer(x)).abs()
    assert change[:, 5:].max() == 0, "registers leak into the patch grid"
    assert change[:, :5].max() > 0, "prefix rows must attend to registers"
    moved = x.clone()
    moved[:, 5] += 1  # the first patch reaches its own neighbourhood and the prefix rows only
    reached = (layer(moved) - layer(x)).abs().amax((0, 2))[5:].reshape(height, width) > 0
    expected = torch.zeros(height, width, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("heads", [None, [0, 1, 2]])
@pytest.mark.parametrize("name", ["timm", "timm-no-bias", "hf-vit", "hub"])
@torch.no_grad()
def test_a_block_with_all_heads_converted_has_its_values(
    name: str, heads: list[int] | None
) -> None:
    """It never loaded V: strict=False hid the missing keys."""
    family = BY_NAME[name]
    model = family.build()
    site = describe(model).blocks[1]
    from dwattn.adapters import adapter_for

    weights = adapter_for(site.attention).weights(site.attention)
    dwattn.replace(model, Plan.for_layers(model, [1], [heads]))
    layer = model.get_submodule(site.attention_name).layer
    assert isinstance(layer, dwattn.FusedDWAttention)
    assert torch.equal(layer.value.weight, weights.wv)
    assert torch.equal(layer.proj.weight, weights.wo)
    if weights.bv is not None:
        assert torch.equal(layer.value.bias, weights.bv)


def test_missing_values_cannot_hide_in_a_file(tmp_path: Path) -> None:
    """Loading is strict: a file without one block's V is refused by name."""
    from safetensors import safe_open

    model = timm_vit()
    dwattn.replace(model, Plan.for_layers(model, [1]))
    path = tmp_path / "model.safetensors"
    dwattn.save(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["blocks.1.attn.layer.value.weight"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.attn\.layer\.value\.weight"):
        dwattn.load(timm_vit(), path)


@pytest.mark.parametrize("name", ["timm-reg4", "hf-siglip", "hub"])
@pytest.mark.parametrize("heads", [None, [1]])
def test_a_converted_block_reloads_its_own_state_dict(name: str, heads: list[int] | None) -> None:
    """It could not."""
    family, images = BY_NAME[name], BY_NAME[name].images()
    models = []
    for seed in (0, 1):
        model = family.build()
        dwattn.replace(model, Plan.for_layers(model, [0, 2], [heads, None]), seed=seed)
        models.append(model)
    first, second = models
    assert not torch.equal(family.tokens(first, images), family.tokens(second, images))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(family.tokens(first, images), family.tokens(second, images))
    for name, shim in shims(first).items():
        shims(second)[name].load_state_dict(shim.state_dict(), strict=True)


def test_onnx_takes_any_batch(tmp_path: Path) -> None:
    """Batch 1 was baked in despite dynamic axes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm_vit(reg_tokens=4, depth=2)
    dwattn.replace(model, Plan.for_layers(model, [0]))
    path = tmp_path / "model.onnx"
    dwattn.export(model, path, size=(32, 24))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 24)
        out = torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(out, model(images), rtol=1e-3, atol=1e-4)


def test_loaded_weights_reach_the_export(tmp_path: Path) -> None:
    """The example exported the initial weights: what it had loaded was never applied."""
    onnxruntime = pytest.importorskip("onnxruntime")
    trained = timm_vit(depth=2)
    dwattn.replace(trained, Plan.for_layers(trained, [1]))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    dwattn.save(trained, tmp_path / "trained.safetensors")
    loaded = dwattn.load(timm_vit(depth=2), tmp_path / "trained.safetensors")
    dwattn.export(loaded, tmp_path / "model.onnx", size=(32, 24))
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    out = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), trained(IMAGES), rtol=1e-3, atol=1e-4)


def test_scores_are_not_rounded_before_they_are_ranked() -> None:
    """They were, to two decimals: blocks whose scores differ by less came out in any order."""
    model = timm_vit()
    with torch.no_grad():
        for index, block in enumerate(model.blocks):  # nearly uniform maps: scores far below 0.01
            block.attn.qkv.weight[:96] *= 1e-3 * (1 + 0.1 * ((index * 3) % 4))
    scores = dwattn.score(model, torch.randn(12, 3, 32, 24), num_images=12, progress=False)
    exact = [float(layer.sigma.double().mean()) for layer in scores.layers]
    assert len(set(exact)) == 4
    assert len({round(value, 2) for value in exact}) < 4, "the test needs scores that rounding ties"
    for count in (1, 2, 3):
        plan = dwattn.select(scores, blocks=count, criterion="variance")
        lowest = sorted(range(4), key=exact.__getitem__)[:count]
        assert {layer.name for layer in plan.layers} == {f"blocks.{i}.attn" for i in lowest}


def test_every_library_is_served_and_not_one_vendored_copy() -> None:
    for family in (BY_NAME["timm"], BY_NAME["hf-dinov2"], BY_NAME["hub"]):
        model = family.build()
        assert dwattn.replace(model, Plan.for_layers(model, [0])).replaced == [family.attention]


def test_chunked_blocks_are_counted_in_depth_order() -> None:
    """Padding of chunks is not a block."""
    model = hub_vit(block_chunks=2)
    names = [block.attention_name for block in describe(model).blocks]
    assert names == ["blocks.0.0.attn", "blocks.0.1.attn", "blocks.1.2.attn", "blocks.1.3.attn"]
