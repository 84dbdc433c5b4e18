"""The Triton kernels against the reference in fp64: awkward sizes, strides, memory; and what is refused.

On a GPU they run there. Without one they run under Triton's interpreter, in a process of their own:
Triton decides between compiler and interpreter when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dwattn import reference, triton_ops
from dwattn.errors import BackendError, DwattnError, GeometryError
from support.operators import OperatorCase, assert_as_exact, error, make_case
from support.triton_cases import (
    BROKEN_INTERPRETER,
    DEVICE,
    DTYPES,
    INSTALLED,
    INTERPRETED,
    aggregate,
    agree,
    attention,
    cases,
    draw_heads,
    lowrank,
    lowrank_arguments,
    on_device,
    runs_kernels,
    strided_views,
    written_into,
)

pytestmark = pytest.mark.usefixtures("one_thread")
#: Those with kernels; those of the compiler need no interpreter.
FILES = sorted(p for p in Path(__file__).parent.glob("test_triton*.py") if "compile" not in p.stem)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed.")
@pytest.mark.skipif(
    BROKEN_INTERPRETER, reason="The interpreter of Triton 3.6 does not work with NumPy 2.4."
)
@pytest.mark.skipif(INTERPRETED, reason="This is the process with the interpreter.")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *FILES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, dwattn.triton_ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(INSTALLED, reason="Triton is installed.")
def test_without_triton_calls_say_what_to_install() -> None:
    assert not triton_ops.available()
    case = make_case()
    with pytest.raises(BackendError, match=r"dwattn\[triton\]"):
        triton_ops.dw_aggregate(case.v, case.kernel, case.geometry)


# Aggregation


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
def test_aggregation_is_as_exact_as_pytorch(dtype: torch.dtype, context: bool) -> None:
    part = context + (dtype == torch.float16)
    for case in cases(dtype, part, context=context, bias=context):
        exact = case.to(torch.float64)
        assert_as_exact(aggregate(case), case.aggregate("torch"), exact.aggregate("reference"))
        assert_as_exact(attention(case), case.attention("torch"), exact.attention("reference"))


@runs_kernels
@pytest.mark.parametrize("term", ["kappa", "mu", "beta"])
def test_every_context_term_alone(term: str) -> None:
    case = on_device(
        make_case(17, 16, 8, num_prefix=3, batch=1)
    )  # 272 patches: more than one partial sum
    result = triton_ops.dw_aggregate(
        case.v, case.kernel, case.geometry, **{term: getattr(case, term)}
    )
    exact = reference.dw_aggregate(
        case.v.double(), case.kernel.double(), case.geometry, **{term: getattr(case, term).double()}
    )
    assert error(result, exact) < 1e-6


@runs_kernels
def test_the_mean_of_many_patches_keeps_fp32_accuracy() -> None:
    case = on_device(make_case(29, 19, 3, num_prefix=0, batch=1))
    exact = reference.dw_aggregate(
        case.v.double() + 1000, case.kernel.double(), case.geometry, mu=case.mu.double()
    )
    v = (case.v.double() + 1000).float()
    assert error(triton_ops.dw_aggregate(v, case.kernel, case.geometry, mu=case.mu), exact) < 1e-6


@runs_kernels
def test_fp32_coefficients_with_16_bit_tokens() -> None:
    wide = on_device(make_case(channels=80))
    case = OperatorCase(
        wide.geometry, wide.x, wide.wv, wide.bv, wide.v.half(), wide.kernel, *wide.coefficients
    )
    exact = case.to(torch.float64).aggregate("reference")
    # One rounding, of the result.
    assert error(aggregate(case), exact) <= error(exact.half(), exact) * 1.01


@runs_kernels
def test_a_nan_reaches_its_neighbours_only() -> None:
    case = on_device(make_case(9, 10, 16, num_prefix=2, batch=2, context=False))
    case.v[:, :2] = float("nan")
    case.v[0, 2 + 7 * 10 + 9, 3] = float("nan")  # row 7, last column, channel 3
    touched = aggregate(case).isnan().view(2, 9, 10, 16)
    expected = torch.zeros_like(touched)
    expected[0, 6:9, 8:10, 3] = True
    assert torch.equal(touched, expected)


# Strides and memory


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_inputs_between_nans(dtype: torch.dtype) -> None:
    case = on_device(make_case(4, 3, 17, num_prefix=2, dtype=dtype))
    plain = aggregate(case)
    for name, v in strided_views(case.v).items():
        y = triton_ops.dw_aggregate(v, case.kernel, case.geometry, *case.coefficients)
        assert agree(y, plain), name
    once = case.v[:1].expand(3, -1, -1)
    y = triton_ops.dw_aggregate(once, case.kernel, case.geometry, *case.coefficients)
    assert agree(y, plain[:1].expand(3, -1, -1))


@runs_kernels
def test_strided_coefficients() -> None:
    case = on_device(make_case(4, 3, 17, num_prefix=2))
    kernel = case.kernel.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    kappa = case.kappa.t().contiguous().t()
    mu, beta = (torch.stack([t, t], 1)[:, 0] for t in (case.mu, case.beta))
    y = triton_ops.dw_aggregate(case.v, kernel, case.geometry, kappa, mu, beta)
    assert agree(y, aggregate(case))


@runs_kernels
def test_outputs_go_into_the_rows_of_a_larger_tensor_and_nowhere_else() -> None:
    case = on_device(make_case(9, 5, 20, num_prefix=3))
    for run in (aggregate, attention):
        expected = run(case)
        out = torch.full((4, 50, 29), 7.0, device=DEVICE)
        rows = out[1:3, 3:-2, 4:-5]
        assert run(case, out=rows) is rows
        written_into(out, rows, expected)
        out = torch.full((2, 20, 90), 7.0, device=DEVICE)
        rows = out[:, :, ::2].transpose(1, 2)
        run(case, out=rows)
        written_into(out, rows, expected)


@runs_kernels
def test_uninitialised_memory_does_not_leak() -> None:
    """New tensors start as NaN: outputs, partial sums, V and gradients."""
    case = on_device(make_case(5, 6, 33, num_prefix=1, batch=1))
    layer = lowrank_arguments(torch.float32, 5, 6, 33, 1, 1)
    # cuBLAS would rather not run than be asked for this; only the filling matters here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=DEVICE).isnan().all()
        results = [aggregate(case), attention(case), lowrank(layer)]
        gradients = triton_ops.dw_aggregate_backward(
            torch.ones_like(results[0]), case.v, case.kernel, case.geometry, *case.coefficients
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for t in (*results, *gradients):
        assert t.isfinite().all()


@runs_kernels
def test_empty_batches_and_no_channels() -> None:
    assert aggregate(on_device(make_case(batch=0))).shape == (0, 15, 8)
    assert aggregate(on_device(make_case(channels=0))).shape == (2, 15, 0)
    layer = lowrank_arguments(torch.float32, 2, 3, 8, 1, 0)
    assert lowrank(layer).shape == (0, 6, 20)


# Mistakes


@runs_kernels
def test_what_cannot_run_is_refused_with_the_reason() -> None:
    case = on_device(make_case())
    with pytest.raises(DwattnError, match=r"float64.*\.float\(\)"):
        aggregate(case.to(torch.float64))
    assert triton_ops.reasons_against(device=DEVICE, dtype=torch.float32) == ()
    assert "float64" in triton_ops.reasons_against(device=DEVICE, dtype=torch.float64)[0]
    if INTERPRETED:
        with pytest.raises(BackendError, match="bf16"):
            aggregate(case.to(torch.bfloat16))
    else:
        with pytest.raises(BackendError, match="'cpu'"):
            aggregate(make_case())


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed.")
def test_the_gpu_of_the_tensor_decides_and_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_ops, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda gpu=None: (7, 5) if gpu == 1 else (9, 0)
    )
    tokens = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float16)
    with pytest.raises(BackendError, match=r"this GPU has 7\.5"):
        triton_ops._require(tokens)
    tokens.device = torch.device("cuda:0")
    triton_ops._require(tokens)


@runs_kernels
def test_shapes_are_checked_before_memory_is_read() -> None:
    case = on_device(make_case(num_prefix=2))
    v, kernel, geometry = case.v, case.kernel, case.geometry
    with pytest.raises(GeometryError, match="N=16"):
        triton_ops.dw_aggregate(v[:, 1:], kernel, geometry)
    for arguments in ({"kappa": case.kappa[:1]}, {"mu": case.mu[:3]}, {"out": v}):
        with pytest.raises(DwattnError, match=next(iter(arguments))):
            triton_ops.dw_aggregate(v, kernel, geometry, **arguments)
    with pytest.raises(DwattnError, match=r"\(8, 3, 3\)"):
        triton_ops.dw_aggregate(v, kernel[1:], geometry)
    with pytest.raises(DwattnError, match="out="):
        triton_ops.dw_aggregate(v.requires_grad_(), kernel, geometry, out=v[:, 2:].detach())
    layer = lowrank_arguments(torch.float32, 3, 4, 8, 1, 2)
    for name in ("wv", "wo", "bv", "bo", "residual", "scale"):
        word = {"bv": "bias of wv", "bo": "bias of wo"}.get(name, name)
        with pytest.raises(DwattnError, match=word):
            lowrank(layer, **{name: layer[name][..., :-1]})
    q, k, v = draw_heads(torch.float32, 2, 2, 6, 8)
    mean, m2 = torch.zeros(2, 2, 6, 6, device=DEVICE)
    for wrong in ((q[:, :, :5], k, mean, m2), (q, k, mean[:, :5], m2), (q, k, mean, m2.half())):
        with pytest.raises(DwattnError):
            triton_ops.attention_variance(*wrong, 0)
    with pytest.raises(DwattnError, match="num_prefix=6"):
        triton_ops.attention_variance(q, k, mean, m2, 0, num_prefix=6)
