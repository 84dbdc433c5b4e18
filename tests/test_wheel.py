"""A built wheel: what is in it, and that it works where nothing but its dependencies is installed.

``make wheel`` builds one and runs this file; ``DWATTN_WHEEL=dist/dwattn-....whl pytest tests/test_wheel.py`` checks
another. The environment of the second half is filled from the package index.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

WHEEL = os.environ.get("DWATTN_WHEEL")
ROOT = Path(__file__).parents[1]
#: The budgets of the documentation.
LARGEST_CPU, LARGEST_CUDA = 3_000_000, 12_000_000

pytestmark = [
    pytest.mark.skipif(WHEEL is None, reason="DWATTN_WHEEL names no wheel (make wheel)."),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def names() -> list[str]:
    with zipfile.ZipFile(str(WHEEL)) as wheel:
        return wheel.namelist()


def has_cuda_kernels() -> bool:
    with zipfile.ZipFile(str(WHEEL)) as wheel:
        return b".nv_fatbin" in wheel.read("dwattn/_C.so")


def test_the_size_is_within_its_budget() -> None:
    largest = LARGEST_CUDA if has_cuda_kernels() else LARGEST_CPU
    assert Path(str(WHEEL)).stat().st_size < largest


def test_the_documentation_states_these_budgets() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for largest in (LARGEST_CPU, LARGEST_CUDA):
        assert f"below {largest // 1_000_000} MB" in text


def test_both_modules_and_all_data_files_are_in_it(names: list[str]) -> None:
    compiled = sorted(name for name in names if name.endswith(".so"))
    modules = [re.sub(r"\..*", "", Path(name).name) for name in compiled]
    assert [name for name in modules if name != "libdwattn_trt"] == ["_C", "_native"]
    source = ROOT / "python"
    expected = {
        str(path.relative_to(source))
        for path in (source / "dwattn").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert expected <= set(names)


def test_nothing_else_is_in_it(names: list[str]) -> None:
    strangers = [name for name in names if not re.match(r"dwattn(-[^/]+\.dist-info)?/", name)]
    assert strangers == []
    assert not [name for name in names if "__pycache__" in name]


def test_no_library_was_copied_in(names: list[str]) -> None:
    assert not [name for name in names if "libtorch" in name or ".libs/" in name]


# In an environment of its own

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of a new environment with torch, the wheel and its extras timm and onnx."""
    place = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DWATTN"))}
    environment["PYTHONPATH"] = str(ROOT / "tests")  # for support alone; the package is elsewhere

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(place / "venv" / "bin" / program), *arguments],
            cwd=place, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    install = ("-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"))
    run("python", *install, "torch")  # first and alone: the others would bring the CUDA build
    run("python", *install, f"dwattn[timm,onnx] @ {Path(str(WHEEL)).resolve().as_uri()}")
    return run


def test_the_doctor_finds_the_compiled_parts(run: Run) -> None:
    info = json.loads(run("dwattn", "doctor", "--json"))
    assert "site-packages" in info["location"]
    assert info["operators"]["available"], info["operators"]
    assert info["native"]["available"], info["native"]
    assert info["build"]["version"] == info["dwattn"]
    assert bool(info["build"]["cuda_architectures"]) == has_cuda_kernels()


JOURNEY = """
from support import torchvision_shim
torchvision_shim.install()
import numpy, timm, torch
import dwattn
from dwattn import _native, functional, library
from dwattn.geometry import Geometry

assert "site-packages" in dwattn.__file__
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=0).eval()
images = torch.randn(16, 3, 64, 64)
with torch.inference_mode():
    original = model(images)
scores = dwattn.score(model, images, num_images=16, progress=False)
plan = dwattn.select(scores, blocks=2)
dwattn.replace(model, plan, calibrate=images, progress=False)
with torch.inference_mode():
    result = model(images)
assert not torch.equal(result, original)
print("cosine", torch.nn.functional.cosine_similarity(result, original).mean().item())
print("parity", dwattn.export(model, "model.onnx", size=64))

import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(output,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
numpy.testing.assert_allclose(output, result[:3].numpy(), atol=1e-3)

x, wv, kernel = torch.randn(2, 16, 32), torch.randn(24, 32), torch.randn(24, 3, 3)
grid = Geometry(4, 4)
exact = functional.dw_attention(x.double(), wv.double(), None, kernel.double(), grid, backend="reference")
for y in (functional.dw_attention(x, wv, None, kernel, grid, backend="cpp"),
          torch.from_numpy(_native.dw_attention(x.numpy(), wv.numpy(), None, kernel.numpy(), 4, 4))):
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=1e-4)
"""


def test_score_select_replace_export(run: Run) -> None:
    output = run("python", "-c", JOURNEY)
    cosine = re.search(r"cosine ([\d.]+)", output)
    assert cosine is not None
    assert float(cosine[1]) > 0.5, output
