"""Every supported model is described correctly, and everything else is refused by name with the
reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn import adapters, reference
from dwattn.adapters import AttentionAdapter, BackboneAdapter, BackboneLayout, BlockSite, describe
from dwattn.errors import GeometryError, PlanError, UnsupportedAttentionError
from dwattn.projections import AttentionWeights
from support import hub_dinov2
from support.models import FAMILIES, HF, TIMM, Family, clip_both, hf_model, hub_vit, timm_vit

parametrize_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


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
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def recorder(name: str, convention: Any) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            calls[name] = (convention.tokens(args, kwargs), convention.unpack(result))

        return hook

    for block in layout.blocks:
        adapter = adapters.adapter_for(block.attention)
        assert adapter is not None
        hook = recorder(block.name, adapter.convention(block.attention))
        block.attention.register_forward_hook(hook, with_kwargs=True)
    family.tokens(model, images)
    for block in layout.blocks:
        x, out = calls[block.name]
        assert x.shape[1] == layout.geometry().num_tokens
        w = adapters.adapter_for(block.attention).weights(block.attention)
        q, k, v = (
            reference.split_heads(nn.functional.linear(x, weight, bias), w.num_heads)
            for weight, bias in ((w.wq, w.bq), (w.wk, w.bk), (w.wv, w.bv))
        )
        q = q if w.q_norm is None else w.q_norm(q)
        k = k if w.k_norm is None else w.k_norm(k)
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
                lambda m, a, k, seen=seen: seen.update(t=a[0] if a else k["hidden_states"]),
                with_kwargs=True,
            ),
            block.attention.register_forward_hook(
                lambda m, a, r, seen=seen, convention=convention: seen.update(
                    a=convention.unpack(r)
                )
            ),
            block.mlp_out.register_forward_hook(lambda m, a, r, seen=seen: seen.update(m=r)),
            block.module.register_forward_hook(
                lambda m, a, r, seen=seen: seen.update(out=r[0] if isinstance(r, tuple) else r)
            ),
        ]
        family.tokens(model, images)
        for handle in handles:
            handle.remove()
        s1 = 1 if block.attention_scale is None else block.attention_scale
        s2 = 1 if block.mlp_scale is None else block.mlp_scale
        assert block.pre_norm
        expected = seen["t"] + s1 * seen["a"] + s2 * seen["m"]
        torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.num_prefix], ids=str)
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


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.size[0] != f.size[1]], ids=str)
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


# --- refusals
# -----------------------------------------------------------------------------------------


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def hf_tiny(kind: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}Model")(config)


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
UNSUPPORTED_MODELS = {
    "eva": (lambda: timm_model("eva02_tiny_patch14_224", depth=1), "EvaAttention cannot.*rotary"),
    "beit": (
        lambda: timm_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3),
        "Attention cannot be replaced.*relative position bias",
    ),
    "swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1)),
        "WindowAttention cannot.*windowed",
    ),
    "hf-dinov3": (
        lambda: hf_tiny("DINOv3ViT", **_SMALL, image_size=32, patch_size=8),
        "DINOv3ViTAttention cannot.*rotary",
    ),
    "hf-pixtral": (
        lambda: hf_tiny("PixtralVision", **_SMALL, image_size=32, patch_size=8),
        "PixtralAttention cannot.*rotary",
    ),
    "hf-beit": (
        lambda: hf_tiny("Beit", **_SMALL, image_size=32, patch_size=8),
        "BeitAttention cannot.*relative position bias",
    ),
    "hf-swin": (
        lambda: hf_tiny("Swin", image_size=32, embed_dim=16, depths=[1], num_heads=[2], window_size=4),
        "Swin.*Attention cannot.*windowed",
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential.*no attention layers"),
    "torch": (
        lambda: nn.TransformerEncoderLayer(16, 2),
        "MultiheadAttention is not known.*adapters.register",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED_MODELS)
def test_unsupported_models_are_refused_by_name(name: str) -> None:
    build, message = UNSUPPORTED_MODELS[name]
    model = build()
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(UnsupportedAttentionError, match=message) as raised:
        dwattn.Plan.for_layers(model, [0])
    assert "Supported are timm VisionTransformer" in str(raised.value)
    assert before == {n: id(m) for n, m in model.named_modules()}


def _gated() -> nn.Module:
    from timm.layers import Attention

    model = timm_vit()
    model.blocks[1].attn = Attention(48, num_heads=3, qkv_bias=True, gated=True)
    return model


def _scale_norm() -> nn.Module:
    return timm_vit(scale_attn_norm=True)


def _lora() -> nn.Module:
    class LoRALinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = timm_vit()
    model.blocks[1].attn.qkv = LoRALinear(48, 144)
    return model


def _causal() -> nn.Module:
    model = hf_model("ViT")
    model.layers[1].attention.is_causal = True
    return model


def _nan() -> nn.Module:
    model = timm_vit()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[5, 7] = float("nan")
    return model


def _meta() -> nn.Module:
    model = timm_vit()
    model.blocks[1].attn.to("meta")
    return model


def _projecting() -> nn.Module:
    from timm.layers import Attention

    model = timm_vit()
    model.blocks[1].attn = Attention(48, num_heads=3, dim_out=24)
    return model


def _custom() -> nn.Module:
    class MyAttention(nn.Module):
        pass

    model = timm_vit()
    model.blocks[1].attn = MyAttention()
    return model


UNSUPPORTED_LAYERS = {
    "gated": (_gated, "gate"),
    "lora": (_lora, "LoRALinear"),
    "causal": (_causal, "Causal attention"),
    "nan": (_nan, "wq holds NaN"),
    "meta": (_meta, "meta device"),
    "output width": (_projecting, r"shape \(24, 48\), expected \(48, 48\)"),
    "unknown": (_custom, r"MyAttention is not known.*register"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_LAYERS)
def test_unsupported_layers_are_refused_and_the_others_replaced(name: str) -> None:
    build, message = UNSUPPORTED_LAYERS[name]
    model = build()
    modules = dict(model.named_modules())
    plan = dwattn.Plan.for_layers(model, [0, 1])
    attention = plan.layers[1].name
    with pytest.raises(PlanError, match=message) as raised:
        dwattn.replace(model, plan)
    assert attention in str(raised.value)
    assert plan.layers[0].name not in str(raised.value)
    assert modules == dict(model.named_modules())
    report = dwattn.replace(model, plan, dry_run=True)
    assert list(report.refused) == [attention]
    plan = dwattn.Plan.for_layers(model, [0])
    report = dwattn.replace(model, plan)
    assert report.replaced == [plan.layers[0].name]
    assert list(report.refused) == [attention]


def test_scale_norm_is_refused() -> None:
    model = _scale_norm()
    with pytest.raises(PlanError, match="scale_norm normalises all heads together"):
        dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ParallelThingsBlock"])
def test_parallel_blocks_are_refused(block: str) -> None:
    from timm.models import vision_transformer

    model = timm_vit(block_fn=getattr(vision_transformer, block))
    with pytest.raises(UnsupportedAttentionError, match=f"blocks.0 is a {block}"):
        describe(model)


def test_hub_causal_blocks_are_refused() -> None:
    model = hub_vit(block_class=hub_dinov2.CausalSelfAttentionBlock)
    with pytest.raises(UnsupportedAttentionError, match=r"blocks.0 is a CausalSelfAttentionBlock"):
        describe(model)


def _converted(build: Any = timm_vit) -> tuple[nn.Module, nn.Module]:
    model = build()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))
    return model, model.get_submodule(describe(model).blocks[0].attention_name)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"attn_mask": torch.zeros(13, 13)}, "attn_mask=.*cannot apply masks"),
        ((), {"attention_mask": torch.zeros(13, 13)}, "attention_mask="),
        ((), {"causal_attention_mask": torch.zeros(13, 13)}, "causal_attention_mask="),
        ((), {"attn_bias": torch.zeros(13, 13)}, "attn_bias="),
        ((), {"head_mask": torch.ones(3)}, "head_mask="),
        ((), {"is_causal": True}, "is_causal=True"),
        ((), {"position_embeddings": (torch.ones(1), torch.ones(1))}, "rotary"),
        ((), {"output_attentions": True}, "output_attentions=True.*no attention weights"),
        ((torch.zeros(13, 13),), {}, "Tensor after the tokens"),
        ((None, True), {}, "bool after the tokens"),
    ],
)
def test_calls_that_need_attention_are_refused(args: Any, kwargs: Any, message: str) -> None:
    _, shim = _converted()
    x = torch.randn(1, 13, 48)
    shim(x, None, False)
    shim(x, attn_mask=None, is_causal=False)
    with pytest.raises(UnsupportedAttentionError, match=message):
        shim(x, *args, **kwargs)


def test_lists_of_tokens_are_refused() -> None:
    _, shim = _converted()
    with pytest.raises(UnsupportedAttentionError, match="one tensor of tokens, got list"):
        shim([torch.randn(1, 13, 48)])


@pytest.mark.parametrize("family", [f for f in HF if "backbone" not in f.name], ids=str)
def test_attention_weights_of_a_converted_model_are_refused(family: Family) -> None:
    """Better an error than a tuple in which the replaced layers are silently missing."""
    model = family.build()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))
    part = getattr(model, "vision_model", model)
    with pytest.raises(UnsupportedAttentionError, match="output_attentions=True"):
        part(family.images(), output_attentions=True)


@pytest.mark.parametrize("family", [f for f in HF if "both" not in f.name], ids=str)
@torch.no_grad()
def test_eager_attention_converts_too(family: Family) -> None:
    model, images = family.build(), family.images()
    plan = dwattn.Plan.for_layers(model, [1])
    dwattn.replace(model, plan)
    sdpa = family.tokens(model, images)
    dwattn.restore(model)
    model.set_attn_implementation("eager")
    dwattn.replace(model, plan)
    torch.testing.assert_close(family.tokens(model, images), sdpa, rtol=1e-4, atol=1e-4)


# --- third parties
# ------------------------------------------------------------------------------------


class ThirdPartyAttention(nn.Module):
    """Separate projections under names of its own, called with channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (reference.split_heads(p(tokens.mT), 2) for p in (self.a, self.b, self.c))
        return self.d(reference.merge_heads(nn.functional.scaled_dot_product_attention(q, k, v))).mT


class ThirdPartyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.stages = nn.ModuleList([ThirdPartyAttention() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2)
        for stage in self.stages:
            tokens = tokens + stage(tokens)
        return tokens


class ChannelsFirst(adapters.CallConvention):
    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return super().tokens(args, kwargs).mT

    def pack(self, output: Tensor) -> Any:
        return output.mT


class ThirdPartyAttentionAdapter(AttentionAdapter):
    name = "third party attention"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is ThirdPartyAttention

    def weights(self, module: Any) -> AttentionWeights:
        a, b, c, d = module.a, module.b, module.c, module.d
        return AttentionWeights(
            2, 8, 8**-0.5, a.weight, b.weight, c.weight, d.weight, a.bias, b.bias, c.bias, d.bias
        )

    def convention(self, module: nn.Module) -> adapters.CallConvention:
        return ChannelsFirst()


class ThirdPartyBackboneAdapter(BackboneAdapter):
    def matches(self, module: nn.Module) -> bool:
        return type(module) is ThirdPartyModel

    def layout(self, name: str, module: Any) -> BackboneLayout:
        prefix = f"{name}." if name else ""
        blocks = tuple(
            BlockSite(f"{prefix}stages.{i}", stage, f"{prefix}stages.{i}", stage, pre_norm=False)
            for i, stage in enumerate(module.stages)
        )
        return BackboneLayout("third party", name, module, blocks, 0, None, (4, 4), module.patches)


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> ThirdPartyModel:
    monkeypatch.setattr(adapters, "_attention_adapters", list(adapters._attention_adapters))
    monkeypatch.setattr(adapters, "_backbone_adapters", list(adapters._backbone_adapters))
    adapters.register(ThirdPartyAttentionAdapter())
    adapters.register(ThirdPartyBackboneAdapter())
    return ThirdPartyModel().eval()


@torch.no_grad()
def test_third_parties_can_register_their_own(third_party: ThirdPartyModel, tmp_path: Path) -> None:
    model, images = third_party, torch.randn(2, 3, 12, 20)
    before = model(images)
    plan = dwattn.Plan.for_layers(model, [0])
    with pytest.raises(UnsupportedAttentionError, match=r"no image size.*grid=.*dynamic_grid=True"):
        dwattn.replace(model, plan)
    dwattn.replace(model, plan, grid=(3, 5))
    after = model(images)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-3)
    dwattn.save(model, tmp_path / "model.safetensors")
    assert torch.equal(dwattn.load(ThirdPartyModel, tmp_path / "model.safetensors")(images), after)
    dwattn.restore(model)
    assert torch.equal(model(images), before)


