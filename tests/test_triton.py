"""The Triton kernels against the reference in fp64: awkward sizes, strides, memory, gradients.

On a GPU they run there. Without one they run under Triton's interpreter, in a process of their own:
Triton decides between compiler and interpreter when it is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import functional, reference, triton_ops
from dwattn.errors import BackendError, DwattnError, GeometryError
from dwattn.geometry import Geometry
from support.operators import OperatorCase, assert_as_exact, error, make_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
BROKEN_INTERPRETER = (
    INSTALLED
    and importlib.metadata.version("triton").startswith("3.6.")
    and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
)

runs_kernels = pytest.mark.skipif(
    not INSTALLED or not (INTERPRETED or ON_GPU),
    reason="Triton is not installed."
    if not INSTALLED
    else "No GPU: run by test_under_the_interpreter in a process with TRITON_INTERPRET=1.",
)
bf16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not ON_GPU, reason="Triton's interpreter is silently wrong for bf16 (tl.dot)."
    ),
)
DTYPES = (torch.float32, torch.float16, bf16)
#: height, width, channels, prefix tokens, batch
SIZES = (
    (1, 1, 1, 0, 1),
    (1, 7, 3, 1, 2),
    (5, 1, 8, 2, 1),
    (2, 2, 80, 0, 2),
    (3, 5, 129, 5, 1),
    (11, 9, 16, 1, 1),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        [*command, __file__],
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


def on_device(case: OperatorCase) -> OperatorCase:
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in vars(case).items()
    }
    return OperatorCase(**moved)


def aggregate(case: OperatorCase, **options: Tensor) -> Tensor:
    return triton_ops.dw_aggregate(
        case.v, case.kernel, case.geometry, *case.coefficients, **options
    )


def attention(case: OperatorCase, **options: Tensor) -> Tensor:
    return triton_ops.dw_attention(
        case.x, case.wv, case.bv, case.kernel, case.geometry, *case.coefficients, **options
    )


def cases(dtype: torch.dtype, **options: bool) -> Iterator[OperatorCase]:
    for height, width, channels, num_prefix, batch in SIZES:
        case = make_case(
            height, width, channels, num_prefix=num_prefix, batch=batch, dtype=dtype, **options
        )
        yield on_device(case)


# Aggregation


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
def test_aggregation_is_as_exact_as_pytorch(dtype: torch.dtype, context: bool) -> None:
    for case in cases(dtype, context=context, bias=context):
        exact = case.to(torch.float64)
        assert_as_exact(aggregate(case), case.aggregate("torch"), exact.aggregate("reference"))
        assert_as_exact(attention(case), case.attention("torch"), exact.attention("reference"))


@runs_kernels
@pytest.mark.parametrize("term", ["kappa", "mu", "beta"])
def test_every_context_term_alone(term: str) -> None:
    case = on_device(make_case(17, 16, 8, num_prefix=3))  # 272 patches: more than one partial sum
    result = triton_ops.dw_aggregate(
        case.v, case.kernel, case.geometry, **{term: getattr(case, term)}
    )
    exact = reference.dw_aggregate(
        case.v.double(), case.kernel.double(), case.geometry, **{term: getattr(case, term).double()}
    )
    assert error(result, exact) < 1e-6


@runs_kernels
def test_the_mean_of_many_patches_keeps_fp32_accuracy() -> None:
    case = on_device(make_case(41, 37, 3, num_prefix=0, batch=1))
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


def strided_views(t: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides, with NaN in every gap."""
    batch, rows, channels = t.shape

    def filled(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)

    views = {
        "inside": filled(batch + 2, rows + 5, channels + 7)[1:-1, 2:-3, 4:-3],
        "every second token": filled(batch, 2 * rows, channels)[:, ::2],
        "every third channel": filled(batch, rows, 3 * channels)[:, :, ::3],
        "channels first": filled(batch, channels, rows).transpose(1, 2),
        "tokens first": filled(rows, batch, channels).transpose(0, 1),
    }
    for view in views.values():
        view.copy_(t)
    return views


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_inputs_between_nans(dtype: torch.dtype) -> None:
    case = on_device(make_case(4, 3, 17, num_prefix=2, dtype=dtype))
    plain = aggregate(case)
    for name, v in strided_views(case.v).items():
        y = triton_ops.dw_aggregate(v, case.kernel, case.geometry, *case.coefficients)
        assert torch.equal(y, plain), name
    once = case.v[:1].expand(3, -1, -1)
    y = triton_ops.dw_aggregate(once, case.kernel, case.geometry, *case.coefficients)
    assert torch.equal(y, plain[:1].expand(3, -1, -1))


