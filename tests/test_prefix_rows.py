"""The compiled operator of exact prefix rows: attention of the CLS and register tokens and its output projection."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dwattn import backends, library, reference
from dwattn.attention import EnsembleDWAttention, FusedDWAttention, LowRankDWAttention
from dwattn.errors import DwattnError
from dwattn.prefix import ExactPrefixRows
from support.operators import assert_as_exact

pytestmark = [
    pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error()),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: H, W, D, heads, d_h, D_out
SHAPES = ((1, 1, 12, 1, 5, 7), (2, 3, 48, 2, 32, 48), (13, 7, 70, 3, 64, 50), (9, 16, 200, 5, 80, 200),
          (12, 11, 400, 2, 64, 96))  # fmt: skip


def case(
    height: int, width: int, dim: int, heads: int, head_dim: int, out: int,
    *, prefix: int, batch: int, dtype: torch.dtype, bias: bool = True, draw_number: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the operator by name."""
    generator = torch.Generator().manual_seed(prefix + dim + 1000 * draw_number)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype)

    channels = heads * head_dim
    weight = {
        "scale": 2 * dim**-0.5
    }  # logits of a few units: weights that are neither even nor one-hot
    return {
        "x": draw(batch, prefix + height * width, dim),
        "wq": draw(channels, dim, **weight), "bq": draw(channels) if bias else None,
        "wk": draw(channels, dim, **weight),
        "wv": draw(channels, dim, **weight), "bv": draw(channels) if bias else None,
        "wo": draw(out, channels, scale=channels**-0.5), "bo": draw(out) if bias else None,
        "num_heads": heads, "num_prefix": prefix, "scale": head_dim**-0.5,
    }  # fmt: skip


def compiled(arguments: dict[str, Any]) -> Tensor:
    return library.prefix_rows(**arguments)


def plain(arguments: dict[str, Any]) -> Tensor:
    """The same in PyTorch."""
    a = arguments
    rows = reference.exact_prefix_rows(
        a["x"], a["num_prefix"], a["wq"], a["wk"], a["wv"], a["num_heads"],
        bq=a["bq"], bv=a["bv"], scale=a["scale"],
    )  # fmt: skip
    return torch.nn.functional.linear(rows, a["wo"], a["bo"])


