"""Models with the attention of another family, from scoring to the saved file, and models that need more than pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwattn
from dwattn.adapters import describe
from dwattn.errors import CalibrationError, CheckpointError, DataError
from dwattn.models import load_model
from support.models import Family, clip_both, hf_model
from support.more_families import MORE_HF, MULTIHEAD, depth, detector, dpt, pose, pose_backbone


@pytest.mark.parametrize("family", MORE_HF + MULTIHEAD, ids=str)
@torch.no_grad()
def test_the_whole_journey(family: Family, tmp_path: Path) -> None:
    model, images = family.build(), family.images()
    # A model of two towers is scored and calibrated as part of itself here; whole below.
    part = describe(model).module if "both" in family.name else model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    scores = dwattn.score(part, family.images(8), num_images=8, progress=False)
    plan = dwattn.select(scores, blocks=2, criterion="residual")
    report = dwattn.replace(part, plan, calibrate=family.images(12), progress=False)
    assert report.replaced == [layer.name for layer in plan.layers]
    drift = report.calibration.drift
    assert drift
    assert all(0 < apart < 1 for apart in drift.values())
    converted = family.tokens(model, images)
    dwattn.save(model, tmp_path / "model.safetensors")
    loaded = dwattn.load(family.build(), tmp_path / "model.safetensors")
    assert torch.equal(family.tokens(loaded, images), converted)
    dwattn.restore(part)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_only_what_one_expert_shares_with_the_others_is_left_alone() -> None:
    """Of a mixture of experts the last layer gives some channels only, which a correction of all would not fit."""
    experts = describe(pose_backbone(num_experts=2, part_features=12)).blocks
    assert [block.mlp_out for block in experts] == [None] * 4
    assert all(isinstance(block.mlp_out, nn.Linear) for block in describe(pose_backbone()).blocks)


@pytest.mark.parametrize("index", [[1], [1] * 6], ids=["one", "an image"])
@torch.no_grad()
def test_an_argument_of_the_blocks_that_is_the_same_for_all_images(index: list[int]) -> None:
    """Images go through the blocks in other numbers than the model was called with."""
    model = pose_backbone(num_experts=2, part_features=12)
    batch = {"pixel_values": torch.randn(6, 3, 32, 24), "dataset_index": torch.tensor(index)}
    scores = dwattn.score(model, [batch] * 2, num_images=12, progress=False)
    before = model(**batch).feature_maps[-1]
    plan = dwattn.select(scores, blocks=1, criterion="residual")
    dwattn.replace(model, plan, calibrate=[batch] * 4, progress=False)
    after = model(**batch).feature_maps[-1]
    assert 0 < (after - before).abs().mean() < 0.3 * before.abs().mean()


def test_an_argument_of_the_blocks_that_differs_between_images() -> None:
    model = pose_backbone(num_experts=2, part_features=12)
    batch = {"pixel_values": torch.randn(3, 3, 32, 24), "dataset_index": torch.tensor([0, 1, 1])}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"another value for each image, \[0, 1, 1\]"):
        dwattn.replace(model, dwattn.Plan.for_layers(model, [1]), calibrate=[batch], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["OwlViT", "Owlv2"])
@torch.no_grad()
def test_a_detector_with_its_text(kind: str) -> None:
    model: Any = detector(kind)
    batch = {
        "pixel_values": torch.randn(6, 3, 32, 32),
        "input_ids": torch.randint(3, 40, (12, 8)),
        "attention_mask": torch.ones(12, 8, dtype=torch.long),
    }
    before = model(**batch)
    scores = dwattn.score(model, [batch], num_images=6, progress=False)
    plan = dwattn.select(scores, blocks=1, criterion="residual")
    dwattn.replace(model, plan, calibrate=[batch], progress=False)
    after = model(**batch)
    assert after.pred_boxes.shape == before.pred_boxes.shape
    assert not torch.equal(after.logits, before.logits)
    assert torch.equal(after.text_embeds, before.text_embeds)


def test_pixels_alone_are_not_enough_for_two_towers() -> None:
    with pytest.raises(
        DataError,
        match=r"CLIPModel could not be called with a tensor of pixels alone.*dictionaries",
    ):
        dwattn.score(clip_both(), torch.randn(2, 3, 32, 32), num_images=2, progress=False)


SAVED = {
    "MetaClip2VisionModel": lambda: clip_both("MetaClip2"),
    "CLIPSegVisionModel": lambda: clip_both("CLIPSeg"),
    "OwlViTVisionModel": lambda: detector("OwlViT"),
    "VitPoseForPoseEstimation": pose,
    "VitPoseBackbone": pose_backbone,
    "DepthAnythingForDepthEstimation": depth,
    "DPTModel": lambda: dpt("DPTForDepthEstimation"),
    "IJepaModel": lambda: hf_model("IJepa"),
    "ViTMSNForImageClassification": lambda: hf_model("ViTMSN", "ViTMSNForImageClassification"),
}


@pytest.mark.parametrize("name", SAVED)
def test_from_a_directory(name: str, tmp_path: Path) -> None:
    saved: Any = SAVED[name]()
    saved.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert type(loaded).__name__ == name
    for one, other in zip(describe(saved).blocks, describe(loaded).blocks, strict=True):
        state = other.module.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in one.module.state_dict().items())


def test_blocks_that_a_directory_lacks_are_not_made_up(tmp_path: Path) -> None:
    """transformers only warns, and leaves them random."""
    shallow: Any = hf_model("ViTMSN", num_hidden_layers=1)
    shallow.save_pretrained(tmp_path)
    assert load_model(f"hf:{tmp_path}")
    config = tmp_path / "config.json"
    deeper = config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    config.write_text(deeper)
    with pytest.raises(CheckpointError, match=r"as ViTMSNModel does not fit.*weights of the model"):
        load_model(f"hf:{tmp_path}")
