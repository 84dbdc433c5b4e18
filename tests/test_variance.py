"""The streaming state against a direct two-pass computation in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from dwattn.errors import ScoreError
from dwattn.variance import AttentionVariance

HEADS, TOKENS, WIDTH = 2, 14, 8


def queries_and_keys(images: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, images, HEADS, TOKENS, WIDTH, dtype=torch.float64) * 1.5
    return q.to(dtype), k.to(dtype)


def two_pass(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of E in fp64."""
    e = torch.softmax(q.double() @ k.double().transpose(2, 3) * scale, -1)
    return e.mean(0), e.std(0, unbiased=False)


def state_of(q: Tensor, k: Tensor, **options: object) -> AttentionVariance:
    state = AttentionVariance(**options)  # type: ignore[arg-type]
    state.update(q, k)
    return state


def assert_same(a: AttentionVariance, b: AttentionVariance, tolerance: float = 1e-9) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=1e-14)
    torch.testing.assert_close(a.m2, b.m2, rtol=tolerance, atol=1e-14)
    torch.testing.assert_close(a.prefix_mean, b.prefix_mean, rtol=tolerance, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_agrees_with_two_passes(dtype: torch.dtype, tolerance: float, scale: float | None) -> None:
    q, k = queries_and_keys(37, dtype)
    mean, std = two_pass(q, k, 1 / math.sqrt(WIDTH) if scale is None else scale)
    state = AttentionVariance()
    for first in range(0, 37, 10):
        state.update(q[first : first + 10], k[first : first + 10], scale)
    assert state.count == 37
    torch.testing.assert_close(state.mean, mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(state.std, std, rtol=tolerance, atol=0)
    # Roundings of single entries are independent: the sum is far more accurate than an entry.
    torch.testing.assert_close(state.sigma(), std.sum((1, 2)), rtol=1e-7, atol=0)


def test_half_precision_is_computed_in_fp32() -> None:
    q, k = queries_and_keys(6, torch.bfloat16)
    mean, std = two_pass(q, k, 1 / math.sqrt(WIDTH))
    state = state_of(q, k)
    torch.testing.assert_close(state.mean, mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.sigma(), std.sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prefix", [1, 5])
def test_patch_entries_are_the_corner_of_all_entries(prefix: int) -> None:
    q, k = queries_and_keys(9)
    everything = state_of(q, k, num_prefix=prefix, entries="all")
    patches = state_of(q, k, num_prefix=prefix)
    assert everything.mean.shape == (HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(patches.mean, everything.mean[:, prefix:, prefix:])
    torch.testing.assert_close(patches.m2, everything.m2[:, prefix:, prefix:])
    torch.testing.assert_close(patches.prefix_mean, everything.prefix_mean)
    assert patches.prefix_mean.shape == (HEADS, TOKENS - prefix, prefix)
    assert everything.mean.sum(2).sub(1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", ["patches", "all"])
def test_any_split_merges_to_the_same_state(dtype: torch.dtype, entries: str) -> None:
    q, k = queries_and_keys(23, dtype)
    whole = state_of(q, k, num_prefix=2, entries=entries)
    for cuts in ([1], [22], [11], [1, 2, 3], [5, 6, 20], list(range(1, 23))):
        bounds = [0, *cuts, 23]
        parts = [
            state_of(q[a:b], k[a:b], num_prefix=2, entries=entries)
            for a, b in itertools.pairwise(bounds)
        ]
        merged = AttentionVariance(2, entries)
        for part in reversed(parts):
            merged.merge(part)
        assert_same(merged, whole)
        one_by_one = AttentionVariance(2, entries)
        for a, b in itertools.pairwise(bounds):
            one_by_one.update(q[a:b], k[a:b])
        assert_same(one_by_one, whole)


def test_merging_is_independent_of_the_order() -> None:
    q, k = queries_and_keys(30)
    sizes = [1, 2, 7, 20]
    parts = list(zip(q.split(sizes), k.split(sizes), strict=True))
    states = []
    for order in itertools.permutations(range(4)):
        merged = AttentionVariance()
        for index in order:
            merged.merge(state_of(*parts[index]))
        states.append(merged)
    for state in states[1:]:
        assert_same(state, states[0])


def test_merge_leaves_the_other_state_alone() -> None:
    q, k = queries_and_keys(8)
    other = state_of(q[:3], k[:3], num_prefix=1)
    mean, m2 = other.mean.clone(), other.m2.clone()
    merged = AttentionVariance(1).merge(other)
    merged.update(q[3:], k[3:])
    merged.merge(AttentionVariance(1))
    assert other.count == 3
    assert merged.count == 8
    assert torch.equal(other.mean, mean)
    assert torch.equal(other.m2, m2)
    assert_same(merged, state_of(q, k, num_prefix=1))


@pytest.mark.parametrize(("tokens", "width"), [(14, 16), (257, 64)])
def test_maps_of_an_image_have_the_same_bits_in_any_batch(tokens: int, width: int) -> None:
    q, k = torch.randn(2, 20, 1, tokens, width)
    alone = [state_of(q[i : i + 1], k[i : i + 1]).mean for i in (0, 17)]
    # With one image the mean is E itself. A batch of twice the same image must give the same bits.
    for index, expected in zip((0, 17), alone, strict=True):
        assert torch.equal(state_of(q[[index] * 20], k[[index] * 20]).mean, expected)
        assert torch.equal(
            state_of(q[[index] * 20], k[[index] * 20]).m2, torch.zeros_like(expected)
        )


@pytest.mark.parametrize("tokens", [14, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attend_is_attention(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 3, tokens, HEADS, WIDTH, dtype=dtype).transpose(2, 3)
    state = AttentionVariance(num_prefix=1)
    out = state.attend(q, k, v, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), scale=0.3
    )
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    updated = AttentionVariance(num_prefix=1)
    updated.update(q, k, 0.3)
    assert torch.equal(state.mean, updated.mean)
    assert torch.equal(state.m2, updated.m2)


def test_under_autocast_the_statistics_keep_their_precision() -> None:
    q, k = queries_and_keys(5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = AttentionVariance()
        state.attend(q, k, k)
    assert_same(state, state_of(q, k))


def test_state_dict_round_trip() -> None:
    q, k = queries_and_keys(11)
    for options in ({"num_prefix": 3}, {"num_prefix": 3, "entries": "all"}, {}):
        state = state_of(q, k, **options)
        again = AttentionVariance.from_state_dict(load(save(state.state_dict())))
        assert_same(again, state, tolerance=0)
        assert (again.num_prefix, again.entries) == (state.num_prefix, state.entries)
        saved = state.state_dict()
        kept = {name: tensor.clone() for name, tensor in saved.items()}
        again.update(q[:2], k[:2])
        state.update(q[:2], k[:2])
        assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("m2"), "lacks m2"),
        (lambda s: s.update(count=torch.tensor([0])), "count 0"),
        (lambda s: s.update(m2=s["m2"][:1]), r"m2 \(1, 11, 11\)"),
        (lambda s: s["mean"].fill_(math.nan), "NaN"),
        (lambda s: s.pop("prefix_mean"), r"prefix_mean of shape \(2, 11, 3\)"),
    ],
)
def test_malformed_state_dict(change, message: str) -> None:
    q, k = queries_and_keys(2)
    state = state_of(q, k, num_prefix=3).state_dict()
    change(state)
    with pytest.raises(ScoreError, match=message):
        AttentionVariance.from_state_dict(state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["q", "k"])
def test_nan_is_refused_and_the_state_untouched(bad: float, which: str) -> None:
    q, k = queries_and_keys(6)
    state = state_of(q, k)
    before = state.mean.clone(), state.m2.clone()
    batch = {"q": q.clone(), "k": k.clone()}
    batch[which][3, 1, 2, 4] = bad
    with pytest.raises(ScoreError, match=f"{which} has NaN or infinite"):
        state.update(batch["q"], batch["k"])
    assert state.count == 6
    assert torch.equal(state.mean, before[0])
    assert torch.equal(state.m2, before[1])
    state.update(q, k)
    assert state.count == 12


def test_constant_attention_has_no_variance() -> None:
    q, k = queries_and_keys(1)
    state = AttentionVariance()
    for _ in range(7):
        state.update(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1))
    assert state.count == 21
    assert state.sigma().abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, q, k: s.update(q, k[:, :, :5]), r"one shape.*\(4, 2, 14, 8\).*\(4, 2, 5, 8\)"),
        (lambda s, q, k: s.update(q[0], k[0]), "one shape"),
        (lambda s, q, k: s.update(q[:0], k[:0]), "no zero in it"),
        (lambda s, q, k: s.update(q, k.float()), "one dtype"),
        (lambda s, q, k: s.update(q.long(), k.long()), "floating point"),
        (lambda s, q, k: s.update(q[:, :1], k[:, :1]), r"\(2, 13, 13\).*\(1, 13, 13\)"),
        (lambda s, q, k: s.update(q[:, :, :9], k[:, :, :9]), "another resolution"),
        (lambda s, q, k: s.update(q[:, :, :1], k[:, :, :1]), "leave no patches"),
        (lambda s, q, k: s.attend(q, k, k[:1]), "v has shape"),
        (lambda s, q, k: s.merge(AttentionVariance(1, "all")), "entries='all'"),
        (lambda s, q, k: s.merge(state_of(q[:, :1], k[:, :1], num_prefix=1)), "Cannot merge maps"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_state_untouched(call, message: str) -> None:
    q, k = queries_and_keys(4)
    state = state_of(q, k, num_prefix=1)
    before = state.mean.clone()
    with pytest.raises(ScoreError, match=message):
        call(state, q, k)
    assert state.count == 4
    assert torch.equal(state.mean, before)


def test_empty_state_and_bad_settings() -> None:
    for read in (lambda s: s.mean, lambda s: s.std, lambda s: s.sigma(), lambda s: s.state_dict()):
        with pytest.raises(ScoreError, match="no images were added"):
            read(AttentionVariance())
    with pytest.raises(ScoreError, match="entries='rows'"):
        AttentionVariance(entries="rows")
    with pytest.raises(ScoreError, match="num_prefix=-1"):
        AttentionVariance(-1)


def test_an_interrupted_update_invalidates_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = queries_and_keys(4)
    state = state_of(q, k)
    calls = iter(range(1))  # the first of the two heads gets through

    def interrupt(*args: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(AttentionVariance, "_fold", interrupt)
    with pytest.raises(KeyboardInterrupt):
        state.update(q, k)
    monkeypatch.undo()
    for use in (
        lambda: state.mean,
        lambda: state.update(q, k),
        lambda: state_of(q, k).merge(state),
    ):
        with pytest.raises(ScoreError, match="interrupted"):
            use()


def test_nbytes_counts_the_state() -> None:
    q, k = queries_and_keys(2)
    for options in ({"num_prefix": 3}, {"num_prefix": 3, "entries": "all"}):
        state = state_of(q, k, **options).state_dict()
        held = sum(state[n].numel() * 8 for n in ("mean", "m2", "prefix_mean") if n in state)
        assert AttentionVariance.nbytes(HEADS, TOKENS, **options) == held
