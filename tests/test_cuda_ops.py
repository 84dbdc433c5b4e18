"""The compiled operators on a GPU. Skipped without one: the kernels are then judged by emulation only
(``test_cuda_emulation.py``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dwattn import functional, gradients, library
from dwattn.geometry import Geometry
from dwattn.variance import AttentionVariance
from support.operators import OperatorCase, assert_as_exact, make_case


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not library.AVAILABLE or library.native is None:
        return library.load_error() or library.native_error()
    build = library.native.build_info()
    return "" if build["cuda_architectures"] else f"built without CUDA kernels: {build['cuda']}"


NO_CUDA_KERNELS = _why_not()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(NO_CUDA_KERNELS), reason=NO_CUDA_KERNELS),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: height, width, prefix tokens, batch, dim, channels
SHAPES = (
    (24, 24, 1, 2, 1024, 1024),
    (37, 37, 5, 1, 384, 384),
    (16, 16, 0, 33, 384, 384),
    (1, 37, 1, 3, 40, 72),
    (37, 1, 5, 2, 64, 64),
    (13, 11, 2, 2, 96, 130),
    (5, 230, 1, 1, 64, 66),
    (7, 5, 1, 2, 33, 65),
    (1, 1, 0, 1, 8, 2),
    (32768, 1, 0, 1, 8, 16),  # a longer side than the one kernel of a layer takes
)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Plain PyTorch is the measure in fp32, and would use TF32 in its convolution."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def on_gpu(case: OperatorCase) -> OperatorCase:
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{k: t.cuda() for k, t in tensors.items() if isinstance(t, Tensor)})


def attention(case: OperatorCase) -> Tensor:
    return library.dw_attention(
        case.x, case.wv, case.bv, case.kernel, *case.coefficients, *case.sizes
    )


def aggregate(case: OperatorCase) -> Tensor:
    return library.dw_aggregate(case.v, case.kernel, *case.coefficients, *case.sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(
    shape: tuple[int, ...], context: bool, dtype: torch.dtype
) -> None:
    height, width, num_prefix, batch, dim, channels = shape
    case = on_gpu(
        make_case(
            height, width, channels,
            num_prefix=num_prefix, batch=batch, dim=dim, dtype=dtype, context=context, bias=context,
        )
    )  # fmt: skip
    exact = case.to(torch.float64)
    assert_as_exact(attention(case), case.attention("torch"), exact.attention("reference"))
    assert_as_exact(aggregate(case), case.aggregate("torch"), exact.aggregate("reference"))


@pytest.mark.parametrize("width", [64, 576], ids=["narrow", "wide"])
def test_tf32_is_used_where_pytorch_allows_it_and_nowhere_else(width: int) -> None:
    case = on_gpu(make_case(24, 24, 384, num_prefix=1, dim=384, dtype=torch.float32))
    wide = case.to(torch.float64)
    runs: tuple[Callable[[], Tensor], ...] = (lambda: attention(case), lambda: layer(case, width))
    for run in runs:
        single = run()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        short = run()
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert torch.equal(run(), single)
        assert not torch.equal(short, single)
        torch.testing.assert_close(short, single, rtol=0, atol=2**-9 * single.abs().max().item())
    exact = wide.attention("reference")
    assert (attention(case) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [1, 16])
def test_slices_of_larger_tensors(dtype: torch.dtype, gap: int) -> None:
    case = on_gpu(make_case(7, 5, 64, num_prefix=2, dim=64, dtype=dtype))

    def sliced(t: Tensor) -> Tensor:
        larger = t.new_full((*t.shape[:-1], t.shape[-1] + gap + 8), float("nan"))
        inner = larger[..., gap : gap + t.shape[-1]]
        return inner.copy_(t)

    strided = replace(case, x=sliced(case.x), wv=sliced(case.wv), v=sliced(case.v))
    assert not strided.x.is_contiguous()
    torch.testing.assert_close(attention(strided), attention(case))
    torch.testing.assert_close(aggregate(strided), aggregate(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_layer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One kernel up to 512 channels, two products beyond; prefix rows on and off."""
    height, width, num_prefix, batch, dim, channels = shape
    case = on_gpu(
        make_case(height, width, channels, num_prefix=num_prefix, batch=batch, dim=dim, dtype=dtype)
    )
    wo = torch.randn(dim, channels, device="cuda").to(dtype) / channels**0.5
    bo = torch.randn(dim, device="cuda").to(dtype)
    prefix = torch.randn(batch, num_prefix, dim, device="cuda").to(dtype)

    def layer(given: OperatorCase, backend: str, *output: Tensor | None) -> Tensor:
        return functional.dw_layer(
            given.x, given.wv, given.bv, given.kernel, output[0], output[1], given.geometry,
            *given.coefficients, prefix_out=output[2], backend=backend,
        )  # fmt: skip

    for rows in (prefix, None):
        output = (wo, bo, rows)
        wide = tuple(None if t is None else t.double() for t in output)
        exact = layer(case.to(torch.float64), "reference", *wide)
        assert_as_exact(layer(case, "cuda", *output), layer(case, "torch", *output), exact)


def narrow_layer(case: OperatorCase) -> Tensor:
    """lowrank_dw of width 64: one kernel for the patch rows, behind the finished prefix rows."""
    return layer(case, 64)


