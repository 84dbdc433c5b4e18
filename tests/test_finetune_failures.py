"""Runs that are stopped or fail: what is kept then, and what is refused afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from dwattn.errors import CheckpointError, DataError, DwattnError, TrainingError
from dwattn.files import sole_writer
from dwattn.finetune import Callback, Evaluate, Order, Trainer, Views
from dwattn.finetune import state as state_file
from dwattn.finetune import trainer as trainer_module
from dwattn.finetune.batches import in_step
from dwattn.finetune.log import CsvLog
from dwattn.image_files import image_folder
from dwattn.ranks import Ranks
from test_finetune_runs import RECIPE, StopAfter, Two, same, student, trainer, views, weights

pytest.importorskip("accelerate", reason="training needs the train extra")


def test_terms_that_are_not_finite_and_settings_are_read_again(tmp_path: Path) -> None:
    trainer(Two(size=(1, 2)), tmp_path, callbacks=[StopAfter(2)]).fit()
    found = state_file.read_progress(tmp_path)
    assert found is not None
    assert found.losses["other"] != found.losses["other"]
    with pytest.raises(TrainingError, match=r"\[1, 2\]\}, now they are \{'size': \[1, 3\]"):
        trainer(Two(size=(1, 3)), tmp_path).fit(resume=True)
    assert trainer(Two(size=(1, 2)), tmp_path).fit(resume=True).complete


def test_a_run_that_trains_other_parameters_is_refused(tmp_path: Path) -> None:
    module = Two()
    trainer(module, tmp_path, callbacks=[StopAfter(2)]).fit()
    module.second.requires_grad_(False)
    groups = [{"params": [module.first], "lr": 1e-3}]
    with pytest.raises(CheckpointError, match=r"also holds \['average\.second'\].*trained param"):
        trainer(module, tmp_path, groups=groups).fit(resume=True)


def test_the_state_is_put_beside_its_parameters(tmp_path: Path) -> None:
    """A fused optimiser wants its step counter there, another one on the CPU."""
    module = Two()
    trainer(module, tmp_path, callbacks=[StopAfter(1)], recipe=RECIPE.but(ema=None)).fit()
    elsewhere = Two().to("meta")
    for fused, device in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.AdamW(elsewhere.parameters())
        optimizer.defaults["fused"] = fused
        state_file.load_state(tmp_path, elsewhere, optimizer, None)
        state = optimizer.state[elsewhere.first]
        assert {k: t.device.type for k, t in state.items()} == {
            "step": device, "exp_avg": "meta", "exp_avg_sq": "meta"
        }  # fmt: skip


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, MemoryError])
def test_ctrl_c_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """Between steps the state is written; amid an update the older one stays."""

    class Interrupt(Callback):
        def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
            if step == 3:
                raise stop

    with pytest.raises(stop):
        trainer(student(), tmp_path, callbacks=[Interrupt()]).fit()
    whole, parts = student(), student()
    trainer(whole, None).fit()
    run = trainer(parts, tmp_path)

    def interrupted(step: int) -> None:
        raise stop

    monkeypatch.setattr(run.average, "update", interrupted)
    with pytest.raises(stop):
        run.fit(resume=True)
    found = state_file.read_progress(tmp_path)
    assert found is not None
    assert found.step == 3
    parts = student()
    trainer(parts, tmp_path).fit(resume=True)
    assert same(weights(whole), weights(parts))


@pytest.mark.parametrize("amid", ["its row", "its evaluation"])
def test_a_stop_amid_a_step_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amid: str
) -> None:
    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"sum": sum(float(p.detach().double().sum()) for p in module.parameters())}

    def run(folder: Path) -> None:
        trainer(student(), folder, callbacks=[Evaluate(evaluate, 3)]).fit(resume=True)

    write = CsvLog.write

    def stopped_at_6(log: CsvLog, row: dict[str, float]) -> None:
        name = "eval.csv" if amid == "its evaluation" else "train.csv"
        if log.path is not None and (log.path.name, row["step"]) == (name, 6):
            raise KeyboardInterrupt
        write(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(CsvLog, "write", stopped_at_6)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    run(tmp_path / "parts")
    run(tmp_path / "whole")
    for name in ("train.csv", "eval.csv"):
        whole, parts = ((tmp_path / folder / name).read_text() for folder in ("whole", "parts"))
        assert whole == parts


def test_ctrl_c_amid_an_exchange_with_the_averages(tmp_path: Path) -> None:
    """A module that holds some weights and some averages is not written."""

    class Interrupting(dict[str, Tensor]):
        def __setitem__(self, name: str, value: Tensor) -> None:
            if name == "second":
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    class Look(Callback):
        def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
            if step == 2:
                trainer._save()
            if step == 3:
                assert trainer.average is not None
                trainer.average.values = Interrupting(trainer.average.values)
                with trainer.averaged():
                    raise AssertionError("the exchange is interrupted before")

    with pytest.raises(KeyboardInterrupt):
        trainer(Two(), tmp_path, callbacks=[Look()]).fit()
    found = state_file.read_progress(tmp_path)
    assert found is not None
    assert found.step == 2
    whole, parts = Two(), Two()
    trainer(whole, None).fit()
    trainer(parts, tmp_path).fit(resume=True)
    assert same(weights(whole), weights(parts))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_costs_nothing(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        pixels = torch.randint(0, 255, (60, 60, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    data = Views(image_folder(folder, 56))
    whole = (folder / "5.png").read_bytes()
    step = next(i for i, keys in enumerate(Order(6, 2, 0, 2, 8)) if 5 in dict(keys))
    recipe = RECIPE.but(batch_size=2)
    module = student()
    module.cache.limit = 0
    run = trainer(module, tmp_path / "run", recipe=recipe, data=data, workers=workers)
    (folder / "5.png").write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"5\.png cannot be read") as found_unreadable:
        run.fit()
    assert "\n" not in str(found_unreadable.value)
    found = state_file.read_progress(tmp_path / "run")
    assert found is not None
    assert found.step == step
    with pytest.raises(TrainingError, match="other images"):
        trainer(student(), tmp_path / "run", recipe=recipe, data=data).fit(resume=True)
    (folder / "5.png").write_bytes(whole)
    assert trainer(student(), tmp_path / "run", recipe=recipe, data=data).fit(resume=True).complete


def test_a_folder_has_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would remove each other's half-written files; the lock ends with its process, killed or not."""
    monkeypatch.setattr(trainer_module, "sole_writer", partial(sole_writer, patience=0.3))
    run = tmp_path / "run"
    code = (
        "import sys, time; from dwattn.errors import TrainingError; from dwattn.files import sole_writer\n"
        "with sole_writer(sys.argv[1], TrainingError): print('held', flush=True); time.sleep(60)"
    )
    run.mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(TrainingError, match=r"Another process is at work in '.*run'"):
        trainer(student(), run).fit()
    assert not list(run.iterdir())
    other.kill()
    other.wait()
    assert trainer(student(), run).fit().complete


