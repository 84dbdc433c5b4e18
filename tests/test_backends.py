"""Which backend runs: rules, forcing, reasons, and life without the compiled modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dwattn
from dwattn import backends, library
from dwattn.errors import BackendError
from support.operators import make_case

CPU = {"device": "cpu", "dtype": torch.float32}
CUDA = {"device": "cuda", "dtype": torch.float16}
compiled = pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error())


@compiled
@pytest.mark.parametrize("op", backends.OPS)
def test_compiled_kernels_are_preferred_on_the_cpu(op: str) -> None:
    assert backends.choose(op, **CPU) == "cpp"
    assert backends.choose(op, **CUDA) == "torch"
    assert backends.choose(op, device="meta", dtype=torch.float32) == "torch"


def test_every_backend_computes_the_same() -> None:
    case = make_case(num_prefix=2)
    expected = case.attention("reference")
    for name in backends.NAMES:
        if not backends._by_name(name).can_run("dw_attention", **CPU):
            continue
        torch.testing.assert_close(case.attention(name), expected)
        torch.testing.assert_close(case.aggregate(name), case.aggregate("reference"))


@compiled
def test_forcing_from_weakest_to_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.choose("dw_attention", **CPU) == "cpp"
    monkeypatch.setattr(backends, "_forced", "reference")  # what the environment asked for
    assert backends.choose("dw_attention", **CPU) == "reference"
    with backends.use("torch"):
        assert backends.choose("dw_attention", **CPU) == "torch"
        with backends.use("cpp"):
            assert backends.choose("dw_attention", **CPU) == "cpp"
            assert backends.choose("dw_attention", **CPU, backend="reference") == "reference"
        assert backends.choose("dw_attention", **CPU) == "torch"
    assert backends.choose("dw_attention", **CPU) == "reference"


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("", "None")])
def test_the_environment_forces_what_it_names(value: str, expected: str) -> None:
    code = "from dwattn import backends; print(backends.forced_backend())"
    environment = {**os.environ, "DWATTN_BACKEND": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected]


def test_use_ends_with_its_block_also_after_an_error() -> None:
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.forced_backend() is None


def test_unknown_names_are_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(BackendError, match=r"cudnn.*cpp, cuda, triton, torch, reference"),
        backends.use("cudnn"),
    ):
        pass
    monkeypatch.setattr(backends, "_forced", "fastest")
    with pytest.raises(BackendError, match=r"'fastest'.*DWATTN_BACKEND"):
        make_case().attention()
    with pytest.raises(BackendError, match="dw_atention"):
        backends.can_run_torch("dw_atention", **CPU)


def test_forcing_what_cannot_run_gives_the_reasons() -> None:
    with pytest.raises(BackendError, match=r"'cpp' cannot run dw_attention.*'cuda'"):
        backends.choose("dw_attention", **CUDA, backend="cpp")
    with pytest.raises(BackendError, match=r"torch\.int32"):
        backends.can_run_reference(
            "dw_attention", device="cpu", dtype=torch.int32, raise_error=True
        )
    with pytest.raises(BackendError, match=r"No backend.*torch\.int64"):
        backends.choose("dw_aggregate", device="cpu", dtype=torch.int64)
    verdict = backends.can_run_cpp("dw_attention", **CUDA)
    assert not verdict
    assert "'cuda'" in " ".join(verdict.reasons)


def test_explain_answers_for_every_backend() -> None:
    for question in (CPU, CUDA):
        verdicts = backends.explain("dw_attention", **question)
        assert {v.backend for v in verdicts} == set(backends.NAMES)
        assert all(bool(v) != bool(v.reasons) for v in verdicts)
        first = next(v.backend for v in verdicts if v)
        assert first == backends.choose("dw_attention", **question)


@compiled
def test_an_onnx_export_never_gets_the_compiled_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.choose("dw_attention", **CPU) == "cpp"
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert backends.choose("dw_attention", **CPU) == "torch"
    monkeypatch.undo()
    assert backends.choose("dw_attention", **CPU) == "cpp"


def test_a_compiled_graph_follows_the_forced_backend() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def remember(module: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(module.print_readable(print_output=False))
        return module

    case = make_case()
    run = torch.compile(lambda: case.attention(), fullgraph=True, backend=remember)
    with torch.no_grad():
        expected = run()
        with backends.use("torch"):
            torch.testing.assert_close(run(), expected)
    assert "conv2d" in graphs[-1]
    assert ("dwattn.dw_attention" in graphs[0]) == library.AVAILABLE


LIFE_WITHOUT_BINARIES = """
import torch, dwattn
from dwattn import backends, environment, library
assert not library.AVAILABLE and library.native is None
assert backends.choose("dw_attention", device="cpu", dtype=torch.float32) == "torch"
layer = dwattn.FusedDWAttention(16, num_heads=2, grid=(2, 3), num_prefix=1)
x = torch.randn(1, 7, 16, requires_grad=True)
layer(x).sum().backward()
assert x.grad.isfinite().all()
try:
    backends.choose("dw_attention", device="cpu", dtype=torch.float32, backend="cpp")
except backends.BackendError as error:
    print(error)
print(environment.explain(environment.collect()))
"""


def run_python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_works_without_its_binaries_and_says_why(tmp_path: Path) -> None:
    source = Path(dwattn.__file__).parent
    shutil.copytree(
        source, tmp_path / "dwattn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # A finder of an editable install would find the binaries that the copy lacks.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'skbuild' not in"
        " type(f).__module__ and 'editable' not in type(f).__module__.lower()]\n"
    )
    said = run_python(code + LIFE_WITHOUT_BINARIES, PYTHONPATH=str(tmp_path))
    assert "_C.so) are not installed" in said
    assert "pip install ." in said


def test_a_damaged_binary_is_reported_not_raised(tmp_path: Path) -> None:
    source = Path(dwattn.__file__).parent
    shutil.copytree(
        source, tmp_path / "dwattn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "dwattn" / "_C.so").write_bytes(b"not a library")
    said = run_python(
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in"
        " type(f).__module__.lower()]\n"
        "from dwattn import library; print(library.AVAILABLE, library.load_error())",
        PYTHONPATH=str(tmp_path),
    )
    assert said.startswith("False The compiled operators could not be loaded")


def test_binaries_can_be_switched_off() -> None:
    said = run_python(LIFE_WITHOUT_BINARIES, DWATTN_DISABLE_NATIVE="1")
    assert "switched off by DWATTN_DISABLE_NATIVE" in said
