"""The kernel for Hopper on a device, before anything may choose it (``DWATTN_CUDA_HOPPER=1``).

Without such a GPU the emulation judges it (``tests/cuda/test_dw_attention_sm90.cpp``).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from support.operators import assert_as_exact, make_case
from test_cuda_ops import SHAPES, _why_not, attention, on_gpu


def _why_not_hopper() -> str:
    if _why_not():
        return _why_not()
    if torch.cuda.get_device_capability() != (9, 0):
        return "the device is not a Hopper"
    from dwattn.library import native

    built = native.build_info()["cuda_architectures"] if native else []
    return "" if any("90a" in arch for arch in built) else f"built for {built}, not for 90a"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_why_not_hopper()), reason=_why_not_hopper()),
]

#: Shapes that the kernel takes: even channels, rows of whole 16 bytes, at most 95 columns.
TAKEN = (
    *(shape for shape in SHAPES if shape[1] <= 95 and shape[4] % 8 == 0 and shape[5] % 2 == 0),
    (16, 16, 0, 1, 768, 768),
    (24, 24, 1, 64, 1024, 1024),  # several pieces of work a block
    (95, 95, 0, 1, 128, 128),
)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWATTN_CUDA_HOPPER", "1")


def kernels_of(run: object) -> tuple[Tensor, str]:
    """The result of a call and the names of the kernels that ran."""
    assert callable(run)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        result = run()
        torch.cuda.synchronize()
    return result, " ".join(event.key for event in record.key_averages())


@pytest.mark.usefixtures("hopper")
def test_it_is_chosen_when_asked_for() -> None:
    _, names = kernels_of(lambda: attention(on_gpu(make_case(5, 7, 64, dtype=torch.float16))))
    assert "dw_attention_sm90_kernel" in names


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DWATTN_CUDA_HOPPER", raising=False)
    _, names = kernels_of(lambda: attention(on_gpu(make_case(5, 7, 64, dtype=torch.float16))))
    assert "dw_attention_kernel" in names
    assert "sm90" not in names


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("shape", TAKEN, ids=str)
def test_it_agrees_with_the_reference_and_with_the_other_kernel(
    shape: tuple[int, ...], context: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width, num_prefix, batch, dim, channels = shape
    case = on_gpu(
        make_case(
            height, width, channels,
            num_prefix=num_prefix, batch=batch, dim=dim, dtype=dtype, context=context, bias=context,
        )
    )  # fmt: skip
    exact = case.to(torch.float64).attention("reference")
    monkeypatch.delenv("DWATTN_CUDA_HOPPER", raising=False)
    other = attention(case)
    monkeypatch.setenv("DWATTN_CUDA_HOPPER", "1")
    assert_as_exact(attention(case), case.attention("torch"), exact)
    assert_as_exact(attention(case), other, exact)


@pytest.mark.usefixtures("hopper")
def test_every_call_gives_the_same_bits() -> None:
    case = on_gpu(make_case(24, 24, 1024, batch=32, dim=1024, dtype=torch.bfloat16))
    first = attention(case)
    assert all(torch.equal(attention(case), first) for _ in range(20))


@pytest.mark.usefixtures("hopper")
def test_it_can_be_captured() -> None:
    case = on_gpu(make_case(24, 24, 384, dim=384, dtype=torch.float16))
    expected = attention(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(case)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
