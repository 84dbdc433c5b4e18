"""Learned selection: the relaxed subset, its annealing, and the plan and model that come out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dwattn
from dwattn.errors import CheckpointError, TrainingError
from dwattn.finetune import (
    Annealing,
    Callback,
    Distillation,
    Evaluate,
    Recipe,
    SubsetGate,
    Trainer,
    Views,
    add_gates,
    learned_plan,
    param_groups,
    settle,
    teacher,
)
from dwattn.finetune.gates import gated_layers
from dwattn.scattered import ScatteredDWAttention
from support.models import BY_NAME
from support.surgery import shims

FAMILIES = [BY_NAME[name] for name in ("hub-reg4", "timm", "hf-clip", "timm-dinov3")]


def tokens(family: Any, model: nn.Module, count: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return family.tokens(model, family.images(count))


class Sampled(Callback):
    """Notes the gates of a run's steps."""

    def __init__(self, gate: SubsetGate) -> None:
        self.gate = gate
        self.gates: list[torch.Tensor] = []

    def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
        self.gates.append(self.gate().detach())


def test_gates_are_shares_and_harden() -> None:
    gate = SubsetGate(6, 2, seed=3)
    gate.learning = True
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([0.0, 0.5, 3.0, -1.0, 2.0, 0.1]))
    soft = {}
    for step in (0, 40, 75, 100):
        gate.at(step, 100)
        soft[step] = gate().detach()
        assert 1 < float(soft[step].sum()) <= 2 + 1e-4
        assert 0 <= float(soft[step].min()) <= float(soft[step].max()) <= 1
    assert gate.temperature == pytest.approx(1e-3)
    assert float(soft[0].max()) < 0.999
    rounded = soft[100].round()
    assert rounded.sum() == 2
    torch.testing.assert_close(soft[100], rounded, atol=1e-3, rtol=0)
    gate.learning = False
    assert gate().tolist() == [0, 0, 1, 0, 1, 0]
    assert gate.chosen() == [2, 4]


def test_scores_far_apart_make_subsets_too() -> None:
    """The first slot's choice lies above the others by more than the logarithm of the least number near 1."""
    gate = SubsetGate(6, 3)
    gate.learning = True
    with torch.no_grad():
        gate.scores[0], gate.scores[3] = 60.0, 25.0
    gate.at(100, 100)
    gates = gate()
    assert gates.round().sum() == 3
    assert gates[[0, 3]].tolist() == pytest.approx([1, 1])
    (gates * torch.arange(6.0)).sum().backward()
    assert gate.scores.grad is not None
    assert torch.isfinite(gate.scores.grad).all()


@pytest.mark.parametrize("first", ["evaluation", "annealing"])
def test_a_run_evaluates_the_subset_itself(first: str) -> None:
    pytest.importorskip("accelerate", reason="training needs the train extra")
    family = BY_NAME["hub-reg4"]
    model = family.build()
    gate, seen = add_gates(model, 2), []
    callbacks: list[Callback] = [
        Evaluate(lambda _: seen.append((gate().tolist(), gate.chosen())) or {}, 2),
        Annealing(gate),
    ]
    sampled = Sampled(gate)
    run = Trainer(
        Distillation(model), Views(family.images(4)), Recipe(steps=6, batch_size=2),
        callbacks=[*(callbacks if first == "evaluation" else callbacks[::-1]), sampled],
        device="cpu", progress=False,
    )  # fmt: skip
    run.fit()
    assert len(seen) == 3
    assert all(gates == [float(i in chosen) for i in range(4)] for gates, chosen in seen)
    assert any(not gates.equal(gates.round()) for gates in sampled.gates)


def test_the_relaxation_samples_subsets_as_it_should() -> None:
    """At a low temperature gate i is 1 with the probability of sampling without replacement."""
    gate = SubsetGate(3, 2, start=1e-3, end=1e-3)
    gate.learning = True
    p = torch.tensor([0.6, 0.3, 0.1])
    with torch.no_grad():
        gate.scores.copy_(p.log())
    draws = []
    for step in range(3000):
        gate.at(step, 3000)
        draws.append(gate().detach())
    found = torch.stack(draws).mean(0)
    first = p
    second = torch.stack(
        [sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]  # type: ignore[misc]
    )
    torch.testing.assert_close(found, first + second, atol=0.03, rtol=0)


