"""The kernels without torch: layers and statistics over numpy arrays, and ``__cuda_array_interface__``.

The GPU interface reads descriptions before anything else, so that what it refuses is tested with descriptions of
memory that does not exist, with or without CUDA kernels in the build.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dwattn import library
from support.operators import assert_as_exact, make_case, output_of, to_numpy

if library.native is None:
    pytest.skip(library.native_error(), allow_module_level=True)

native: Any = library.native
ISAS = native.cpu_info()["usable_isas"]
HAS_KERNELS = bool(native.build_info()["cuda_architectures"])
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def expect(op: Any, arguments: dict[str, Any], kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        op(**arguments)
    assert [word for word in words if word not in str(caught.value)] == []


# numpy: layers


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_over_numpy_agrees_with_the_reference(dtype: torch.dtype, isa: str) -> None:
    varying = itertools.cycle(itertools.product((0, 1, 5), (1, 3), (True, False)))
    grids, widths = ((1, 1), (1, 7), (5, 1), (13, 11)), ((64, 64), (5, 96), (96, 384), (80, 7))
    for (height, width), (channels, dim) in itertools.product(grids, widths):
        prefix, batch, full = next(varying)
        case = make_case(
            height, width, channels,
            num_prefix=prefix, batch=batch, dtype=dtype, context=full, bias=full,
        )  # fmt: skip
        output: dict[str, Any] = output_of(case, dim)
        if not full:
            output |= {"bo": None, "prefix_out": None}
        arrays = [
            None if t is None else to_numpy(t) for t in (case.x, case.wv, case.bv, output["wo"])
        ]
        wide = {name: None if t is None else t.double() for name, t in output.items()}
        coefficients = (None if t is None else t.double().numpy() for t in case.coefficients)
        result = native.dw_layer(
            *arrays[:3], case.kernel.double().numpy(), arrays[3],
            None if output["bo"] is None else to_numpy(output["bo"]), *case.sizes, *coefficients,
            None if output["prefix_out"] is None else to_numpy(output["prefix_out"]),
            isa=isa, num_threads=2,
        )  # fmt: skip
        y = torch.from_numpy(result).view(dtype)
        exact = case.to(torch.float64).layer(wide, "reference")
        if dtype == torch.float64:  # the judge rounds too, in another order
            torch.testing.assert_close(y, exact, rtol=0, atol=1e-14 * exact.abs().max().item())
        else:
            assert_as_exact(y, case.layer(output, "torch"), exact)


def test_strided_and_read_only_numpy_arrays() -> None:
    case = make_case(4, 6, 32, num_prefix=2)
    output = output_of(case, 24)
    x, wo, prefix = (t.numpy() for t in (case.x, output["wo"], output["prefix_out"]))
    plain = [case.wv.numpy(), case.bv.numpy(), case.kernel.numpy()]
    rest = (output["bo"].numpy(), *case.sizes, None, None, None)
    expected = native.dw_layer(x, *plain, wo, *rest, prefix)
    spread = np.repeat(x, 2, axis=1)[:, ::2]
    turned, first = np.asfortranarray(wo), np.asfortranarray(prefix)
    for array in (spread, turned, first):
        array.flags.writeable = False
        assert not array.flags.c_contiguous
    result = native.dw_layer(spread, *plain, turned, *rest, first)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"wo": np.zeros((5, 3), np.float32)}, ["wo", "(D_out, 4)", "(5, 3)"]),
        ({"wo": np.zeros((5, 4))}, ["wo and x", "dtype"]),
        ({"bo": np.zeros(4, np.float32)}, ["bo", "(5,)", "(4,)"]),
        ({"prefix_out": np.zeros((2, 2, 5), np.float32)}, ["prefix_out", "(2, 1, 5)", "(2, 2, 5)"]),
        ({"prefix_out": np.zeros((2, 1, 5))}, ["prefix_out and x", "dtype"]),
        ({"width": 4}, ["N=7", "height=2", "width=4", "9"]),
        ({"num_threads": 0}, ["num_threads=0", "at least 1"]),
        ({"num_threads": -1}, ["num_threads=-1", "at least 1"]),
        ({"kernel": np.full((4, 3, 3), "a")}, ["kernel", "<U1", "real numbers"]),
        ({"bv": np.full(4, "a", object)}, ["bv", "object", "real numbers"]),
        ({"bo": np.zeros(5, complex)}, ["bo", "complex128", "real numbers"]),
        ({"x": np.zeros((2, 7, 6), ">f4")}, ["x is >f4", "byte order"]),
        ({"wo": np.zeros((5, 4), ">f4")}, ["wo is >f4", "byte order"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_mistakes_in_a_layer_over_numpy(arguments: dict[str, Any], words: list[str]) -> None:
    shapes = {"x": (2, 7, 6), "wv": (4, 6), "bv": (4,), "kernel": (4, 3, 3), "wo": (5, 4)}
    good: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    good |= {"bo": np.zeros(5, np.float32), "prefix_out": np.zeros((2, 1, 5), np.float32)}
    good |= {"height": 2, "width": 3, "num_prefix": 1}
    native.dw_layer(**good)
    expect(native.dw_layer, {**good, **arguments}, ValueError, words)


def test_bits_of_bfloat16_and_other_byte_orders_as_coefficients() -> None:
    case = make_case(4, 6, 32, num_prefix=2, dtype=torch.bfloat16)
    x, wv, bv = (to_numpy(t) for t in (case.x, case.wv, case.bv))
    given = [t.bfloat16() for t in (case.kernel, *case.coefficients)]
    numbers, bits = [t.float().numpy() for t in given], [to_numpy(t) for t in given]
    swapped = [array.astype(">f8") for array in numbers]

    def attention(coefficients: list[np.ndarray]) -> np.ndarray:
        kernel, *rest = coefficients
        return native.dw_attention(x, wv, bv, kernel, *case.sizes, *rest)

    for other in (bits, swapped, [array.astype(">u2") for array in bits]):
        np.testing.assert_array_equal(attention(other), attention(numbers))
    result = torch.from_numpy(attention(bits)).view(torch.bfloat16)
    torch.testing.assert_close(result, case.attention("torch"), atol=0.1, rtol=0.05)


# numpy: attention statistics


def heads(batch: int, count: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Queries, keys and values as a fused projection leaves them, ``(3, B, n_h, N, d_h)``."""
    generator = torch.Generator().manual_seed(tokens)
    fused = torch.randn(batch, tokens, 3 * count * width, generator=generator).to(dtype)
    return fused.unflatten(2, (3, count, width)).permute(2, 0, 3, 1, 4)


