"""Tasks: heads, metrics, the paper's stages, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import dwattn
from dwattn.cli import app
from dwattn.data import Batch
from dwattn.errors import TrainingError
from dwattn.finetune import (
    Augment,
    Callback,
    Features,
    LabelledViews,
    LinearHead,
    MaskedViews,
    MaskFolder,
    Recipe,
    SegmentationDecoder,
    SplitHead,
    Task,
    Trainer,
    classifier,
    evaluate,
    second_stage,
    segmenter,
    train_in_stages,
)
from dwattn.finetune.features import FeatureReader
from dwattn.geometry import Geometry
from support.models import BY_NAME, hub_vit
from support.surgery import plan_for, shims
from test_cli import FACTORY
from test_labelled_images import save_image, save_mask

FAMILY = BY_NAME["hub-reg4"]
RECIPE = Recipe(steps=25, batch_size=8, lr=1e-3, weight_decay=0.01)


def coloured(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three colours, and which."""
    labels = torch.arange(count) % 3
    images = 0.3 * FAMILY.images(count)
    images[torch.arange(count), labels] += 1.5
    return images, labels


def halves(count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose left or right half is bright, and the mask of the bright half."""
    images = 0.3 * FAMILY.images(count)
    masks = torch.zeros(count, *FAMILY.size, dtype=torch.uint8)
    middle = FAMILY.size[1] // 2
    for index in range(count):
        part = slice(0, middle) if index % 2 else slice(middle, None)
        images[index, :, :, part] += 2
        masks[index, :, part] = 1
    return images, masks


def run(task: Task, data: Any, recipe: Recipe = RECIPE) -> None:
    pytest.importorskip("accelerate", reason="training needs the train extra")
    Trainer(task, data, recipe, device="cpu", progress=False).fit()


def test_a_classifier_learns() -> None:
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    images, labels = coloured()
    data = LabelledViews(images[:18], labels[:18], 3, Augment())
    held_out = LabelledViews(images[18:], labels[18:], 3)
    task = classifier(FAMILY.build(), 3)
    run(task, data)
    found = evaluate(task, held_out)
    assert found["top1"] == 1.0
    assert not task.training
    logits = task.predict(images[18:])
    assert logits.shape == (6, 3)


def test_a_segmenter_learns_at_the_papers_resolution() -> None:
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    images, masks = halves()
    masks[:, :3] = 255
    data = MaskedViews(images, masks, 2, Augment(), mask_size=(32, 32))
    assert data[0, 1]["mask"].shape == (32, 32)
    assert segmenter(FAMILY.build(), 2).predict(images[:2]).shape == (2, 2, 32, 32)  # 8 x 4 patches
    task = Task(FAMILY.build(), SegmentationDecoder(48, 2, (32, 16, 16)))
    run(task, data, RECIPE.but(steps=30))
    found = evaluate(task, data)
    assert found["miou"] > 0.8
    assert found["pixel_accuracy"] >= found["miou"]


def test_metrics_are_those_of_the_definition() -> None:
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    images, masks = halves(4)
    masks[:, :5] = 255
    task = segmenter(FAMILY.build(), 2)
    found = evaluate(task, MaskedViews(images, masks, 2), batch_size=3)
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(
            task.predict(images), FAMILY.size, mode="bilinear", align_corners=False
        )
    guess, valid = logits.argmax(1), masks != 255
    shares = [
        ((guess == c) & (masks == c) & valid).sum() / (((guess == c) | (masks == c)) & valid).sum()
        for c in range(2)
    ]
    assert found["miou"] == pytest.approx(float(sum(shares)) / 2, abs=1e-5)
    assert found["pixel_accuracy"] == pytest.approx(float((guess == masks)[valid].float().mean()))


def test_one_of_several_processes_evaluates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    images, masks = halves(2)
    task = segmenter(FAMILY.build(), 2, widths=(16, 16, 16))
    assert 0 <= evaluate(task, MaskedViews(images, masks, 2))["miou"] <= 1
    labelled = LabelledViews(images, [0, 1], 2)
    assert 0 <= evaluate(classifier(FAMILY.build(), 2), labelled)["top1"] <= 1


def test_ignored_pixels_do_not_weigh_the_parts_of_a_batch() -> None:
    images, masks = halves(4)
    masks[0], masks[1, 3:] = 255, 255
    masks[1, 0, 0] = 1
    task = segmenter(FAMILY.build(), 2, widths=(16, 16, 16))

    def losses(part: slice) -> dict[str, torch.Tensor]:
        return task({"pixels": images[part], "mask": masks[part].long()})

    whole, parts = losses(slice(0, 4)), [losses(slice(i, i + 1)) for i in range(4)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean())
    assert float(parts[0]["loss"].detach()) == 0
    logits = torch.nn.functional.interpolate(
        task.predict(images[1:2]), FAMILY.size, mode="bilinear", align_corners=False
    )
    valid = masks[1] != 255
    expected = torch.nn.functional.cross_entropy(logits[0, :, valid].T, masks[1][valid].long())
    torch.testing.assert_close(parts[1]["loss"], expected)


@pytest.mark.parametrize("name", ["hub-reg4", "timm", "hf-dinov2-reg"])
def test_split_heads_leave_the_backbone_alone(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    dwattn.replace(model, plan_for(model, (1, 3)), kernel_init="gaussian", dynamic_grid=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for inner, shape in (
        (LinearHead(48, 3), (6, 3)),
        (SegmentationDecoder(48, 3, (16, 16, 16)), (6, 3, 8 * family.grid[0], 8 * family.grid[1])),
    ):
        task = Task(model, SplitHead(model, inner, task_blocks=2), frozen=True)
        assert task.predict(family.images(6)).shape == shape
    images, labels = family.images(6), torch.arange(6) % 3
    task = Task(model, SplitHead(model, LinearHead(48, 3)), frozen=True)
    copies = {n: p.clone() for n, p in task.head.named_parameters()}
    run(task, LabelledViews(images, labels, 3), RECIPE.but(steps=2, batch_size=6))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    moved = [n for n, p in task.head.named_parameters() if not torch.equal(copies[n], p)]
    assert any(n.startswith("copies.1.") for n in moved)
    assert any(n.startswith("prior.") for n in moved)
    with pytest.raises(TrainingError, match="task_blocks=4"):
        SplitHead(model, LinearHead(48, 3), task_blocks=4)


@pytest.mark.parametrize(
    "name", ["timm-eva02", "timm-dinov3", "hub-dinov3", "hf-dinov3", "hf-clip", "hf-siglip"]
)
def test_split_heads_call_their_blocks_as_the_backbone_does(name: str) -> None:
    """Fresh copies give the tokens of the originals, rotary positions and masks included."""
    family = BY_NAME[name]
    model, pixels = family.build(), family.images(2)
    head = SplitHead(model, LinearHead(48, 3), task_blocks=2, prior_blocks=[-1])
    task = Task(model, head, frozen=True).eval()
    seen: list[torch.Tensor] = []
    head.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task.predict(pixels)
    with torch.no_grad():
        expected = FeatureReader(model, [-1])(Batch(pixels, 2, pixels)).blocks[0]
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


def test_heads_read_what_they_say() -> None:
    tokens, geometry = torch.randn(2, 1 + 6, 8), Geometry(2, 3, 1)
    mean, cls = LinearHead(8, 4), LinearHead(8, 4, "cls")
    torch.testing.assert_close(mean(Features(tokens), geometry), mean.linear(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(cls(Features(tokens), geometry), cls.linear(tokens[:, 0]))
    with pytest.raises(TrainingError, match="pool='mean'"):
        cls(Features(tokens[:, 1:]), Geometry(2, 3, 0))
    with pytest.raises(TrainingError, match="max"):
        LinearHead(8, 4, "max")
    with pytest.raises(TrainingError, match="multiples"):
        SegmentationDecoder(8, 2, (12, 12, 12))
    decoder = SegmentationDecoder(8, 5)
    assert decoder(Features(tokens), geometry).shape == (2, 5, 16, 24)
    kinds = [type(m).__name__ for m in decoder.modules()]
    assert [kinds.count(k) for k in ("ConvTranspose2d", "GroupNorm", "Conv2d")] == [3, 3, 2]


@pytest.mark.parametrize("stages", ["two-stage", "one-stage", "frozen"])
def test_the_papers_stages(stages: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs the train extra")
    images, labels = coloured(12)
    data = LabelledViews(images, labels, 3)
    recipe = RECIPE.but(steps=3, batch_size=4)
    options = {"device": "cpu", "progress": False}
    seen: list[Any] = []
    task = classifier(FAMILY.build(), 3)
    result = train_in_stages(
        task, data, lambda backbone: seen.append(backbone) or plan_for(backbone), recipe,
        stages=stages, kernel_init="gaussian", folder=tmp_path, trainer_options=options,
    )  # fmt: skip
    assert seen == [task.backbone]
    assert len(result.stages) == (1 if stages == "one-stage" else 2)
    assert len(shims(task.backbone)) == 2
    trained = {n for n, p in task.named_parameters() if p.requires_grad}
    if stages == "frozen":
        assert trained == {n for n, _ in task.named_parameters() if ".layer." in n}
    else:
        assert trained == {n for n, _ in task.named_parameters()}
    again = classifier(FAMILY.build(), 3)
    train_in_stages(
        again, data, plan_for, recipe, stages=stages, kernel_init="gaussian", folder=tmp_path,
        trainer_options=options,
    )  # fmt: skip
    for name, value in task.named_parameters():
        assert torch.equal(again.get_parameter(name), value)


def test_a_stage_that_was_stopped_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs the train extra")

    class Stop(Callback):
        def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
            trainer.stop()

    def stages(*callbacks: Callback) -> Any:
        task = classifier(FAMILY.build(), 3)
        options = {"device": "cpu", "progress": False, "callbacks": callbacks}
        return train_in_stages(
            task, LabelledViews(*coloured(6), 3), plan_for, RECIPE.but(steps=2, batch_size=2),
            kernel_init="gaussian", folder=tmp_path, trainer_options=options,
        )  # fmt: skip

    stopped = stages(Stop())
    assert (len(stopped.stages), stopped.replaced, stopped.complete) == (1, None, False)
    whole = stages()
    assert [stage.steps for stage in whole.stages] == [2, 2]
    assert whole.complete


def test_a_run_is_resumed_with_the_head_it_had(tmp_path: Path) -> None:
    """Heads that read other tokens have the same weights, so that the state alone does not tell them apart."""
    pytest.importorskip("accelerate", reason="training needs the train extra")

    def trainer(pool: str) -> Trainer:
        task = classifier(FAMILY.build(), 3, pool=pool)
        data = LabelledViews(*coloured(6), 3)
        recipe = RECIPE.but(steps=1, batch_size=2)
        return Trainer(task, data, recipe, folder=tmp_path, device="cpu", progress=False)

    trainer("mean").fit()
    with pytest.raises(TrainingError, match=r"'pool': 'mean'.*'pool': 'cls'"):
        trainer("cls").fit(resume=True)
    assert trainer("mean").fit(resume=True).complete


def test_what_changes_pixels_or_masks_makes_other_images(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "0.jpg")
    save_mask(tmp_path / "masks" / "0.png", 1)

    def printed(**options: Any) -> str:
        return MaskFolder(
            tmp_path / "images", tmp_path / "masks", (8, 8), 2, **options
        ).fingerprint()

    assert printed() == printed()
    others = [
        printed(),
        printed(mean=(0.5,) * 3),
        printed(std=(0.5,) * 3),
        printed(mask_size=(4, 4)),
    ]
    assert len(set(others)) == 4


def test_stages_refuse_what_does_not_fit() -> None:
    task, data = classifier(FAMILY.build(), 3), LabelledViews(*coloured(6), 3)
    plan = plan_for(task.backbone)
    for options, match in (
        ({"kernel_init": "calibrated"}, "calibrate=images"),
        ({"kernel_init": "zeros"}, "must be calibrated"),
        ({"stages": "three", "kernel_init": "gaussian"}, "two-stage"),
    ):
        with pytest.raises(TrainingError, match=match):
            train_in_stages(task, data, plan, RECIPE, **options)
    with pytest.raises(TrainingError, match="batch_size=3 cannot be halved"):
        train_in_stages(
            task, data, plan, RECIPE.but(batch_size=3), kernel_init="gaussian",
            trainer_options={"device": "refused once it trains"},
        )  # fmt: skip
    assert second_stage(RECIPE).batch_size == 4
    assert second_stage(RECIPE).steps == RECIPE.steps
    with pytest.raises(TrainingError, match="halved"):
        second_stage(RECIPE.but(batch_size=3))


def invoke(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "factory.py").write_text(FACTORY)
    for index in range(8):
        kind = ("light", "dark")[index % 2]
        save_image(tmp_path / "images" / kind / f"{index}.png", (60, 64), seed=index)
        save_mask(tmp_path / "masks" / kind / f"{index}.png", size=(60, 64))
    model = hub_vit(num_register_tokens=4)
    dwattn.replace(model, plan_for(model), kernel_init="gaussian")
    dwattn.save(model, tmp_path / "student.safetensors")
    return tmp_path


def test_the_command_distils_and_resumes(place: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs the train extra")
    model, out = f"{place / 'factory.py'}:make", place / "run"
    common = (model, place / "student.safetensors", "--images", place / "images", "--out", out)
    options = ("--size", 56, "--batch-size", 4, "--device", "cpu", "--lr", 1e-3, "--views", 2)
    extra = ("--cache", 8, "--blocks", 0.5, "--ema", 0.9, "--no-progress")
    dry = json.loads(invoke(*common, *options, *extra, "--epochs", 3, "--dry-run", "--json").stdout)
    assert dry["steps"] == 6
    assert dry["seconds"] > 0
    if not torch.cuda.is_available():
        for measured in (("--dry-run",), ("--minutes", 1)):
            bad = invoke(*common, "--size", 56, "--device", "cuda", *measured, code=1)
            assert "finds no GPU" in bad.output
    assert not out.exists()
    done = json.loads(invoke(*common, *options, *extra, "--epochs", 3, "--json").stdout)
    assert done["steps"] == 6
    assert done["complete"]
    assert done["recipe"]["weight_decay"] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "state.safetensors", "student.safetensors", "train.csv"
    ]  # fmt: skip
    assert "holds a run of 6 steps" in invoke(*common, *options, "--steps", 6, code=1).output
    first = (out / "student.safetensors").read_bytes()
    again = invoke(
        *common, "--size", 56, "--resume", "--blocks", 0.5, "--no-progress", "--device", "cpu"
    )
    assert "6 steps" in again.output
    other = invoke(*common, "--size", 56, "--resume", "--epochs", 4, "--lr", 1e-3, code=2)
    assert "steps=8 instead of 6" in other.output
    assert "lr" not in other.output.split("say")[1]
    assert (out / "student.safetensors").read_bytes() == first
    trained = dwattn.load(hub_vit(num_register_tokens=4), out / "student.safetensors")
    start = dwattn.load(hub_vit(num_register_tokens=4), place / "student.safetensors")
    kernel = "blocks.0.attn.layer.kernel"
    assert not torch.equal(trained.get_parameter(kernel), start.get_parameter(kernel))


def test_the_command_trains_tasks(place: Path) -> None:
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    model = f"{place / 'factory.py'}:make"
    options = ("--size", 56, "--batch-size", 4, "--steps", 2, "--device", "cpu", "--no-progress")
    images, masks = place / "images", place / "masks"
    done = invoke(
        model, place / "student.safetensors", "--task", "classify", "--images", images, "--out",
        place / "c", "--test-images", images, "--json", *options,
    )  # fmt: skip
    assert 0 <= json.loads(done.stdout)["test"]["top1"] <= 1
    assert (place / "c" / "student.safetensors").exists()
    assert (place / "c" / "head.safetensors").exists()
    invoke(
        model, "--task", "segment", "--images", images, "--masks", masks, "--classes", 2, "--out",
        place / "s", "--test-images", images, "--test-masks", masks, *options,
    )  # fmt: skip
    invoke(
        model, place / "student.safetensors", "--task", "classify", "--images", images, "--out",
        place / "split", "--split", *options,
    )  # fmt: skip
    kept = dwattn.load(hub_vit(num_register_tokens=4), place / "split" / "student.safetensors")
    start = dwattn.load(hub_vit(num_register_tokens=4), place / "student.safetensors")
    assert all(torch.equal(kept.get_parameter(n), p) for n, p in start.named_parameters())
    assert {p.name for p in (place / "s").iterdir()} == {
        "state.safetensors", "train.csv", "head.safetensors", "backbone.safetensors"
    }  # fmt: skip


def test_the_command_says_what_is_wrong(place: Path) -> None:
    model, images = f"{place / 'factory.py'}:make", place / "images"
    student = place / "student.safetensors"
    onto = invoke(model, student, "--images", images, "--out", place, code=1)
    assert "is also read" in onto.output.replace("\n", " ")
    for arguments in (
        (model, "--images", images),
        (model, student, "--images", images, "--task", "detect"),
        (model, student, "--images", images, "--steps", 2, "--minutes", 1),
        (model, "--images", images, "--task", "segment"),
        (model, student, "--images", images, "--masks", images),
    ):
        invoke(*arguments, code=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        bad = invoke(model, student, "--images", images, "--size", 56, "--minutes", 1, code=1)
    assert "give --steps or --epochs" in bad.output
    bad = invoke(model, student, "--images", images, "--epochs", -2, "--size", 56, code=1)
    assert "epochs=-2 must be a number above 0" in bad.output
    bad = invoke(model, student, "--images", place / "none", "--out", place / "o", code=1)
    assert "Error: There is no folder" in bad.output
    bad = invoke(model, student, "--images", images, "--lr", -1, "--size", 56, code=1)
    assert "The recipe is wrong: lr" in bad.output
