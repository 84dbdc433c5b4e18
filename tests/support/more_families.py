"""More families: transformers models whose attention is that of one of :mod:`support.models` under another name, and
models on PyTorch's own ``nn.MultiheadAttention``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from support import open_clip_vit
from support.models import Family, clip_both, hf_model, randomise

_TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
_SQUARE: tuple[tuple[int, int], tuple[int, int]] = ((32, 32), (4, 4))
_PORTRAIT: tuple[tuple[int, int], tuple[int, int]] = ((32, 24), (4, 3))


def pose(**options: Any) -> nn.Module:
    """ViTPose, portrait, no CLS."""
    import transformers

    return randomise(
        transformers.VitPoseForPoseEstimation(
            transformers.VitPoseConfig(backbone_config=_pose_config(**options))
        )
    )


def pose_backbone(**options: Any) -> nn.Module:
    """What ViTPose has in front of its head."""
    import transformers

    return randomise(transformers.VitPoseBackbone(_pose_config(**options)))


def _pose_config(**options: Any) -> Any:
    import transformers

    sizes = {k: v for k, v in _TOWER.items() if k != "intermediate_size"}
    return transformers.VitPoseBackboneConfig(
        **sizes, mlp_ratio=2, image_size=[32, 24], patch_size=[8, 8], out_indices=[4], **options
    )


def detector(kind: str) -> nn.Module:
    """OWL-ViT or OWLv2 with both towers and heads."""
    import transformers

    text = {**_TOWER, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 8}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config={**_TOWER, "image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    return randomise(getattr(transformers, f"{kind}ForObjectDetection")(config))


def depth() -> nn.Module:
    """Depth Anything, which contains a DINOv2."""
    import transformers

    sizes = {k: v for k, v in _TOWER.items() if k != "intermediate_size"}
    backbone = transformers.Dinov2Config(
        **sizes, mlp_ratio=2, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )  # fmt: skip
    return randomise(
        transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig(
                backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, reassemble_hidden_size=48
            )
        )
    )  # fmt: skip


def dpt(kind: str) -> nn.Module:
    """DPT on a plain ViT."""
    return hf_model(
        "DPT", kind, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
    )  # fmt: skip


def torchvision_vit() -> nn.Module:
    """torchvision's, of 4 blocks."""
    from torchvision.models.vision_transformer import VisionTransformer

    return randomise(VisionTransformer(32, 8, 4, 3, 48, 96, num_classes=5))


def open_clip(**options: Any) -> nn.Module:
    """The stand-in for OpenCLIP's image tower."""
    return randomise(open_clip_vit.VisionTransformer(**options))


def _vision(model: Any, x: Any) -> Any:
    return model.vision_model(pixel_values=x).last_hidden_state


_CLIP = "encoder.layers.0.self_attn"
MORE_HF = [
    Family("hf-vit-msn", lambda: hf_model("ViTMSN"), *_SQUARE, 1, "layers.0.attention"),
    Family("hf-ijepa", lambda: hf_model("IJepa"), *_SQUARE, 0, "layers.0.attention"),
    Family("hf-pixio", lambda: hf_model("Pixio"), *_SQUARE, 8, "layers.0.attention"),
    Family("hf-dpt", lambda: dpt("DPTModel"), *_SQUARE, 1, "encoder.layer.0.attention"),
    Family("hf-vitpose-backbone", pose_backbone, *_PORTRAIT, 0, "encoder.layer.0.attention"),
    Family("hf-vitpose", pose, *_PORTRAIT, 0, "backbone.encoder.layer.0.attention"),
    Family("hf-depth-anything", depth, (56, 56), (4, 4), 1, "backbone.encoder.layer.0.attention", True),
    Family("hf-clipseg", lambda: hf_model("CLIPSegVision"), *_SQUARE, 1, _CLIP),
    Family("hf-chinese-clip", lambda: hf_model("ChineseCLIPVision"), *_SQUARE, 1, _CLIP),
    Family("hf-altclip", lambda: hf_model("AltCLIPVision"), *_SQUARE, 1, _CLIP),
    Family("hf-metaclip2-both", lambda: clip_both("MetaClip2"), *_SQUARE, 1, f"vision_model.{_CLIP}", tokens=_vision),
    Family("hf-owlvit", lambda: hf_model("OwlViTVision"), *_SQUARE, 1, f"vision_model.{_CLIP}"),
    Family("hf-owlv2", lambda: hf_model("Owlv2Vision"), *_SQUARE, 1, f"vision_model.{_CLIP}"),
]  # fmt: skip
MULTIHEAD = [
    Family("torchvision", torchvision_vit, *_SQUARE, 1, "encoder.layers.encoder_layer_0.self_attention"),
    Family("open-clip", open_clip, *_PORTRAIT, 1, "transformer.resblocks.0.attn"),
    Family("open-clip-scaled", lambda: open_clip(scale=0.1), *_PORTRAIT, 1, "transformer.resblocks.0.attn", True),
]  # fmt: skip