@runs_kernels
def test_strided_coefficients() -> None:
    case = on_device(make_case(4, 3, 17, num_prefix=2))
    kernel = case.kernel.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    kappa = case.kappa.t().contiguous().t()
    mu, beta = (torch.stack([t, t], 1)[:, 0] for t in (case.mu, case.beta))
    y = triton_ops.dw_aggregate(case.v, kernel, case.geometry, kappa, mu, beta)
    assert torch.equal(y, aggregate(case))


def written_into(out: Tensor, rows: Tensor, result: Tensor) -> None:
    """``rows`` is the view of ``out`` that was to be written; all else must still be 7."""
    assert torch.equal(rows, result)
    rows.fill_(7)
    assert (out == 7).all()


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
    case = on_device(make_case(5, 6, 33, num_prefix=1))
    layer = lowrank_arguments(torch.float32, 5, 6, 33, 1, 2)
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


# Gradients


def gradients(case: OperatorCase, backend: str, weight: Tensor) -> list[Tensor]:
    names = ("v", "kernel", "kappa", "mu", "beta")
    leaves = [getattr(case, name).detach().clone().requires_grad_() for name in names]
    v, *coefficients = leaves
    if backend == "triton":
        y = triton_ops.dw_aggregate(v, coefficients[0], case.geometry, *coefficients[1:])
    else:
        y = functional.dw_aggregate(
            v, coefficients[0], case.geometry, *coefficients[1:], backend=backend
        )
    (y * weight.to(y.dtype)).sum().backward()
    return [leaf.grad for leaf in leaves]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_agree_with_the_reference(dtype: torch.dtype) -> None:
    for case in cases(dtype):
        if case.geometry.num_prefix == 0:  # PyTorch cannot sum over no prefix tokens in fp16
            continue
        shape = (case.v.shape[0], case.geometry.num_patches, case.v.shape[2])
        weight = torch.randn(shape).to(DEVICE, dtype)
        exact = gradients(case.to(torch.float64), "reference", weight)
        ours, theirs = (gradients(case, backend, weight) for backend in ("triton", "torch"))
        for mine, plain, truth in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype
            floor = 4 * torch.finfo(dtype).eps
            assert error(mine, truth) <= 2 * max(error(plain, truth), floor)


@runs_kernels
def test_gradients_of_a_whole_attention() -> None:
    case = on_device(make_case(4, 6, 16, num_prefix=2))
    exact = case.to(torch.float64)
    for one in (case, exact):
        one.x.requires_grad_()
        one.wv.requires_grad_()
    attention(case).square().sum().backward()
    exact.attention("reference").square().sum().backward()
    assert error(case.x.grad, exact.x.grad) < 1e-6
    assert error(case.wv.grad, exact.wv.grad) < 1e-6


@runs_kernels
def test_gradients_of_many_strips_are_right_repeatable_and_of_any_strides() -> None:
    """12 strips for 8 groups of programs under the interpreter."""
    case = on_device(make_case(9, 10, 5, num_prefix=0, batch=3))
    grad = torch.randn(3, 90, 5).to(DEVICE)

    def run(grad: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return triton_ops.dw_aggregate_backward(
            grad, v, case.kernel, case.geometry, None, case.mu, case.beta
        )

    first = run(grad, case.v)
    assert first[2] is None
    exact = gradients(case.to(torch.float64), "reference", grad)
    for mine, truth in zip((first[0], first[1], *first[3:]), (*exact[:2], *exact[3:]), strict=True):
        assert error(mine, truth) < 1e-6
    for again in (run(grad, case.v), run(strided_views(grad)["channels first"], case.v)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    only = triton_ops.dw_aggregate_backward(
        grad, case.v, case.kernel, case.geometry, None, case.mu, case.beta,
        needs=(False, True, False, False, False),
    )  # fmt: skip
    assert [g is None for g in only] == [True, False, True, True, True]
    assert torch.equal(only[1], first[1])


@runs_kernels
def test_operators_under_the_compiler() -> None:
    case = make_case()
    operator = torch.ops.dwattn_triton.dw_aggregate.default
    assert triton_ops.available()
    arguments = (case.v.requires_grad_(), case.kernel.requires_grad_(), *case.coefficients)
    moved = [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in arguments]
    torch.library.opcheck(operator, (*moved, *case.sizes))

    layer = lowrank_arguments(torch.float32, 3, 4, 8, 1, 2)
    names = ("x", "wv", "bv", "kernel", "kappa", "mu", "beta", "wo", "bo", "residual", "scale")
    torch.library.opcheck(
        torch.ops.dwattn_triton.lowrank_dw_attention.default,
        (*(layer[name] for name in names), 3, 4, 1),
    )

    def both(v: Tensor, kernel: Tensor) -> Tensor:
        return triton_ops.dw_aggregate(v, kernel, case.geometry).sum() + lowrank(layer).sum()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*moved[:2]), both(*moved[:2]))


