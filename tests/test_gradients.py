"""Gradients of the compiled operators on every device that has them; the judge is autograd through the
reference in fp64. On a GPU ``torch.ops.dwattn.dw_aggregate_backward`` is one kernel, on the CPU a sum of
parts; the same tests run on both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dwattn import functional, gradients, library
from support.operators import OperatorCase, error, make_case
from test_cuda_ops import NO_CUDA_KERNELS, on_gpu

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(NO_CUDA_KERNELS), reason=NO_CUDA_KERNELS)]
)  # fmt: skip
pytestmark = [
    pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error()),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
COMPILED = {"cpu": "cpp", "cuda": "cuda"}
#: height, width, prefix tokens, batch, dim, channels
SHAPES = ((7, 5, 1, 2, 16, 24), (1, 9, 2, 3, 12, 7), (6, 1, 5, 1, 8, 65), (1, 1, 1, 2, 4, 2))
#: Sizes for the kernel: the CPU takes long for them, and its parts do not depend on sizes.
LARGE = ((24, 24, 1, 8, 1024, 1024), (37, 37, 5, 1, 384, 384), (16, 16, 2, 33, 384, 386))
NAMES = ("x", "wv", "bv", "kernel", "kappa", "mu", "beta")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Plain PyTorch is the measure in fp32."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def case_on(
    device: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> OperatorCase:
    height, width, num_prefix, batch, dim, channels = shape
    case = make_case(
        height, width, channels, num_prefix=num_prefix, batch=batch, dim=dim, dtype=dtype
    )
    return on_gpu(case) if device == "cuda" else case


def attention_gradients(case: OperatorCase, backend: str, recompute: bool = False) -> list[Tensor]:
    """Of every tensor, for a gradient of Y that is the same in all dtypes."""
    leaves = [getattr(case, name).detach().clone().requires_grad_() for name in NAMES]
    x, wv, bv, kernel, *coefficients = leaves
    if recompute:  # the operator itself, which projects V again
        y = library.dw_attention(x, wv, bv, kernel, *coefficients, *case.sizes)
    else:
        y = functional.dw_attention(
            x, wv, bv, kernel, case.geometry, *coefficients, backend=backend
        )
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
    return list(torch.autograd.grad(y, leaves, grad.to(y.device, y.dtype)))


def assert_gradients(case: OperatorCase, backend: str) -> None:
    exact = attention_gradients(case.to(torch.float64), "reference")
    plain = attention_gradients(case, "torch")
    for recompute in (False, True):
        ours = attention_gradients(case, backend, recompute)
        for name, mine, theirs, truth in zip(NAMES, ours, plain, exact, strict=True):
            assert mine.dtype == case.x.dtype, name
            floor = torch.finfo(mine.dtype).eps
            assert error(mine, truth) <= 2 * max(error(theirs, truth), floor), name


@every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    assert_gradients(case_on(device, shape, dtype), COMPILED[device])


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_error_on_the_sizes_of_real_models(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    assert_gradients(case_on(device, shape, dtype), "cuda")


@every_device
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("with_v", [True, False])
def test_what_is_not_asked_for_is_empty(values: bool, with_v: bool, device: str) -> None:
    case = case_on(device, SHAPES[0])
    grad = torch.randn_like(case.aggregate())
    full = gradients.aggregate_backward  # grad mode off: the operator, not its parts
    with torch.no_grad():
        everything = full(grad, case.v, case.kernel, case.kappa, case.mu, case.sizes, values=True)
        found = full(
            grad, case.v if with_v else None, case.kernel, case.kappa, case.mu, case.sizes,
            values=values,
        )  # fmt: skip
    given = (values, with_v, with_v, with_v, True)
    for wanted, one, expected in zip(given, found, everything, strict=True):
        if wanted:
            assert torch.equal(one, expected)
        else:
            assert one.numel() == 0


@every_device
def test_absent_terms_have_no_gradient(device: str) -> None:
    case = case_on(device, SHAPES[0])
    grad = torch.randn_like(case.aggregate())
    with torch.no_grad():
        dv, dkernel, dkappa, dmu, dbeta = gradients.aggregate_backward(
            grad, case.v, case.kernel, None, None, case.sizes, values=True
        )
    assert dkappa.numel() == dmu.numel() == 0
    assert not dv[:, : case.geometry.num_prefix].any()
    v = case.v.double().requires_grad_()
    bare = OperatorCase(
        case.geometry, case.x, case.wv, None, v, case.kernel.double(), None, None, None
    )
    (exact,) = torch.autograd.grad(bare.aggregate("reference"), v, grad.double())
    assert error(dv, exact) < 1e-6
    assert dkernel.shape == (24, 3, 3)
    torch.testing.assert_close(dbeta, grad.sum((0, 1)))


@every_device
def test_gradients_of_a_broadcast_loss_and_of_slices(device: str) -> None:
    """``sum().backward()`` hands over a gradient of strides 0; a slice of a larger V has gaps."""
    case = case_on(device, SHAPES[0])
    ones = torch.ones((), device=case.v.device).expand(2, 35, 24)
    wide = torch.full((2, 40, 31), float("nan"), device=case.v.device)
    wide[:, 2:38, 3:27] = case.v
    arguments = (case.kernel, case.kappa, case.mu, case.sizes)
    with torch.no_grad():
        plain = gradients.aggregate_backward(ones.clone(), case.v, *arguments, values=True)
        sliced = wide[:, 2:38, 3:27]
        found = gradients.aggregate_backward(ones, sliced, *arguments, values=True)
    for one, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)


@every_device
def test_an_empty_batch_gives_zeros(device: str) -> None:
    case = case_on(device, (3, 4, 1, 0, 8, 6))
    case.kernel.requires_grad_()
    case.mu.requires_grad_()
    case.aggregate(COMPILED[device]).sum().backward()
    assert not case.kernel.grad.any()
    assert not case.mu.grad.any()


@every_device
def test_every_call_gives_the_same_bits(device: str) -> None:
    case = case_on(device, (9, 11, 2, 3, 16, 66))
    first = attention_gradients(case, COMPILED[device])
    for _ in range(3):
        again = attention_gradients(case, COMPILED[device])
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@every_device
def test_opcheck(device: str) -> None:
    case = case_on(device, (3, 5, 1, 2, 12, 8))
    grad = torch.randn_like(case.aggregate())
    operator = torch.ops.dwattn.dw_aggregate_backward.default
    tests = ("test_schema", "test_faketensor")  # it has no gradients of its own
    for v, kappa, mu, values in (
        (case.v, case.kappa, case.mu, True), (None, case.kappa, case.mu, True), (case.v, None, None, False),
    ):  # fmt: skip
        torch.library.opcheck(
            operator, (grad, v, case.kernel, kappa, mu, *case.sizes, values), test_utils=tests
        )


@pytest.mark.parametrize("device", [CUDA])
def test_wrong_shapes_are_named(device: str) -> None:
    case = case_on(device, (3, 5, 1, 2, 12, 8))
    grad = torch.randn_like(case.aggregate())
    operator = torch.ops.dwattn.dw_aggregate_backward
    with pytest.raises(RuntimeError, match=r"N=15.*height=4"):
        operator(grad, None, case.kernel, None, None, 4, 5, 1, True)
    with pytest.raises(RuntimeError, match=r"v of shape \(2, 16, 4\)"):
        operator(grad, case.v[:, :, :4], case.kernel, None, None, 3, 5, 1, True)
    with pytest.raises(RuntimeError, match="float64"):
        operator(grad.double(), None, case.kernel, None, None, 3, 5, 1, True)


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype: torch.dtype, device: str) -> None:
    """Parameters are fp32, tokens and products take the autocast dtype, gradients come back in fp32."""
    case = case_on(device, (6, 5, 1, 2, 32, 16))
    wo = torch.randn(32, 16, device=case.x.device) / 4
    leaves = [getattr(case, name).requires_grad_() for name in NAMES] + [wo.requires_grad_()]
    with torch.autocast(device, dtype=dtype):
        out = functional.dw_layer(
            *leaves[:4], wo, None, case.geometry, *leaves[4:7], backend=COMPILED[device]
        )
    assert out.dtype == dtype
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    assert {t.dtype for t in found} == {torch.float32}
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = functional.dw_layer(
        *wide[:4], wide[7], None, case.geometry, *wide[4:7], backend="reference"
    )
    for mine, truth in zip(found, torch.autograd.grad(exact.square().sum(), wide), strict=True):
        assert error(mine, truth) < 30 * torch.finfo(dtype).eps
