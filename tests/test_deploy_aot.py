"""TensorRT's ahead-of-time plugins from the Triton kernels, as far as they go without TensorRT:
numbers under Triton's interpreter, PTX for sm_87 and sm_90, and registration with NVIDIA's own
Python code. No engine with them has been built.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwattn import deploy
from dwattn.deploy import aot_plugin
from support import tensorrt_bindings
from support.tensorrt import named

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed."
)
PTXAS = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")

NUMBERS = """
import torch
from dwattn import reference
from dwattn.triton_ops.kernels import ahead
torch.manual_seed(0)
B, H, W, C, D, groups = 2, 5, 7, 48, 80, 2
errors = {}
for dtype in (torch.float32, torch.float16):
    v, weight, ctx = torch.randn(B, H * W, C).to(dtype), torch.randn(C, 3, 3), torch.randn(B, C)
    wo, bo = torch.randn(D, C).to(dtype) / 7, torch.randn(D)
    grid = v.double().mT.reshape(B, C, H, W)
    y = torch.nn.functional.conv2d(grid, weight.double()[:, None], padding=1, groups=C)
    y = y.flatten(2).mT + ctx.double()[:, None]
    out = y @ wo.double().mT + bo.double()
    found = torch.empty_like(v)
    rows, columns, channels = 4, 8, 32
    cdiv = lambda a, b: -(-a // b)
    programs = B * cdiv(H, rows) * cdiv(W, columns) * cdiv(C, channels)
    ahead.aggregate[(programs,)](
        v, weight, ctx, H, W, C, found, ROWS=rows, COLUMNS=columns, CHANNELS=channels
    )
    errors[f"aggregate {dtype}"] = float((found - y).abs().max() / y.abs().max())
    for chunk, one in ((64, True), (32, False)):
        found = torch.full((B, H * W, D), float("nan"), dtype=dtype)
        ahead.expand[(B * cdiv(H * W, 16) * groups,)](
            v, weight, ctx, wo, bo, H, W, C, D, groups, found,
            CHANNELS=chunk, ONE_CHUNK=one, PATCHES=16, FEATURES=32,
        )
        errors[f"expand {dtype} {one}"] = float((found - out).abs().max() / out.abs().max())
import json
print(json.dumps(errors))
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_compute_the_layer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NUMBERS], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, error in json.loads(done.stdout).items():
        assert error < (1e-6 if "float32" in name else 2e-3), name