# The narrow layer


def lowrank_arguments(
    dtype: torch.dtype, height: int, width: int, rank: int, num_prefix: int, batch: int,
    dim: int = 20,
) -> dict[str, Tensor | Geometry]:  # fmt: skip
    case = on_device(
        make_case(height, width, rank, num_prefix=num_prefix, batch=batch, dim=dim, dtype=dtype)
    )

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(DEVICE, dtype)

    return {
        "x": case.x, "wv": case.wv, "bv": case.bv, "kernel": case.kernel,
        "geometry": case.geometry, "wo": draw(dim, rank) / rank**0.5, "bo": draw(dim),
        "kappa": case.kappa, "mu": case.mu, "beta": case.beta,
        "residual": draw(batch, height * width, dim), "scale": draw(dim),
    }  # fmt: skip


def lowrank(layer: dict[str, Tensor | Geometry], **options: Tensor) -> Tensor:
    return triton_ops.lowrank_dw_attention(**{**layer, **options})


def plain_lowrank(layer: dict[str, Tensor | Geometry], backend: str) -> Tensor:
    names = ("x", "wv", "bv", "kernel", "geometry", "kappa", "mu", "beta")
    inner = functional.dw_attention(*(layer[name] for name in names), backend=backend)
    y = F.linear(inner, layer["wo"], layer["bo"])
    y = y if layer["scale"] is None else y * layer["scale"]
    return y if layer["residual"] is None else layer["residual"] + y


def in_fp64(layer: dict[str, Tensor | Geometry]) -> dict[str, Tensor | Geometry]:
    return {k: t.double() if isinstance(t, Tensor) else t for k, t in layer.items()}


#: rank 129 and more: two chunks of inner channels and more; 300: two projections of x
RANKS = (1, 8, 129, 72, 33, 300)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_is_as_exact_as_pytorch(dtype: torch.dtype, rank: int) -> None:
    cases = list(zip(SIZES, (5, 16, 70, 20, 130, 33), strict=True))
    for (height, width, _, num_prefix, batch), dim in cases[RANKS.index(rank) % 2 :: 2]:
        layer = lowrank_arguments(dtype, height, width, rank, num_prefix, batch, dim)
        exact = plain_lowrank(in_fp64(layer), "reference")
        result, plain = lowrank(layer), plain_lowrank(layer, "torch")
        assert result.dtype == dtype
        # Outputs share the errors of a few inner channels: PyTorch's own may be small by luck.
        floor = torch.finfo(dtype).eps
        assert error(result, exact) <= 2 * max(error(plain, exact), floor)


@runs_kernels
@pytest.mark.parametrize("absent", ["bv", "bo", "residual", "scale", "mu", "context"])
def test_lowrank_without_a_term(absent: str) -> None:
    layer = lowrank_arguments(torch.float32, 5, 7, 24, 2, 2)
    gone = ("kappa", "mu", "beta") if absent == "context" else (absent,)
    layer.update(dict.fromkeys(gone))
    assert error(lowrank(layer), plain_lowrank(in_fp64(layer), "reference")) < 1e-6


@runs_kernels
def test_lowrank_in_place_and_with_strides() -> None:
    layer = lowrank_arguments(torch.float32, 5, 7, 24, 2, 2)
    expected = lowrank(layer)
    stream = torch.full((2, 40, 23), 7.0, device=DEVICE)
    rows = stream[:, 3:-2, 1:-2]
    rows.copy_(layer["residual"])
    lowrank(layer, residual=rows, out=rows)
    written_into(stream, rows, expected)
    for name, x in strided_views(layer["x"]).items():
        strided = lowrank(layer, x=x, wo=layer["wo"].t().contiguous().t())
        assert torch.equal(strided, expected), name


