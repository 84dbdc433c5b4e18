"""The way from scores to a student on a GPU, or where there is none on one that is pretended: every tensor is where it has
to be. There PyTorch's parts compute and no kernel is tried, see ``support/pretend_gpu.py``.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.calibration import stencil
from dwattn.latency import measure_latency
from dwattn.plan import Plan
from support.models import BY_NAME, Family
from support.pretend_gpu import GPU, pretend_gpu

pytest.importorskip("timm")

#: Each library, and each way of fitting a layer; all pairs would take minutes.
CONVERSIONS: list[tuple[str, dict[str, Any]]] = [
    ("timm", {"variant": "dw", "amp": "bf16"}),
    ("hf-dinov2-reg", {"variant": "dw", "prefix": "static"}),
    ("hf-clip", {"variant": "lowrank_dw", "rank": 16}),
    ("hub-reg4", {"variant": "ens_dw"}),
    ("timm-dinov3", {"variant": "lowrank_dw", "rank": {"fidelity": 0.9}}),
]


# Without a GPU they run all the same; the mark is for make gpu-check.
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with contextlib.nullcontext() if torch.cuda.is_available() else pretend_gpu():
        yield


def tokens(family: Family, model: nn.Module, device: Any = GPU) -> Tensor:
    with torch.no_grad():
        return family.tokens(model, family.images().to(device))


def test_what_cuda_refuses_is_refused() -> None:
    x, y = torch.ones(3, device=GPU), torch.ones(3)
    assert (x.device, x.is_cuda, x[1:].device, x.cpu().device.type) == (GPU, True, GPU, "cpu")
    assert (x + 1).sum().item() == 6
    assert x[torch.tensor([0, 2])].device == GPU
    for wrong in (
        lambda: x + y,
        lambda: torch.cat([x, y]),
        lambda: torch.rand(3, device=GPU, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="Expected"):
            wrong()


def test_a_forgotten_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(v: Tensor, geometry: Any) -> Tensor:
        return torch.zeros(stencil_features(v, geometry).shape)

    stencil_features = stencil.stencil_features
    monkeypatch.setattr(stencil, "stencil_features", forgetful)
    family = BY_NAME["timm"]
    model = family.build().to(GPU)
    with pytest.raises(RuntimeError, match="same device"):
        dwattn.replace(model, Plan.for_layers(model, [1]), calibrate=family.images(8), progress=False)  # fmt: skip


@pytest.mark.parametrize(("name", "conversion"), CONVERSIONS, ids=str)
def test_from_scores_to_a_student(name: str, conversion: dict[str, Any], tmp_path: Path) -> None:
    family = BY_NAME[name]
    model, here = family.build().to(GPU), family.build()
    before, images = tokens(family, model), family.images(6, seed=1)
    scores, expected = (
        dwattn.score(m, images, num_images=6, progress=False) for m in (model, here)
    )
    for ours, theirs in zip(scores.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.sigma, theirs.sigma, rtol=1e-2, atol=0)
    plan = dwattn.select(scores, blocks=1)
    for either in (model, here):
        dwattn.replace(either, plan, calibrate=images, views=1, progress=False, **conversion)
    found = tokens(family, model)
    assert found.device == GPU
    wanted = tokens(family, here, "cpu")
    assert (found.cpu() - wanted).norm() < 0.05 * wanted.norm()
    dwattn.save(model, tmp_path / "student.safetensors")
    loaded = dwattn.load(family.build().to(GPU), tmp_path / "student.safetensors")
    torch.testing.assert_close(tokens(family, loaded), found)
    dwattn.restore(model)
    assert torch.equal(tokens(family, model), before)


@pytest.mark.parametrize(
    ("variant", "init"),
    [
        ("dw", "mean-attention"),
        ("conv", "mean-attention"),
        ("ens_dw", "gaussian"),
        ("spvit", "mean-attention"),
    ],
)
def test_starts_without_calibration(variant: str, init: str) -> None:
    family = BY_NAME["timm"]
    model = family.build().to(GPU)
    scores = dwattn.score(model, family.images(2), num_images=2, progress=False)
    plan = dwattn.select(scores, blocks=1)
    dwattn.replace(model, plan, variant=variant, kernel_init=init, progress=False)
    assert tokens(family, model).device == GPU


def test_choices_that_try_things_out() -> None:
    family = BY_NAME["timm"]
    model, images = family.build().to(GPU), family.images(8)
    scores = dwattn.score(model, images, num_images=8, keep_maps=True, progress=False)
    found = dwattn.refine(model, scores, images, 2, width=1, rounds=1, progress=False)
    assert len(found.blocks) == 2
    assert measure_latency(model, grid=scores.grid, rounds=1).device != "cpu"
    plan = dwattn.select(scores, heads=1)
    dwattn.replace(model, plan, calibrate=images, views=1, progress=False)
    assert tokens(family, model).device == GPU


def test_a_student_on_the_gpu_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    family = BY_NAME["timm"]
    model = family.build().to(GPU)
    dwattn.replace(model, Plan.for_layers(model, [1]), calibrate=family.images(8), progress=False)
    report = dwattn.export(model, tmp_path / "student.onnx", family.size)
    assert report.replaced == 1
    assert tokens(family, model).device == GPU


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="training needs the train extra")
    pytest.importorskip("torchmetrics", reason="evaluation needs the train extra")
    from dwattn import finetune
    from dwattn.finetune import trainer
    from test_finetune_tasks import coloured

    alone = types.SimpleNamespace(
        device=GPU, is_main_process=True, num_processes=1, process_index=0,
        reduce=lambda t, reduction: t, no_sync=lambda module: contextlib.nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_accelerator", lambda device: alone)
    family = BY_NAME["timm"]
    student = family.build()
    dwattn.replace(student, Plan.for_layers(student, [1]), calibrate=family.images(8), progress=False)  # fmt: skip
    views = finetune.Views(family.images(8), finetune.Augment())
    recipe = finetune.Recipe(steps=2, batch_size=4, ema=0.9)
    module, moved, move = finetune.Distillation(student, family.build()), [], trainer.move
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "move", lambda batch, device: moved.append(device) or move(batch, device))  # fmt: skip
        assert finetune.estimate(module, views, recipe).seconds > 0
    assert set(moved) == {GPU}
    assert next(student.parameters()).device.type == "cpu"
    for _ in range(2):
        run = finetune.Trainer(module, views, recipe, folder=tmp_path / "run", progress=False)
        assert run.fit(resume=True).steps == 2
        states = run.optimizer.state.values()
        assert {value.device for state in states for value in state.values()} == {GPU}
    assert tokens(family, student).device == GPU
    grid = finetune.StudyGrid(
        comparisons={
            "gates": {"blocks": (2,), "criteria": ("dsp-e2e",), "kernel_inits": ("gaussian",)},
            "sets": {"blocks": (2,), "criteria": ("dsp",)},
        },
        seeds=(0,), score_images=8, calibration_images=8, calibration={"views": 1}, recipe=finetune.Recipe(steps=2, batch_size=4),
    )  # fmt: skip
    data, test = (
        finetune.LabelledViews(*coloured(8), 3, finetune.Augment()),
        finetune.LabelledViews(*coloured(6), 3),
    )
    result = finetune.run_study(
        grid, lambda seed: finetune.classifier(BY_NAME["hub-reg4"].build(), 3, seed=seed).to(GPU), data, test,
        tmp_path / "study", trainer_options={"progress": False},
    )  # fmt: skip
    assert len(result.rows) == 4