def empty_state(count: int, tokens: int, prefix: int) -> dict[str, np.ndarray]:
    size = tokens - prefix
    shapes = {"mean": (size, size), "m2": (size, size), "prefix_mean": (size, prefix)}
    return {name: np.full((count, *shape), np.nan) for name, shape in shapes.items()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_over_numpy_are_those_of_whole_maps(dtype: torch.dtype, isa: str) -> None:
    for batch, count, tokens, width, prefix in (
        (3, 2, 85, 64, 1),
        (2, 1, 37, 7, 0),
        (1, 3, 6, 5, 5),
    ):
        state, scale, maps = empty_state(count, tokens, prefix), 1.3 * width**-0.5, []
        for call in range(2):
            q, k, v = heads(batch, count, tokens + call, width, dtype)[..., call:, :]
            out = native.attention_variance(
                to_numpy(q), to_numpy(k), state["mean"], state["m2"], call * batch, to_numpy(v),
                state["prefix_mean"], prefix, scale, isa=isa, num_threads=1 + call,
            )  # fmt: skip
            maps.append(torch.softmax(q.double() @ k.double().transpose(2, 3) * scale, -1))
            expected = maps[-1] @ v.double()
            found = torch.from_numpy(out).view(dtype).double()
            room = 0.51 * torch.finfo(dtype).eps * expected.abs() + 2e-6 * v.double().abs().max()
            assert ((found - expected).abs() <= room).all()
            assert out.transpose(0, 2, 1, 3).flags.c_contiguous  # joining the heads is a view
        e = torch.cat(maps)[:, :, prefix:].numpy()
        kept = e[..., prefix:]
        np.testing.assert_allclose(state["mean"], kept.mean(0), rtol=1e-5)
        np.testing.assert_allclose(state["prefix_mean"], e[..., :prefix].mean(0), rtol=1e-5)
        np.testing.assert_allclose(np.sqrt(state["m2"] / len(e)), kept.std(0), rtol=1e-4, atol=1e-9)


def test_statistics_over_numpy_need_no_values_and_no_layout() -> None:
    q, k, v = (t.numpy() for t in heads(4, 2, 39, 24, torch.float32))
    expected = empty_state(2, 39, 3)
    native.attention_variance(q, k, **expected, num_prefix=3, seen=0, v=v)
    spread = np.ascontiguousarray(q.swapaxes(2, 3)).swapaxes(2, 3)  # no unit stride along d_h
    turned = np.ascontiguousarray(k[:, :, ::-1])[:, :, ::-1]  # a negative one along the tokens
    state = empty_state(2, 39, 3)
    assert native.attention_variance(spread, turned, **state, num_prefix=3, seen=0) is None
    for name, array in state.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": np.zeros((2, 9, 8), np.float32)}, ["q", "(batch, heads, tokens, width)", "(2, 9, 8)"]),
        ({"q": np.zeros((3, 2, 9, 8))}, ["q is float64", "float32"]),
        ({"k": np.zeros((3, 2, 8, 8), np.float32)}, ["k", "(3, 2, 9, 8)", "(3, 2, 8, 8)"]),
        ({"k": np.zeros((3, 2, 9, 8), np.float16)}, ["k and q", "dtype"]),
        ({"v": np.zeros((3, 2, 9, 4), np.float32)}, ["v", "(3, 2, 9, 8)", "(3, 2, 9, 4)"]),
        ({"mean": np.zeros((2, 9, 9))}, ["mean", "(2, 8, 8)", "(2, 9, 9)"]),
        ({"mean": np.zeros((2, 8, 8), np.float32)}, ["mean is float32", "float64"]),
        ({"m2": np.zeros((2, 8, 16))[:, :, ::2]}, ["m2", "in place", "contiguous"]),
        ({"m2": np.broadcast_to(np.float64(0), (2, 8, 8))}, ["m2", "in place", "writable"]),
        ({"prefix_mean": np.zeros((2, 8, 2))}, ["prefix_mean", "(2, 8, 1)", "(2, 8, 2)"]),
        ({"num_prefix": 9}, ["num_prefix=9 of N=9"]),
        ({"seen": -1}, ["seen=-1"]),
        ({"isa": "mmx"}, ["isa=mmx", "avx2"]),
        ({"num_threads": -1}, ["num_threads=-1", "at least 1"]),
        ({"k": np.zeros((3, 2, 9, 8), ">f4")}, ["k is >f4", "byte order"]),
        ({"mean": np.zeros((2, 8, 8), ">f8")}, ["mean is >f8", "byte order"]),
    ],
)  # fmt: skip
def test_mistakes_in_statistics_over_numpy(arguments: dict[str, Any], words: list[str]) -> None:
    good: dict[str, Any] = {name: np.zeros((3, 2, 9, 8), np.float32) for name in "qkv"}
    good |= {"mean": np.zeros((2, 8, 8)), "m2": np.zeros((2, 8, 8)), "num_prefix": 1, "seen": 0}
    good |= {"prefix_mean": np.zeros((2, 8, 1))}
    native.attention_variance(**good)
    expect(native.attention_variance, {**good, **arguments}, ValueError, words)


