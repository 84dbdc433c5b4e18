"""Many threads at once, and thousands of calls: the same bits, and no memory kept."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dwattn import functional, library
from dwattn.errors import DwattnError
from dwattn.geometry import Geometry
from dwattn.variance import AttentionVariance
from support.operators import OperatorCase, make_case
from support.rss import resident_bytes

THREADS = 8
CALLS = 10_000
#: An op that keeps its 12 kB result would keep 117 MiB.
ALLOWED_GROWTH = 8 * 2**20

BACKENDS = ["torch", "reference", *(["cpp"] if library.AVAILABLE else [])]


pytestmark = pytest.mark.usefixtures("one_thread")


def layer(case: OperatorCase, backend: str) -> Tensor:
    wo = case.wv.t().contiguous()
    return functional.dw_layer(
        case.x, case.wv, case.bv, case.kernel, wo, None, case.geometry, *case.coefficients,
        backend=backend,
    )  # fmt: skip


def with_gradient(case: OperatorCase, backend: str) -> Tensor:
    v = case.v.detach().clone().requires_grad_()
    out = functional.dw_aggregate(
        v, case.kernel, case.geometry, *case.coefficients, backend=backend
    )
    (gradient,) = torch.autograd.grad(out.sum(), v)
    return gradient


def works(backend: str) -> list[Callable[[], Tensor]]:
    """Calls of different shapes, dtypes and instruction paths."""
    sizes = [(3, 5, 8, torch.float32), (9, 4, 70, torch.float32), (16, 16, 96, torch.bfloat16),
             (2, 2, 33, torch.float16), (7, 7, 64, torch.float64)]  # fmt: skip
    cases = [make_case(h, w, c, dim=40, dtype=dtype) for h, w, c, dtype in sizes]
    calls: list[Callable[[], Tensor]] = []
    for case in cases:
        calls += [
            lambda case=case: case.aggregate(backend),
            lambda case=case: case.attention(backend),
            lambda case=case: layer(case, backend),
            lambda case=case: with_gradient(case, backend),
        ]
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_concurrent_calls_give_the_bits_of_calls_in_turn(backend: str) -> None:
    calls = works(backend)
    expected = [call() for call in calls]
    together = threading.Barrier(THREADS)

    def run(offset: int) -> None:
        torch.set_num_threads(1 + offset % 2)
        together.wait()
        for step in range(3 * len(calls)):
            index = (step + offset) % len(calls)
            assert torch.equal(calls[index](), expected[index]), (backend, index)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))


@pytest.mark.skipif(library.native is None, reason=library.native_error())
def test_concurrent_calls_over_numpy_arrays() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 50, 48), dtype=np.float32)
    wv = random.standard_normal((33, 48), dtype=np.float32)
    kernel = random.standard_normal((33, 3, 3), dtype=np.float32)

    def call(threads: int) -> np.ndarray:
        return library.native.dw_attention(x, wv, None, kernel, 7, 7, 1, num_threads=threads)

    expected = call(1)
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(call, [1 + i % 3 for i in range(200)]):
            assert np.array_equal(found, expected)


def test_statistics_of_several_threads_merge_into_those_of_one() -> None:
    batches = [
        torch.randn(3, 2, 17, 5, generator=torch.Generator().manual_seed(i)) for i in range(THREADS)
    ]
    alone = AttentionVariance(1)
    for q in batches:
        alone.update(q, q)

    def one(q: Tensor) -> AttentionVariance:
        state = AttentionVariance(1)
        state.update(q, q)
        return state

    with ThreadPoolExecutor(THREADS) as pool:
        first, *others = pool.map(one, batches)
    for other in others:
        first.merge(other)
    torch.testing.assert_close(first.m2, alone.m2, rtol=1e-12, atol=1e-14)


FIRST_CALLS = """
import threading, torch
from dwattn import functional
from dwattn.geometry import Geometry
v = torch.ones(1, 16, 8); kernel = torch.ones(8, 3, 3); together = threading.Barrier(8); sums = []
def run():
    together.wait()
    sums.append(functional.dw_aggregate(v, kernel, Geometry(4, 4)).sum().item())
threads = [threading.Thread(target=run) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert sums == [800.0] * 8, sums
"""


def test_the_first_calls_of_a_process_may_come_together() -> None:
    source = str(Path(functional.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r})\n{FIRST_CALLS}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def refused(case: OperatorCase, backend: str) -> None:
    with pytest.raises(DwattnError):
        functional.dw_aggregate(case.v, case.kernel, Geometry(40, 40), backend=backend)


def repeated() -> dict[str, Callable[[], object]]:
    case = make_case(8, 8, 24, dim=24)
    best = BACKENDS[-1]
    calls: dict[str, Callable[[], object]] = {
        "dw_aggregate": lambda: case.aggregate(best),
        "dw_attention": lambda: case.attention(best),
        "dw_layer": lambda: layer(case, best),
        "dw_layer in PyTorch": lambda: layer(case, "torch"),
        "gradient": lambda: with_gradient(case, best),
        "refused": lambda: refused(case, best),
    }
    if library.native is not None:
        v, kernel = case.v.numpy(), case.kernel.numpy()
        calls["numpy"] = lambda: library.native.dw_aggregate(v, kernel, 8, 8, 1)
    return calls


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Needs /proc (Linux).")
@pytest.mark.parametrize("name", repeated())
def test_ten_thousand_calls_keep_no_memory(name: str) -> None:
    call = repeated()[name]
    for _ in range(CALLS // 10):  # caches and the allocator's arenas fill
        call()
    gc.collect()
    before = resident_bytes()
    for _ in range(CALLS):
        call()
    gc.collect()
    growth = resident_bytes() - before
    assert growth < ALLOWED_GROWTH, f"{growth / 2**20:.1f} MiB after {CALLS} calls"
