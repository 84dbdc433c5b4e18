"""``dwattn build`` with the real TensorRT-RTX: parser, builder and engines, on a machine without GPU.

The command is what prepares the process for it; these tests type what a user types.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dwattn
from support.models import timm_vit
from support.surgery import plan_for
from support.tensorrt import named, plugin_library

onnx = pytest.importorskip("onnx")
TensorProto, helper = onnx.TensorProto, onnx.helper


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """Variables of a process that can import tensorrt_rtx, and nothing more."""
    folder = named("DWATTN_TENSORRT_RTX", "a folder that holds tensorrt_rtx_cu13")
    paths = [str(folder), *(p for p in sys.path if p)]
    kept = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny converted ViT in fp32 and fp16."""
    folder = tmp_path_factory.mktemp("rtx")
    model = timm_vit(depth=1, num_classes=0)
    dwattn.replace(model, plan_for(model, [0]))
    paths = {dtype: folder / f"{dtype}.onnx" for dtype in ("fp32", "fp16")}
    for dtype, path in paths.items():
        dwattn.export(model, path, (32, 24), dtype=dtype, check=False)
    return paths


def command(
    variables: dict[str, str], *arguments: object, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dwattn", "build", *map(str, arguments),
         "--runtime", "tensorrt-rtx"],
        env=variables, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


@pytest.mark.slow
def test_native_operators_become_an_engine(
    variables: dict[str, str], exported: dict[str, Path], tmp_path: Path
) -> None:
    engine, cache = tmp_path / "m.engine", tmp_path / "times"
    for dtype, path in exported.items():
        options = ["-o", engine, "--batch", "1:2:4", "--workspace", 256, "--timing-cache", cache]
        record = json.loads(command(variables, path, *options, "--json").stdout)
        assert record["engine"]["bytes"] == engine.stat().st_size > 100_000, dtype
        assert record["profile"] == {"pixel_values": [[n, 3, 32, 24] for n in (1, 2, 4)]}
        assert (record["runtime"], record["device"]) == ("tensorrt-rtx", None)
        assert ("fp16" in record["precision"]) == (dtype == "fp16")
    # The cache that the first build wrote was read by the second.
    assert cache.stat().st_size > 0


@pytest.mark.slow
def test_the_plugin_becomes_an_engine(variables: dict[str, str], tmp_path: Path) -> None:
    model = timm_vit(depth=1, num_classes=0)
    dwattn.replace(model, plan_for(model, [0]))
    dwattn.export(model, tmp_path / "m.onnx", (32, 24), lowering="plugin", check=False)
    library = plugin_library()
    # By a variable, and without -o: what is typed is `dwattn build m.onnx --runtime tensorrt-rtx`.
    variables = {**variables, "DWATTN_TRT_PLUGIN": str(library)}
    record = json.loads(command(variables, tmp_path / "m.onnx", "--json").stdout)
    assert record["plugin"]["path"] == str(library)
    assert b"DWAttention" in (tmp_path / "m.engine").read_bytes()


@pytest.mark.slow
def test_one_process_builds_twice_with_the_plugin(
    variables: dict[str, str], tmp_path: Path
) -> None:
    model = timm_vit(depth=1, num_classes=0)
    dwattn.replace(model, plan_for(model, [0]))
    dwattn.export(model, tmp_path / "m.onnx", (32, 24), lowering="plugin", check=False)
    prepared = (
        "import subprocess, sys; from dwattn.deploy import rtx\n"
        "with rtx.environment() as variables:\n"
        "    sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]], env=variables).returncode)"
    )
    twice = (
        "import sys; from dwattn import deploy\n"
        "for engine in ('1.engine', '2.engine'):\n"
        "    options = deploy.BuildOptions('m.onnx', engine, 'tensorrt-rtx', plugin=sys.argv[1])\n"
        "    print(deploy.build(options, show_progress=False).engine['bytes'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", prepared, twice, str(plugin_library())], cwd=tmp_path, env=variables,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert len(done.stdout.split()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["fp16", "plugin", "junk", "library"])
def test_mistakes_have_our_messages(
    mistake: str, variables: dict[str, str], exported: dict[str, Path], tmp_path: Path
) -> None:
    model, options, message = exported["fp32"], [], "no fp16 flag"
    if mistake == "fp16":
        options = ["--fp16"]
    if mistake in ("plugin", "junk"):
        model = tmp_path / "m.onnx"
        message = "named.node (NoSuchPlugin)" if mistake == "plugin" else "complete ONNX model"
        onnx.save(_custom("NoSuchPlugin"), model)
        if mistake == "junk":
            model.write_bytes(b"junk")
    if mistake == "library":
        options, message = ["--plugin", str(model)], "cannot be loaded"
    done = command(variables, model, "-o", tmp_path / "m.engine", *options, code=1)
    assert message in done.stderr
    assert ("name its library with --plugin" in done.stderr) == (mistake == "plugin")
    assert ("invalid ELF header" in done.stderr) == (mistake == "library")
    assert not (tmp_path / "m.engine").exists()


def _custom(op_type: str) -> Any:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    node = helper.make_node(
        op_type, ["x"], ["y"], "named.node", domain="dwattn",
        plugin_version="1", plugin_namespace="dwattn",
    )  # fmt: skip
    return helper.make_model(
        helper.make_graph([node], "g", [x], [y]), ir_version=9,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("dwattn", 1)],
    )  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_reaches_the_process_that_builds(
    variables: dict[str, str], exported: dict[str, Path], tmp_path: Path
) -> None:
    engine = tmp_path / "m.engine"
    child = subprocess.Popen(
        [sys.executable, "-m", "dwattn.deploy", "build", str(exported["fp32"]), "-o", str(engine),
         "--runtime", "tensorrt-rtx"],
        env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not _children(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, stderr
    assert not list(tmp_path.iterdir())


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
