"""What the deployment commands write and print: numbers of every kind, and a stdout that is full or closed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dwattn
from dwattn import deploy
from dwattn.deploy import verification
from dwattn.deploy.commands import main
from dwattn.deploy.verification import VerifyResult, differences

onnx = pytest.importorskip("onnx")
TensorProto, helper = onnx.TensorProto, onnx.helper


def save(path: Path, node: Any, x: Any, y: Any, **attributes: Any) -> Path:
    graph = helper.make_graph([node], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, path)
    return path


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "BOOL", "UINT8", "INT8", "UINT16", "UINT64", "INT64"])  # fmt: skip
def test_all_kinds_of_numbers_are_fed(kind: str, tmp_path: Path) -> None:
    number = getattr(TensorProto, kind)
    x, y = (helper.make_tensor_value_info(name, number, [2, 3]) for name in "xy")
    path = save(tmp_path / "m.onnx", helper.make_node("Identity", ["x"], ["y"]), x, y)
    written = deploy.golden(path, tmp_path / "g")
    assert written.outputs["y"].dtype == helper.tensor_dtype_to_np_dtype(number)
    assert deploy.Golden.load(tmp_path / "g").outputs["y"].shape == (2, 3)


def test_outputs_that_are_no_arrays_of_numbers_are_named(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    text = helper.make_tensor_value_info("words", TensorProto.STRING, [2, 3])
    cast = helper.make_node("Cast", ["x"], ["words"], to=TensorProto.STRING)
    several = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    split = helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0)
    for node, y in ((cast, text), (split, several)):
        path = save(tmp_path / "m.onnx", node, x, y)
        with pytest.raises(deploy.DeployError, match=f"Output {y.name} .*not an array of numbers"):
            deploy.golden(path, tmp_path / "g")
        assert not (tmp_path / "g").exists()


def test_json_of_an_engine_that_overflows_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = differences({"y": np.array([np.nan])}, {"y": np.array([1.0])})
    result = VerifyResult(tuple(found), 0.01, {})
    monkeypatch.setattr(verification, "verify", lambda *_, **__: result)
    assert main(["verify", "m.engine", "golden", "--json"]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed["differences"][0]["max_rel"] is None
    assert printed["ok"] is False


def test_a_full_stdout_is_told_and_a_closed_one_is_not() -> None:
    _full_and_closed(["-m", "dwattn", "doctor", "--json"])


def test_a_full_stdout_of_the_deploy_kit(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    path = save(tmp_path / "m.onnx", helper.make_node("Identity", ["x"], ["y"]), x, y)
    _full_and_closed(["-m", "dwattn.deploy", "golden", str(path), "-o", str(tmp_path / "g")])


def _full_and_closed(command: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("This system has no /dev/full.")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "Error: Cannot write the result to stdout: No space left on device.\n"
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


def test_the_version_of_the_kit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dwattn-deploy {dwattn.__version__}\n"


def test_the_kit_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"dwattn\.surgery is not part of dwattn-deploy"):
        dwattn.__getattr__("replace")


def test_a_build_does_not_write_over_what_it_reads(tmp_path: Path) -> None:
    model, library = tmp_path / "m.engine", tmp_path / "lib.so"
    for path in (model, library):
        path.write_bytes(b"kept")
    link = tmp_path / "link"
    link.symlink_to(model)
    other = str(tmp_path / "e")
    for changes in (
        {"engine": str(model)},
        {"engine": str(link)},
        {"engine": str(library), "plugin": str(library)},
        {"engine": other, "timing_cache": str(model)},
        {"engine": other, "timing_cache": other},
        {"engine": other, "timing_cache": f"{other}.json"},
    ):
        with pytest.raises(deploy.DeployError, match="also read"):
            deploy.build(deploy.BuildOptions(str(model), **changes))
    assert main(["build", str(model)]) == 1  # M.engine is the default
    options = deploy.BuildOptions("", "")
    with pytest.raises(deploy.DeployError, match="also read"):
        deploy.compare(tmp_path / "native.onnx", tmp_path / "plugin.engine", tmp_path, options)
    assert model.read_bytes() == library.read_bytes() == b"kept"
