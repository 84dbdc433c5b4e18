"""The demo's model at any image size: its position embeddings are those of a 37 x 37 grid, resampled."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dwattn.demo import pretrained
from dwattn.demo._torchvision import make_importable
from dwattn.demo.pretrained import DIM, PATCH, SaliencyDecoder, SaliencyModel


class SizedModel(SaliencyModel):
    """:class:`SaliencyModel` for images of ``size`` pixels instead of 224."""

    def __init__(self, backbone: torch.nn.Module, decoder: SaliencyDecoder, size: int) -> None:
        super().__init__(backbone, decoder, "timm")
        self.size = size

    def decode(self, tokens: Tensor) -> Tensor:
        """Saliency ``(B, 1, size, size)``."""
        side = self.size // PATCH
        patches = tokens[:, 1:].transpose(1, 2).reshape(-1, DIM, side, side)
        return self.decoder(patches, (self.size, self.size))


@lru_cache(maxsize=1)
def _weights() -> tuple[pretrained.StateDict, pretrained.StateDict]:
    return pretrained.load_graph(pretrained.onnx_path())


def build(size: int) -> SizedModel:
    """The model in eval mode for images of ``size`` pixels, a multiple of the patch."""
    if size % PATCH:
        raise SystemExit(f"--size {size} is no multiple of the patch of {PATCH} pixels.")
    make_importable()
    import timm

    embeddings = "embeddings.position_embeddings"
    graph, decoder_state = _weights()
    side = size // PATCH
    graph = {**graph, embeddings: pretrained.bake_positions(graph[embeddings], (side, side))}
    backbone = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=size)
    backbone.load_state_dict(pretrained.convert(graph, "timm"))
    decoder = SaliencyDecoder()
    decoder.load_state_dict(decoder_state, strict=False)
    return SizedModel(backbone, decoder, size).eval()
