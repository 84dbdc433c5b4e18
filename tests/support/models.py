"""Tiny models with random weights, one for every supported family and its options.

The weights are large enough for attention to depend on the image, and LayerScale is large enough
for attention to matter: a replacement that does nothing shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from support import hub_dinov2, hub_dinov3


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        build: makes an unconverted model with random weights; the same ones each time.
        size: image height and width.
        grid, num_prefix: what the adapter must find.
        attention: name of block 0's attention layer.
        patches: gets the ``(B, H*W, D)`` patch tokens out of a model's result, or None where there
            are none.
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix: int
    attention: str
    layer_scale: bool = False
    tokens: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: first_tensor(model(x))

    def images(self, count: int = 2, seed: int = 0) -> Tensor:
        """``(count, 3, H, W)``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, *self.size, generator=generator)

    def __str__(self) -> str:
        return self.name


def first_tensor(result: Any) -> Tensor:
    """The main output of any of the models."""
    if isinstance(result, Tensor):
        return result
    for key in (
        "last_hidden_state",
        "logits",
        "x_norm_patchtokens",
        "image_embeds",
        "heatmaps",
        "predicted_depth",
    ):
        value = result.get(key) if isinstance(result, dict) else getattr(result, key, None)
        if isinstance(value, Tensor):
            return value
    maps = getattr(result, "feature_maps", None)
    return maps[-1] if maps else next(v for v in result if isinstance(v, Tensor))


def only(value: Any) -> Any:
    """The tokens in what a block takes or returns, which may be a tuple or a list."""
    return value[0] if isinstance(value, (tuple, list)) else value


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrite all parameters; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("gamma", "gamma_1", "gamma_2", "lambda1")):
            parameter.copy_(0.6 + 0.1 * values)
        elif parameter.dim() < 2:
            weight = ("norm" in name or "ln" in name) and name.endswith("weight")
            parameter.copy_((1.0 if weight else 0.0) + 0.1 * values)
        elif "pos" in name or "token" in name:
            parameter.copy_(0.3 * values)
        else:
            parameter.copy_(values / parameter[0].numel() ** 0.5)
    return model.eval()


def timm_vit(**options: Any) -> nn.Module:
    """``timm`` VisionTransformer of 4 blocks, 48 wide, 3 heads."""
    from timm.models.vision_transformer import VisionTransformer

    defaults = {"img_size": (32, 24), "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return randomise(VisionTransformer(**{**defaults, "num_classes": 5, **options}))


def timm_model(name: str, **options: Any) -> nn.Module:
    """One of timm's own models, as small as the options make it."""
    import timm

    return timm.create_model(name, **options)


def timm_eva(**options: Any) -> nn.Module:
    """``timm`` Eva of 4 blocks, 48 wide, 3 heads, rotary as in EVA-02 unless told otherwise."""
    from timm.models.eva import Eva

    defaults = {
        "img_size": (32, 24),
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "use_rot_pos_emb": True,
        "num_classes": 5,
    }
    return randomise(Eva(**{**defaults, **options}))


#: What makes an Eva a DINOv3.
DINOV3: dict[str, Any] = {
    "dynamic_img_size": True,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 4,
    "init_values": 1e-5,
    "qkv_bias": False,
}


def timm_distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return randomise(
        VisionTransformerDistilled(
            img_size=(32, 24), patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5
        )
    )


def hf_model(kind: str, class_name: str | None = None, **options: Any) -> nn.Module:
    """A transformers model of 4 blocks, 48 wide, 3 heads, by its configuration's name."""
    import transformers

    config_class = getattr(transformers, f"{kind}Config")
    defaults = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind.startswith("Dinov2"):
        defaults.pop("intermediate_size")
        defaults |= {"mlp_ratio": 2}
    config = config_class(**{**defaults, **options})
    return randomise(getattr(transformers, class_name or f"{kind}Model")(config))


def hf_dinov3() -> nn.Module:
    """transformers' DINOv3, rotary, with registers."""
    return hf_model("DINOv3ViT", num_register_tokens=4)


def clip_both(kind: str = "CLIP", class_name: str | None = None) -> nn.Module:
    """CLIP or SigLIP with both towers, so that the text tower can be checked to stay as it is."""
    import transformers

    tower = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }
    text = {**tower, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 8}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    return randomise(getattr(transformers, class_name or f"{kind}Model")(config))


def hub_vit(**options: Any) -> nn.Module:
    """The stand-in for torch.hub's DINOv2."""
    return randomise(hub_dinov2.DinoVisionTransformer(**options))


def hub_dinov3_vit(**options: Any) -> nn.Module:
    """The stand-in for torch.hub's DINOv3."""
    return randomise(hub_dinov3.DinoVisionTransformer(**options))


def _hub_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_features(x)["x_norm_patchtokens"]


def _vision(model: nn.Module, x: Tensor) -> Tensor:
    return model.vision_model(pixel_values=x).last_hidden_state


_TIMM, _HF, _LAYER = "blocks.0.attn", "encoder.layer.0.attention", "layer.0.attention"