def test_a_state_that_is_no_array_is_not_updated_in_a_copy() -> None:
    q = np.zeros((1, 1, 2, 4), np.float32)
    with pytest.raises(TypeError):
        native.attention_variance(q, q, [[[0.0, 0.0], [0.0, 0.0]]], np.zeros((1, 2, 2)), 0)


# __cuda_array_interface__: what is refused

ADDRESSES = itertools.count(1 << 40, 1 << 20)


def described(*shape: int, typestr: str = "<f4", **entries: Any) -> Any:
    """An object that claims to be an array in GPU memory."""
    interface = {
        "shape": shape,
        "typestr": typestr,
        "data": (next(ADDRESSES), False),
        "version": 3,
        **entries,
    }
    return types.SimpleNamespace(__cuda_array_interface__=interface)


def good_layer() -> dict[str, Any]:
    return {
        "x": described(2, 7, 6), "wv": described(4, 6), "bv": described(4),
        "kernel": described(4, 3, 3), "wo": described(5, 4), "bo": described(5),
        "height": 2, "width": 3, "num_prefix": 1,
        "kappa": described(1, 4), "mu": described(4), "beta": described(4),
        "prefix_out": described(2, 1, 5), "out": described(2, 7, 5),
    }  # fmt: skip


#: Where the description is good: then there are no kernels, or no memory at that address.
GOOD = ["Looking up the memory"] if HAS_KERNELS else ["no CUDA kernels"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"x": described(2, 7, 6, strides=(400, 24, 4))},
        {"x": described(2, 7, 6, data=(64, True)), "wv": described(4, 6, data=(4096, True))},
        {"x": described(2, 7, 6, version=2, stream=None, strides=None, mask=None)},
        {"x": described(2, 7, 6, stream=2), "out": described(2, 7, 5, stream=1), "stream": 0},
        {"bv": None, "kappa": None, "mu": None, "beta": None, "bo": None},
        {"prefix_out": None, "out": described(2, 6, 5)},
        # Strides of a size of 1 mean nothing.
        {"prefix_out": described(2, 1, 5, strides=(20, 12, 4))},
        *(
            {name: described(*shape, typestr=typestr)
             for name, shape in {"x": (2, 7, 6), "wv": (4, 6), "wo": (5, 4), "prefix_out": (2, 1, 5),
                                 "out": (2, 7, 5)}.items()}
            for typestr in ("<f2", "<V2", "<u2")
        ),
    ],
)  # fmt: skip
def test_good_descriptions_get_as_far_as_the_gpu(changes: dict[str, Any]) -> None:
    expect(native.cuda.dw_layer, good_layer() | changes, RuntimeError, GOOD)


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"x": described(2, 7, 6, typestr="<f8")}, ["x is float64", "float32"]),
    ({"x": described(2, 7, 6, typestr="<i4")}, ["x must be float32", '"<i4"']),
    ({"x": described(2, 7, 6, typestr=">f4")}, ["x must be float32", '">f4"']),
    ({"x": described(7, 6)}, ["x", "(batch, tokens, channels)", "(7, 6)"]),
    ({"width": 4}, ["N=7", "num_prefix=1", "width=4"]),
    ({"height": 0}, ["height >= 1", "height=0"]),
    ({"wv": described(4, 5)}, ["wv must have shape (C, 6)", "(4, 5)"]),
    ({"wv": described(4, 6, typestr="<f2")}, ["wv is float16", "x is float32"]),
    ({"wo": described(5, 3)}, ["wo must have shape (D_out, 4)", "(5, 3)"]),
    ({"bv": described(3)}, ["bv must have shape (4,)", "(3,)"]),
    ({"bo": described(5, typestr="<f2")}, ["bo is float16", "float32"]),
    ({"kernel": described(4, 9)}, ["kernel must have shape (4, 3, 3)", "(4, 9)"]),
    ({"kappa": described(2, 4)}, ["kappa must have shape (1, 4)", "(2, 4)"]),
    ({"prefix_out": described(2, 2, 5)}, ["prefix_out must have shape (2, 1, 5)"]),
    ({"out": described(2, 6, 5)}, ["out must have shape (2, 7, 5)", "(2, 6, 5)"]),
    ({"out": described(2, 7, 5, data=(64, True))}, ["out is read-only"]),
    ({"out": described(2, 7, 5, strides=(200, 20, 4))}, ["out must be contiguous", "(50, 5, 1)"]),
    ({"x": described(2, 7, 6, strides=(168, 24, 8))}, ["last dimension", "(42, 6, 2)"]),
    ({"x": described(2, 7, 6, strides=(168, 26, 4))}, ["(168, 26, 4)", "multiples", "4-byte"]),
    ({"x": described(2, 7, 6, strides=(168, -24, 4))}, ["(168, -24, 4)", "not negative"]),
    ({"x": described(2, 7, 6, strides=(24, 4))}, ["3 dimensions", "(24, 4)"]),
    ({"wv": described(4, 6, strides=(48, 4))}, ["wv must be contiguous, got", "copy"]),
    ({"x": described(2, 7, 6, mask=object())}, ["masked"]),
    ({"x": described(2, 7, 6, version=1)}, ["version 1"]),
    ({"x": described(2, 7, 6, data=(0, False))}, ["x has shape (2, 7, 6) but no memory"]),
    ({"x": described(2, 7, 6, data=None)}, ['["data"]', "None"]),
    ({"x": described(2, 7, 6, stream=0)}, ["stream 0"]),
    ({"x": described(2, 7, 6, stream="1")}, ['["stream"]', "'1'"]),
    ({"x": described("2", 7, 6)}, ['["shape"]', "'2'"]),
    ({"x": described(-2, 7, 6)}, ["negative size"]),
    ({"x": types.SimpleNamespace(__cuda_array_interface__=())}, ["not a dict"]),
    ({"x": types.SimpleNamespace(__cuda_array_interface__={"version": 3})}, ['no entry "typestr"']),
    ({"x": described(2, 7, 6, data=(1000, False)), "out": described(2, 7, 5, data=(1332, False))},
     ["out and x share memory"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), MISTAKES)