@runs_kernels
def test_lowrank_with_gradients() -> None:
    layer = lowrank_arguments(torch.float32, 3, 4, 8, 1, 2)
    exact = in_fp64(layer)
    for one in (layer, exact):
        for name in ("x", "wo", "scale", "mu"):
            one[name].requires_grad_()
    lowrank(layer).square().sum().backward()
    plain_lowrank(exact, "reference").square().sum().backward()
    for name in ("x", "wo", "scale", "mu"):
        assert error(layer[name].grad, exact[name].grad) < 1e-6


# Attention statistics


def draw_heads(
    dtype: torch.dtype, batch: int, heads: int, tokens: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as attention layers have them: views of one product."""
    fused = torch.randn(batch, tokens, 3, heads, width).to(DEVICE, dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    return q * 1.5, k, v


def exact_maps(q: Tensor, k: Tensor) -> Tensor:
    return reference.attention_map(q.double(), k.double())


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("heads", "tokens", "width", "num_prefix"),
    [(1, 1, 8, 0), (2, 37, 20, 1), (3, 70, 64, 5), (1, 16, 33, 0)],
)
def test_attention_statistics_over_two_batches(
    dtype: torch.dtype, state: torch.dtype, heads: int, tokens: int, width: int, num_prefix: int
) -> None:
    q, k, v = draw_heads(dtype, 5, heads, tokens, width)
    size = tokens - num_prefix
    # Garbage, because nothing was seen yet; views, because a state may be one.
    mean, m2 = torch.full((2, heads, size, size), float("nan"), dtype=state, device=DEVICE)
    prefix = torch.full((heads, size, num_prefix), float("nan"), dtype=state, device=DEVICE)
    outputs = [
        triton_ops.attention_variance(
            q[images], k[images], mean, m2, images.start, v=v[images],
            prefix_mean=prefix, num_prefix=num_prefix,
        )
        for images in (slice(0, 3), slice(3, 5))
    ]  # fmt: skip
    exact = exact_maps(q, k)
    patches = exact[:, :, num_prefix:, num_prefix:]
    assert error(mean, patches.mean(0)) < 2e-6
    if tokens > 1:
        deviations = patches - patches.mean(0)
        assert error(m2, deviations.square().sum(0)) < 1e-5
    else:
        assert m2.abs().max() < 1e-12
    if num_prefix:
        assert error(prefix, exact[:, :, num_prefix:, :num_prefix].mean(0)) < 2e-6
    assert all(o.transpose(1, 2).is_contiguous() for o in outputs)
    output = torch.cat(outputs)
    plain = F.scaled_dot_product_attention(q, k, v)
    assert_as_exact(output, plain, exact @ v.double())


@runs_kernels
def test_statistics_of_one_image_at_a_time_and_of_a_batch_agree() -> None:
    q, k, _ = draw_heads(torch.float32, 7, 2, 24, 16)
    states = torch.zeros(2, 2, 2, 24, 24, dtype=torch.float64, device=DEVICE)
    triton_ops.attention_variance(q, k, *states[0], 0, scale=0.5)
    for image in range(7):
        one = slice(image, image + 1)
        assert triton_ops.attention_variance(q[one], k[one], *states[1], image, scale=0.5) is None
    assert error(states[1, 0], states[0, 0]) < 1e-6
    assert error(states[1, 1], states[0, 1]) < 1e-5
    maps = reference.attention_map(q.double(), k.double(), 0.5)
    assert error(states[0, 1], maps.var(0, correction=0) * 7) < 1e-5


@runs_kernels
def test_the_variance_of_nearly_constant_maps_is_not_lost() -> None:
    """A deviation of 1e-4 beside a mean of 1/24: sums of squares in fp32 would not see it."""
    q, k, _ = draw_heads(torch.float32, 1, 1, 24, 16)
    noise = torch.randn(6, 1, 24, 16).to(DEVICE) * 1e-4
    q, k = q + noise, k.expand(6, -1, -1, -1)
    mean, m2 = torch.zeros(2, 1, 24, 24, device=DEVICE)
    triton_ops.attention_variance(q, k, mean, m2, 0)
    exact = exact_maps(q, k).var(0, correction=0) * 6
    assert error(m2, exact) < 0.02
    maps = exact_maps(q, k).float()
    naive = maps.square().sum(0) - maps.sum(0).square() / 6
    assert error(naive, exact) > 0.02


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
