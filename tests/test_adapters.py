"""Every supported model is described correctly, and everything else is refused by name with the
reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn import adapters, reference
from dwattn.adapters import describe
from dwattn.errors import GeometryError, PlanError, UnsupportedAttentionError
from dwattn.rotary import placed
from support.models import FAMILIES, Family, clip_both, hf_model, hub_vit, only, timm_vit
from support.more_families import MORE_HF, MULTIHEAD

ALL = FAMILIES + MORE_HF + MULTIHEAD
parametrize_families = pytest.mark.parametrize("family", ALL, ids=str)


@parametrize_families
def test_layout(family: Family) -> None:
    model = family.build()
    layout = describe(model)
    assert layout.grid == family.grid
    assert layout.num_prefix == family.num_prefix
    assert layout.grid_of(*family.size) == family.grid
    assert layout.geometry().num_patches == family.grid[0] * family.grid[1]
    assert layout.blocks[0].attention_name == family.attention
    assert len(layout.blocks) == 4
    for block in layout.blocks:
        assert model.get_submodule(block.name) is block.module
        assert model.get_submodule(block.attention_name) is block.attention
        assert (block.attention_scale is not None) == family.layer_scale
        assert (block.mlp_scale is not None) == family.layer_scale
        assert adapters.refusal(block.attention) is None


@parametrize_families
@torch.no_grad()
def test_weights_and_calls_are_understood(family: Family) -> None:
    """The mapped weights reproduce every layer's output on the tokens it is really called with."""
    model, images = family.build(), family.images()
    layout = describe(model)
    calls: dict[str, tuple[Tensor, Tensor, Any]] = {}

    def recorder(name: str, convention: Any) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            x, out = convention.tokens(args, kwargs), convention.unpack(result)
            calls[name] = (x, out, convention.rotary(kwargs))

        return hook

    for block in layout.blocks:
        adapter = adapters.adapter_for(block.attention)
        assert adapter is not None
        hook = recorder(block.name, adapter.convention(block.attention))
        block.attention.register_forward_hook(hook, with_kwargs=True)
    family.tokens(model, images)
    for block in layout.blocks:
        x, out, rotary = calls[block.name]
        assert x.shape[1] == layout.geometry().num_tokens
        w = adapters.adapter_for(block.attention).weights(block.attention)
        q, k, v = (
            reference.split_heads(nn.functional.linear(x, weight, bias), w.num_heads)
            for weight, bias in ((w.wq, w.bq), (w.wk, w.bk), (w.wv, w.bv))
        )
        assert w.rotary == (rotary is not None)
        q, k = placed(q, k, w, rotary)
        rows = reference.merge_heads(reference.attention_map(q, k, w.scale) @ v)
        torch.testing.assert_close(
            nn.functional.linear(rows, w.wo, w.bo), out, rtol=1e-4, atol=1e-5
        )


@parametrize_families
@torch.no_grad()
def test_blocks_are_residual_blocks_as_described(family: Family) -> None:
    """``t + s1 attention(norm t)``, then the MLP: what error compensation relies on."""
    model, images = family.build(), family.images()
    layout = describe(model)
    for block in layout.blocks:
        seen: dict[str, Any] = {}
        adapter = adapters.adapter_for(block.attention)
        convention = adapter.convention(block.attention)
        handles = [
            block.module.register_forward_pre_hook(
                lambda m, a, k, seen=seen: seen.update(t=only(a[0]) if a else k["hidden_states"]),
                with_kwargs=True,
            ),
            block.attention.register_forward_hook(
                lambda m, a, r, seen=seen, convention=convention: seen.update(
                    a=convention.unpack(r)
                )
            ),
            block.mlp_out.register_forward_hook(lambda m, a, r, seen=seen: seen.update(m=r)),
            block.module.register_forward_hook(lambda m, a, r, seen=seen: seen.update(out=only(r))),
        ]
        family.tokens(model, images)
        for handle in handles:
            handle.remove()
        s1 = 1 if block.attention_scale is None else block.attention_scale
        s2 = 1 if block.mlp_scale is None else block.mlp_scale
        assert block.pre_norm
        expected = seen["t"] + s1 * seen["a"] + s2 * seen["m"]
        torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in ALL if f.num_prefix], ids=str)
@torch.no_grad()
def test_prefix_rows_stay_exact_in_the_first_replaced_block(family: Family) -> None:
    """Tokens, grid, P and output projection are wired correctly if and only if this holds."""
    model, images = family.build(), family.images()
    block = describe(model).blocks[0]
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, result: Any) -> None:
        outputs.append(result[0] if isinstance(result, tuple) else result)

    if family.name == "hf-vit-mae":  # its patches come in random order unless they are told not to
        layout = describe(model)
        with layout.in_raster_order():
            handle = block.attention.register_forward_hook(hook)
            family.tokens(model, images)
            handle.remove()
    else:
        handle = block.attention.register_forward_hook(hook)
        family.tokens(model, images)
        handle.remove()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))
    model.get_submodule(block.attention_name).register_forward_hook(hook)
    family.tokens(model, images)
    before, after = outputs
    p = family.num_prefix
    torch.testing.assert_close(after[:, :p], before[:, :p], rtol=1e-4, atol=1e-5)
    assert (after[:, p:] - before[:, p:]).abs().max() > 0.05