def test_mistakes_in_descriptions(changes: dict[str, Any], words: list[str]) -> None:
    expect(native.cuda.dw_layer, good_layer() | changes, ValueError, words)


def test_neighbours_in_memory_are_not_taken_for_overlapping() -> None:
    changes = {
        "x": described(2, 7, 6, data=(1000, False)),
        "out": described(2, 7, 5, data=(1336, False)),
    }
    expect(native.cuda.dw_layer, good_layer() | changes, RuntimeError, GOOD)


@pytest.mark.parametrize("name", ["x", "wv", "kernel", "wo", "out"])
def test_an_array_of_the_host_is_a_type_error(name: str) -> None:
    changes = {name: np.zeros(good_layer()[name].__cuda_array_interface__["shape"], np.float32)}
    words = [name, "__cuda_array_interface__", "ndarray"]
    expect(native.cuda.dw_layer, good_layer() | changes, TypeError, words)


def test_the_smaller_operators_check_too() -> None:
    good = good_layer()
    names = ("kernel", "height", "width", "num_prefix", "kappa", "mu", "beta")
    common = {name: good[name] for name in names}
    project = {**common, "x": good["x"], "wv": good["wv"], "bv": good["bv"]}
    attention, aggregate = native.cuda.dw_attention, native.cuda.dw_aggregate
    expect(attention, project | {"out": described(2, 6, 4)}, RuntimeError, GOOD)
    expect(attention, project | {"out": described(2, 6, 5)}, ValueError, ["out", "(2, 6, 4)"])
    values = {**common, "v": described(2, 7, 4)}
    expect(aggregate, values | {"out": described(2, 6, 4)}, RuntimeError, GOOD)
    expect(aggregate, values | {"out": described(2, 7, 4)}, ValueError, ["out", "(2, 6, 4)"])