#: A run of which the process is killed while its worker starts, which then sleeps a moment.
STARTING = """
import os, signal, sys, time
import torch
from torch.utils.data._utils import signal_handling
from dwattn.errors import TrainingError
from dwattn.files import sole_writer
from dwattn.finetune import Order, Views
from dwattn.finetune.batches import read_batches

def slowly():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(0.5)

signal_handling._set_worker_signal_handlers = slowly
with sole_writer(sys.argv[1], TrainingError):
    next(read_batches(Views(torch.zeros(4, 3, 8, 8)), Order(4, 2, 0, 2, 8), workers=1))
"""


@pytest.mark.slow
def test_a_worker_whose_parent_was_killed_lets_go_of_the_folder(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", STARTING, tmp_path], check=False)
    assert killed.returncode == -9
    with sole_writer(tmp_path, TrainingError):
        pass


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    module = student()
    before = weights(module)
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if n.endswith("kernel")).fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"The loss is nan at step 1.*lower lr"):
        trainer(module, tmp_path).fit()
    changed = [n for n, p in module.named_parameters() if not torch.equal(before[n], p)]
    assert all(n.endswith("kernel") for n in changed)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path, clip: float | None) -> None:
    class Root(Two):
        def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
            losses = super().forward(batch)
            # From the third step on an infinite slope where the value is 0.
            return {"loss": losses["loss"] + (self.first * (run.step < 2)).abs().sqrt().sum()}

    module = Root()
    run = trainer(module, tmp_path, recipe=RECIPE.but(clip=clip))
    with pytest.raises(TrainingError, match="norm of the gradients is nan at step 3"):
        run.fit()
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    found = state_file.read_progress(tmp_path)
    assert found is not None
    assert found.step == 2


