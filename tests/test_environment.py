"""What ``dwattn doctor`` says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dwattn import backends, environment, library


@pytest.fixture(scope="module")
def info() -> dict[str, object]:
    return environment.collect()


def test_everything_is_plain_data(info: dict[str, object]) -> None:
    assert json.loads(json.dumps(info)) == info


def test_it_says_what_is_installed_and_built(info: dict[str, object]) -> None:
    text = environment.explain(info)
    assert torch.__version__ in text
    assert info["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    if library.native:
        assert info["build"] == library.native.build_info()
        assert info["cpu"]["chosen_isa"] in text
        assert "CUDA kernels: " in text


@pytest.mark.parametrize(("asked", "state"), [("1", "asked for"), ("", "off")])
def test_the_kernel_for_hopper_is_named(
    info: dict[str, object], asked: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library.native:
        pytest.skip(library.native_error())
    monkeypatch.setenv("DWATTN_CUDA_HOPPER", asked)
    built = {**info["build"], "cuda_architectures": ["87-real", "90a-real"]}
    text = environment.explain({**info, "build": built})
    assert f"CUDA kernel for Hopper (90a): {state}" in text
    assert "untested on a device" in text
    built = {**built, "cuda_architectures": ["87-real"]}
    assert "Hopper" not in environment.explain({**info, "build": built})


def test_every_backend_is_answered_for(info: dict[str, object]) -> None:
    for answer in info["backends"]:
        assert {v["backend"] for v in answer["verdicts"]} == set(backends.NAMES)
        assert answer["chosen"] in backends.NAMES
        for verdict in answer["verdicts"]:
            assert verdict["can_run"] != bool(verdict["reasons"])


def test_what_a_bug_report_needs(info: dict[str, object]) -> None:
    system = info["system"]
    assert system["cpu"] in environment.explain(info)
    assert 1 <= system["usable_cpus"] <= system["cpus"]
    assert system["memory_bytes"] is None or system["memory_bytes"] > 2**26
    assert info["location"] == str(Path(environment.__file__).parent)
    asked = {answer["op"] for answer in info["backends"]}
    assert asked == {"dw_attention", "dw_layer", "attention_variance"} <= set(backends.OPS)
    assert info["torch"]["threads"] == torch.get_num_threads()


def test_equal_answers_are_given_once(info: dict[str, object]) -> None:
    text = environment.explain(info)
    for device in ("cpu", "cuda"):
        answers = [a for a in info["backends"] if a["device"] == device]
        different = {(a["chosen"], str(a["verdicts"])) for a in answers}
        assert text.count(f" on {device} in ") <= len(answers)
        if len(different) == 1:
            ops = "dw_attention, dw_layer, attention_variance"
            assert f"{ops} on {device} in float32, bfloat16, float16: " in text


def test_a_forced_backend_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWATTN_BACKEND", "cpp")
    monkeypatch.setattr(backends, "_forced", "cpp")  # read at import
    info = environment.collect()
    on_gpu = next(a for a in info["backends"] if a["device"] == "cuda")
    assert on_gpu["chosen"] is None
    assert "'cuda'" in on_gpu["error"]
    text = environment.explain(info)
    assert "DWATTN_BACKEND=cpp" in text
    assert on_gpu["error"] in text


def test_a_broken_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.importlib.import_module

    def import_module(name: str) -> object:
        if name in ("torch", "dwattn.library"):
            raise ImportError("libtorch_cpu.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(environment.importlib, "import_module", import_module)
    info = environment.collect()
    text = environment.explain(info)
    assert "torch could not be imported: libtorch_cpu.so" in text
    assert info["backends"] == []


def test_only_the_standard_library_is_needed_to_start() -> None:
    code = (
        "import sys; before = set(sys.modules); import dwattn.environment;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['dwattn']"
