"""What cannot be scored, and how it is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.errors import DataError, DwattnError, ScoreError, UnsupportedAttentionError
from support.models import BY_NAME, hf_model
from support.scoring import snapshot


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
    with pytest.raises(ScoreError, match="'fp8' must be one of no, bf16, fp16"):
        dwattn.score(model, images, amp="fp8", progress=False)
    with pytest.warns(UserWarning, match="held 3 images, fewer than num_images=1000"):
        assert dwattn.score(model, images, progress=False).num_images == 3
    assert snapshot(model) == before


def test_images_that_are_all_alike_are_told() -> None:
    family = BY_NAME["timm"]
    with pytest.warns(UserWarning, match=r"is the same for all 3 images \(each Sigma is 0\)"):
        dwattn.score(family.build(), family.images(1).repeat(3, 1, 1, 1), 3, progress=False)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (torch.zeros(2, 3, 48, 48), r"pixels alone, of shape \(2, 3, 48, 48\).*AssertionError.*--size"),
        (torch.zeros(2, 4, 32, 24), "RuntimeError.*4 channels instead.*other channels"),
        ([{"x": torch.zeros(2, 3, 32, 24), "path": ["a", "b"]}], r"x=\(2, 3, 32, 24\), path=.*Leave out"),
        ([{"image": torch.zeros(2, 3, 32, 24)}], "unexpected keyword argument 'image'.*Leave out"),
    ],
    ids=["size", "channels", "another key", "another name"],
)  # fmt: skip
def test_images_that_the_model_does_not_take(data: Any, told: str) -> None:
    model = BY_NAME["timm"].build()
    before = snapshot(model)
    with pytest.raises(DataError, match=rf"VisionTransformer could not be called with .*{told}"):
        dwattn.score(model, data, 2, progress=False)
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
