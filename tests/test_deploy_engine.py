"""Building, running, measuring and comparing engines over a TensorRT of plain Python and a CUDA
runtime in host memory: everything but NVIDIA's own code runs, ctypes included.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dwattn import deploy
from dwattn.deploy import cuda
from dwattn.deploy.commands import main
from dwattn.deploy.session import open_engine
from dwattn.deploy.sidecar import record_of
from support import fake_tensorrt

SOURCE = Path(__file__).parent / "support" / "fake_cudart.c"
LAYERS = [["conv", "CaskConvolution"], ["/attn", "PluginV3"], ["reformat", "Reformat"]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("There is no C compiler for the fake CUDA runtime.")
    path = tmp_path_factory.mktemp("cuda") / "libcudart.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", SOURCE, "-o", path], check=True)
    return path


@pytest.fixture
def runtime(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The fake TensorRT 10.3, on the fake device, which must get everything back."""
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, str(library))
    cuda._load.cache_clear()
    module = fake_tensorrt.make()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    yield module
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "live").value == 0
    cuda._load.cache_clear()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model of the fake TensorRT."""

    def written(name: str = "m", **fields: Any) -> Path:
        path = tmp_path / f"{name}.onnx"
        model = {"inputs": {"x": [-1, 4]}, "scale": 2.0, "layers": LAYERS, **fields}
        path.write_text(json.dumps(model))
        return path

    return written


def build(model: Path, **options: Any) -> Path:
    engine = model.with_suffix(".engine")
    deploy.build(deploy.BuildOptions(str(model), str(engine), **options), show_progress=False)
    return engine


def golden(folder: Path, scale: float = 2.0, batch: int = 3) -> Path:
    x = np.linspace(-1, 1, 4 * batch, dtype=np.float32).reshape(batch, 4)
    deploy.Golden({"x": x}, {"out_x": x * np.float32(scale)}, {"onnx": "m.onnx"}).save(folder)
    return folder


# Building ------------------------------------------------------------------------------------


def test_an_engine_and_its_record(runtime: ModuleType, write: Callable[..., Path]) -> None:
    model = write()
    engine = build(model, batch="1:2:4", workspace=64)
    record = deploy.Sidecar.load(engine)
    assert record is not None
    assert (record.runtime, record.version, record.precision) == (
        "tensorrt", "10.3.0", "strongly typed",
    )  # fmt: skip
    assert record.device == {"name": "Fake Orin", "compute_capability": "8.7", "memory": 8 << 20}
    assert record.profile == {"x": [[1, 4], [2, 4], [4, 4]]}
    config = runtime.builders[-1].config
    assert (config.workspace, config.flags) == (64 << 20, set())
    assert json.loads(engine.read_text())["typed"] is True
    assert sorted(p.name for p in engine.parent.iterdir()) == [
        "m.engine", "m.engine.json", "m.onnx",
    ]  # fmt: skip


def test_fp16_is_a_flag_for_fp32_files_only(
    runtime: ModuleType, write: Callable[..., Path]
) -> None:
    engine = build(write(), fp16=True)
    assert runtime.builders[-1].config.flags == {"FP16"}
    assert json.loads(engine.read_text())["typed"] is False
    engine = build(write("half", half=True), fp16=True)
    assert runtime.builders[-1].config.flags == set()
    assert json.loads(engine.read_text())["typed"] is True


def test_tensorrt_11_has_no_fp16_flag(
    runtime: ModuleType, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make("11.4.0"))
    with pytest.raises(deploy.DeployError, match=r"11\.4\.0 has no fp16 flag.*export --fp16"):
        build(write(), fp16=True)


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1"])
def test_old_versions_are_refused(
    version: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make(version))
    with pytest.raises(deploy.DeployError, match=rf"{version} is too old; 10\.3"):
        build(write())


def test_plugins(runtime: ModuleType, write: Callable[..., Path], tmp_path: Path) -> None:
    model = write(plugin="DWAttention")
    with pytest.raises(deploy.DeployError, match=r"/blocks\.3/attn \(DWAttention\)") as failure:
        build(model)
    assert "--plugin" in str(failure.value)
    library = tmp_path / "libdwattn_trt.so"
    library.write_text("not a library")
    with pytest.raises(deploy.DeployError, match="cannot be loaded"):
        build(model, plugin=str(library))
    library.write_text("plugins: DWAttention")
    record = deploy.Sidecar.load(build(model, plugin=str(library)))
    assert record is not None
    assert record.plugin is not None
    assert record.plugin["path"] == str(library)


def test_the_plugin_of_the_build_is_loaded_with_the_engine(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libdwattn_trt.so"
    library.write_text("plugins: DWAttention")
    engine = build(write(plugin="DWAttention"), plugin=str(library))
    other_process = fake_tensorrt.make()
    monkeypatch.setitem(sys.modules, "tensorrt", other_process)
    session, _, loaded = open_engine(engine)
    session.close()
    assert loaded == str(library)
    assert other_process.get_plugin_registry().names == {"DWAttention"}
    library.unlink()
    with pytest.raises(deploy.DeployError, match="no plugin library"):
        open_engine(engine)


def test_one_process_uses_a_plugin_library_more_than_once(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    library, link = tmp_path / "libdwattn_trt.so", tmp_path / "link.so"
    library.write_text("plugins: DWAttention")
    link.symlink_to(library)
    options = deploy.BuildOptions("", "", plugin=str(library))
    model = write(plugin="DWAttention")
    compared = deploy.compare(
        write("native"), model, tmp_path / "both", options, show_progress=False
    )
    assert compared.agrees
    engine = build(model, plugin=str(link))
    assert deploy.bench(engine, iterations=2, show_progress=False).timings


def test_another_library_with_the_same_plugins_is_refused_with_both_names(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("There is no C compiler for a library.")
    first, second = tmp_path / "first.so", tmp_path / "second.so"
    first.write_text("plugins: DWAttention")
    source = tmp_path / "second.c"
    source.write_text('char getCreators[] = "plugins: DWAttention";')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", second], check=True)
    model = write(plugin="DWAttention")
    build(model, plugin=str(first))
    with pytest.raises(
        deploy.DeployError, match=r"second\.so.*DWAttention.*already, by .*first\.so"
    ):
        build(model, plugin=str(second))


def test_timing_caches(runtime: ModuleType, write: Callable[..., Path], tmp_path: Path) -> None:
    cache = tmp_path / "times"
    build(write(), timing_cache=str(cache))
    assert cache.read_bytes() == b"times of this device+++"
    build(write(), timing_cache=str(cache))
    assert runtime.builders[-1].config.cache == b"times of this device+++"
    cache.write_bytes(b"times of another device")
    with pytest.warns(UserWarning, match="another device"):
        build(write(), timing_cache=str(cache))
    assert runtime.builders[-1].config.cache == b""
    assert cache.read_bytes() == b"times of this device+++"


def test_an_engine_has_its_record_where_the_timing_cache_cannot_be_written(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    model, folder = write(), tmp_path / "times"
    folder.mkdir()
    runtime.at_step = lambda step: folder.rmdir() if step == 2 else None
    with pytest.raises(deploy.DeployError, match="times/cache"):
        build(model, timing_cache=str(folder / "cache"))
    assert deploy.Sidecar.load(model.with_suffix(".engine")) is not None


def test_a_failed_build_leaves_the_old_engine(
    runtime: ModuleType, write: Callable[..., Path]
) -> None:
    engine = build(write())
    before = engine.read_bytes(), record_of(engine).read_bytes()
    with pytest.raises(deploy.DeployError, match="Memory ran out"):
        build(write(memory=1000))
    assert (engine.read_bytes(), record_of(engine).read_bytes()) == before


def test_warnings_are_no_reason_where_there_is_an_error(
    runtime: ModuleType, write: Callable[..., Path]
) -> None:
    warning = ["WARNING", "Skipping tactic 0x3e8 due to insufficient memory on requested size of 9"]
    with pytest.raises(deploy.DeployError, match=r"from .*: Error Code 2: 257 tokens\.$"):
        build(write(says=[warning, ["ERROR", "Error Code 2: 257 tokens"]]))


def test_a_full_disk(
    runtime: ModuleType, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write()

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(deploy.DeployError, match=r"m\.engine.*No space left"):
        build(model)
    assert [p.name for p in model.parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_build_at_a_step(
    sent: signal.Signals, code: int,
    runtime: ModuleType, write: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    steps = []

    def at_step(step: int) -> None:
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), sent)

    runtime.at_step = at_step  # type: ignore[attr-defined]
    model = write()
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["build", str(model)]))
    assert ended.value.code == code
    assert steps == [0, 1]
    assert ("Interrupted" in capsys.readouterr().err) == (sent == signal.SIGINT)
    assert [p.name for p in model.parent.iterdir()] == ["m.onnx"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Running -------------------------------------------------------------------------------------


def test_verify(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine = build(write(), batch="1:2:4")
    good, bad = golden(tmp_path / "good"), golden(tmp_path / "bad", scale=2.2)
    result = deploy.verify(engine, good)
    assert result.ok
    assert result.differences[0].max_abs == 0.0
    assert main(["verify", str(engine), str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["verify", str(engine), str(bad)]) == 1
    assert "out_x differs by 0.2" in capsys.readouterr().err
    assert main(["verify", str(engine), str(bad), "--tolerance", "0.5"]) == 0


def test_verify_with_a_fixed_image_size(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    engine = build(write(inputs={"x": [-1, 3, 4, 6]}), batch="1:2:4")
    x = np.ones((2, 3, 4, 6), np.float32)
    deploy.Golden({"x": x}, {"out_x": 2 * x}, {}).save(tmp_path / "g")
    assert deploy.verify(engine, tmp_path / "g").ok
    deploy.Golden({"pixels": x}, {"out_x": 2 * x}, {}).save(tmp_path / "other")
    with pytest.raises(deploy.DeployError, match="takes x, but got pixels"):
        deploy.verify(engine, tmp_path / "other")


def test_half_precision_engines_take_fp32_inputs(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    engine = build(write(half=True), batch="1:2:4")
    result = deploy.verify(engine, golden(tmp_path / "g"))
    assert result.ok
    assert 0 < result.differences[0].max_rel < 1e-3
    assert result.tolerance == 2e-2


@pytest.mark.parametrize(
    ("fields", "options", "precision"),
    [
        ({"half": True, "fp32_io": True}, {}, "strongly typed, fp16"),
        ({}, {"fp16": True}, "fp16 allowed"),
    ],
)
def test_half_precision_behind_fp32_outputs_has_its_own_tolerance(
    fields: dict[str, Any], options: dict[str, Any], precision: str,
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    model = write(**fields)
    engine = build(model, batch="1:2:4", **options)
    record = deploy.Sidecar.load(engine)
    assert record is not None
    assert record.precision == precision
    assert deploy.verify(engine, golden(tmp_path / "g")).tolerance == 2e-2
    wanted = deploy.BuildOptions("", "", **options)
    compared = deploy.compare(model, model, tmp_path / "both", wanted, show_progress=False)
    assert compared.tolerance == 2e-2


def test_shapes_outside_of_the_profile_are_refused(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    engine = build(write(), batch="1:2:4")
    with pytest.raises(deploy.DeployError, match=r"x cannot have the shape \[9, 4\]"):
        deploy.verify(engine, golden(tmp_path / "g", batch=9))


def test_bench(
    runtime: ModuleType, write: Callable[..., Path], library: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine, baseline = build(write(), batch="1:2:4"), build(write("base"), batch="1:2:4")
    launches = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "graph_launches")
    launches.value = 0
    result = deploy.bench(
        engine, against=baseline, iterations=20, warmup=5, show_progress=False, batch=4
    )
    # Five turns with two uncounted launches, warm-up, and every counted one, of two engines.
    assert launches.value == 2 * (5 + 5 * 2 + 20)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["settings"]["shapes"] == {str(engine): {"x": [4, 4]}, str(baseline): {"x": [4, 4]}}
    assert plain["settings"]["cuda_graph"] == {str(engine): True, str(baseline): True}
    assert plain["settings"]["device"]["name"] == "Fake Orin"
    assert plain["timings"][str(engine)]["gpu"]["min_ms"] >= 0.25
    assert plain["ratios"]["median"] > 0
    assert all("--shapes=x:4x4" in command for command in plain["trtexec"])
    assert main(["bench", str(engine), "--iterations", "5"]) == 0
    # The usual batch of the build.
    assert "--shapes=x:2x4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": "10.7.0"},
            "was built by tensorrt 10.7.0, but this machine has tensorrt 10.3.0",
        ),
        ({"device": {"name": "Xavier", "compute_capability": "7.2", "memory": 1}}, "Xavier.*7.2"),
    ],
)
def test_engines_from_elsewhere_are_refused_before_they_are_loaded(
    change: dict[str, Any], message: str, runtime: ModuleType, write: Callable[..., Path]
) -> None:
    engine = build(write())
    record = json.loads(record_of(engine).read_text())
    record_of(engine).write_text(json.dumps({**record, **change}))
    runtime.Runtime = None  # type: ignore[attr-defined]
    with pytest.raises(deploy.DeployError, match=message):
        deploy.bench(engine, show_progress=False)


def test_an_engine_without_a_record(runtime: ModuleType, write: Callable[..., Path]) -> None:
    engine = build(write())
    record_of(engine).unlink()
    with pytest.warns(UserWarning, match=r"no record \(m\.engine\.json\)"):
        result = deploy.bench(engine, iterations=3, show_progress=False)
    assert result.settings["build"] == {str(engine): None}
    model = json.loads(engine.read_text())
    engine.write_text(json.dumps({**model, "version": "10.7.0"}))
    with (
        pytest.warns(UserWarning, match="no record"),
        pytest.raises(deploy.DeployError, match=r"cannot be loaded.*another TensorRT version"),
    ):
        deploy.bench(engine, show_progress=False)


def test_a_model_is_not_an_engine(runtime: ModuleType, write: Callable[..., Path]) -> None:
    with pytest.raises(deploy.DeployError, match=r"m\.onnx is a model.*--provider cpu"):
        deploy.bench(write(), show_progress=False)


def test_no_memory_for_the_tensors(
    runtime: ModuleType, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(write())
    monkeypatch.setenv("DWATTN_FAKE_CUDA_LIMIT", "8")
    with pytest.raises(deploy.DeployError, match="memory is full"):
        deploy.bench(engine, show_progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"context_fails": True}, "Memory ran out"), ({"fails": True}, "failed to run")],
)
def test_engines_that_do_not_run(
    fields: dict[str, Any], message: str, runtime: ModuleType, write: Callable[..., Path]
) -> None:
    with pytest.raises(deploy.DeployError, match=message):
        deploy.bench(build(write(**fields)), show_progress=False)


def test_no_gpu(runtime: ModuleType, library: Path, write: Callable[..., Path]) -> None:
    count = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "device_count")
    count.value = 0
    try:
        with pytest.raises(deploy.DeployError, match="no usable GPU"):
            build(write())
    finally:
        count.value = 1


def test_no_cuda_runtime(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make())
    monkeypatch.setenv(cuda.LIBRARY_VARIABLE, "/nowhere/libcudart.so")
    cuda._load.cache_clear()
    with pytest.raises(deploy.DeployError, match=r"/nowhere/libcudart\.so"):
        build(write())


# Comparing -----------------------------------------------------------------------------------


def test_compare(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    native = write("native", layers=[["conv", "CaskConvolution"], ["soft", "SoftMax"]])
    plugin = write("plugin", layers=[["/attn", "PluginV3"]])
    folder = tmp_path / "both"
    arguments = ["compare", str(native), str(plugin), "-o", str(folder), "--iterations", "5"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["agrees"] is True
    assert result["kinds"] == {
        "SoftMax": {"native": 1.5, "plugin": 0.0},
        "CaskConvolution": {"native": 0.5, "plugin": 0.0},
        "PluginV3": {"native": 0.0, "plugin": 0.5},
    }
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".engine") == [
        "native.engine", "plugin.engine",
    ]  # fmt: skip
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "slowest layers, plugin" in text
    assert "as native operators" in text


def test_compare_tells_a_winner_and_different_outputs() -> None:
    fast, slow = deploy.Timing(1, 1, 1, 1.1, 1, 9), deploy.Timing(2, 2, 1.9, 2.1, 2, 9)
    vague = deploy.Timing(1.5, 1.5, 1.0, 2.0, 1, 9)

    def result(native: deploy.Timing, plugin: deploy.Timing) -> deploy.CompareResult:
        timings = {"native": {"gpu": native}, "plugin": {"gpu": plugin}}
        return deploy.CompareResult(timings, {"native": (), "plugin": ()}, (), 0.1, {})

    assert result(slow, fast).winner == "plugin"
    assert result(slow, fast).speedup["median"] == 2.0
    assert result(fast, slow).winner == "native"
    assert result(fast, vague).winner == "neither"
    assert result(vague, deploy.Timing(1.2, 1.2, 1.1, 1.3, 1, 9)).winner == "neither"
    assert "No winner" in result(fast, vague).verdict()


def test_models_with_other_inputs_are_not_compared(
    runtime: ModuleType, write: Callable[..., Path], tmp_path: Path
) -> None:
    other = write("other", inputs={"pixels": [-1, 4]})
    options = deploy.BuildOptions("", "")
    with pytest.raises(deploy.DeployError, match="other inputs"):
        deploy.compare(write(), other, tmp_path / "both", options, show_progress=False)
