"""The deploy kit without TensorRT: options, statistics, records, golden outputs, the CPU provider,
and that it needs no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dwattn import deploy
from dwattn.cli import app
from dwattn.deploy import options, trtexec
from dwattn.deploy.builder import shape_profile
from dwattn.deploy.commands import SUMMARIES, _parsed, main
from dwattn.deploy.provider import pinned
from dwattn.deploy.runtime import Runtime, explain
from dwattn.deploy.sidecar import model_digests, record_of, sha256
from dwattn.deploy.verification import VerifyResult, differences
from support import fake_tensorrt

onnx = pytest.importorskip("onnx")
TensorProto, helper = onnx.TensorProto, onnx.helper

PACKAGE = Path(deploy.__file__).parents[1]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """``y = 2 x`` with an open batch and image size."""
    shape = ["batch", 3, "height", "width"]
    x = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("out/y", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        [helper.make_node("Add", ["pixels", "pixels"], ["out/y"])], "g", [x], [y]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    return path


# Imports and commands ------------------------------------------------------------------------


def python(
    code: str, *arguments: str, options: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code, *arguments],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **variables},
    )  # fmt: skip


def test_only_numpy_is_imported() -> None:
    code = (
        "import sys; before = set(sys.modules); import dwattn.deploy, dwattn.deploy.aot_plugin;"
        "[getattr(dwattn.deploy, name) for name in dwattn.deploy.__all__];"
        "import dwattn.deploy.commands, dwattn.deploy.rtx_worker;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names)))"
    )
    done = python(code)
    assert done.stdout.strip() == "['dwattn', 'numpy']", done.stderr


def test_it_works_where_nothing_else_can_be_imported(model: Path, tmp_path: Path) -> None:
    """What a Jetson's system Python lacks raises ImportError; onnxruntime is needed by golden."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'timm', 'transformers', 'typer', 'rich', 'onnx',"
        " 'pydantic', 'safetensors', 'triton'):\n"
        "            raise ImportError('blocked ' + name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from dwattn.deploy.commands import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = python(code, "golden", str(model), "-o", str(tmp_path / "g"), "--size", "4x6", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"] == {"out/y": [1, 3, 4, 6]}