def assert_good(kernel: dict[str, Any], capability: int, folder: Path) -> None:
    """It takes the plugin's arguments and no others, and assembles without local memory."""
    ptx, name = kernel["ptx"], kernel["name"]
    target = re.search(r"\.target (sm_(\d+)a?)", ptx)
    assert target is not None
    assert int(target[2]) == capability
    arguments = {"aggregate": 7, "expand": 11}[kernel["plugin"]]
    assert len(re.findall(rf"\.param [^\n]*\b{name}_param_\d+", ptx)) == arguments
    assert ".local" not in ptx
    assert "/" not in re.sub(r"//[^\n]*", "", ptx)  # no path of this machine
    assert kernel["shared"] <= 48 * 1024  # more has to be asked for, which TensorRT may not do
    if PTXAS is not None:
        (folder / "k.ptx").write_text(ptx)
        done = subprocess.run(
            [PTXAS, "-v", f"-arch={target[1]}", folder / "k.ptx", "-o", folder / "k.cubin"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "0 bytes stack frame, 0 bytes spill stores" in done.stderr
        assert f"Compiling entry function '{name}'" in done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [87, 90])
def test_ptx(capability: int, tmp_path: Path) -> None:
    from dwattn.triton_ops import ahead

    for name in ("aggregate", "expand"):
        tile = ahead.tiles(name, "fp16")[0]
        assert_good(ahead.compile_kernel(name, "fp16", tile, capability), capability, tmp_path)


@needs_triton
@pytest.mark.compilers
@pytest.mark.parametrize("capability", [87, 90])
def test_every_kernel_of_a_bundle(capability: int, tmp_path: Path) -> None:
    from dwattn.triton_ops import ahead

    bundle = ahead.bundle(capability)
    (tmp_path / "b.json").write_text(json.dumps(bundle))
    loaded = aot_plugin.load(tmp_path / "b.json")
    assert loaded.capability == capability
    for kernel in loaded.kernels:
        assert_good(kernel, capability, tmp_path)
    for dtype, tiles in (("fp16", 2), ("fp32", 1)):
        assert len(loaded.select("aggregate", dtype)) == 6
        assert len(loaded.select("expand", dtype, ONE_CHUNK=False)) == tiles


@needs_triton
def test_scratch_memory_is_refused() -> None:
    from dwattn.triton_ops.ahead import without_scratch

    ptx = (
        ".visible .entry f(\n.param .u64 f_param_0,\n.param .u64 f_param_1\n)\n{ use [f_param_0]; }"
    )
    assert "f_param_1" not in without_scratch(ptx, "f", 1)
    with pytest.raises(deploy.DeployError, match="scratch memory"):
        without_scratch(ptx.replace("[f_param_0]", "[f_param_1]"), "f", 1)


# Registration --------------------------------------------------------------------------------

TILES = {
    "aggregate": [{"ROWS": 8, "COLUMNS": 8, "CHANNELS": 64}, {"ROWS": 4, "COLUMNS": 8, "CHANNELS": 64}],
    "expand": [
        {"PATCHES": patches, "FEATURES": 64, "CHANNELS": channels, "ONE_CHUNK": one}
        for patches in (32, 16)
        for channels, one in ((64, True), (128, True), (32, False))
    ],
}  # fmt: skip

REGISTER = """
import json, sys
import tensorrt
trt = sys.modules["tensorrt"]
from dwattn.deploy import aot_plugin
aot_plugin.register(aot_plugin.load(sys.argv[1]))
registry = trt.get_plugin_registry()
creators = [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators]

# A stand-in for TensorRT's symbolic dimensions: numbers that remember whether they are constant.
class Dimension:
    def __init__(self, value, constant=True):
        self.value, self.constant = value, constant
    def is_constant(self):
        return self.constant
    def get_constant_value(self):
        return self.value
trt.IDimensionExpr = Dimension
class Builder:
    def constant(self, value):
        return Dimension(value)
    def operation(self, op, a, b):
        x, y = a.value, b.value
        value = {"SUM": x + y, "PROD": x * y, "CEIL_DIV": -(-x // y) if y else 0,
                 "FLOOR_DIV": x // y if y else 0, "SUB": x - y}[str(op).split(".")[1]]
        return Dimension(value, a.constant and b.constant)

import tensorrt.plugin as trtp
from tensorrt.plugin import _lib, _tensor
_tensor.SymIntExpr._exprBuilder = Builder()

def tensor(*shape, dtype=trt.float16):
    exprs = [trtp.ShapeExpr(Dimension(n) if n > 0 else Dimension(-n, False)) for n in shape]
    return trtp.TensorDesc(trtp.ShapeExprs.from_tuple(tuple(exprs)), dtype)

def plan(name, inputs, tactic, out):
    d = _lib.QDP_REGISTRY["dwattn::" + name]
    found = d.register_func(*inputs, 5, 7)
    combos = d.autotune_func(*inputs, (found,))
    kernel, ptx, launch, extra = d.aot_impl_func(*inputs, 5, 7, (found,), tactic)
    out[name] = {
        "shape": [found.shape_expr[i]._expr.value for i in range(3)],
        "half": found.dtype == trt.float16,
        "combinations": len(combos),
        "kernel": kernel, "ptx": ptx,
        "grid": launch.grid_x._expr.value, "block": launch.block_x._expr.value,
        "shared": launch.shared_mem._expr.value,
        "extra": [extra[i]._expr.value for i in range(len(extra))],
    }

out = {"creators": creators}
F = trt.float32
plan("aggregate", [tensor(-3, 35, 96), tensor(96, 3, 3, dtype=F), tensor(-3, 96, dtype=F)], 2, out)
plan("expand", [tensor(-3, 35, 96), tensor(96, 3, 3, dtype=F), tensor(-3, 96, dtype=F),
                tensor(384, 96), tensor(384, dtype=F)], 1, out)
try:
    plan("aggregate", [tensor(3, 35, 90), tensor(90, 3, 3, dtype=F), tensor(3, 90, dtype=F)], 1, {})
except Exception as error:
    out["refused"] = str(error)
print("RESULT" + json.dumps(out))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Kernels without code, with names that tell which one was chosen."""
    kernels = [
        {"plugin": plugin, "dtype": dtype, "tile": tile, "name": f"{plugin}_{dtype}_{index}",
         "ptx": "ptx", "threads": 128, "shared": 1024}
        for plugin, tiles in TILES.items()
        for dtype in ("fp32", "fp16")
        for index, tile in enumerate(tiles)
    ]  # fmt: skip
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps({"schema": aot_plugin.SCHEMA, "capability": 87, "kernels": kernels}))
    return path


