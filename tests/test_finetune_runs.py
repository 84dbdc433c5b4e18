"""Whole runs: they learn, stop and go on to the last bit, survive kill -9, and share the work."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.errors import CheckpointError, DataError, DwattnError, TrainingError
from dwattn.finetune import (
    Augment,
    Callback,
    Distillation,
    Evaluate,
    Order,
    Recipe,
    Targets,
    Trainer,
    Views,
    estimate,
)
from dwattn.finetune import state as state_file
from dwattn.finetune import trainer as trainer_module
from dwattn.finetune.ema import Average
from support.models import BY_NAME, hub_vit
from support.surgery import plan_for

pytest.importorskip("accelerate", reason="training needs the train extra")

FAMILY = BY_NAME["hub-reg4"]  # needs no other library: processes start quickly
TESTS = Path(__file__).parent
RECIPE = Recipe(steps=8, batch_size=4, lr=1e-3, views=2, ema=0.9, weight_decay=0.01)


def student() -> Distillation:
    model = hub_vit(num_register_tokens=4)
    dwattn.replace(model, plan_for(model), kernel_init="gaussian")
    return Distillation(model, targets=Targets(blocks=0.5), cache=1 << 20)


def views(count: int = 6) -> Views:
    return Views(FAMILY.images(count), Augment())


def trainer(module: nn.Module, folder: Path | None, **options: Any) -> Trainer:
    recipe = options.pop("recipe", RECIPE)
    data = options.pop("data", None) or views()
    return Trainer(module, data, recipe, folder=folder, device="cpu", progress=False, **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
        if step == self.step:
            trainer.stop()


def test_a_run_learns_and_leaves_its_files(tmp_path: Path) -> None:
    module = student()
    unseen = {"pixels": FAMILY.images(4, seed=9)}
    before = float(module(unseen)["loss"].detach())
    check = Evaluate(lambda m: {"loss": float(m(unseen)["loss"])}, 10)
    recipe, data = RECIPE.but(steps=40, lr=3e-3, views=None), views(80)
    run = trainer(module, tmp_path / "run", recipe=recipe, data=data, callbacks=[check])
    result = run.fit()
    found = [numbers["loss"] for _, numbers in check.history]
    assert len(found) == 4
    assert found[-1] < 0.75 * before
    assert result.complete
    assert result.steps == 40
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "eval.csv", "state.safetensors", "train.csv"
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "run" / "train.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert {"loss", "cosine", "blocks", "lr"} <= set(rows[0])
    assert not module.training


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_is_bit_exact(tmp_path: Path, workers: int) -> None:
    whole = student()
    trainer(whole, None).fit()
    parts = student()
    for stop in (3, 5):
        parts = student()
        result = trainer(parts, tmp_path / "run", callbacks=[StopAfter(stop)], workers=workers).fit(
            resume=True
        )
        assert not result.complete
    parts = student()
    assert trainer(parts, tmp_path / "run", workers=workers).fit(resume=True).complete
    assert same(weights(whole), weights(parts))
    rows = list(csv.DictReader((tmp_path / "run" / "train.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    again = student()
    assert trainer(again, tmp_path / "run").fit(resume=True).steps == 8
    assert same(weights(whole), weights(again))


class Dropping(nn.Module):
    """A training module whose loss depends on dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(3 * FAMILY.size[0] * FAMILY.size[1], 2)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        dropped = nn.functional.dropout(batch["pixels"].flatten(1), 0.5)
        return {"loss": self.linear(dropped).square().mean()}


def test_dropout_resumes_too(tmp_path: Path) -> None:
    whole, parts = Dropping(), Dropping()
    trainer(whole, None).fit()
    trainer(Dropping(), tmp_path, callbacks=[StopAfter(3)]).fit()
    torch.rand(7)
    state = torch.get_rng_state()
    trainer(parts, tmp_path).fit(resume=True)
    assert same(weights(whole), weights(parts))
    assert torch.equal(torch.get_rng_state(), state)