def test_a_log_keeps_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.csv"
    expected = ["step,loss", "1,2"]
    log, whole = CsvLog(path), Path.open

    def full(self: Path, *args: Any, **options: Any) -> Any:
        with whole(self, *args, **options) as file:
            file.write("step,lo")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(CheckpointError, match="No space left"):
            log.write({"step": 1, "loss": 2})
    assert path.read_text() == ""
    log.write({"step": 1, "loss": 2})
    assert path.read_text().split() == expected
    for left in ("", "\n", "step,lo", "step,loss\n", "0,3\n"):
        path.write_text(left)
        CsvLog(path)
        CsvLog(path, 1).write({"step": 1, "loss": 2})
        assert path.read_text().split() == expected


def test_all_processes_end_where_one_cannot_read() -> None:
    class Failing(Ranks):
        @contextlib.contextmanager
        def agreement(self) -> Iterator[None]:
            yield
            raise DwattnError("Process 1 of 2 failed")

    batches = in_step(iter([{"a": 1}, {"a": 2}]), Failing(), lambda failed: next(anywhere))
    anywhere = iter([False, True])
    assert next(batches) == {"a": 1}
    with pytest.raises(DwattnError, match="Process 1 of 2"):
        next(batches)


def test_a_process_keeps_to_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(Two(), None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TrainingError, match=r"device='cuda' is not available.*keeps to cpu"):
        Trainer(Two(), views(), RECIPE, device="cuda")


def test_a_full_disk_stops_checkpoints_not_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = student()
    trainer(whole, None).fit()
    save, full = safetensors.torch.save_file, [True]

    def no_space(*args: Any, **options: Any) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        save(*args, **options)

    class FreeAtTheEnd(Callback):
        def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
            full[0] = step < 8

    monkeypatch.setattr(safetensors.torch, "save_file", no_space)
    module = student()
    result = trainer(module, tmp_path, callbacks=[FreeAtTheEnd()], save_minutes=0.0).fit()
    assert result.complete
    assert any("No space left on device" in note for note in result.notes)
    assert same(weights(whole), weights(module))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.safetensors", "train.csv"]
    full[0] = True
    monkeypatch.setattr(FreeAtTheEnd, "on_step", lambda *_: None)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer(student(), tmp_path / "other").fit()
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["train.csv"]


def test_a_folder_that_takes_no_files_is_refused_before_training(tmp_path: Path) -> None:
    folder = Path("/proc/self")
    if not folder.exists():
        pytest.skip("no /proc")
    run = trainer(student(), folder)
    with pytest.raises(CheckpointError, match=r"Cannot write '/proc/self/state\.safetensors'"):
        run.fit()
    assert run.step == 0
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cannot make the folder"):
        trainer(student(), tmp_path / "file" / "run").fit()


def test_progress_is_validated(tmp_path: Path) -> None:
    trainer(student(), tmp_path, callbacks=[StopAfter(1)]).fit()
    found = state_file.read_progress(tmp_path)
    assert found is not None
    assert (found.step, found.images) == (1, 6)
    assert json.loads(found.model_dump_json())["recipe"]["ema"] == 0.9
    assert state_file.read_progress(tmp_path / "nothing") is None