def good_statistics() -> dict[str, Any]:
    maps = {name: described(3, 2, 9, 8, typestr="<f2") for name in ("q", "k", "v", "out")}
    state = {name: described(2, 8, 8, typestr="<f8") for name in ("mean", "m2")}
    prefix = described(2, 8, 1, typestr="<f8")
    return maps | state | {"prefix_mean": prefix, "num_prefix": 1, "seen": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"prefix_mean": None, "v": None, "out": None}, None),
        ({"q": described(3, 2, 9, 8, typestr="<f2", strides=(432, 16, 48, 2))}, None),
        ({name: described(2, 8, 8) for name in ("mean", "m2")} | {"prefix_mean": None}, None),
        ({"q": described(2, 9, 8, typestr="<f2")}, ["q", "(batch, heads, tokens, width)"]),
        ({"q": described(3, 2, 9, 8, typestr="<f8")}, ["q is float64", "float32"]),
        ({"k": described(3, 2, 9, 8)}, ["k is float32", "q is float16"]),
        ({"k": described(3, 2, 8, 8, typestr="<f2")}, ["k must have shape (3, 2, 9, 8)"]),
        ({"mean": described(2, 9, 9, typestr="<f8")}, ["mean must have shape (2, 8, 8)"]),
        ({"m2": described(2, 8, 8)}, ["m2 is float32", "mean is float64"]),
        ({"m2": described(2, 8, 8, typestr="<f2")}, ["m2 is float16", "float64 or float32"]),
        ({"m2": described(2, 8, 8, typestr="<f8", data=(64, True))}, ["m2 is read-only"]),
        ({"mean": described(2, 8, 8, typestr="<f8", strides=(512, 8, 64))}, ["mean", "contiguous"]),
        ({"prefix_mean": described(2, 8, 2, typestr="<f8")}, ["prefix_mean", "(2, 8, 1)"]),
        ({"v": None}, ["v and out go together"]),
        ({"out": None}, ["v and out go together"]),
        ({"num_prefix": 9}, ["num_prefix=9 of N=9"]),
        ({"seen": -1}, ["seen=-1"]),
        ({name: described(1, 1, 2, 136) for name in "qk"} | {"v": None, "out": None}
         | {"prefix_mean": None}, ["d_h=136", "1..128"]),
        ({"v": described(3, 2, 9, 8, typestr="<f2", data=(4096, False)),
          "out": described(3, 2, 9, 8, typestr="<f2", data=(4098, False))}, ["out and v share"]),
    ],
)  # fmt: skip
def test_descriptions_of_statistics(changes: dict[str, Any], words: list[str] | None) -> None:
    kind: type[Exception] = RuntimeError if words is None else ValueError
    expect(native.cuda.attention_variance, good_statistics() | changes, kind, words or GOOD)