def wide_layer(case: OperatorCase) -> Tensor:
    """dw of 576 channels, beyond the width of one kernel: two products."""
    return layer(case, 576)


def layer(case: OperatorCase, width: int) -> Tensor:
    """A layer of the case's tokens with an inner width of its own."""
    prefix = case.x[:, : case.geometry.num_prefix]
    inner = weights(case.geometry, case.x.shape[2], width, case.x.dtype)
    return library.dw_layer(
        case.x, inner.wv, inner.bv, inner.kernel, *inner.coefficients, inner.wv.t(), None, prefix,
        *case.sizes,
    )  # fmt: skip


@functools.cache
def weights(geometry: Geometry, dim: int, width: int, dtype: torch.dtype) -> OperatorCase:
    """Copied to the GPU once: a graph cannot capture that."""
    case = make_case(
        *geometry.grid, width, num_prefix=geometry.num_prefix, batch=1, dim=dim, dtype=dtype, seed=2
    )
    return on_gpu(case)


def backward(case: OperatorCase) -> Tensor:
    """All gradients of the aggregation, in one tensor."""
    grad = case.v[:, case.geometry.num_prefix :]
    with torch.no_grad():
        found = gradients.aggregate_backward(
            grad, case.v, case.kernel, case.kappa, case.mu, case.sizes, values=True
        )
    return torch.cat([t.flatten().float() for t in found])


RUNS = (attention, aggregate, narrow_layer, wide_layer, backward)


@pytest.mark.parametrize("run", RUNS)
def test_every_call_gives_the_same_bits(run: Callable[[OperatorCase], Tensor]) -> None:
    case = on_gpu(make_case(24, 24, 384, dim=384, dtype=torch.bfloat16))
    first = run(case)
    assert all(torch.equal(run(case), first) for _ in range(5))


@pytest.mark.parametrize("run", RUNS)
def test_the_current_stream_is_used_and_can_be_captured(
    run: Callable[[OperatorCase], Tensor],
) -> None:
    """A capture fails at a hidden synchronisation, and at work on another stream. The replay reads the
    inputs of that time anew."""
    case = on_gpu(make_case(24, 24, 384, dim=384, dtype=torch.float16))
    later = on_gpu(make_case(24, 24, 384, dim=384, dtype=torch.float16, seed=1))
    run = staged(run, case)
    expected = run(later)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case)
    captured.zero_()
    case.x.copy_(later.x)
    case.v.copy_(later.v)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("run", RUNS)
def test_another_device_than_the_current_one(run: Callable[[OperatorCase], Tensor]) -> None:
    """What a kernel is granted, more shared memory than by default, it is granted on one device."""
    case = make_case(24, 24, 384, dim=384, dtype=torch.float16)
    expected = run(on_gpu(case))
    weights.cache_clear()
    with torch.cuda.device(1):
        second = on_gpu(case)
        weights(case.geometry, 384, 64, torch.float16)
        weights(case.geometry, 384, 576, torch.float16)
    found = run(second)
    weights.cache_clear()
    assert found.device.index == 1
    torch.testing.assert_close(found.cpu(), expected.cpu())


def staged(
    run: Callable[[OperatorCase], Tensor], case: OperatorCase
) -> Callable[[OperatorCase], Tensor]:
    """The same call with the weights of ``case``, whatever tokens it gets."""
    return lambda tokens: run(replace(case, x=tokens.x, v=tokens.v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_attention_variance_adds_to_the_state(head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, num_prefix, tokens = 3, 2, 79
    state = torch.full((2, heads, 77, 77), float("nan"), dtype=torch.float64, device="cuda")
    prefix = torch.full((heads, 77, 2), float("nan"), dtype=torch.float64, device="cuda")
    expected = AttentionVariance(num_prefix)
    for batch in (3, 5):
        q, k, v = torch.randn(3, batch, heads, tokens, head_dim, device="cuda").to(dtype)
        out = library.attention_variance_(
            q, k, state[0], state[1], expected.count,
            v=v, prefix_mean=prefix, num_prefix=num_prefix,
        )  # fmt: skip
        exact = expected.attend(q.double(), k.double(), v.double())
        assert out is not None
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    near = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(state[0], expected.mean, **near)
    torch.testing.assert_close(state[1], expected.m2, **near)
    torch.testing.assert_close(prefix, expected.prefix_mean, **near)


def test_opcheck() -> None:
    case = on_gpu(make_case(context=True))
    given = (case.v.requires_grad_(), case.kernel.requires_grad_(), *case.coefficients)
    torch.library.opcheck(torch.ops.dwattn.dw_aggregate.default, (*given, *case.sizes))
    given = (case.x.requires_grad_(), case.wv, case.bv, case.kernel, *case.coefficients)
    torch.library.opcheck(torch.ops.dwattn.dw_attention.default, (*given, *case.sizes))


def test_fp64_is_refused_with_a_way_out() -> None:
    case = on_gpu(make_case(dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"float64.*DWATTN_BACKEND=torch"):
        attention(case)
    with pytest.raises(RuntimeError, match=r"float64.*DWATTN_BACKEND=torch"):
        aggregate(case)
