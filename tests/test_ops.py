"""The compiled operators: accuracy on awkward sizes, memory safety, autograd, tracing, errors."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dwattn import functional, library
from dwattn.errors import DwattnError, GeometryError
from dwattn.geometry import Geometry
from support.operators import OperatorCase, assert_as_exact, error, from_numpy, make_case, to_numpy

pytestmark = [
    pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error()),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRIDS = ((1, 1), (1, 7), (5, 1), (2, 2), (3, 5), (7, 4), (13, 11))
CHANNELS = (1, 3, 8, 32, 80, 96, 384, 1024)
ISAS = library.native.cpu_info()["usable_isas"] if library.native else []


def awkward_cases() -> Iterator[tuple[int, ...]]:
    """Every grid with every channel count; prefix tokens and batch vary along."""
    varying = itertools.cycle(itertools.product((0, 1, 5), (1, 3)))
    for (height, width), channels in itertools.product(GRIDS, CHANNELS):
        yield (height, width, channels, *next(varying))


# Accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype, context: bool) -> None:
    for height, width, channels, num_prefix, batch in awkward_cases():
        case = make_case(
            height, width, channels,
            num_prefix=num_prefix, batch=batch, dtype=dtype, context=context, bias=context,
        )  # fmt: skip
        exact = case.to(torch.float64)
        assert_as_exact(
            case.aggregate("cpp"), case.aggregate("torch"), exact.aggregate("reference")
        )
        assert_as_exact(
            case.attention("cpp"), case.attention("torch"), exact.attention("reference")
        )


@pytest.mark.parametrize("grid", [(1, 5000), (5000, 1)], ids=str)
def test_means_over_grids_with_one_long_side(grid: tuple[int, int]) -> None:
    case = make_case(*grid, 64, num_prefix=0, batch=1)
    case = replace(case, v=case.v + 3)  # where all have one sign the sums are long
    exact = case.to(torch.float64).aggregate("reference")
    assert_as_exact(case.aggregate("cpp"), case.aggregate("torch"), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_coefficients_with_16_bit_tokens(dtype: torch.dtype) -> None:
    case = make_case(channels=80, dtype=dtype)
    narrow = make_case(channels=80)
    mixed = OperatorCase(
        case.geometry, case.x, case.wv, case.bv, case.v, narrow.kernel, *narrow.coefficients
    )
    exact = mixed.to(torch.float64).aggregate("reference")
    result = mixed.aggregate("cpp")
    assert result.dtype == dtype
    # One rounding, of the result: coefficients are not rounded to 16 bits on the way.
    assert error(result, exact) <= error(exact.to(dtype), exact) * 1.01


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_instruction_set_agrees_with_the_reference(isa: str, dtype: str) -> None:
    native, torch_dtype = library.native, getattr(torch, dtype)
    for height, width, channels, num_prefix, batch in awkward_cases():
        case = make_case(
            height, width, channels, num_prefix=num_prefix, batch=batch, dtype=torch_dtype
        )
        exact = case.to(torch.float64)
        kernel, *coefficients = (
            None if t is None else t.double().numpy() for t in (case.kernel, *case.coefficients)
        )
        v, x, wv, bv = (to_numpy(t) for t in (case.v, case.x, case.wv, case.bv))
        y = native.dw_aggregate(v, kernel, *case.sizes, *coefficients, isa=isa)
        assert_as_exact(
            from_numpy(y, torch_dtype), case.aggregate("torch"), exact.aggregate("reference")
        )
        y = native.dw_attention(
            x, wv, bv, kernel, *case.sizes, *coefficients, isa=isa, num_threads=2
        )
        assert_as_exact(
            from_numpy(y, torch_dtype), case.attention("torch"), exact.attention("reference")
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_survives_and_rounds_as_in_pytorch(
    isa: str, dtype: torch.dtype
) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    v = bits.view(dtype).view(1, 64, 1024)
    for scale in (1.0, 1.0 / 3.0):
        kernel = torch.zeros(1024, 3, 3)
        kernel[:, 1, 1] = scale
        y = library.native.dw_aggregate(to_numpy(v), kernel.numpy(), 1, 64, isa=isa)
        # A NaN or infinity in a neighbour times a zero tap is NaN: leave those columns out.
        usable = v.isfinite() & v.roll(1, 1).isfinite() & v.roll(-1, 1).isfinite()
        expected = (v.float() * kernel[0, 1, 1]).to(dtype)
        result = from_numpy(y, dtype)
        assert torch.equal(result[usable], expected[usable])
        assert result[v.isnan()].isnan().all()


def test_the_mean_of_many_patches_keeps_fp32_accuracy() -> None:
    case = make_case(97, 89, 16, num_prefix=0, batch=1)
    shifted = OperatorCase(
        case.geometry, case.x, case.wv, case.bv, case.v + 1000, case.kernel, None,
        torch.ones(16), None,
    )  # fmt: skip
    exact = shifted.to(torch.float64).aggregate("reference")
    assert error(shifted.aggregate("cpp"), exact) < 1e-6


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    case = make_case(17, 19, 96, num_prefix=5, batch=3)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((case.aggregate("cpp"), case.attention("cpp")))
    for aggregate, attention in results[1:]:
        assert torch.equal(aggregate, results[0][0])
        torch.testing.assert_close(attention, results[0][1])  # the matrix product may vary


def test_batches_that_are_cut_into_chunks() -> None:
    case = make_case(24, 24, 512, batch=9, dim=16)  # 1.2 MB of values an image
    whole = case.attention("cpp")
    exact = case.to(torch.float64).attention("reference")
    assert_as_exact(whole, case.attention("torch"), exact)


def test_an_empty_batch_and_no_channels() -> None:
    assert make_case(batch=0).attention("cpp").shape == (0, 15, 8)
    assert make_case(batch=0).aggregate("cpp").shape == (0, 15, 8)
    assert make_case(channels=0).aggregate("cpp").shape == (2, 15, 0)


# Memory: strides, neighbours, uninitialised memory


def strided_views(t: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides, with NaN in every gap."""
    batch, tokens, channels = t.shape

    def filled(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=t.dtype)

    inside = filled(batch + 2, tokens + 5, channels + 7)
    every_second = filled(batch, 2 * tokens, channels)
    apart = filled(batch, tokens, 3 * channels)
    views = {
        "inside": inside[1:-1, 2:-3, 4:-3],
        "every second token": every_second[:, ::2],
        "every third channel": apart[:, :, ::3],
        "channels first": torch.empty(batch, channels, tokens, dtype=t.dtype).transpose(1, 2),
        "tokens first": torch.empty(tokens, batch, channels, dtype=t.dtype).transpose(0, 1),
    }
    for view in views.values():
        view.copy_(t)
    return views


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 32])
def test_strided_inputs_between_nans(dtype: torch.dtype, channels: int) -> None:
    case = make_case(4, 3, channels, num_prefix=2, dtype=dtype)
    plain = case.aggregate("cpp"), case.attention("cpp")
    for name, v in strided_views(case.v).items():
        y = functional.dw_aggregate(
            v, case.kernel, case.geometry, *case.coefficients, backend="cpp"
        )
        assert torch.equal(y, plain[0]), name
    for name, x in strided_views(case.x).items():
        y = functional.dw_attention(
            x, case.wv.t().contiguous().t(), case.bv, case.kernel, case.geometry,
            *case.coefficients, backend="cpp",
        )  # fmt: skip
        torch.testing.assert_close(y, plain[1], msg=name)