def exact(arguments: dict[str, Any]) -> Tensor:
    """The judge: in fp64, and of fp64 in NumPy's longer format, where PyTorch's rounding would be its own judge."""
    if arguments["x"].dtype != torch.float64:
        return plain({k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    a = {
        k: v.numpy().astype(np.longdouble) if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
    heads, x = a["num_heads"], a["x"]

    def biased(rows: Any, name: str) -> Any:
        return rows if a[name] is None else rows + a[name]

    out = []
    q = biased(x[:, : a["num_prefix"]] @ a["wq"].T, "bq") * a["scale"]
    for one, wk, wv in zip(
        *(np.split(a_, heads, i) for a_, i in ((q, 2), (a["wk"], 0), (a["wv"], 0))), strict=True
    ):
        logits = one @ wk @ x.transpose(0, 2, 1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ x @ wv.T)
    rows = biased(np.concatenate(out, -1), "bv")
    return torch.from_numpy(biased(rows @ a["wo"].T, "bo").astype(np.float64))


def assert_as_exact_together(cases: list[dict[str, Any]]) -> None:
    """As :func:`assert_as_exact` of all outputs together.

    A prefix row is a single softmax, whose error is a matter of luck: of one draw it says little about a kernel.
    """
    ways = (compiled, plain, exact)
    assert_as_exact(*(torch.cat([way(c).flatten() for c in cases]) for way in ways))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(
    dtype: torch.dtype, shape: tuple[int, int, int, int, int, int]
) -> None:
    cases = [
        case(*shape, prefix=prefix, batch=batch, dtype=dtype, bias=prefix != 4, draw_number=number)
        for prefix, batch, number in itertools.product((1, 4, 5), (1, 3), range(3))
    ]
    result = compiled(cases[-1])
    assert result.shape == (3, 5, shape[-1])
    assert_as_exact_together(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_are_stable(dtype: torch.dtype) -> None:
    draws = [
        case(*SHAPES[2], prefix=1, batch=3, dtype=dtype, draw_number=n) | {"scale": 30.0}
        for n in range(30)
    ]
    assert_as_exact_together(draws)


def test_one_not_a_number_spoils_its_image_alone() -> None:
    arguments = case(*SHAPES[1], prefix=1, batch=3, dtype=torch.float32)
    clean = compiled(arguments)
    arguments["x"][1, 3, 5] = float("nan")
    result = compiled(arguments)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_poisoned_memory(dtype: torch.dtype) -> None:
    arguments = case(*SHAPES[2], prefix=5, batch=3, dtype=dtype)
    expected = compiled(arguments)

    def spread(t: Any, dense: bool) -> Any:
        """The same values between NaNs; ``dense`` keeps the stride of the last dimension."""
        if not isinstance(t, Tensor):
            return t
        room = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
        step = [slice(None, None, 2)] * (t.dim() - 1)
        view = room[(*step, slice(0, t.shape[-1]) if dense else slice(None, None, 2))]
        return view.copy_(t)

    for dense in (True, False):
        strided = {name: spread(value, dense) for name, value in arguments.items()}
        poison = [torch.full_like(expected, float("nan")) for _ in range(4)]
        compiled({**case(*SHAPES[3], prefix=5, batch=3, dtype=dtype), "scale": float("nan")})
        del poison  # freed blocks full of NaN, and a workspace full of them, are what comes next
        assert torch.equal(compiled(strided), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_on_the_batch(dtype: torch.dtype) -> None:
    arguments = case(12, 16, 768, 5, 80, 500, prefix=4, batch=3, dtype=dtype)
    alone = compiled(arguments)
    torch.set_num_threads(2)
    assert torch.equal(compiled(arguments), alone)
    torch.set_num_threads(1)
    for image in range(3):
        one = arguments | {"x": arguments["x"][image : image + 1]}
        assert torch.equal(compiled(one)[0], alone[image])


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    arguments = case(*SHAPES[1], prefix=2, batch=2, dtype=torch.float32, bias=bias)
    torch.library.opcheck(torch.ops.dwattn.prefix_rows.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_prefix": 0}, "num_prefix=0 must lie between 1 and the 8 tokens"),
        ({"num_prefix": 9}, "num_prefix=9 must lie between 1 and the 8 tokens"),
        ({"num_heads": 3}, "C=64 channels, which num_heads=3 do not divide"),
        ({"x": torch.zeros(8, 48)}, r"three dimensions.*got \(8, 48\)"),
        ({"x": torch.zeros(2, 8, 47)}, r"wq must have shape \(C, 47\).*got \(64, 48\)"),
        ({"x": torch.zeros(2, 8, 48).long()}, "x has a dtype other than"),
        ({"wk": torch.zeros(64, 47)}, r"wk must have shape \(64, 48\), got \(64, 47\)"),
        ({"wv": torch.zeros(63, 48)}, r"wv must have shape \(64, 48\), got \(63, 48\)"),
        ({"wo": torch.zeros(48, 65)}, r"wo must have shape \(D, 64\).*got \(48, 65\)"),
        ({"bq": torch.zeros(63)}, r"bq must have shape \(64,\), got \(63,\)"),
        ({"bv": torch.zeros(65)}, r"bv must have shape \(64,\), got \(65,\)"),
        ({"bo": torch.zeros(47)}, r"bo must have shape \(48,\), got \(47,\)"),
        ({"wv": torch.zeros(64, 48).double()}, "wv is float64 but x is float32"),
        ({"bo": torch.zeros(48).half()}, "bo is float16 but x is float32"),
    ],
)
def test_wrong_arguments_are_refused_with_their_values(changes: dict[str, Any], words: str) -> None:
    arguments = case(*SHAPES[1], prefix=2, batch=2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=words):
        compiled(arguments | changes)


def test_empty_batches() -> None:
    arguments = case(*SHAPES[1], prefix=2, batch=2, dtype=torch.float32)
    assert compiled(arguments | {"x": arguments["x"][:0]}).shape == (0, 2, 48)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the operator."""
    made: list[int] = []
    original = library.prefix_rows
    monkeypatch.setattr(library, "prefix_rows", lambda *a: (made.append(1), original(*a))[1])
    return made


def module(cls: type[FusedDWAttention] = LowRankDWAttention, **options: Any) -> Any:
    torch.manual_seed(0)
    if cls is LowRankDWAttention:
        options["rank"] = 24
    return cls(48, num_heads=3, grid=(4, 5), num_prefix=2, **options).eval()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cls", [FusedDWAttention, LowRankDWAttention, EnsembleDWAttention])
@torch.no_grad()
def test_layers_use_it_without_gradients(cls: Any, own: bool, calls: list[int]) -> None:
    layer, x = module(cls, own_prefix_proj=own), torch.randn(2, 22, 48)
    rows = layer(x)[:, :2]
    assert calls == [1]
    with backends.use("torch"):
        torch.testing.assert_close(rows, layer(x)[:, :2])
    assert calls == [1]


def test_everything_else_goes_through_the_modules(calls: list[int]) -> None:
    x, seen = torch.randn(2, 22, 48), []
    layer = module()
    layer(x).sum().backward()
    assert layer.prefix_rows.key.weight.grad.abs().sum() > 0
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        module(q_norm=torch.nn.LayerNorm(16))(x)
        module(k_norm=torch.nn.LayerNorm(16))(x)
        many = LowRankDWAttention(48, 24, rank=8, grid=(1, 19), num_prefix=3).bfloat16()
        many(x.bfloat16())  # PyTorch's products by tiles are faster then
        for name in ("prefix_rows.query", "prefix_rows.key", "prefix_value", "prefix_proj"):
            hooked = module()
            hooked.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
            hooked(x)
    assert len(seen) >= 3  # a hooked key is computed, too
    assert not calls


def test_wrong_dtypes_raise_as_before() -> None:
    with torch.no_grad(), pytest.raises((DwattnError, RuntimeError), match=r"dtype|float"):
        module()(torch.randn(2, 22, 48, dtype=torch.float64))


@torch.no_grad()
def test_compile_and_export(fresh_dynamo: None) -> None:
    layer, x = module(), torch.randn(2, 22, 48)
    expected = layer(x)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(x), expected)
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
    assert "dwattn.prefix_rows.default" in [str(node.target) for node in program.graph.nodes]
    larger = torch.randn(5, 22, 48)
    torch.testing.assert_close(program.module()(larger), layer(larger))


def test_rows_are_those_of_the_module() -> None:
    rows = ExactPrefixRows(48, 3, 16, 2)
    value, proj = torch.nn.Linear(48, 48), torch.nn.Linear(48, 30)
    x = torch.randn(2, 22, 48)
    with torch.no_grad():
        out = rows.projected(x, value, proj)
        assert out is not None
        torch.testing.assert_close(out, proj(rows(x, value.weight, value.bias)))
