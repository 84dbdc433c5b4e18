"""The command: the whole chain by files, JSON on stdout, exit codes, and Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import dwattn
from dwattn.cli import app
from dwattn.cli.common import command, emit, image_size, parse_size
from dwattn.models import load_model

TESTS = Path(__file__).parent
FACTORY = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import torch
from support.models import hub_vit

def make():
    return hub_vit(num_register_tokens=4)

class Slow(torch.nn.Module):
    def __init__(self, marker):
        super().__init__()
        self.backbone, self.marker = make(), Path(marker)
    def forward(self, x):
        self.marker.touch()
        time.sleep(0.2)
        return self.backbone(x)

def slow(marker):
    return Slow(marker)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model factory and twelve images of several shapes."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "factory.py").write_text(FACTORY)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for index in range(12):
        coarse = random.integers(0, 255, (8 + index % 3, 9, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((80, 60 + 9 * (index % 3)), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{index}.png")
    return folder


def invoke(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def invoke_json(*arguments: object) -> Any:
    """The result of ``--json``: everything on stdout must be one JSON value."""
    return json.loads(invoke(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def scored(place: Path) -> Path:
    """Scores of the model, made by the command."""
    path = place / "scores.safetensors"
    model = f"{place / 'factory.py'}:make"
    result = invoke_json(
        "score", model, "--images", place / "images", "--out", path, "--size", 56, "--amp", "bf16"
    )
    assert result["num_images"] == 12
    assert len(result["layers"]) == 4
    return path


def test_refine_writes_the_best_plan(place: Path, scored: Path, tmp_path: Path) -> None:
    model, plan = f"{place / 'factory.py'}:make", tmp_path / "plan.json"
    found = invoke_json(
        "refine", model, scored, "--images", place / "images", "--judge", place / "images", "--blocks", 2,
        "--variant", "lowrank_dw", "--rank", 16, "--width", 1, "--rounds", 1, "--num-images", 8, "--size", 56,
        "--trials", tmp_path / "trials.json", "--out", plan, "--no-progress",
    )  # fmt: skip
    drift = {tuple(trial["blocks"]): trial["drift"] for trial in found["trials"]}
    assert len(drift) == 2
    assert tuple(found["blocks"]) in drift
    assert json.loads(plan.read_text()) == found["plan"]
    kept = json.loads((tmp_path / "trials.json").read_text())
    assert kept["trials"] == found["trials"]
    wrong = invoke("refine", model, scored, "--images", place / "images", "--blocks", 9, "--size", 56, code=1)  # fmt: skip
    assert "only 4" in wrong.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "m:f", "--images", "i", "--weights", "held", "--out", "held"],
        ["select", "held", "--blocks", "1", "--out", "held"],
        ["refine", "m:f", "held", "--images", "i", "--blocks", "1", "--out", "link"],
        ["refine", "m:f", "held", "--images", "i", "--blocks", "1", "--trials", "held"],
        ["replace", "m:f", "held", "--out", "./held"],
        ["export", "m:f", "held", "--out", "held"],
        ["export", "m:f", "m.data", "--out", "m"],
        ["report", "held", "--out", "held"],
    ],
)
def test_no_command_writes_over_what_it_reads(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("held", "m.data"):
        Path(name).write_text("hours of work")
    Path("link").symlink_to("held")
    assert "is also read" in invoke(*arguments, code=1).stderr.replace("\n", " ")
    assert {Path(name).read_text() for name in ("held", "m.data")} == {"hours of work"}


def test_a_close_call_is_told(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "plan.json"
    hint = "dwattn refine --width 1 --criterion variance tries both"
    for share, told in ((1e9, True), (-1.0, False)):
        monkeypatch.setattr("dwattn.selection.CLOSE", share)
        assert (hint in invoke("select", scored, "--blocks", 2, "--out", plan).stderr) == told
    monkeypatch.setattr("dwattn.selection.CLOSE", 1e9)
    assert hint not in invoke("select", scored, "--heads", 2, "--out", plan).stderr


def test_the_whole_chain(place: Path, scored: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, plan = f"{place / 'factory.py'}:make", tmp_path / "plan.json"
    student, onnx = tmp_path / "student.safetensors", tmp_path / "model.onnx"
    chosen = invoke_json("select", scored, "--blocks", 2, "--criterion", "residual", "--out", plan)
    assert json.loads(plan.read_text())["layers"] == chosen["layers"]
    assert len(chosen["layers"]) == 2

    dry = invoke_json("replace", model, plan, "--dry-run")
    assert dry["dry_run"]
    assert not student.exists()
    done = invoke(
        "replace", model, plan, "--calibrate", place / "images", "--num-images", 8, "--amp", "bf16",
        "--out", student, "--json",
    )  # fmt: skip
    assert "8 images are few to fit weights on" in done.stderr
    done = json.loads(done.stdout)
    assert [row["action"] for row in done["layers"]].count("replaced") == 2
    assert done["calibration"]

    report = invoke_json("export", model, student, "--size", 56, "--out", onnx, "--latency")
    assert report["replaced"] == 2
    assert report["max_rel"] < 1e-4
    assert onnx.exists()
    report = invoke_json(
        "export", model, student, "--size", 56, "--out", onnx, "--lowering", "plugin"
    )
    assert set(report["nodes"].values()) == {"dwattn::DWAttention 1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.onnx", "plan.json", "student.safetensors"
    ]  # fmt: skip


def test_export_names_both_files_of_a_large_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(importlib.import_module("dwattn.export"), "_INLINE_BYTES", 1000)
    model, out = f"{place / 'factory.py'}:make", tmp_path / "m.onnx"
    done = invoke("export", model, "--size", 56, "--out", out, "--no-check")
    assert f"Wrote {out} and {out}.data, which belong together." in done.stderr


def test_a_size_other_than_the_models_sets_the_grid(
    place: Path, scored: Path, tmp_path: Path
) -> None:
    model, plan = f"{place / 'factory.py'}:make", tmp_path / "plan.json"
    student = tmp_path / "student.safetensors"
    invoke("select", scored, "--blocks", 1, "--out", plan)
    calibrated = ("replace", model, plan, "--calibrate", place / "images", "--num-images", 4)
    done = invoke_json(*calibrated, "--size", "56x84", "--out", student)
    assert done["settings"]["grid"] == [4, 6]
    loaded = dwattn.load(load_model(model), student)
    assert image_size(loaded, None) == (56, 84)
    assert loaded(torch.zeros(1, 3, 56, 84)).isfinite().all()
    found = invoke_json(
        "refine", model, scored, "--images", place / "images", "--blocks", 1, "--width", 1, "--rounds", 1,
        "--num-images", 8, "--batch-size", 4, "--size", 84, "--out", plan,
    )  # fmt: skip
    assert len(found["trials"]) == 2
    refused = invoke("refine", model, scored, "--images", place / "images", "--blocks", 1, code=1)
    assert "smaller batches (--batch-size)" in refused.stderr


def test_tables_for_people(place: Path, scored: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    result = invoke("select", scored, "--heads", 3, "--out", plan)
    assert "blocks." in result.stdout
    assert f"Wrote {plan}" in result.stderr.replace("\n", "")
    result = invoke("replace", f"{place / 'factory.py'}:make", plan, "--dry-run")
    assert "would be replaced" in result.stdout
    assert invoke("doctor").stdout.startswith("dwattn ")
    assert "backends" in invoke_json("doctor")
    assert dwattn.__version__ in invoke("--version").stdout


def test_tables_in_a_pipe_hold_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    monkeypatch.delenv("COLUMNS", raising=False)
    name = "vision_model.encoder.layers.11.self_attn"
    table = Table(*(["layer"] * 3))
    table.add_row(name, name, name)
    with io.StringIO() as pipe, contextlib.redirect_stdout(pipe):
        emit(table, as_json=False)
        assert pipe.getvalue().count(name) == 3


def test_json_has_null_for_what_is_not_finite() -> None:
    with io.StringIO() as pipe, contextlib.redirect_stdout(pipe):
        emit({"strength": math.inf, "layers": [{"held_out": math.nan, "drift": 0.5}]}, as_json=True)
        found = json.loads(pipe.getvalue(), parse_constant=pytest.fail)
    assert found == {"strength": None, "layers": [{"held_out": None, "drift": 0.5}]}


def test_a_speedup_is_measured_on_the_model(place: Path, scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ("select", scored, "--target-speedup", 1.0001, "--out", out)
    assert "--model" in invoke(*arguments, code=2).stderr
    result = CliRunner().invoke(
        app, [str(a) for a in (*arguments, "--model", f"{place / 'factory.py'}:make")]
    )
    # Whether a model this small gets faster at all is up to the machine; either answer is a clean
    # one.
    assert result.exit_code in (0, 1)
    assert out.exists() == (result.exit_code == 0)
    narrow = ("--model", f"{place / 'factory.py'}:make", "--variant", "lowrank_dw", "--rank", 0.5)
    out.unlink(missing_ok=True)
    failed = invoke("select", scored, "--target-speedup", 99, "--out", out, *narrow, code=1)
    assert "(lowrank_dw, cpu" in failed.stderr
    assert "--target-speedup" in invoke("select", scored, "--blocks", 1, "--rank", 8, code=2).stderr


def test_the_users_own_order(scored: Path, tmp_path: Path) -> None:
    plan = invoke_json(
        "select", scored, "--order", "3,1,2", "--blocks", 2, "--out", tmp_path / "plan.json"
    )
    assert [layer["name"].split(".")[1] for layer in plan["layers"]] == ["1", "3"]
    assert "--order" in invoke("select", scored, "--order", "a", "--blocks", 1, code=2).stderr
    alone = invoke("select", scored, "--order", "3,1", "--out", tmp_path / "plan.json")
    assert "in your own order\n" in alone.stdout
    assert len(json.loads((tmp_path / "plan.json").read_text())["layers"]) == 2


def test_pixels_are_divided_by_numbers_above_0(place: Path, tmp_path: Path) -> None:
    arguments = ("score", f"{place / 'factory.py'}:make", "--images", place / "images", "--size", 56,
                 "--out", tmp_path / "s.safetensors")  # fmt: skip
    for option, value in (("--std", "0,0,0"), ("--std", "1,nan,1"), ("--mean", "inf,0,0")):
        assert f"{option} {value}" in invoke(*arguments, option, value, code=2).stderr


def test_report_of_stored_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from support.demo_results import make_results

    make_results(tmp_path).save(tmp_path / "results.json")
    written = invoke_json("report", tmp_path)
    assert Path(written["report"]).read_text("utf-8").lstrip().lower().startswith("<!doctype html")
    assert "none.json" in invoke("report", tmp_path / "none.json", code=1).stderr


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.demo_results import make_results

    make_results(tmp_path).save(tmp_path / "results.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "'dwattn[demo]'" in invoke("report", tmp_path, code=1).stderr
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["select", "none.safetensors", "--blocks", "1"], 1, "none.safetensors"),
        (["select", "none.safetensors"], 2, "--target-speedup"),
        (["select", "none.safetensors", "--blocks", "1", "--heads", "2"], 2, "--heads"),
        (["select", "none.safetensors", "--blocks", "zero"], 2, "--blocks"),
        (["score", "resnet50", "--images", "images"], 1, "is not a model name"),
        (["score", "{model}", "--images", "nowhere"], 1, "no folder nowhere"),
        (["score", "{model}", "--images", ".", "--size", "56"], 1, "image"),
        (["score", "{model}", "--images", "images", "--amp", "fp8"], 1, "no, bf16, fp16"),
        (["score", "{model}", "--images", "images", "--size", "big"], 2, "is not a size"),
        (["score", "{model}", "--images", "images", "--mean", "1,2"], 2, "is not three numbers"),
        (["score", "{model}", "--images", "images", "--device", "warp"], 1, "'warp'"),
        (["replace", "{model}", "none.json"], 2, "--dry-run"),
        (["replace", "{model}", "none.json", "--dry-run"], 1, "none.json"),
        (["replace", "{model}", "none.json", "--dry-run", "--rank", "x"], 2, "fidelity=0.95"),
        (["export", "{model}", "none.safetensors"], 1, "none.safetensors"),
        (["export", "{model}", "--size", "55"], 1, "not a multiple"),
        (["export", "{model}", "--fp32-io"], 2, "--fp16"),
        (["export", "{model}", "--lowering", "magic"], 1, "plugin"),
        (["export", "{model}", "--weights", "none.pth"], 1, "no weights file"),
        (["score", "m:f", "--images", "images", "--out", "none/s"], 1, "'none/s'"),
        (["refine", "m:f", "s", "--images", "i", "--blocks", "1", "--out", "."], 1, "directory"),
        (["refine", "m:f", "s", "--images", "i", "--blocks", "1", "--trials", "."], 1, "directory"),
        (["replace", "{model}", "none.json", "--out", "none/s"], 1, "'none/s'"),
        (["replace", "{model}", "none.json", "--out", "/dev/null"], 1, "device"),
        (["export", "{model}", "--out", "none/model.onnx"], 1, "'none/model.onnx'"),
        (["transmogrify"], 2, "transmogrify"),
    ],
)
def test_mistakes_are_one_sentence_and_an_exit_code(
    arguments: list[str],
    code: int,
    words: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(place / "images")
    model = f"{place / 'factory.py'}:make"
    if "--images" in arguments and "." in arguments:
        (tmp_path / "images").unlink()
    result = invoke(*(a.replace("{model}", model) for a in arguments), code=code)
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] in (["images"], [])


def test_damaged_images_end_no_work_that_has_begun(
    place: Path, scored: Path, tmp_path: Path
) -> None:
    """Each command names all of them at once, before the slow model was called."""
    images, marker, labelled = tmp_path / "images", tmp_path / "called", tmp_path / "labelled"
    shutil.copytree(place / "images", images)
    for number in (5, 8):
        data = (images / f"{number}.png").read_bytes()
        (images / f"{number}.png").write_bytes(data[: len(data) // 2])
    for name in ("a", "b"):
        shutil.copytree(images, labelled / name)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    student = tmp_path / "student.safetensors"
    invoke("select", scored, "--blocks", 1, "--out", plan)
    quick, model = f"{place / 'factory.py'}:make", f"{place / 'factory.py'}:slow?marker={marker}"
    invoke("replace", quick, plan, "--out", student, "--size", 56)
    for command_line in (
        ("score", model, "--images", images, "--size", 56),
        ("refine", model, scored, "--images", images, "--blocks", 1, "--size", 56),
        ("replace", model, plan, "--calibrate", images, "--size", 56),
        ("finetune", quick, student, "--images", images, "--size", 56, "--steps", 1),
        ("finetune", model, "--task", "classify", "--images", labelled, "--size", 56, "--steps", 1),
    ):
        found = " ".join(invoke(*command_line, "--out", out, code=1).stderr.split())
        assert "images cannot be read" in found, (command_line, found)
        assert "5.png" in found
        assert "8.png" in found
        assert not marker.exists()
        assert not out.exists()


def test_sizes() -> None:
    assert parse_size("224") == (224, 224)
    assert parse_size("224x336") == (224, 336)


def test_demo_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def run(out: Any, **options: Any) -> dict[str, int]:
        calls.append((out, options))
        return {"seconds": 1}

    monkeypatch.setattr("dwattn.demo.run", run)
    assert invoke_json("demo", "--quick", "--out", tmp_path) == {"seconds": 1}
    assert invoke("demo", "--out", tmp_path).stdout == ""
    assert calls == [
        (tmp_path, {"quick": True, "json": True}), (tmp_path, {"quick": False, "json": False})
    ]  # fmt: skip


# The process -----------------------------------------------------------------------------------


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    source = str(Path(dwattn.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [source, os.environ.get("PYTHONPATH")])
    )
    return subprocess.Popen(
        [sys.executable, "-m", "dwattn", *(str(a) for a in arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # Tests may run as a background job, whose children inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sent", "code"),
    [
        ("score", signal.SIGINT, 130),
        ("replace", signal.SIGINT, 130),
        ("score", signal.SIGTERM, 143),
    ],
)
def test_an_interruption_leaves_no_half_written_file(
    name: str, sent: signal.Signals, code: int, place: Path, scored: Path, tmp_path: Path
) -> None:
    marker, out, plan = tmp_path / "running", tmp_path / "out.safetensors", tmp_path / "plan.json"
    out.write_bytes(b"an older file")
    model = f"{place / 'factory.py'}:slow?marker={marker}"
    images = place / "images"
    arguments: tuple[object, ...] = ("score", model, "--images", images)
    if name == "replace":
        slow_scores = tmp_path / "scores.safetensors"
        invoke("score", model, "--images", images, "--num-images", 2, "--out", slow_scores)
        invoke("select", slow_scores, "--blocks", 1, "--out", plan)
        marker.unlink()
        arguments = ("replace", model, plan, "--calibrate", images)
    before = sorted([*tmp_path.iterdir(), marker])
    running = process(*arguments, "--batch-size", 1, "--json", "--out", out)
    deadline = time.monotonic() + 120
    while not marker.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(sent)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == code, stderr
    assert ("Interrupted" in stderr) == (sent == signal.SIGINT)
    assert "Traceback" not in stderr
    assert stdout == ""
    assert out.read_bytes() == b"an older file"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_library_that_swallows_the_stop_does_not_change_the_exit_code(
    sent: signal.Signals, code: int
) -> None:
    """safetensors makes a ValueError of a Ctrl-C amid its reading, PyTorch's exporter errors of its own."""

    @command
    def export() -> None:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        except BaseException as stop:
            raise ValueError("could not determine the shape") from stop

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises((SystemExit, typer.Exit)) as ended:
        export()
    assert getattr(ended.value, "code", getattr(ended.value, "exit_code", None)) == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