def test_expanded_batches_and_strided_coefficients() -> None:
    case = make_case(channels=6)
    once = case.v[:1].expand(3, -1, -1)
    kernel = case.kernel.transpose(1, 2).contiguous().transpose(1, 2)
    y = functional.dw_aggregate(once, kernel, case.geometry, *case.coefficients, backend="cpp")
    assert torch.equal(y, case.aggregate("cpp")[:1].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uninitialised_memory_does_not_leak(dtype: torch.dtype) -> None:
    """Outputs start as NaN, and the scratch memory is left full of NaN by a call before."""
    case = make_case(5, 6, 33, num_prefix=1, dtype=dtype)
    poison = OperatorCase(
        case.geometry, case.x * float("nan"), case.wv, case.bv, case.v * float("nan"),
        case.kernel, *case.coefficients,
    )  # fmt: skip
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(8, dtype=dtype).isnan().all()
        for name in ("attention", "aggregate"):
            getattr(poison, name)("cpp")
            assert getattr(case, name)("cpp").isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_prefix_tokens_reach_the_patches_only_through_kappa() -> None:
    case = make_case(num_prefix=5)
    v = case.v.clone()
    v[:, :5] = float("nan")
    y = functional.dw_aggregate(
        v, case.kernel, case.geometry, None, case.mu, case.beta, backend="cpp"
    )
    assert y.isfinite().all()


def test_a_nan_or_infinity_reaches_its_neighbours_only() -> None:
    case = make_case(5, 7, 16, num_prefix=0, batch=1, context=False)
    for value in (float("nan"), float("inf")):
        v = case.v.clone()
        v[0, 2 * 7 + 6, 3] = value  # row 2, last column, channel 3
        y = functional.dw_aggregate(v, case.kernel, case.geometry, backend="cpp")
        touched = ~y.isfinite().view(5, 7, 16)
        expected = torch.zeros(5, 7, 16, dtype=torch.bool)
        expected[1:4, 5:7, 3] = True
        assert torch.equal(touched, expected)


# Autograd and tracing


def differentiable(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_gradients(num_prefix: int) -> None:
    tokens = num_prefix + 6
    shapes = ((2, tokens, 3), (3, 3, 3), (num_prefix, 3), (3,), (3,))
    arguments = (*differentiable(*shapes), 3, 2, num_prefix)
    aggregate = torch.ops.dwattn.dw_aggregate
    assert torch.autograd.gradcheck(aggregate, arguments)
    assert torch.autograd.gradgradcheck(aggregate, arguments)
    without = (*arguments[:2], None, None, None, *arguments[5:])
    assert torch.autograd.gradcheck(aggregate, without)

    shapes = ((2, tokens, 4), (3, 4), (3,), (3, 3, 3), (num_prefix, 3), (3,), (3,))
    arguments = (*differentiable(*shapes), 3, 2, num_prefix)
    attention = torch.ops.dwattn.dw_attention
    assert torch.autograd.gradcheck(attention, arguments)
    without = (*arguments[:2], None, arguments[3], None, None, None, *arguments[7:])
    assert torch.autograd.gradcheck(attention, without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_agree_with_the_reference(dtype: torch.dtype) -> None:
    names = ("x", "wv", "bv", "kernel", "kappa", "mu", "beta")

    def gradients(case: OperatorCase, backend: str) -> list[Tensor]:
        leaves = [getattr(case, name).requires_grad_() for name in names]
        case.attention(backend).double().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    case = make_case(4, 6, 16, num_prefix=2, dtype=dtype)
    exact = gradients(case.to(torch.float64), "reference")
    ours, theirs = gradients(case.to(dtype), "cpp"), gradients(make_case(
        4, 6, 16, num_prefix=2, dtype=dtype), "torch")  # fmt: skip
    for name, mine, plain, truth in zip(names, ours, theirs, exact, strict=True):
        assert mine.dtype == dtype, name
        floor = 4 * torch.finfo(dtype).eps
        assert error(mine, truth) <= 2 * max(error(plain, truth), floor), name


def test_only_the_needed_gradients_are_computed() -> None:
    case = make_case()
    case.mu.requires_grad_()
    case.aggregate("cpp").sum().backward()
    assert case.mu.grad is not None
    assert case.v.grad is None
    with torch.no_grad():
        assert not case.attention("cpp").requires_grad
    with torch.inference_mode():
        assert case.attention("cpp").is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
def test_opcheck(dtype: torch.dtype, context: bool) -> None:
    case = make_case(dtype=dtype, context=context, bias=context)
    aggregate = (case.v.requires_grad_(), case.kernel.requires_grad_(), *case.coefficients)
    torch.library.opcheck(torch.ops.dwattn.dw_aggregate.default, (*aggregate, *case.sizes))
    attention = (case.x.requires_grad_(), case.wv, case.bv, case.kernel, *case.coefficients)
    torch.library.opcheck(torch.ops.dwattn.dw_attention.default, (*attention, *case.sizes))


class Layer(torch.nn.Module):
    """The operator as a module uses it: the grid comes from the input."""

    def __init__(self, case: OperatorCase) -> None:
        super().__init__()
        self.kernel, self.wv = torch.nn.Parameter(case.kernel), torch.nn.Parameter(case.wv)
        self.mu = torch.nn.Parameter(case.mu)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:3]
        return functional.dw_attention(
            image.flatten(1, 2), self.wv, None, self.kernel, Geometry(height, width, 0), mu=self.mu
        )


def test_compile_fullgraph_with_gradients(fresh_dynamo: None) -> None:
    layer = Layer(make_case())
    image = torch.randn(2, 3, 5, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), layer(image))
    compiled(image).sum().backward()
    gradient = layer.kernel.grad.clone()
    layer.zero_grad()
    layer(image).sum().backward()
    torch.testing.assert_close(gradient, layer.kernel.grad)


def test_compiled_once_for_every_resolution(fresh_dynamo: None) -> None:
    layer = Layer(make_case())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in ((3, 5), (7, 4), (6, 9)):
            image = torch.randn(2, height, width, 12)
            torch.testing.assert_close(compiled(image), layer(image))


def test_export_with_dynamic_batch_and_resolution() -> None:
    layer = Layer(make_case()).eval()
    sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 3, 5, 12),), dynamic_shapes=(sizes,))
        targets = [str(node.target) for node in program.graph.nodes]
        assert "dwattn.dw_attention.default" in targets
        image = torch.randn(3, 8, 6, 12)
        torch.testing.assert_close(program.module()(image), layer(image))


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_autocast_casts_tokens_and_weights_but_not_coefficients(backend: str) -> None:
    case = make_case(channels=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.attention(backend)
    assert y.dtype == torch.bfloat16
    exact = case.to(torch.float64).attention("reference")
    assert error(y, exact) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.to(torch.float64).attention(backend).dtype == torch.float64


# Errors


def broken(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[OperatorCase], OperatorCase]:
    def apply(case: OperatorCase) -> OperatorCase:
        values = {f: getattr(case, f) for f in case.__dataclass_fields__}
        return OperatorCase(**{**values, name: change(values[name])})

    return apply


MISTAKES = {
    "too few tokens": (broken("x", lambda t: t[:, :-1]), ["15", "num_prefix=1", "3", "5", "16"]),
    "two dimensions": (broken("x", lambda t: t[0]), ["(16, 12)"]),
    "integers": (broken("x", lambda t: t.long()), []),
    "wrong features": (broken("x", lambda t: t[..., :-1]), ["11", "(8, 12)"]),
    "weight dtype": (broken("wv", lambda t: t.double()), ["float64", "float32", "autocast"]),
    "bias dtype": (broken("bv", lambda t: t.half()), ["float16", "float32"]),
    "bias shape": (broken("bv", lambda t: t[:-1]), ["(8,)", "(7,)"]),
    "kernel shape": (broken("kernel", lambda t: t[:, :, :2]), ["(8, 3, 3)", "(8, 3, 2)"]),
    "kernel channels": (broken("kernel", lambda t: t[:5]), ["(8, 3, 3)", "(5, 3, 3)"]),
    "kappa rows": (broken("kappa", lambda t: t.repeat(2, 1)), ["(1, 8)", "(2, 8)"]),
    "mu shape": (broken("mu", lambda t: t[:3]), ["(8,)", "(3,)"]),
    "beta dtype": (broken("beta", lambda t: t.int()), ["beta"]),
    "kernel device": (broken("kernel", lambda t: t.to("meta")), ["kernel"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_mistakes_are_named_with_their_values(mistake: str, backend: str) -> None:
    break_it, words = MISTAKES[mistake]
    with pytest.raises(DwattnError) as caught:
        break_it(make_case()).attention(backend)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("mistake", sorted(set(MISTAKES) - {"kernel device"}))
def test_the_operator_itself_names_mistakes(mistake: str) -> None:
    break_it, words = MISTAKES[mistake]
    case = break_it(make_case())
    with pytest.raises(RuntimeError) as caught:
        library.dw_attention(case.x, case.wv, case.bv, case.kernel, *case.coefficients, *case.sizes)
    for word in words:
        assert word in str(caught.value)


def test_geometry_errors_state_all_four_numbers() -> None:
    case = make_case(3, 4, num_prefix=1)
    for wrong in (Geometry(4, 4, 1), Geometry(3, 4, 5), Geometry(12, 12)):
        with pytest.raises(GeometryError) as caught:
            functional.dw_aggregate(case.v, case.kernel, wrong)
        for number in (13, wrong.height, wrong.width, wrong.num_prefix):
            assert str(number) in str(caught.value)


def test_fake_tensors_refuse_wrong_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        v, kernel = torch.empty(1, 16, 8), torch.empty(8, 3, 3)
        with pytest.raises(RuntimeError, match="N=16"):
            library.dw_aggregate(v, kernel, None, None, None, 4, 4, 1)
        with pytest.raises(RuntimeError, match=r"\(8, 3, 3\)"):
            library.dw_aggregate(v, kernel[:4], None, None, None, 4, 4, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 4}, ["N=15", "height=4", "width=5", "num_prefix=0", "20"]),
        ({"v": np.zeros((1, 15, 4), np.int32)}, ["int32", "bfloat16"]),
        ({"v": np.zeros((15, 4), np.float32)}, ["(15, 4)"]),
        ({"kernel": np.zeros((4, 9), np.float32)}, ["(4, 3, 3)", "(4, 9)"]),
        ({"mu": np.zeros(3, np.float32)}, ["mu", "(4,)", "(3,)"]),
        ({"isa": "sse9"}, ["sse9", "avx2"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_mistakes_over_numpy_arrays(arguments: dict[str, object], words: list[str]) -> None:
    good = {
        "v": np.zeros((1, 15, 4), np.float32),
        "kernel": np.zeros((4, 3, 3), np.float32),
        "height": 3,
        "width": 5,
    }
    library.native.dw_aggregate(**good)
    with pytest.raises(ValueError) as caught:
        library.native.dw_aggregate(**{**good, **arguments})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_can_be_chosen_by_environment(isa: str) -> None:
    code = (
        "import torch; from dwattn import functional, library; from dwattn.geometry import Geometry;"
        "v = torch.ones(1, 4, 8); y = functional.dw_aggregate(v, torch.ones(8, 3, 3), Geometry(2, 2));"
        "assert (y == 4).all(); print(library.native.cpu_info()['chosen_isa'])"
    )
    environment = {**os.environ, "DWATTN_CPU_ISA": isa, "DWATTN_BACKEND": "cpp"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == isa