def test_gradients_reach_the_scores() -> None:
    gate = SubsetGate(5, 2)
    gate.learning = True
    gate.at(10, 100)
    (gate() * torch.arange(5.0)).sum().backward()
    assert gate.scores.grad is not None
    assert float(gate.scores.grad.abs().min()) > 0
    for wrong in ((5, 0, {}), (5, 5, {}), (5, 2, {"end": 0.0}), (5, 2, {"anneal": 0.0})):
        with pytest.raises(TrainingError):
            SubsetGate(wrong[0], wrong[1], **wrong[2])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_closed_gates_are_the_original(family: Any) -> None:
    model = family.build()
    before = tokens(family, model)
    gate = add_gates(model, 2)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.gates = lambda c=layer.kernel.shape[0]: torch.zeros(c)  # type: ignore[method-assign]
    torch.testing.assert_close(tokens(family, model), before, rtol=1e-4, atol=1e-4)
    assert len(gate.scores) == 4
    dwattn.restore(model)
    assert torch.equal(tokens(family, model), before)


@pytest.mark.parametrize("granularity", ["blocks", "heads"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_settling_keeps_what_was_trained(family: Any, granularity: Any) -> None:
    model = family.build()
    gate = add_gates(model, 2 if granularity == "blocks" else 4, granularity=granularity)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        gate.scores.copy_(torch.randn(gate.scores.shape, generator=generator))
    before, plan = tokens(family, model), learned_plan(model)
    with pytest.raises(CheckpointError, match="settle"):
        dwattn.save(model, "/nonexistent/gated.safetensors")
    report = settle(model, dynamic_grid=granularity == "heads")
    torch.testing.assert_close(tokens(family, model), before, rtol=1e-3, atol=1e-3)
    assert report.replaced == [layer.name for layer in plan.layers]
    assert plan.criterion == "dsp"
    layers = [shim.layer for shim in shims(model).values()]
    if granularity == "blocks":
        assert len(layers) == 2
        assert not any(isinstance(layer, ScatteredDWAttention) for layer in layers)
    else:
        whole = sum(3 for layer in layers if not isinstance(layer, ScatteredDWAttention))
        some = sum(len(x.replaced) for x in layers if isinstance(x, ScatteredDWAttention))
        assert whole + some == 4
    fresh = family.build()
    dwattn.replace(fresh, plan, kernel_init="gaussian")
    assert list(shims(fresh)) == list(shims(model))


def test_a_run_finds_the_block_that_does_not_matter() -> None:
    """The only layer whose attention does nothing is the one to replace; its scores start level, and end so far apart
    that the noise rarely changes the subset."""
    pytest.importorskip("accelerate", reason="training needs the train extra")
    family = BY_NAME["hub-reg4"]
    model = family.build()
    with torch.no_grad():
        model.blocks[2].ls1.gamma.mul_(1e-3)
    original = copy.deepcopy(model)
    gate = add_gates(model, 1, seed=5)
    module = Distillation(model)
    assert torch.equal(tokens(family, teacher(model)), tokens(family, original))
    found = {g["name"]: g for g in param_groups(module, lr=1e-4, gate_lr=0.25)}["gates"]
    assert (found["params"], found["lr"], found["weight_decay"]) == ([gate.scores], 0.25, 0.0)
    recipe, sampled = Recipe(steps=60, batch_size=4, gate_lr=0.25, seed=1), Sampled(gate)
    run = Trainer(
        module, Views(family.images(16)), recipe, callbacks=[Annealing(gate), sampled],
        device="cpu", progress=False,
    )  # fmt: skip
    run.fit()
    assert [int(gates.argmax()) for gates in sampled.gates[-15:]].count(2) >= 13
    assert gate.temperature == pytest.approx(1e-3)
    assert not gate.learning
    assert [layer.name for layer in learned_plan(model).layers] == ["blocks.2.attn"]
    with pytest.raises(TrainingError, match="replaced layers"):
        add_gates(model, 1)
    with pytest.raises(TrainingError, match="add_gates"):
        learned_plan(original)