def test_only_adapters_can_be_registered() -> None:
    with pytest.raises(TypeError, match="AttentionAdapter or BackboneAdapter, got int"):
        adapters.register(3)


def test_without_registration_the_third_party_is_unknown() -> None:
    with pytest.raises(UnsupportedAttentionError, match="ThirdPartyAttention is not known"):
        describe(ThirdPartyModel())


# --- other releases
# -----------------------------------------------------------------------------------


def test_transformers_4_57() -> None:
    """All transformers families once more, in a process with the other release."""
    folder = os.environ.get("DWATTN_TRANSFORMERS_457")
    if not folder or not Path(folder, "transformers").is_dir():
        pytest.skip("set DWATTN_TRANSFORMERS_457 to a folder that holds transformers 4.57")
    tests = Path(__file__).parent
    path = os.pathsep.join([folder, str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "support.transformers_457"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = dict(line.split() for line in done.stdout.splitlines())
    assert set(names) == {family.name for family in HF}
    assert names["hf-vit"] == "encoder.layer.0.attention"
    assert names["hf-clip"] == "vision_model.encoder.layers.0.self_attn"


def test_importing_dwattn_imports_no_model_library() -> None:
    code = (
        "import dwattn, dwattn.adapters, sys; dwattn.replace; dwattn.load; "
        "print([m for m in ('timm', 'transformers', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    light = subprocess.run(
        [sys.executable, "-c", "import dwattn, sys; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert light.stdout.strip() == "False"


def test_public_names() -> None:
    for name in dwattn.__all__:
        assert getattr(dwattn, name) is not None
    import importlib

    importlib.import_module("dwattn.export")
    assert callable(dwattn.export), "importing the submodule must not hide the function of its name"
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        dwattn.bogus  # noqa: B018


def test_timm_families_are_real() -> None:
    """The tiny models are built by the classes that timm's own names build."""
    model = timm_model("vit_small_patch14_reg4_dinov2.lvd142m", img_size=(28, 42), embed_dim=48, depth=1, num_heads=3)  # fmt: skip
    layout = describe(model)
    assert layout.num_prefix == 5
    assert layout.grid == (2, 3)
    tiny = {cls.__name__ for family in TIMM for cls in type(family.build()).__mro__}
    assert type(model).__name__ in tiny
