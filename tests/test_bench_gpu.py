"""The benchmark of the GPU, as far as no GPU is needed: it runs, covers every target and judges rightly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dwattn import backends, library
from test_benchmarks import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import bench_gpu
import gpu_cases
import gpu_clock
import gpu_scoring
import gpu_targets

Row = dict[str, Any]


def row(part: str, sizes: dict[str, Any], **medians: float) -> Row:
    times = {name.replace("_", " "): {"median_ms": value} for name, value in medians.items()}
    return {"part": part, "case": sizes, "times": times}


def test_the_committed_cases_cover_every_target() -> None:
    rows = [row(part, sizes) for part, cases in gpu_cases.CASES.items() for sizes in cases]
    rows += [row(part, gpu_scoring.FULL) for part in ("scoring", "memory")]
    assert gpu_targets.unmeasured(rows) == []
    assert {target.part for target in gpu_targets.TARGETS} == {*bench_gpu.PARTS, "memory"}
    # Compiled PyTorch is among the competitors where the target names it.
    about = [r for r in rows if gpu_targets.TARGETS[1].is_about(r)]
    assert {r["case"]["batch"] for r in about} == {8, 64}
    assert all(r["case"]["compile"] for r in about)


def test_ratios_are_judged_against_their_bounds() -> None:
    sizes = gpu_cases.CASES["values"][0]
    good = row("values", sizes, cuda=1.05, value_product=1.0, eager=9.0, compiled=1.5)
    product, best = gpu_targets.judge([good])
    assert (product.ratio, product.met, product.floor) == (1.05, True, 1.0)
    assert best.ratio == pytest.approx(1.5 / 1.05)
    assert (best.met, best.floor) == (True, 1.5)
    slow = row("values", sizes, cuda=1.2, value_product=1.0, eager=1.5)
    assert [j.met for j in gpu_targets.judge([slow])] == [False, False]
    without = gpu_targets.judge([row("values", sizes, value_product=1.0)])
    assert [(j.ratio, j.met) for j in without] == [(None, None), (None, None)]
    assert gpu_targets.judge([row("values", gpu_cases.QUICK["values"][0], cuda=1.0)]) == []


def test_the_kernel_for_hopper_counts_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {**gpu_cases.CASES["values"][0], "hopper": True}
    times = {"cuda": 1.3, "cuda, Hopper's kernel": 1.05, "value_product": 1.0}
    found = gpu_targets.judge([row("values", sizes, **times)])[0]
    assert (found.ratio, found.met) == (1.05, True)
    assert "Hopper" in found.case
    monkeypatch.delenv("DWATTN_CUDA_HOPPER", raising=False)
    assert gpu_cases._asking_for_hopper(lambda: os.environ["DWATTN_CUDA_HOPPER"]) == "1"
    assert "DWATTN_CUDA_HOPPER" not in os.environ


def test_a_narrow_layer_is_held_to_the_copy_and_to_the_best_attention() -> None:
    sizes = gpu_cases.case(24, 1024, 16, 64, "bf16", 64)
    times = {"cuda": 1.0, "copy": 0.72, "attention_flash": 9.0, "attention_cudnn": 7.9}
    found = {j.target: j for j in gpu_targets.judge([row("layers", sizes, **times)])}
    assert found["copy / narrow layer"].met
    assert found["best attention / narrow layer"].ratio == 7.9
    assert found["best attention / narrow layer"].met is False


def test_memory_is_judged_in_bytes() -> None:
    used = {"score, no residual": 900, "state": 800, "allowed": 1000}
    times = {"score, no residual": {"median_ms": 1.0}}

    def judged(used: dict[str, int]) -> gpu_targets.Judgement:
        rows = [{"part": "memory", "case": gpu_scoring.FULL, "bytes": used}]
        (found,) = gpu_targets.judge(rows)
        return found

    found = judged(gpu_scoring.with_fastest(used, times))
    assert (found.ratio, found.floor, found.met) == (0.9, 0.8, True)
    # A faster way that needs more memory counts there too: one way has to reach both targets.
    name = "score on cuda, no residual"
    used[name], times[name] = 1100, {"median_ms": 0.5}
    found = judged(gpu_scoring.with_fastest(used, times))
    assert (found.ratio, found.met) == (1.1, False)
    assert judged(used).ratio is None


def test_clocks_are_those_of_the_gpu_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi counts all GPUs, PyTorch those of CUDA_VISIBLE_DEVICES."""
    known = SimpleNamespace(uuid="bd40de86-0a5a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: known)
    asked: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="1980 MHz, 2619 MHz\n")

    monkeypatch.setattr(gpu_clock.subprocess, "run", answer)
    assert gpu_clock.clocks() == {"clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz"}
    assert "--id=GPU-bd40de86-0a5a" in asked[0]
    monkeypatch.setattr(torch.cuda, "get_device_properties", SimpleNamespace)
    assert gpu_clock.smi_id() == "0"


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> Row:
    arguments = ["bench_gpu.py", "--device", "cpu", "--quick", "--json", str(path), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_gpu.main()
    document: Row = json.loads(path.read_text("utf-8"))
    return document


def test_every_part_runs_and_joins_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    first = run(monkeypatch, path, "--part", "values", "scoring")
    assert {r["part"] for r in first["rows"]} == {"values", "scoring"}
    document = run(monkeypatch, path, "--part", "layers", "backward", "values")
    parts = [r["part"] for r in document["rows"]]
    assert sorted(parts) == ["backward"] * 2 + ["layers"] * 2 + ["scoring", "values"]
    for one in document["rows"]:
        for entry in one["times"].values():
            assert 0 < entry["p20_ms"] <= entry["median_ms"] <= entry["p80_ms"]
    # Everything that this machine can run was measured, and every ratio of the end is there.
    calls = {r["part"]: set(r["times"]) for r in document["rows"]}
    assert {"value product", "eager", "channels-last", "cpp"} <= calls["values"]
    assert {"copy", "two products", "attention flash", "torch", "cpp"} <= calls["layers"]
    assert {"conv2d", "conv2d channels-last", "products", "cpp, V again"} <= calls["backward"]
    assert {"plain", "score, no residual", "naive hooks"} <= calls["scoring"]
    judged = gpu_targets.judge(document["rows"], everywhere=True)
    assert {j.target for j in judged if j.ratio} == {
        t.name for t in gpu_targets.TARGETS if t.part != "memory"
    }
    assert "hooks / scoring" in capsys.readouterr().out

    changed = {**document, "environment": {**document["environment"], "device": "else"}}
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="another machine"):
        run(monkeypatch, path, "--part", "values")
    assert json.loads(path.read_text("utf-8")) == changed


