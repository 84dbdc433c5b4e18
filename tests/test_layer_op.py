"""The operator of a whole layer, ``dw_layer``: value projection, aggregation and output projection in one call."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import functional, library
from dwattn.attention import FusedDWAttention, LowRankDWAttention
from dwattn.errors import DwattnError
from dwattn.geometry import Geometry
from support.operators import OperatorCase, assert_as_exact, make_case, output_of

pytestmark = [
    pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error()),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRIDS = ((1, 1), (1, 7), (5, 1), (3, 5), (13, 11))
WIDTHS = ((64, 64), (32, 80), (80, 7), (5, 96), (96, 384))  # inner channels, output width
ISAS = library.native.cpu_info()["usable_isas"] if library.native else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(dtype: torch.dtype) -> None:
    varying = itertools.cycle(itertools.product((0, 1, 5), (1, 3), (True, False)))
    for (height, width), (channels, out) in itertools.product(GRIDS, WIDTHS):
        prefix, batch, full = next(varying)
        case = make_case(
            height, width, channels,
            num_prefix=prefix, batch=batch, dtype=dtype, context=full, bias=full,
        )  # fmt: skip
        exact = case.to(torch.float64)
        output = output_of(case, out)
        if not full:
            output |= {"bo": None, "prefix_out": None}
        wide = {name: None if t is None else t.double() for name, t in output.items()}
        results = [
            case.layer(output, "cpp"), case.layer(output, "torch"),
            exact.layer(wide, "reference"),
        ]  # fmt: skip
        assert results[0].shape == (batch, height * width + (prefix if full else 0), out)
        assert_as_exact(*results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("widths", [(1024, 1024), (1536, 1536), (1536, 64)], ids=str)
def test_the_error_does_not_outgrow_that_of_pytorch_in_wide_layers(
    widths: tuple[int, int], isa: str
) -> None:
    dim, channels = widths
    case = make_case(8, 9, channels, num_prefix=0, batch=1, dim=dim)
    exact, output = case.to(torch.float64), output_of(case, dim)
    wide = {name: t.double() for name, t in output.items()}
    tensors = (case.x, case.wv, case.bv, case.kernel, output["wo"], output["bo"])
    arrays = (None if t is None else t.numpy() for t in (*tensors, *case.coefficients))
    x, wv, bv, kernel, wo, bo, *coefficients = arrays
    y = library.native.dw_attention(x, wv, bv, kernel, *case.sizes, *coefficients, isa=isa)
    assert_as_exact(torch.from_numpy(y), case.attention("torch"), exact.attention("reference"))
    out = library.native.dw_layer(
        x, wv, bv, kernel, wo, bo, *case.sizes, *coefficients, isa=isa, num_threads=2
    )
    assert_as_exact(
        torch.from_numpy(out), case.layer(output, "torch"), exact.layer(wide, "reference")
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("side", "channels", "batch"),
    [(32, 512, 5), (12, 1040, 9)],  # chunks of two images, and of six with PyTorch's products
)
def test_batches_that_are_cut_into_chunks_write_every_image(
    side: int, channels: int, batch: int, threads: int
) -> None:
    torch.set_num_threads(threads)  # the fixture puts it back
    case = make_case(side, side, channels, num_prefix=1, batch=batch)
    output = output_of(case, 48)
    torch.testing.assert_close(
        case.layer(output, "cpp"), case.layer(output, "torch"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_and_poisoned_memory(dtype: torch.dtype) -> None:
    case = make_case(4, 6, 32, num_prefix=1, batch=2, dtype=dtype)
    output = output_of(case, 40)
    expected = case.layer(output, "torch")

    def spread(t: Tensor) -> Tensor:
        """The same values between NaNs, no stride as before."""
        room = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
        view = room[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    for _ in range(3):  # freed blocks full of NaN are what new_empty returns next
        poison = [torch.full_like(expected, float("nan")) for _ in range(4)]
        del poison
        strided = OperatorCase(
            case.geometry, spread(case.x), spread(case.wv), spread(case.bv), case.v,
            spread(case.kernel), *(spread(t) for t in case.coefficients),
        )  # fmt: skip
        result = strided.layer({name: spread(t) for name, t in output.items()}, "cpp")
        tolerance = 1e-5 if dtype == torch.float32 else 0.1  # both round, each its own way
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def arguments(num_prefix: int, *, grad: bool) -> tuple[Any, ...]:
    shapes = ((2, num_prefix + 6, 4), (3, 4), (3,), (3, 3, 3), (num_prefix, 3), (3,), (3,), (5, 3),
              (5,), (2, num_prefix, 5))  # fmt: skip
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=grad) for shape in shapes]
    return (*tensors, 3, 2, num_prefix)


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_gradients(num_prefix: int) -> None:
    op = torch.ops.dwattn.dw_layer
    full = arguments(num_prefix, grad=True)
    assert torch.autograd.gradcheck(op, full)
    bare = (*full[:2], None, full[3], None, None, None, full[7], None, None, *full[10:])
    assert torch.autograd.gradcheck(op, bare)


def test_opcheck() -> None:
    full = arguments(2, grad=True)
    torch.library.opcheck(torch.ops.dwattn.dw_layer.default, full)
    bare = (*full[:2], None, full[3], None, None, None, full[7], None, None, *full[10:])
    torch.library.opcheck(torch.ops.dwattn.dw_layer.default, bare)


@pytest.mark.parametrize("cls", [FusedDWAttention, LowRankDWAttention])
def test_the_module_is_one_operator_without_gradients(cls: type[FusedDWAttention]) -> None:
    options = {"rank": 24} if cls is LowRankDWAttention else {}
    module = cls(48, num_heads=3, grid=(4, 5), num_prefix=2, **options).eval()
    x = torch.randn(2, 22, 48)
    with torch.no_grad():
        fused = module(x)
        program = torch.export.export(module, (x,))
    assert "dwattn.dw_layer.default" in [str(node.target) for node in program.graph.nodes]
    torch.testing.assert_close(fused, module(x).detach(), atol=1e-5, rtol=1e-5)


def test_hooks_and_adapters_on_the_output_projection_are_called() -> None:
    module = FusedDWAttention(48, num_heads=3, grid=(4, 5)).eval()
    x, seen = torch.randn(1, 20, 48), []
    module.proj.register_forward_hook(lambda *_: seen.append(True))
    with torch.no_grad():
        module(x)
        assert seen

        class Doubled(torch.nn.Linear):
            def forward(self, rows: Tensor) -> Tensor:
                return 2 * super().forward(rows)

        plain = FusedDWAttention(48, num_heads=3, grid=(4, 5)).eval()
        doubled = Doubled(48, 48)
        doubled.load_state_dict(plain.proj.state_dict())
        expected = 2 * plain(x)
        plain.proj = doubled
        torch.testing.assert_close(plain(x), expected)


def test_autocast_and_compile(fresh_dynamo: None) -> None:
    module = LowRankDWAttention(48, num_heads=3, rank=16, grid=(4, 5), num_prefix=1).eval()
    x = torch.randn(2, 21, 48)
    with torch.no_grad():
        expected = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = module(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, atol=0.05, rtol=0.05)


MISTAKES = {
    "wo": (lambda t: t[:, :-1], ["wo", "8"]),
    "bo": (lambda t: t[:-1], ["bo", "(7,)"]),
    "prefix_out": (lambda t: t[:, :0], ["prefix_out", "(2, 1, 7)"]),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_mistakes_are_named_with_their_values(name: str, backend: str) -> None:
    case = make_case(3, 5, 8, num_prefix=1, batch=2)
    output = output_of(case, 7)
    change, words = MISTAKES[name]
    with pytest.raises(DwattnError) as caught:
        case.layer({**output, name: change(output[name])}, backend)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(DwattnError, match="autocast"):
        case.layer({**output, name: output[name].double()}, backend)
    with pytest.raises(DwattnError, match=r"torch\.Tensor, got numpy\.ndarray"):
        replace(case, x=case.x.numpy()).layer(output, backend)


def test_equal_to_the_equations() -> None:
    """Spelled out with nothing of the project but the aggregation."""
    case = make_case(3, 4, 6, num_prefix=1, batch=2, dtype=torch.float64)
    output = output_of(case, 5)
    y = functional.dw_aggregate(
        F.linear(case.x, case.wv, case.bv), case.kernel, Geometry(3, 4, 1), *case.coefficients
    )
    expected = torch.cat([output["prefix_out"], F.linear(y, output["wo"], output["bo"])], 1)
    torch.testing.assert_close(case.layer(output, "cpp"), expected)


def test_one_thread_writes_over_values_of_any_width() -> None:
    """Where PyTorch computes the products of bf16, rows are as long as they are: here no whole cache lines."""
    code = """
import torch
from dwattn import functional
from support.operators import make_case
torch.set_num_threads(1)
for width, channels in ((7, 17), (9, 36), (5, 66)):
    case = make_case(9, width, channels, num_prefix=1, dim=24, dtype=torch.bfloat16)
    def layer(backend):
        return functional.dw_layer(
            case.x, case.wv, case.bv, case.kernel, torch.eye(channels).bfloat16(), None,
            case.geometry, *case.coefficients, backend=backend,
        )
    torch.testing.assert_close(layer("cpp"), layer("torch"), atol=0.1, rtol=0.05)
"""
    environment = {
        **os.environ,
        "DWATTN_CPU_ISA": "generic",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
