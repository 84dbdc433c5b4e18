"""The compiled attention statistics on the CPU against whole maps in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import dwattn
from dwattn import backends, library, triton_ops
from dwattn.adapters import describe
from dwattn.errors import BackendError
from dwattn.variance import AttentionVariance
from support.models import hub_vit

pytestmark = pytest.mark.skipif(not library.AVAILABLE, reason=library.load_error())

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: batch, heads, tokens, width of a head, prefix tokens
SHAPES = (
    (3, 2, 12 * 7 + 1, 64, 1),
    (1, 1, 37, 32, 0),
    (3, 2, 101, 80, 5),
    (2, 1, 197, 128, 1),  # several tiles, blocks of keys and register tiles
    (4, 1, 16, 7, 0),
    (3, 1, 1, 64, 0),
    (2, 3, 6, 5, 5),  # a single patch
    (5, 2, 23, 72, 1),
)


def packed(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Queries, keys and values as a fused projection leaves them, with NaN around them."""
    room = torch.full((batch, tokens + 1, 3 * heads * width + 5), float("nan"), dtype=dtype)
    inside = room[:, 1:, 2:-3]
    inside.copy_(torch.randn(inside.shape) * 1.5)
    return inside.unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Maps and output in fp64."""
    e = torch.softmax(q.double() @ k.double().transpose(2, 3) * scale, -1)
    return e, e @ v.double()


def poisoned(heads: int, tokens: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    nan = float("nan")
    size = tokens - prefix
    mean, m2 = torch.full((2, heads, size, size), nan, dtype=torch.float64)
    return mean, m2, torch.full((heads, size, prefix), nan, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_whole_maps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, tokens, width, prefix = shape
    scale = 1.2 * width**-0.5
    mean, m2, prefix_mean = poisoned(heads, tokens, prefix)
    maps = []
    for call in range(3):
        q, k, v = packed(batch, heads, tokens, width, dtype)
        given = [t.clone() for t in (q, k, v)]
        out = library.attention_variance_(
            q,
            k,
            mean,
            m2,
            call * batch,
            v=v,
            prefix_mean=prefix_mean,
            num_prefix=prefix,
            scale=scale,
        )
        assert out is not None
        e, expected = exact(q, k, v, scale)
        maps.append(e)
        assert out.dtype == dtype
        assert out.transpose(1, 2).is_contiguous()  # joining the heads is a view
        rounding = 0.51 * torch.finfo(dtype).eps * expected.abs()
        assert ((out.double() - expected).abs() <= rounding + 2e-6 * v.double().abs().max()).all()
        for t, before in zip((q, k, v), given, strict=True):
            assert torch.equal(t, before)
    e = torch.cat(maps)[:, :, prefix:]
    deviation = e[..., prefix:].std(0, unbiased=False)
    torch.testing.assert_close(mean, e[..., prefix:].mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(prefix_mean, e[..., :prefix].mean(0), rtol=1e-5, atol=0)
    found = (m2 / len(e)).sqrt()
    torch.testing.assert_close(found, deviation, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.sum((1, 2)), deviation.sum((1, 2)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "heads", "width"),
    [
        (torch.float32, 6, 64),
        (torch.float32, 5, 80),
        (torch.bfloat16, 12, 64),
        (torch.float16, 9, 96),
    ],
    ids=str,
)
def test_large_outputs_are_written_past_the_cache(
    dtype: torch.dtype, heads: int, width: int
) -> None:
    q, k, v = packed(16, heads, 179, width, dtype)
    whole, parts = AttentionVariance(num_prefix=1), AttentionVariance(num_prefix=1)
    found = whole.attend(q, k, v)
    assert found.nbytes > 4 << 20  # and those of one image are not
    expected = [parts.attend(*one) for one in zip(q.split(1), k.split(1), v.split(1), strict=True)]
    assert torch.equal(found, torch.cat(expected))


def test_all_entries_and_no_values() -> None:
    q, k, v = packed(4, 2, 39, 24, torch.float32)
    state = AttentionVariance(num_prefix=3, entries="all")
    state.update(q, k)
    e, _ = exact(q, k, v, 24**-0.5)
    torch.testing.assert_close(state.mean, e.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(state.std, e.std(0, unbiased=False), rtol=1e-4, atol=1e-9)
    attending = AttentionVariance(num_prefix=3, entries="all")
    attending.attend(q, k, v)
    assert torch.equal(attending.m2, state.m2)


def test_threads_batches_and_strides_do_not_change_a_bit() -> None:
    q, k, v = packed(7, 3, 150, 64, torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for count, dense in itertools.product((1, 2, 5), (False, True)):
            torch.set_num_threads(count)
            given = [t.contiguous() for t in (q, k, v)] if dense else (q, k, v)
            state = AttentionVariance(1)
            out = state.attend(*given)
            results.append((out, state.mean, state.m2, state.prefix_mean))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    alone = torch.cat([AttentionVariance(1).attend(*(t[i : i + 1] for t in (q, k, v)))
                       for i in range(7)])  # fmt: skip
    assert torch.equal(alone, results[0][0])


def test_keys_and_values_that_are_packed_in_parts() -> None:
    """1.3 MB an image: less than the batch is packed at a time, and meets the state more than once."""
    q, k, v = packed(6, 1, 1300, 128, torch.float32)
    state = AttentionVariance(1)
    for part in (slice(0, 1), slice(1, 6)):
        out = state.attend(q[part], k[part], v[part])
    e, expected = exact(q, k, v, 128**-0.5)
    e = e[:, :, 1:, 1:]
    torch.testing.assert_close(out.double(), expected[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.mean, e.mean(0), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(state.std, e.std(0, correction=0), rtol=1e-5, atol=1e-12)


def test_strides_within_a_head_are_met_with_a_copy() -> None:
    q, k, v = torch.randn(3, 2, 3, 8, 20).transpose(3, 4)
    apart, dense = AttentionVariance(), AttentionVariance()
    assert torch.equal(apart.attend(q, k, v), dense.attend(*(t.contiguous() for t in (q, k, v))))
    assert torch.equal(apart.m2, dense.m2)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = packed(3, 1, 40, 16, torch.float32)
    state = AttentionVariance()
    out = state.attend(q * 30, k * 30, v)
    e, expected = exact(q * 30, k * 30, v, 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-3)
    assert state.mean.sum(2).sub(1).abs().max() < 1e-6
    assert state.mean.sub(e.mean(0)).abs().max() < 2e-3


def test_it_is_the_same_state_as_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of both backends merge; the rule prefers the compiled one."""
    q, k, v = packed(6, 2, 50, 32, torch.float32)
    assert backends.choose("attention_variance", device="cpu", dtype=torch.float32) == "cpp"
    whole, mixed = AttentionVariance(1), AttentionVariance(1)
    whole.attend(q, k, v)
    mixed.attend(q[:2], k[:2], v[:2])
    monkeypatch.setattr(library, "attention_variance_", None)  # must not be asked any more
    with backends.use("torch"):
        mixed.attend(q[2:], k[2:], v[2:])
    torch.testing.assert_close(mixed.mean, whole.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(mixed.sigma(), whole.sigma(), rtol=1e-6, atol=0)
    assert mixed.count == whole.count


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_scoring_uses_the_backend_that_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the kernel of the CPU in its place: forcing the backend is all that it takes."""
    compute, used = library.attention_variance_, []

    def kernel(*args: Any, **kwargs: Any) -> Tensor | None:
        used.append(name)
        return compute(*args, **kwargs)

    faked = tuple(
        one._replace(can_run=lambda *_, **__: backends.Verdict(name)) if one.name == name else one
        for one in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", faked)
    monkeypatch.setattr(*{"cuda": (library, "attention_variance_"),
                          "triton": (triton_ops, "attention_variance")}[name], kernel)  # fmt: skip
    model, images = hub_vit(), torch.randn(5, 3, 28, 42)
    expected = dwattn.score(model, images, 5, batch_size=2, progress=False)
    used.clear()
    with backends.use(name):
        scores = dwattn.score(model, images, 5, batch_size=2, progress=False)
    assert used == [name] * 3 * len(describe(model).blocks)  # batches of 2, 2 and 1
    assert scores.sigma_blocks == expected.sigma_blocks


def test_fp64_and_odd_values_run_in_pytorch() -> None:
    q, k, v = packed(2, 2, 9, 8, torch.float64)
    assert backends.choose("attention_variance", device="cpu", dtype=torch.float64) == "torch"
    state = AttentionVariance()
    assert state.attend(q, k, v).dtype == torch.float64
    with backends.use("cpp"), pytest.raises(BackendError, match=r"not in torch\.float64"):
        AttentionVariance().attend(q, k, v)
    q, k = q.float(), k.float()
    assert AttentionVariance().attend(q, k, v[..., :3]).shape == (2, 2, 9, 3)
    assert AttentionVariance(dtype=torch.float32).attend(q, k, q).shape == q.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 2, 8, 8)}, r"k of shape \(2, 2, 8, 8\).*\(2, 2, 9, 8\)"),
        ({"k": torch.zeros(2, 2, 9, 8, dtype=torch.half)}, "float16.*float32"),
        ({"v": torch.zeros(2, 2, 9, 4)}, r"v of shape \(2, 2, 9, 4\)"),
        ({"mean": torch.zeros(2, 9, 9)}, "float32.*float64|alike"),
        ({"m2": torch.zeros(2, 9, 8, dtype=torch.float64)}, r"m2.*\(2, 9, 9\).*\(2, 9, 8\)"),
        ({"m2": torch.zeros(9, 9, 2, dtype=torch.float64).permute(2, 0, 1)}, "contiguous"),
        ({"num_prefix": 9}, "num_prefix=9 of N=9"),
        ({"seen": -1}, "seen=-1"),
    ],
)
def test_mistakes_are_refused(change: dict[str, object], words: str) -> None:
    q, k, v = torch.zeros(3, 2, 2, 9, 8)
    mean, m2 = torch.zeros(2, 2, 9, 9, dtype=torch.float64)
    good = {"q": q, "k": k, "mean": mean, "m2": m2, "seen": 0, "v": v}
    with pytest.raises(RuntimeError, match=words):
        library.attention_variance_(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [True, False])
def test_opcheck(values: bool) -> None:
    q, k, v = packed(2, 2, 11, 8, torch.float32)
    mean, m2, prefix_mean = (t.nan_to_num() for t in poisoned(2, 11, 1))
    torch.library.opcheck(
        torch.ops.dwattn.attention_variance_.default,
        (q, k, mean, m2, prefix_mean, 3, v if values else None, 1, 0.5),
    )


def test_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    q, k, v = packed(2, 2, 11, 8, torch.float32)

    def step(mean: Tensor, m2: Tensor) -> Tensor:
        out = library.attention_variance_(q, k, mean, m2, 0, v=v)
        assert out is not None
        return out + mean.sum()

    states = torch.zeros(2, 2, 2, 11, 11, dtype=torch.float64)
    expected = step(*states[0])
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*states[1])
    assert torch.equal(got, expected)
    assert torch.equal(states[0], states[1])
