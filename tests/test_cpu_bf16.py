"""Products of bf16 as it is, by AMX tiles and by AVX512_BF16: layers in every shape that tiles do not fit, against fp64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dwattn import library
from support.operators import OperatorCase, assert_as_exact, make_case

native = library.native
USABLE = [] if native is None else native.cpu_info()["usable_isas"]

pytestmark = [
    pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error()),
    pytest.mark.usefixtures("one_thread"),
]
by_each = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            isa, marks=pytest.mark.skipif(isa not in USABLE, reason=f"not built, or a CPU without {isa}")
        )
        for isa in ("amx", "avx512_bf16")
    ],
)  # fmt: skip

GRIDS = ((1, 1), (1, 37), (29, 1), (4, 8), (5, 7), (13, 11))
WIDTHS = ((96, 64, 96), (100, 40, 33), (31, 96, 64), (64, 7, 130))  # D, C, D_out


def bits(t: Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint16).numpy()


def layer(case: OperatorCase, wo: Tensor, bo: Tensor, *, isa: str, threads: int = 1) -> Tensor:
    assert native is not None
    coefficients = [None if t is None else t.float().numpy() for t in case.coefficients]
    assert case.bv is not None
    out = native.dw_layer(
        bits(case.x), bits(case.wv), bits(case.bv), case.kernel.float().numpy(), bits(wo), bits(bo),
        *case.sizes, *coefficients, num_threads=threads, isa=isa,
    )  # fmt: skip
    return torch.from_numpy(out).view(torch.bfloat16)


def output(case: OperatorCase, width: int) -> tuple[Tensor, Tensor]:
    channels = case.wv.shape[0]
    generator = torch.Generator().manual_seed(channels + width)
    wo = torch.randn(width, channels, generator=generator) / channels**0.5
    return wo.bfloat16(), torch.randn(width, generator=generator).bfloat16()


@by_each
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(widths: tuple[int, int, int], isa: str) -> None:
    dim, channels, width = widths
    varying = itertools.cycle(itertools.product((0, 1, 5), (1, 3)))
    for height, columns in GRIDS:
        prefix, batch = next(varying)
        case = make_case(
            height, columns, channels, num_prefix=prefix, batch=batch, dim=dim, dtype=torch.bfloat16
        )
        wo, bo = output(case, width)
        y = case.attention("torch")
        exact = case.to(torch.float64).attention("reference")
        results = [layer(case, wo, bo, isa=isa, threads=threads) for threads in (1, 2, 3, 1)]
        assert_as_exact(
            results[0],
            torch.nn.functional.linear(y, wo, bo),
            torch.nn.functional.linear(exact, wo.double(), bo.double()),
        )
        for other in results[1:]:  # nor does it depend on what lay in the scratch memory
            assert torch.equal(other, results[0])


def test_the_operators_take_strided_tokens_between_nans() -> None:
    case = make_case(7, 6, 64, num_prefix=1, batch=3, dim=96, dtype=torch.bfloat16)
    room = torch.full((5, 50, 200), float("nan"), dtype=torch.bfloat16)
    strided = room[1:4, 3:46, 50:146].copy_(case.x)
    plain = case.attention("cpp")
    assert plain.isfinite().all()
    apart = OperatorCase(
        case.geometry, strided, case.wv, case.bv, case.v, case.kernel, *case.coefficients
    )
    assert torch.equal(apart.attention("cpp"), plain)


@by_each
def test_images_that_follow_each_other_are_computed_as_alone(isa: str) -> None:
    case = make_case(5, 5, 48, num_prefix=0, batch=3, dim=64, dtype=torch.bfloat16)
    wo, bo = output(case, 64)
    together = layer(case, wo, bo, isa=isa)
    for image in range(3):
        alone = OperatorCase(
            case.geometry, case.x[image : image + 1], case.wv, case.bv, case.v, case.kernel,
            *case.coefficients,
        )  # fmt: skip
        assert torch.equal(layer(alone, wo, bo, isa=isa)[0], together[image])


def test_a_nan_stays_in_its_row() -> None:
    case = make_case(6, 6, 32, num_prefix=0, batch=1, dim=64, dtype=torch.bfloat16, context=False)
    case.x[0, 20, 3] = float("nan")  # row 3, column 2
    assert case.bv is not None
    touched = ~case.attention("cpp").isfinite().all(-1).view(6, 6)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:5, 1:4] = True
    assert torch.equal(touched, expected)


@by_each
def test_products_of_bf16_and_of_fp32_agree(isa: str) -> None:
    case = make_case(13, 11, 96, num_prefix=1, batch=2, dim=128, dtype=torch.bfloat16)
    wo, bo = output(case, 128)
    as_it_is, widened = (layer(case, wo, bo, isa=way).float() for way in (isa, "avx512"))
    torch.testing.assert_close(as_it_is, widened, atol=0.1, rtol=0.02)