def breaking(call: str) -> Any:
    """The calls of a part, one of which raises."""

    def made(sizes: dict[str, Any], device: str) -> dict[str, Any]:
        def refuse() -> None:
            raise RuntimeError("CUDA error: an illegal memory access\nmore words")

        return {"value product": lambda: None, "eager": lambda: None, call: refuse}

    return made


def test_a_call_that_fails_is_left_out_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_cases.PARTS, "values", breaking("cuda"))
    document = run(monkeypatch, tmp_path / "results.json", "--part", "values", "layers")
    first = document["rows"][0]
    assert set(first["times"]) == {"value product", "eager"}
    assert first["failures"] == {"cuda": "RuntimeError: CUDA error: an illegal memory access"}
    assert [r["part"] for r in document["rows"]] == ["values", "layers", "layers"]


def test_a_case_that_cannot_be_prepared_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sizes: dict[str, Any], device: str) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(gpu_cases.PARTS, "values", refuse)
    document = run(monkeypatch, tmp_path / "results.json", "--part", "values", "backward")
    assert "OutOfMemoryError" in document["rows"][0]["failures"]["preparation"]
    assert len(document["rows"]) == 3


class Replaced(Exception):
    """Instead of a new process."""


def test_a_lost_gpu_goes_on_in_a_new_process_without_that_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def replace(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise Replaced

    class Lost(bench_gpu.Stopwatch):
        def attempt(self, name: str, call: Any) -> Any:
            if name == lost:
                raise bench_gpu.DeviceLost(name, "an illegal memory access")
            return super().attempt(name, call)

    monkeypatch.setattr(os, "execv", replace)
    monkeypatch.setattr(bench_gpu, "Stopwatch", Lost)
    path, parts = tmp_path / "results.json", ("--part", "backward", "values", "scoring")
    lost = "channels-last"
    with pytest.raises(Replaced):
        run(monkeypatch, path, *parts)
    written = json.loads(path.read_text("utf-8"))
    assert [r["part"] for r in written["rows"]] == ["backward", "backward"]
    assert started[0][-1] == "--resume"
    kept = written["rows"]

    lost = "score"  # now within an attempt; the call before is not tried again
    with pytest.raises(Replaced):
        run(monkeypatch, path, *parts, "--resume")
    assert started[1].count("--resume") == 1
    lost = "preparation"  # cannot be left out: the second time the case is
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"rows": kept}))
    for _ in range(2):
        with pytest.raises(Replaced):
            run(monkeypatch, path, *parts, "--resume")
    lost = ""
    capsys.readouterr()
    document = run(monkeypatch, path, *parts, "--resume")
    assert document["rows"][:2] == kept  # not measured again
    values, scoring = document["rows"][2:]
    assert (values["part"], values["times"]) == ("values", {})
    assert scoring["part"] == "scoring"
    assert {"plain", "naive hooks"} <= set(scoring["times"])
    assert "score" not in scoring["times"]
    calls = [entry["call"] for entry in document["environment"]["lost"]]
    assert calls == ["channels-last", "score", "preparation", "preparation"]
    assert "lost: channels-last on n=16" in capsys.readouterr().out