class Two(nn.Module):
    """A training module of two numbers, with losses and settings as they are given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(1)) for _ in range(2))
        self.given = settings

    def settings(self) -> dict[str, Any]:
        return self.given

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        size = batch["pixels"].mean()
        return {"loss": size * (self.first + self.second).sum(), "other": size * float("nan")}


def test_stopping_is_for_one_fit(tmp_path: Path) -> None:
    run = trainer(Two(), tmp_path, callbacks=[StopAfter(3)])
    assert run.fit().steps == 3
    assert run.fit(resume=True).complete


@pytest.mark.parametrize("forgotten", ["optimizer", "average", "order"])
def test_the_resume_test_would_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Planted bugs: a resume that loses a part of the state gives other weights."""
    whole = student()
    trainer(whole, None).fit()
    trainer(student(), tmp_path / "run", callbacks=[StopAfter(4)]).fit()
    parts = student()
    run = trainer(parts, tmp_path / "run")
    load = trainer_module.load_state

    def forgetful(folder: Path, module: nn.Module, optimizer: Any, average: Any) -> None:
        fresh = {} if average is None else {k: v.clone() for k, v in average.values.items()}
        load(folder, module, optimizer, average)
        if forgotten == "optimizer":
            optimizer.state.clear()
        elif forgotten == "average":
            average.values.update(fresh)

    monkeypatch.setattr(trainer_module, "load_state", forgetful)
    if forgotten == "order":
        order = run._order
        monkeypatch.setattr(run, "_order", lambda start: order(max(0, start - 1)))
        run.recipe = run.recipe.but(steps=7)
        monkeypatch.setattr(Recipe, "differences", lambda mine, other: "")
    run.fit(resume=True)
    assert not same(weights(whole), weights(parts))


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    trainer(student(), tmp_path, callbacks=[StopAfter(2)]).fit()
    with pytest.raises(TrainingError, match="2 steps; resume it"):
        trainer(student(), tmp_path).fit()
    with pytest.raises(TrainingError, match=r"lr=0\.001 instead of 0\.002"):
        trainer(student(), tmp_path, recipe=RECIPE.but(lr=2e-3)).fit(resume=True)
    other = Distillation(
        student().student, hub_vit(num_register_tokens=4), targets=Targets(cosine=2.0)
    )
    with pytest.raises(TrainingError, match=r"'cosine': 1\.0.*'cosine': 2\.0"):
        trainer(other, tmp_path).fit(resume=True)
    with pytest.raises(TrainingError, match="6 other images"):
        trainer(student(), tmp_path, data=views(5)).fit(resume=True)
    (tmp_path / "state.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="not a readable training state"):
        trainer(student(), tmp_path).fit(resume=True)


def test_the_last_evaluation_is_noted_once(tmp_path: Path) -> None:
    for _ in range(2):
        check = Evaluate(lambda module: {"a": 1.0}, 3)
        trainer(Two(), tmp_path, callbacks=[check]).fit(resume=True)
    assert (tmp_path / "eval.csv").read_text().split() == ["step,a", "3,1", "6,1", "8,1"]


def test_a_cache_is_filled_anew_for_other_images() -> None:
    module = student()
    trainer(module, None, recipe=RECIPE.but(steps=6)).fit()
    kept = module.cache
    before = {key: row[0].clone() for key, row in kept._rows.items()}
    other = Views(FAMILY.images(6, seed=3), Augment())
    trainer(module, None, data=other, recipe=RECIPE.but(steps=6)).fit()
    assert before.keys() == kept._rows.keys()
    assert not any(torch.equal(before[key], row[0]) for key, row in kept._rows.items())
    size = kept.used
    trainer(module, None, data=other, recipe=RECIPE.but(steps=6, views=None)).fit()
    assert (size > 0, len(kept), kept.used) == (True, 0, 0)


def test_micro_batches_and_recipes_for_other_tastes(tmp_path: Path) -> None:
    results = {}
    for name, options in {"whole": {}, "parts": {"micro_batch": 3}}.items():
        module = student()
        trainer(module, None, recipe=RECIPE.but(**options)).fit()
        results[name] = weights(module)
    for name, value in results["whole"].items():
        torch.testing.assert_close(results["parts"][name], value, rtol=1e-3, atol=1e-4)
    bf16 = student()
    assert trainer(bf16, None, recipe=RECIPE.but(amp="bf16", steps=2)).fit().losses["loss"] > 0
    with pytest.raises(TrainingError, match="device='tpu'"):
        Trainer(student(), views(), RECIPE, device="tpu")


def test_the_estimate_changes_nothing_and_adds_up() -> None:
    module = student()
    before, state = weights(module), torch.get_rng_state()
    found = estimate(module, views(), RECIPE, device="cpu")
    assert same(before, weights(module))
    assert torch.equal(state, torch.get_rng_state())
    parameters = sum(p.numel() for p in module.parameters())
    assert found.trained == found.parameters == parameters
    assert found.gradients == found.average == 4 * parameters
    assert found.optimizer == 8 * parameters
    assert found.checkpoint >= 16 * parameters
    teacher = sum(p.numel() for p in hub_vit(num_register_tokens=4).parameters())
    assert found.held == (1 << 20) + 4 * teacher
    assert found.seconds == found.steps * found.seconds_per_step > 0
    replaced = estimate(module, views(), RECIPE.but(train="replaced", ema=None), device="cpu")
    assert replaced.trained < found.trained / 2
    assert replaced.average == 0
    bigger = estimate(module, views(), RECIPE.but(batch_size=8), device="cpu")
    assert 1.8 < bigger.activations / found.activations < 2.2
    halved = estimate(module, views(), RECIPE.but(amp="bf16"), device="cpu")
    assert halved.activations < 0.9 * found.activations


def test_the_estimate_times_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Average, "update", lambda average, step: time.sleep(0.3))
    assert estimate(Two(), views(), RECIPE, device="cpu").seconds_per_step > 0.3


