"""Parts of training by themselves: what a step, an average, a gate, an evaluation and an estimate are made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwattn.errors import DataError
from dwattn.finetune import (
    Annealing,
    Augment,
    Callback,
    Distillation,
    Features,
    LabelledViews,
    LinearHead,
    Recipe,
    SplitHead,
    SubsetGate,
    Targets,
    Views,
    classifier,
    evaluate,
    train_in_stages,
)
from dwattn.finetune.batches import micro_batches
from dwattn.finetune.ema import Average
from dwattn.finetune.estimate import Estimate
from support.models import BY_NAME, hub_vit
from support.surgery import plan_for


def test_micro_batches_show_each_image_once() -> None:
    batch = {"keys": [(i, 0) for i in range(7)], "pixels": torch.arange(7.0)}
    parts = list(micro_batches(batch, 3))
    assert [part["keys"] for part, _ in parts] == [batch["keys"][:3], batch["keys"][3:6], [(6, 0)]]
    assert [part["pixels"].tolist() for part, _ in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [share for _, share in parts] == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    assert [len(part["keys"]) for part, _ in micro_batches(batch, None)] == [7]


def test_an_average_is_shown_and_taken_back() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.register_parameter("frozen", nn.Parameter(torch.ones(1), requires_grad=False))
    with torch.no_grad():
        module.weight.fill_(0.0)
        average = Average(module, 0.9)
        module.weight.fill_(1.0)
    average.update(0)  # decay 1/10
    assert average.values["weight"].item() == pytest.approx(0.9)
    average.update(8)  # decay 1/2
    assert average.values["weight"].item() == pytest.approx(0.95)
    average.update(1000)  # decay 0.9
    assert average.values["weight"].item() == pytest.approx(0.955)

    def evaluation_that_is_stopped() -> None:
        with average.applied():
            assert module.weight.item() == pytest.approx(0.955)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation_that_is_stopped()
    assert module.weight.item() == 1.0
    assert average.values["weight"].item() == pytest.approx(0.955)
    assert list(average.values) == ["weight"]


def test_a_gate_cools_with_the_steps_and_draws_anew_at_each() -> None:
    gate = SubsetGate(6, 2, start=1.0, end=1e-2, anneal=0.5)
    module = nn.Linear(1, 1).train()
    trainer: Any = SimpleNamespace(step=10, recipe=SimpleNamespace(steps=40), module=module)
    annealing = Annealing(gate)
    annealing.on_start(trainer)
    assert gate.temperature == pytest.approx(0.1)
    first = gate()
    annealing.on_step(trainer, 15, {})
    assert gate.temperature == pytest.approx(10**-1.5)
    second = gate()
    assert not torch.equal(first, second)
    annealing.on_step(trainer, 20, {})
    assert gate.temperature == pytest.approx(1e-2)
    annealing.on_step(trainer, 15, {})
    assert torch.equal(gate(), second)
    module.eval()
    assert gate().tolist() == [1, 1, 0, 0, 0, 0]
    annealing.on_end(trainer)
    assert not gate.learning


class Guess(nn.Module):
    """Says the class that the first pixel names, and notes the mode in which it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.modes: list[bool] = []

    def predict(self, pixels: Tensor) -> Tensor:
        self.modes.append(self.training)
        return nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 3).float()


@pytest.mark.parametrize("wrong", [0, 3, 4])
def test_an_evaluation_counts_every_image_in_eval_mode(wrong: int) -> None:
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    labels = torch.arange(5) % 3
    images = torch.zeros(5, 3, 4, 4)
    images[:, 0, 0, 0] = labels
    images[wrong, 0, 0, 0] = (labels[wrong] + 1) % 3
    task: Any = Guess().train()
    # The images themselves, not views: mirrored, all would be taken for class 0.
    data = LabelledViews(images, labels, 3, Augment(flip=1.0))
    assert evaluate(task, data, batch_size=2) == {"top1": pytest.approx(0.8)}
    assert task.modes == [False] * 3
    assert task.training


def test_memory_is_the_sum_of_its_parts() -> None:
    found = Estimate(
        steps=10, seconds_per_step=3.0, trained=1, parameters=2, weights=1, gradients=10, optimizer=100,
        average=1000, activations=10_000, held=100_000, checkpoint=7,
    )  # fmt: skip
    assert found.memory == 111_111
    assert found.seconds == 30


def test_prior_heads_read_blocks_of_all_depths() -> None:
    """Without them being named: the ends of the four quarters, and the block in front of the copies."""
    for depth, tasks, expected in ((4, 1, (2, 0, 1, 2, 3)), (6, 2, (3, 1, 2, 3, 5))):
        model = hub_vit(depth=depth)
        assert SplitHead(model, LinearHead(48, 3), task_blocks=tasks).blocks == expected


def test_students_never_drop_out() -> None:
    model = hub_vit()
    module = Distillation(model, targets=Targets(blocks=1.0))
    model.train()
    module.train()
    assert module.training
    assert not any(m.training for m in model.modules())
    # Nothing is replaced in it: then all blocks are held to those of the teacher.
    assert module.settings()["targets"]["block_indices"] == list(range(len(model.blocks)))


@pytest.mark.parametrize("output", [True, False])
def test_features_with_other_tensors(output: bool) -> None:
    made = Features(
        torch.zeros(1), (torch.zeros(2), torch.zeros(3)), torch.zeros(4) if output else None
    )
    tensors = [t + 1 for t in made.tensors()]
    again = made.like(tensors)
    assert len(again.blocks) == 2
    assert (
        [len(t) for t in again.tensors()] == [len(t) for t in tensors] == list(range(1, 4 + output))
    )
    assert all(map(torch.equal, again.tensors(), tensors))


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"colour": 1.0},
        {"colour": -0.1},
        {"crop": (0.0, 1.0)},
        {"crop": (0.8, 0.2)},
        {"crop": (0.5, 1.5)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
    ],
)
def test_views_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        Augment(**wrong)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)])
def test_images_that_are_none_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\(M, 3, H, W\)"):
        Views(torch.zeros(shape))


@pytest.mark.parametrize("shared", [False, True])
def test_stages_leave_their_folders_and_are_not_done_again(shared: bool, tmp_path: Path) -> None:
    """That a repeated call ends with the same weights says little: trained anew, they would be the same."""
    pytest.importorskip("accelerate", reason="training needs the train extra")
    steps: list[int] = []

    class Count(Callback):
        def on_step(self, trainer: Any, step: int, losses: dict[str, float]) -> None:
            steps.append(step)

    images = BY_NAME["hub"].images(4)
    for expected in ([1, 2, 1, 2], []):
        task = classifier(hub_vit(), 3)
        data = LabelledViews(images, torch.tensor([0, 1, 2, 0]), 3)
        steps.clear()
        train_in_stages(
            task, data, plan_for, Recipe(steps=2, batch_size=2), kernel_init="gaussian", folder=tmp_path / "run",
            first_folder=tmp_path / "shared" if shared else None,
            trainer_options={"device": "cpu", "progress": False, "callbacks": [Count()]},
        )  # fmt: skip
        assert steps == expected
        first = tmp_path / "shared" if shared else tmp_path / "run" / "first"
        for folder in (first, tmp_path / "run" / "second"):
            assert (folder / "state.safetensors").is_file()
        assert (tmp_path / "run" / "first").exists() != shared