# __cuda_array_interface__: on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_KERNELS and torch.cuda.is_available()), reason="no GPU or no kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [32, 520], ids=["narrow", "wide"])
@pytest.mark.parametrize("on_own_stream", [False, True], ids=["default", "stream"])
def test_layers_on_the_gpu(dtype: torch.dtype, channels: int, on_own_stream: bool) -> None:
    case = make_case(7, 5, channels, num_prefix=2, batch=3, dim=64, dtype=dtype)
    output = output_of(case, 64)
    wide = {name: t.double() for name, t in output.items()}
    exact = case.to(torch.float64).layer(wide, "reference")
    x, wv, wo, prefix = (t.cuda() for t in (case.x, case.wv, output["wo"], output["prefix_out"]))
    bv, kernel, bo, *coefficients = (
        t.float().cuda() for t in (case.bv, case.kernel, output["bo"], *case.coefficients)
    )
    out = torch.full(exact.shape, float("nan"), dtype=dtype, device="cuda")
    stream = torch.cuda.Stream() if on_own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(2):
        native.cuda.dw_layer(
            x, wv, bv, kernel, wo, bo, *case.sizes, *coefficients, prefix,
            out=out, stream=stream.cuda_stream,
        )  # fmt: skip
    stream.synchronize()
    assert_as_exact(out.cpu(), case.layer(output, "torch"), exact)


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_KERNELS and torch.cuda.is_available()), reason="no GPU or no kernels")
def test_statistics_on_the_gpu() -> None:
    q, k, v = heads(3, 2, 39, 24, torch.float16)
    state = {name: torch.from_numpy(a).cuda() for name, a in empty_state(2, 39, 3).items()}
    expected = empty_state(2, 39, 3)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device="cuda")
    for seen in (0, 3):
        native.cuda.attention_variance(
            q.cuda(), k.cuda(), seen=seen, num_prefix=3, v=v.cuda(), out=out, **state
        )
        torch.cuda.synchronize()
        y = native.attention_variance(
            q.numpy(), k.numpy(), seen=seen, num_prefix=3, v=v.numpy(), **expected
        )
    np.testing.assert_allclose(out.cpu().numpy(), y, rtol=0, atol=4e-3)
    for name, array in expected.items():
        np.testing.assert_allclose(state[name].cpu().numpy(), array, rtol=1e-3, atol=1e-6)