RUN = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
import torch
from dwattn.finetune import Callback
import test_finetune_runs as runs

torch.set_num_threads(1)

class Tell(Callback):
    def on_step(self, trainer, step, losses):
        print(step, flush=True)

def main(folder, steps):
    module = runs.student()
    recipe = runs.RECIPE.but(steps=int(steps))
    runs.trainer(
        module, Path(folder), recipe=recipe, save_minutes=0.0, callbacks=[Tell()]
    ).fit(resume=True)
    torch.save(runs.weights(module), Path(folder) / "final.pt")

main(*sys.argv[1:])
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """Killed twice while it trains and writes a checkpoint after every step; goes on each time."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    folder, steps = tmp_path / "run", 60
    command = [sys.executable, str(script), str(folder), str(steps)]
    reached = []
    for attempt in range(2):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]  # so two checkpoints are written
        assert told[0], process.stderr.read() if process.stderr else ""
        reached.append(int(told[0]))
        time.sleep(0.11 + 0.037 * attempt)  # some way into a later step or the file it writes
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert state_file.read_progress(folder) is not None
    assert reached == sorted(set(reached))
    (folder / ".tmpcoSQlg").touch()  # of safetensors, if the kill meets its writing
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = student()
        trainer(whole, None, recipe=RECIPE.but(steps=steps)).fit()
    finally:
        torch.set_num_threads(threads)
    assert same(weights(whole), torch.load(folder / "final.pt"))
    assert sorted(p.name for p in folder.iterdir()) == [
        "final.pt", "state.safetensors", "train.csv"
    ]  # fmt: skip
    rows = list(csv.DictReader((folder / "train.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, steps + 1))


def share(rank: int, folder: str, port: int) -> None:
    """One of two processes, as torchrun starts them."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    module = student()
    run = trainer(module, Path(folder) / "run", recipe=RECIPE.but(micro_batch=1))
    result = run.fit()
    torch.save({"weights": weights(module), "losses": result.losses}, f"{folder}/{rank}.pt")
    data = views()
    order = list(Order(6, 4, 0, 2, 8, rank=1, world=2))
    if rank:
        read = data.load

        def load(index: int) -> Tensor:
            if stopping.step == 2 and index == order[2][0][0]:
                raise DataError("An image cannot be read")
            return read(index)

        data.load = load
    module = student()
    module.cache.limit = 0
    stopping = trainer(module, Path(folder) / "unreadable", data=data)
    try:
        stopping.fit()
    except DwattnError as error:
        (Path(folder) / f"unreadable-{rank}.txt").write_text(str(error))
    try:
        trainer(student(), None, recipe=RECIPE.but(batch_size=3))
    except TrainingError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(share, args=(str(tmp_path), port), nprocs=2)
    one = student()
    result = trainer(one, None).fit()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(found[0]["weights"], found[1]["weights"])
    for name, value in weights(one).items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-3, atol=1e-4)
    assert found[0]["losses"] == pytest.approx(result.losses, rel=1e-3)
    unreadable = [(tmp_path / f"unreadable-{rank}.txt").read_text() for rank in range(2)]
    assert unreadable[0] == "Process 1 of 2 failed with DataError: An image cannot be read"
    assert unreadable[1] == "An image cannot be read"
    kept = state_file.read_progress(tmp_path / "unreadable")
    assert kept is not None
    assert kept.step == 2
    assert "cannot be shared equally by 2" in (tmp_path / "1.txt").read_text()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "state.safetensors", "train.csv"
    ]  # fmt: skip


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_recovers() -> None:
    """From the paper's initialisation, a few steps towards features and saliency of photos it also sees mirrored."""
    pytest.importorskip("onnx")
    pytest.importorskip("timm")
    from dwattn.demo import photos, pretrained

    try:
        model = pretrained.build("timm")
        images, _ = photos.load(photos.pool(8)[:4])
    except DataError as error:
        pytest.skip(str(error))
    dwattn.replace(model, plan_for(model, (2, 11)), kernel_init="gaussian")
    targets = Targets(output=1.0, output_loss="binary")
    module = Distillation(model, targets=targets)
    before = module({"pixels": images})
    recipe = Recipe(steps=3, batch_size=4, lr=1e-4, kernel_lr=30, weight_decay=0)
    Trainer(module, Views(images, Augment()), recipe, device="cpu", progress=False).fit()
    after = module({"pixels": images})
    assert float(after["cosine"].detach()) < 0.9 * float(before["cosine"].detach())
    assert float(after["output"].detach()) < float(before["output"].detach())