@pytest.mark.parametrize("family", [f for f in ALL if f.size[0] != f.size[1]], ids=str)
@torch.no_grad()
def test_rows_and_columns_are_not_mixed_up(family: Family) -> None:
    """A kernel that takes the patch above shows in the row below its source, whatever the library."""
    model = family.build()
    layout = describe(model)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]), context=False)
    shim = model.get_submodule(layout.blocks[0].attention_name)
    shim.layer.kernel.zero_()
    shim.layer.kernel[:, 0, 1] = 1  # dr = -1: Y[i, j] = V[i - 1, j]
    height, width = family.grid
    x = torch.randn(1, layout.geometry().num_tokens, 48)
    y = shim.layer.patch_features(x, layout.geometry()).unflatten(1, (height, width))
    v = shim.layer.value(x)[:, family.num_prefix :].unflatten(1, (height, width))
    torch.testing.assert_close(y[:, 1:], v[:, :-1])
    assert y[:, 0].abs().max() == 0


def test_images_of_another_shape_are_refused_or_followed() -> None:
    """4x3 patches in a model converted for 3x4: as many tokens, another grid."""
    model = hf_model("Dinov2", image_size=(24, 32))
    plan = dwattn.Plan.for_layers(model, [0, 3])
    tall, wide = torch.randn(1, 3, 32, 24), torch.randn(1, 3, 24, 32)
    # transformers' own interpolation wants square position grids; give it what it needs at this
    # size
    model.embeddings.interpolate_pos_encoding = lambda *_: model.embeddings.position_embeddings
    dwattn.replace(model, plan, prefix="exact")
    model(wide)
    with pytest.raises(GeometryError, match=r"32 x 24 pixels.*grid of 4 x 3.*converted for 3 x 4"):
        model(tall)
    fixed = model(wide).last_hidden_state
    dwattn.restore(model)
    dwattn.replace(model, plan, dynamic_grid=True)
    torch.testing.assert_close(model(wide).last_hidden_state, fixed)
    assert model(tall).last_hidden_state.shape == fixed.shape


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: timm_vit(dynamic_img_size=True), (40, 24)),
        (lambda: timm_vit(dynamic_img_size=True, dynamic_img_pad=True), (37, 22)),
        (lambda: hf_model("Dinov2WithRegisters"), (24, 40)),
        (lambda: hub_vit(num_register_tokens=4), (28, 70)),
    ],
)
@torch.no_grad()
def test_dynamic_grids(build: Any, size: tuple[int, int]) -> None:
    model = build()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [1, 2]), dynamic_grid=True)
    layer = model.get_submodule(describe(model).blocks[1].attention_name).layer
    seen = []
    layer.register_forward_hook(lambda m, a, r: seen.append(a[0].shape[1]))
    for height, width in (size, size[::-1]):
        model(torch.randn(2, 3, height, width))
        assert layer.grid_source.grid[0] * layer.grid_source.grid[1] == seen[-1] - layer.num_prefix
    assert layer.grid_source.grid == describe(model).grid_of(*size[::-1])


def test_vit_mae_must_keep_all_patches() -> None:
    masked = hf_model("ViTMAE", mask_ratio=0.75)
    with pytest.raises(UnsupportedAttentionError, match=r"mask_ratio=0.75.*mask_ratio = 0"):
        dwattn.Plan.for_layers(masked, [0])
    masked.config.mask_ratio = 0.0
    assert describe(masked).num_prefix == 1


@torch.no_grad()
def test_vit_mae_keeps_its_patches_in_order_while_converted() -> None:
    model, images = hf_model("ViTMAE", mask_ratio=0.0), torch.randn(2, 3, 32, 32)
    noise = torch.arange(16.0).expand(2, 16)
    in_order = model(images, noise=noise).last_hidden_state
    with describe(model).in_raster_order():
        torch.testing.assert_close(model(images).last_hidden_state, in_order)
    assert not torch.allclose(model(images).last_hidden_state, in_order, atol=1e-3)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [1]))
    first, second = model(images), model(images)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert torch.equal(first.ids_restore[0], torch.arange(16))
    assert first.mask.abs().max() == 0
    with pytest.raises(UnsupportedAttentionError, match=r"noise=.*raster order"):
        model(images, noise=noise)
    model.config.mask_ratio = 0.5
    with pytest.raises(UnsupportedAttentionError, match=r"mask_ratio=0\.5"):
        model(images)
    model.config.mask_ratio = 0.0
    dwattn.restore(model)
    assert "random_masking" not in vars(model.embeddings)
    torch.testing.assert_close(model(images, noise=noise).last_hidden_state, in_order)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_text_towers_are_never_touched(kind: str) -> None:
    model = clip_both(kind)
    plan = dwattn.Plan.for_layers(model, range(4))
    assert all(layer.name.startswith("vision_model.") for layer in plan.layers)
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])}
    before = model.text_model(**tokens).last_hidden_state
    dwattn.replace(model, plan)
    assert torch.equal(model.text_model(**tokens).last_hidden_state, before)
    text = next(
        n
        for n, m in model.named_modules()
        if n.startswith("text_model") and n.endswith("self_attn")
    )
    plan.layers[0].name = text
    dwattn.restore(model)
    with pytest.raises(PlanError, match=f"{text}, which is not an attention layer"):
        dwattn.replace(model, plan)


def test_wrappers_are_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"vit": timm_vit(), "head": nn.Linear(5, 2)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["head"](self.inner["vit"](x * 2))

    model = Wrapper().eval()
    layout = describe(model)
    assert layout.name == "inner.vit"
    assert layout.blocks[1].attention_name == "inner.vit.blocks.1.attn"
    plan = dwattn.Plan.for_layers(model, [1])
    dwattn.replace(model, plan)
    assert isinstance(model.inner["vit"].blocks[1].attn, adapters.ConvertedAttention)
    # A plan made for the wrapper fits what is wrapped, and the other way round.
    dwattn.restore(model)
    dwattn.replace(model.inner["vit"], plan)
