"""Models, layers and calls that cannot be replaced are refused by name with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.adapters import describe
from dwattn.errors import PlanError, UnsupportedAttentionError
from support import hub_dinov2, hub_dinov3
from support.models import DINOV3, HF, Family, hf_model, hub_vit, timm_eva, timm_model, timm_vit


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
    "beit": (
        lambda: timm_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3),
        "Attention cannot be replaced.*relative position bias",
    ),
    "swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1)),
        "WindowAttention cannot.*windowed",
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
    "hf-vitdet": (
        lambda: hf_tiny("VitDet", **{**_SMALL, "image_size": 32, "patch_size": 8}),
        "VitDetAttention cannot.*relative position bias",
    ),
    "sam": (
        lambda: timm_model("samvit_base_patch16", depth=1, embed_dim=48, num_heads=3, img_size=64),
        "Attention cannot.*relative position bias",
    ),
    "cait": (
        lambda: timm_model("cait_xxs24_224", depth=1, embed_dim=48, num_heads=3),
        "ClassAttn cannot.*not the tokens themselves.*TalkingHeadAttn cannot.*mixes",
    ),
    "xcit": (
        lambda: timm_model("xcit_nano_12_p16_224", depth=1, embed_dim=48, num_heads=3),
        "XCA cannot.*does not form a token-by-token attention map",
    ),
    "edgenext": (
        lambda: timm_model("edgenext_xx_small", dims=(8, 16, 16, 16), depths=(1, 1, 2, 2)),
        "CrossCovarianceAttn cannot.*does not form a token-by-token attention map",
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential.*no attention layers"),
    "torch": (
        lambda: nn.TransformerEncoderLayer(16, 2, batch_first=True),
        "MultiheadAttention is known, but not this model.*adapters.register",
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


def test_hub_dinov3_that_drops_samples_is_refused() -> None:
    model = hub_dinov3.DinoVisionTransformer()
    model.blocks[2].sample_drop_ratio = 0.1
    with pytest.raises(
        UnsupportedAttentionError, match=r"blocks.2 drops samples.*drop_path_rate=0"
    ):
        describe(model)


def test_rotations_of_each_block_are_refused() -> None:
    model = timm_eva(rope_type="mixed")
    with pytest.raises(UnsupportedAttentionError, match="Eva learns rotary frequencies of its own"):
        dwattn.Plan.for_layers(model, [0])


def _gated() -> nn.Module:
    from timm.layers import Attention

    model = timm_vit()
    model.blocks[1].attn = Attention(48, num_heads=3, qkv_bias=True, gated=True)
    return model


def _eva_gated() -> nn.Module:
    model = timm_eva(**DINOV3)
    model.blocks[1].attn.gate = nn.Linear(48, 48)
    return model


def _eva_norm() -> nn.Module:
    model = timm_eva()
    model.blocks[1].attn.norm = nn.LayerNorm(48)
    return model


def _eva_grouped() -> nn.Module:
    return timm_eva(
        **{**DINOV3, "attn_type": "rope", "num_kv_heads": (3, 1, 3, 3), "qkv_fused": False}
    )


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
    "eva gated": (_eva_gated, "gate"),
    "eva norm": (_eva_norm, "scale_norm"),
    "eva grouped": (_eva_grouped, "fewer key/value heads"),
    "lora": (_lora, r"test_adapters_refused\.\S*LoRALinear instead of a plain"),
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


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "CLIPVision"])
@torch.no_grad()
def test_attention_weights_that_the_configuration_asks_for_are_refused(kind: str) -> None:
    model, images = hf_model(kind), torch.randn(2, 3, 32, 32)
    model.set_attn_implementation("eager")
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))
    model.config.output_attentions = True
    with pytest.raises(UnsupportedAttentionError, match=r"config.output_attentions=True.*without"):
        model(images)
    twin = copy.deepcopy(model)
    twin.config.output_attentions = False
    assert torch.isfinite(twin(images)[0]).all()


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