def test_the_wheel_of_the_kit_alone(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed.")
    source = ROOT / "packaging" / "deploy"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"],
        cwd=source, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("dwattn_deploy-*-py3-none-any.whl")
    assert wheel.stat().st_size < 64 * 1024  # as the guide says
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys, dwattn; from dwattn.deploy.commands import main;"
        "print(dwattn.__version__, dwattn.__file__); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["bench", str(model), "--provider", "cpu", "--size", "4", "--iterations", "3"]
    # Without site, an editable install of the whole package does not come first.
    installed_in = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    found = os.pathsep.join([str(tmp_path / "site"), *installed_in])
    done = python(code, *arguments, options=("-S",), PYTHONPATH=found)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site" / "dwattn" / "__init__.py") in done.stdout
    installed = {
        str(p.relative_to(tmp_path / "site" / "dwattn"))
        for p in tmp_path.glob("site/dwattn/**/*.py")
    }
    assert {"__init__.py", "errors.py", "files.py", "deploy/builder.py"} <= installed
    assert not {"attention.py", "library.py"} & installed


def test_the_files_are_python_3_10() -> None:
    import ast

    for path in (PACKAGE / "deploy").glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_main_command_has_the_same_commands(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"usage: dwattn {name}" in result.output
    assert "--json" in result.output


def test_the_guide_types_commands_that_exist() -> None:
    guide = ROOT / "docs" / "jetson.md"
    found = re.findall(r"^dwattn(?:-deploy)? (.+)$", guide.read_text(), re.M)
    commands = [line.split("#")[0].split() for line in found if "[" not in line]
    ours = [words for words in commands if words[0] in SUMMARIES]
    assert {words[0] for words in ours} == set(SUMMARIES)
    for words in ours:
        assert _parsed(words, "dwattn-deploy").command == words[0]


def test_wrong_usage_and_errors_have_their_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert CliRunner().invoke(app, ["bench"]).exit_code == 2
    with pytest.raises(SystemExit, match="2"):
        main(["golden", "m.onnx", "--foo"])
    assert "usage: dwattn-deploy golden [-h] [-o DIR]" in capsys.readouterr().err
    assert main(["build", str(tmp_path / "none.onnx")]) == 1
    assert "There is no model" in capsys.readouterr().err


def test_missing_tensorrt_says_how_to_get_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(deploy.DeployError, match="python3-libnvinfer"):
        deploy.build(deploy.BuildOptions(str(model), str(model.with_suffix(".engine")), size="8"))


# Options -------------------------------------------------------------------------------------


def test_ranges() -> None:
    assert str(deploy.Range.parse("8", "--batch")) == "8"
    assert deploy.Range.parse("1:8:16", "--batch").usual == (8,)
    mixed = deploy.Range.parse("16x24:32:48x64", "--size")
    assert (mixed.smallest, mixed.usual, mixed.largest) == ((16, 24), (32, 32), (48, 64))
    assert deploy.Range.parse("224x336", "--size").pair().smallest == (224, 336)
    for bad in ("", "1:2", "a", "8:4:2", "0", "1:2:3:4", "1x2x3", "-1", "8x4:9x3:9x9"):
        with pytest.raises(deploy.DeployError, match="--batch"):
            deploy.Range.parse(bad, "--batch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "openvino"}, "openvino"),
        ({"onnx": "none.onnx"}, "none.onnx"),
        ({"engine": "no/where/m.engine"}, "no/where"),
        ({"engine": "."}, "is a folder"),
        ({"timing_cache": "no/where/times"}, "no/where"),
        ({"timing_cache": "."}, "is a folder"),
        ({"plugin": "none.so"}, "DWATTN_TRT_PLUGIN"),
        ({"workspace": 0}, "--workspace 0"),
        ({"batch": "2x2"}, "counts images"),
        ({"size": "x"}, "--size x"),
    ],
)
def test_wrong_options_are_refused_with_their_values(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    given = {"onnx": str(model), "engine": str(tmp_path / "m.engine"), **changes}
    with pytest.raises(deploy.DeployError, match=message):
        deploy.BuildOptions(**given).checked()


def test_the_plugin_can_be_named_by_a_variable(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib.so"
    library.touch()
    monkeypatch.setenv("DWATTN_TRT_PLUGIN", str(library))
    assert deploy.BuildOptions(str(model), "m.engine").checked().plugin == str(library)


def test_the_packaged_plugin_is_used_where_it_is_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libdwattn_trt.so"
    library.touch()
    monkeypatch.setattr(options, "PACKAGED_PLUGIN", library)
    assert deploy.BuildOptions(str(model), "m.engine").checked().plugin is None
    made = onnx.load(model)
    made.graph.node[0].op_type = "LowRankDWAttention"
    onnx.save(made, model)
    assert deploy.BuildOptions(str(model), "m.engine").checked().plugin == str(library)
    mine = tmp_path / "mine.so"
    mine.touch()
    assert deploy.BuildOptions(str(model), "m.engine", plugin=str(mine)).checked().plugin == str(
        mine
    )


def test_profiles_fill_in_open_dimensions() -> None:
    open_shape = {"pixels": (-1, 3, -1, -1)}
    assert shape_profile(open_shape, "1:8:16", "14x28:28x42:56x70") == {
        "pixels": [[1, 3, 14, 28], [8, 3, 28, 42], [16, 3, 56, 70]]
    }
    assert shape_profile({"pixels": (-1, 3, 8, 8)}, None, None)["pixels"][2] == [1, 3, 8, 8]
    assert shape_profile({"pixels": (1, 3, 8, 8)}, None, None) == {}
    assert shape_profile({"pixels": (1, 3, 8, 8)}, "1", "8") == {}


@pytest.mark.parametrize(
    ("shape", "batch", "size", "message"),
    [
        ((-1, 3, -1, -1), None, None, "--size 224"),
        ((-1, -1, 384), None, None, "only batch and image size"),
        ((-1, 3, 8, 8), None, "8x9", "--size 8x9.*--dynamic-size"),
        ((1, 3, 8, 8), "1:2:4", None, "--static-batch"),
        ((-1, 3, 8, 8), "0", None, "--batch 0 must have sizes of at least 1"),
    ],
)
def test_profiles_refuse_what_does_not_fit(
    shape: tuple[int, ...], batch: str | None, size: str | None, message: str
) -> None:
    with pytest.raises(deploy.DeployError, match=message):
        shape_profile({"pixels": shape}, batch, size)


def test_trtexec_commands() -> None:
    asked = deploy.BuildOptions("a b.onnx", "m.engine", fp16=True, workspace=512, timing_cache="t")
    profile = {"x": [[1, 3], [8, 3], [16, 3]]}
    command = trtexec.build_command(asked, profile, strongly_typed=False)
    assert command == (
        "trtexec '--onnx=a b.onnx' --saveEngine=m.engine --skipInference --minShapes=x:1x3 "
        "--optShapes=x:8x3 --maxShapes=x:16x3 --fp16 --timingCacheFile=t "
        "--memPoolSize=workspace:512M"
    )
    assert "--stronglyTyped" in trtexec.build_command(asked, {}, strongly_typed=True)
    command = trtexec.bench_command(
        "m.engine", {"x": (8, 3)}, runtime="tensorrt", plugin="l.so", iterations=100
    )
    assert command == (
        "trtexec --loadEngine=m.engine --shapes=x:8x3 --staticPlugins=l.so --useCudaGraph "
        "--useSpinWait --noDataTransfers --warmUp=500 --duration=0 --iterations=100 --avgRuns=100"
    )


# TensorRT's words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ('creator && "Plugin not found, are the plugin name, version, and namespace correct?"', "--plugin"),
        ("[virtualMemoryBuffer.cpp] CUDA error 2 out of memory", "--workspace 512"),
        ("Requested amount of GPU memory (12 bytes) could not be allocated.", "Memory ran out"),
        ("CUDA initialization failure with error: 35", "No usable GPU"),
        ("Version tag does not match. Note: Current Version: 240, Serialized Engine Version: 239", "TensorRT version"),
        ("The engine plan file is generated on an incompatible device, expecting compute 8.7 got 8.6", "kind of device"),
        ("Magic tag does not match", "not a complete engine"),
        ("MODEL_DESERIALIZE_FAILED: Failed to parse the ONNX model.", "complete ONNX model"),
    ],
)  # fmt: skip
def test_complaints_become_advice(said: str, meaning: str) -> None:
    text = explain("It failed", ["something else", said])
    assert text.startswith("It failed. ")
    assert meaning in text
    assert said[:40] in text


def test_the_plugin_s_own_words_come_first() -> None:
    ours = "[dwattn] DWAttention 'blocks.3.attn': x has 257 tokens"
    log = ["Requested amount of GPU memory could not be allocated.", ours, "Error Code 4: Internal"]
    assert explain("It failed", log) == f"It failed: {ours}."


def test_unknown_complaints_are_passed_on() -> None:
    assert explain("It failed", ["a", "b   c"]) == "It failed: a; b c."
    assert "--verbose" in explain("It failed", [])


def test_a_missing_gpu_is_no_reason_where_none_is_needed() -> None:
    no_gpu = "CUDA initialization failure with error: 35"
    needs_none = Runtime("tensorrt-rtx", fake_tensorrt, errors=[no_gpu, "node 7: bad shape"])
    assert str(needs_none.failure("It failed")) == "It failed: node 7: bad shape."
    log = [f"node 7 (MatMul): bad shape\n{no_gpu}", no_gpu, *("ModelImporter.cpp:1: here",) * 3]
    needs_none = Runtime("tensorrt-rtx", fake_tensorrt, errors=log)
    assert str(needs_none.failure("It failed")) == "It failed: node 7 (MatMul): bad shape."
    needs_none = Runtime("tensorrt-rtx", fake_tensorrt, errors=[no_gpu], warnings=["a tactic"])
    assert str(needs_none.failure("It failed")) == "It failed: a tactic."
    needs_one = Runtime("tensorrt", fake_tensorrt, errors=[no_gpu, "node 7: bad shape"])
    assert "No usable GPU" in str(needs_one.failure("It failed"))


# Records -------------------------------------------------------------------------------------


def record(engine: Path, **changes: Any) -> deploy.Sidecar:
    fields: dict[str, Any] = {
        "runtime": "tensorrt",
        "version": "10.3.0",
        "device": {"name": "Orin", "compute_capability": "8.7", "memory": 8},
        "onnx": {"name": "m.onnx", "sha256": "0"},
        "plugin": None,
        "precision": "strongly typed",
        "profile": {},
        "options": {},
        "engine": {"bytes": 3, "sha256": sha256(engine)},
        "seconds": 1.0,
        "created": "2026-01-01T00:00:00+00:00",
        "dwattn": "0.1.0",
    }
    return deploy.Sidecar(**{**fields, **changes})


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "m.engine"
    path.write_bytes(b"abc")
    return path


def test_records_round_trip(engine: Path) -> None:
    assert deploy.Sidecar.load(engine) is None
    record(engine).save(engine)
    assert deploy.Sidecar.load(engine) == record(engine)


def test_records_of_other_files_and_versions_are_refused(engine: Path) -> None:
    record(engine).save(engine)
    engine.write_bytes(b"abd")
    with pytest.raises(deploy.DeployError, match="another engine"):
        deploy.Sidecar.load(engine)
    record(engine, schema=2).save(engine)
    with pytest.raises(deploy.DeployError, match="schema 2"):
        deploy.Sidecar.load(engine)
    for text in ("{", "[]", '{"schema": 1}'):
        record_of(engine).write_text(text)
        with pytest.raises(deploy.DeployError, match="not the record"):
            deploy.Sidecar.load(engine)


# Golden outputs ------------------------------------------------------------------------------


def test_golden_outputs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(deploy.DeployError, match="--batch 0"):
        deploy.golden(model, tmp_path / "g", batch=0, size="4x6")
    written = deploy.golden(model, tmp_path / "g", batch=2, size="4x6")
    read = deploy.Golden.load(tmp_path / "g")
    assert read.inputs["pixels"].shape == (2, 3, 4, 6)
    np.testing.assert_array_equal(read.outputs["out/y"], 2 * read.inputs["pixels"])
    assert read.source == written.source
    assert read.source["sha256"] == sha256(model)


def test_digests_cover_weights_beside_the_model(model: Path) -> None:
    alone = model_digests(model)
    assert alone == {"sha256": sha256(model)}
    data = model.with_name("m.onnx.data")
    data.write_bytes(b"weights")
    assert model_digests(str(model)) == {**alone, "data_sha256": sha256(data)}


def test_golden_outputs_of_given_inputs(model: Path, tmp_path: Path) -> None:
    pixels = np.full((1, 3, 2, 2), np.nan, np.float32)
    with pytest.raises(deploy.DeployError, match="NaN"):
        deploy.golden(model, tmp_path / "g", inputs={"pixels": pixels})
    assert not (tmp_path / "g").exists()


def test_half_a_golden_folder_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "g"
    deploy.golden(model, folder, size="4")
    (folder / "inputs" / "pixels.npy").write_bytes(b"")
    with pytest.raises(deploy.DeployError, match="not a complete folder"):
        deploy.Golden.load(folder)
    np.save(folder / "inputs" / "pixels.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(deploy.DeployError, match="allow_pickle=False"):
        deploy.Golden.load(folder)
    with pytest.raises(deploy.DeployError, match="not a complete folder"):
        deploy.Golden.load(tmp_path)


def test_differences_are_judged() -> None:
    expected = {"y": np.array([1.0, -2.0], np.float32)}
    (same,) = differences({"y": np.array([1.0, -2.0], np.float16)}, expected)
    assert (same.max_abs, same.cosine) == (0.0, pytest.approx(1.0))
    (off,) = differences({"y": np.array([1.0, -1.5])}, expected)
    assert (off.max_abs, off.max_rel) == (0.5, 0.25)
    (broken,) = differences({"y": np.array([np.nan, -2.0])}, expected)
    assert (broken.max_rel, broken.cosine) == (np.inf, 0.0)
    for difference in (off, broken):
        result = VerifyResult((difference,), 0.01, {})
        with pytest.raises(deploy.DeployError, match="y differs by"):
            result.require()
        assert "Does not agree" in str(result)
    with pytest.raises(deploy.DeployError, match="another model"):
        differences({"z": np.zeros(2)}, expected)
    with pytest.raises(deploy.DeployError, match="shape"):
        differences({"y": np.zeros(3)}, expected)


# CPU -----------------------------------------------------------------------------------------


def test_a_cpu_is_measured_on_one_core(model: Path) -> None:
    before = os.sched_getaffinity(0)
    result = deploy.bench(
        model, provider="cpu", iterations=10, warmup=1, size="8", show_progress=False
    )
    assert os.sched_getaffinity(0) == before
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["timings"][str(model)]["host"]["iterations"] == 10
    assert plain["settings"]["core"] == max(before)
    assert plain["settings"]["shapes"] == {str(model): {"pixels": [1, 3, 8, 8]}}
    assert "host" in str(result)


def test_a_core_is_pinned_and_released() -> None:
    allowed = os.sched_getaffinity(0)
    with pinned(min(allowed)) as core:
        assert os.sched_getaffinity(0) == {core} == {min(allowed)}
    assert os.sched_getaffinity(0) == allowed
    with pytest.raises(deploy.DeployError, match="Core 4096"), pinned(4096):
        pass
    with pinned(-1) as core:
        assert core is None
        assert os.sched_getaffinity(0) == allowed


def test_a_cpu_baseline(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    arguments = ["--provider", "cpu", "--iterations", "10", "--size", "8"]
    assert main(["bench", str(model), "--against", str(other), *arguments]) == 0
    assert "times as fast as the baseline" in capsys.readouterr().out
    assert main(["bench", str(model), "--against", str(model), *arguments]) == 1
    assert "its own baseline" in capsys.readouterr().err


def test_what_onnxruntime_cannot_run_is_explained(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"junk")
    with pytest.raises(deploy.DeployError, match=r"does not load .*[^.]\.$"):
        deploy.bench(path, provider="cpu", show_progress=False)
    made = onnx.load(model)
    made.graph.node[0].op_type, made.graph.node[0].domain = "LowRankDWAttention", "dwattn"
    made.opset_import.append(helper.make_opsetid("dwattn", 1))
    onnx.save(made, path)
    with pytest.raises(deploy.DeployError, match="--lowering native"):
        deploy.bench(path, provider="cpu", show_progress=False)


def test_sigterm_unwinds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(np, "save", stopped)
    with pytest.raises(SystemExit, match="143"):
        main(["golden", str(model), "--size", "8", "-o", str(tmp_path / "g")])
    assert not list((tmp_path / "g" / "inputs").iterdir())