TIMM = [
    Family("timm", timm_vit, (32, 24), (4, 3), 1, _TIMM),
    Family(
        "timm-reg4",
        lambda: timm_vit(reg_tokens=4, no_embed_class=True, init_values=1e-5),
        (32, 24),
        (4, 3),
        5,
        _TIMM,
        True,
    ),
    Family(
        "timm-no-class",
        lambda: timm_vit(class_token=False, global_pool="avg"),
        (32, 24),
        (4, 3),
        0,
        _TIMM,
    ),
    Family("timm-qk-norm", lambda: timm_vit(qk_norm=True), (32, 24), (4, 3), 1, _TIMM),
    Family("timm-no-bias", lambda: timm_vit(qkv_bias=False), (32, 24), (4, 3), 1, _TIMM),
    Family("timm-clip", lambda: timm_vit(pre_norm=True), (32, 24), (4, 3), 1, _TIMM),
    Family(
        "timm-mae", lambda: timm_vit(global_pool="avg", fc_norm=False), (32, 24), (4, 3), 1, _TIMM
    ),
    Family(
        "timm-siglip",
        lambda: timm_vit(class_token=False, global_pool="map"),
        (32, 24),
        (4, 3),
        0,
        _TIMM,
    ),
    Family("timm-deit", timm_distilled, (32, 24), (4, 3), 2, _TIMM),
    Family("timm-dynamic", lambda: timm_vit(dynamic_img_size=True), (32, 24), (4, 3), 1, _TIMM),
    Family("timm-dinov3", lambda: timm_eva(**DINOV3), (32, 24), (4, 3), 5, _TIMM, True),
    Family(
        "timm-eva02", lambda: timm_eva(swiglu_mlp=True, qkv_fused=False), (32, 24), (4, 3), 1, _TIMM
    ),
]
HF = [
    Family("hf-dinov2", lambda: hf_model("Dinov2"), (32, 32), (4, 4), 1, _HF, True),
    Family(
        "hf-dinov2-swiglu",
        lambda: hf_model("Dinov2", use_swiglu_ffn=True),
        (32, 32),
        (4, 4),
        1,
        _HF,
        True,
    ),
    Family(
        "hf-dinov2-reg", lambda: hf_model("Dinov2WithRegisters"), (32, 32), (4, 4), 5, _HF, True
    ),
    Family("hf-dinov3", hf_dinov3, (32, 32), (4, 4), 5, f"model.{_LAYER}", True),
    Family(
        "hf-dinov2-head",
        lambda: hf_model("Dinov2", "Dinov2ForImageClassification"),
        (32, 32),
        (4, 4),
        1,
        f"dinov2.{_HF}",
        True,
    ),
    Family(
        "hf-dinov2-backbone",
        lambda: hf_model("Dinov2", "Dinov2Backbone"),
        (32, 32),
        (4, 4),
        1,
        _HF,
        True,
    ),
    Family(
        "hf-vit",
        lambda: hf_model("ViT", image_size=(32, 24)),
        (32, 24),
        (4, 3),
        1,
        "layers.0.attention",
    ),
    Family(
        "hf-vit-head",
        lambda: hf_model("ViT", "ViTForImageClassification"),
        (32, 32),
        (4, 4),
        1,
        "vit.layers.0.attention",
    ),
    Family(
        "hf-vit-mae",
        lambda: hf_model("ViTMAE", mask_ratio=0.0),
        (32, 32),
        (4, 4),
        1,
        "layers.0.attention",
    ),
    Family(
        "hf-deit",
        lambda: hf_model("DeiT", image_size=(32, 24)),
        (32, 24),
        (4, 3),
        2,
        "layers.0.attention",
    ),
    Family(
        "hf-clip", lambda: hf_model("CLIPVision"), (32, 32), (4, 4), 1, "encoder.layers.0.self_attn"
    ),
    Family(
        "hf-clip-both",
        clip_both,
        (32, 32),
        (4, 4),
        1,
        "vision_model.encoder.layers.0.self_attn",
        tokens=_vision,
    ),
    Family(
        "hf-siglip",
        lambda: hf_model("SiglipVision"),
        (32, 32),
        (4, 4),
        0,
        "encoder.layers.0.self_attn",
    ),
    Family(
        "hf-siglip-both",
        lambda: clip_both("Siglip"),
        (32, 32),
        (4, 4),
        0,
        "vision_model.encoder.layers.0.self_attn",
        tokens=_vision,
    ),
]
HUB = [
    Family("hub", hub_vit, (56, 56), (4, 4), 1, _TIMM, True, _hub_tokens),
    Family(
        "hub-plain",
        lambda: hub_vit(attn_class=hub_dinov2.Attention, init_values=None),
        (56, 56),
        (4, 4),
        1,
        _TIMM,
        False,
        _hub_tokens,
    ),
    Family(
        "hub-reg4",
        lambda: hub_vit(num_register_tokens=4, ffn_layer="swiglufused"),
        (56, 56),
        (4, 4),
        5,
        _TIMM,
        True,
        _hub_tokens,
    ),
    Family("hub-dinov3", hub_dinov3_vit, (32, 24), (4, 3), 5, _TIMM, True, _hub_tokens),
    Family(
        "hub-chunked",
        lambda: hub_vit(block_chunks=2),
        (56, 56),
        (4, 4),
        1,
        "blocks.0.0.attn",
        True,
        _hub_tokens,
    ),
]
FAMILIES = TIMM + HF + HUB
BY_NAME = {family.name: family for family in FAMILIES}