@pytest.fixture
def in_tensorrt(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code under NVIDIA's Python package of a version, with the lean library's registry."""

    def run(version: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        registry = None
        if version.startswith("11."):
            lean = named("DWATTN_TENSORRT_LEAN", "a folder that holds tensorrt_lean_cu13")
            registry = next(lean.rglob("libnvinfer_lean.so.11"))
        environment = tensorrt_bindings.environment(version, tmp_path, registry)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    return run


def newest(prefix: str) -> str:
    found = [v for v in tensorrt_bindings.versions() if v.startswith(prefix)]
    if not found:
        pytest.skip(f"{tensorrt_bindings.VARIABLE} has no version {prefix}*")
    return found[-1]


def test_registration_with_tensorrt_11(
    bundle: Path, in_tensorrt: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = in_tensorrt(newest("11."), REGISTER, bundle)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.split("RESULT")[1])
    for name in TILES:
        assert [name, "1", "dwattn"] in out["creators"]
        assert out[name]["combinations"] == 2
        assert out[name]["half"] is True
        assert (out[name]["block"], out[name]["shared"]) == (128, 1024)
    assert out["aggregate"]["shape"] == [3, 35, 96]
    assert out["aggregate"]["extra"] == [5, 7, 96]
    # Tactic 2: strips of 4 rows by 8 columns, 64 channels: 3 images * 2 * 1 * 2.
    assert (out["aggregate"]["kernel"], out["aggregate"]["grid"]) == ("aggregate_fp16_1", 12)
    assert out["expand"]["shape"] == [3, 35, 384]
    assert out["expand"]["extra"] == [5, 7, 96, 384, 2]
    # 96 channels fit the tile of 128; 35 patches are two tiles of 32, in two groups.
    assert (out["expand"]["kernel"], out["expand"]["grid"]) == ("expand_fp16_1", 12)
    assert "multiple of 16, and are 90" in out["refused"]


def test_tensorrt_10_3_has_no_such_plugins(
    bundle: Path, in_tensorrt: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = (
        "import sys; from dwattn.deploy import aot_plugin\n"
        "try: aot_plugin.register(aot_plugin.load(sys.argv[1]))\n"
        "except aot_plugin.DeployError as error: print(error)\n"
    )
    done = in_tensorrt(newest("10.3"), code, bundle)
    assert "needs TensorRT 10.9 or later" in done.stdout, done.stderr


def test_bad_bundles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    for text, message in (
        ("{", "not a file"),
        ('{"schema": 99}', "schema 99"),
        ("[]", "not a file"),
    ):
        path.write_text(text)
        with pytest.raises(deploy.DeployError, match=message):
            aot_plugin.load(path)
    with pytest.raises(deploy.DeployError, match="not a file"):
        aot_plugin.load(tmp_path / "none.json")