def test_a_call_that_does_not_return_is_given_up() -> None:
    watch, given_up = bench_gpu.Stopwatch("cpu", 0.0), threading.Event()
    bench_gpu.watch_over(watch, 0.2, lambda call: call == "endless" and given_up.set())
    assert watch.attempt("quick", lambda: 1) == 1
    assert not given_up.wait(0.5)
    watch.attempt("endless", lambda: given_up.wait(20))
    assert given_up.is_set()


def test_tf32_is_allowed_for_its_own_cases_only() -> None:
    for dtype in ("tf32", "fp32", "bf16"):
        with gpu_cases.precision(dtype):
            assert library.allow_tf32() == (dtype == "tf32")
        assert not library.allow_tf32()
    cases = [sizes for part in gpu_cases.CASES.values() for sizes in part]
    assert any(sizes["dtype"] == "tf32" for sizes in cases)


def test_scoring_is_measured_with_every_backend_of_the_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str | None] = []
    plain = {"score, no residual": lambda: asked.append(backends.forced_backend())}
    monkeypatch.setattr(gpu_scoring.bench_scoring, "ways", lambda *_: dict(plain))
    monkeypatch.setattr(gpu_scoring, "runnable", lambda *_: ["cuda", "triton"])
    calls = gpu_scoring.ways(torch.nn.Identity(), torch.zeros(1), 1)
    assert set(calls) == {*plain, *gpu_scoring.COMPILED}
    for call in calls.values():
        call()
    assert asked == [None, "cuda", "triton"]
    times = {"plain": 1.0, "score, no residual": 2.0, "score on cuda, no residual": 1.4}
    found = gpu_targets.judge([row("scoring", gpu_scoring.FULL, **times)])[0]
    assert (found.ratio, found.met) == (1.4, True)


def test_the_forms_that_compete_compute_the_same() -> None:
    layer = gpu_cases.Layer(gpu_cases.QUICK["values"][0], "cpu")
    torch.testing.assert_close(layer.eager_values(), layer.values("torch"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.convolution(True), layer.convolution(False))


def test_the_file_is_named_after_the_gpu() -> None:
    name = bench_gpu.result_path("NVIDIA H200").name
    assert name.startswith("nvidia-h200-20")
    assert name.endswith(".json")


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["gpu-hopper", "gpu-test-triton"])
def test_parts_of_the_check_start_pytest(target: str) -> None:
    """Also without a GPU, where their tests are skipped."""
    done = subprocess.run(
        ["make", target, f"GPU_PYTHON={sys.executable}"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ (skipped|passed)", done.stdout), done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_test_file_that_cannot_be_imported_does_not_end_the_check(tmp_path: Path) -> None:
    """A machine with a GPU may lack a package that only other tests need."""
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    (tmp_path / "test_whole.py").write_text("def test_it():\n    pass\n")
    makefile = Path(__file__).parents[1] / "Makefile"
    rule = f"include {makefile}\ntried:\n\t$(GPU_PYTEST) -p no:cacheprovider {tmp_path}\n"
    done = subprocess.run(
        ["make", "-f", "-", "tried", f"GPU_PYTHON={sys.executable}"],
        cwd=makefile.parent, input=rule, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "1 passed, 1 error" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target", ["gpu-hopper", "gpu-test-kernels", "gpu-test-operators", "gpu-test-triton"]
)
def test_every_tested_part_of_the_check_has_a_limit(target: str) -> None:
    """Of SIGINT, at which pytest still prints its failures; SIGTERM would lose them."""
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.search(r"^timeout -s INT -k 10 \d+ ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_part_beyond_its_limit_prints_what_had_failed(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_long():\n    time.sleep(60)\n"
    )
    makefile = Path(__file__).parents[1] / "Makefile"
    rule = (
        f"include {makefile}\ntried:\n\t$(LIMIT) 6 $(GPU_PYTEST) -p no:cacheprovider {tmp_path}\n"
    )
    done = subprocess.run(
        ["make", "-f", "-", "tried", f"GPU_PYTHON={sys.executable}"],
        cwd=makefile.parent, input=rule, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode != 0
    assert "assert 1 == 2" in done.stdout, done.stdout + done.stderr
