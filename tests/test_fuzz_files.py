"""Damaged and hostile files: every reader answers with a sentence of its own, or with something usable."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dwattn
from dwattn import Plan
from dwattn.errors import DwattnError
from dwattn.scores import Scores
from dwattn.variance import AttentionVariance
from dwattn.weights import read_weights
from support.checkpoints import convert
from support.demo_results import make_results
from support.fuzzing import fuzz
from support.models import timm_vit

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**400])
    | st.floats()
    | st.sampled_from(["", "x", "patches", "blocks.0.attn", "\ud800", "\0", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
#: Text that is hard on a parser.
TEXTS = st.sampled_from(
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        b'{"kind":' * 50_000,
        b"9" * 5000,
        b"\xef\xbb\xbf{}",
    ]
) | st.binary(max_size=60)
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "drop", "add"]), VALUES),
    min_size=1,
    max_size=3,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inside:
        found.append((*path, key))
        if isinstance(item, (dict, list)):
            found += places(item, (*path, key))
    return found


def changed(value: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A copy of a JSON value with some of its inside set, dropped or added."""
    value = copy.deepcopy(value)
    for pick, how, new in changes:
        known = places(value)
        if not known:
            return new
        *way, last = known[pick % len(known)]
        parent = value
        for key in way:
            parent = parent[key]
        if how == "set":
            parent[last] = new
        elif how == "drop":
            del parent[last]
        elif isinstance(parent, dict):
            parent[f"{last}2"] = new
        else:
            parent.insert(last, new)
    return value


def flipped(data: bytes, flips: list[tuple[int, int]], length: float) -> bytes:
    """Some bytes exchanged, then cut to a share of the length."""
    damaged = bytearray(data)
    for place, byte in flips:
        # Half of the damage in the header: most of the file is numbers, where it changes little.
        span = len(damaged) if byte % 2 else min(len(damaged), 4096)
        damaged[place % span] = byte
    return bytes(damaged[: int(len(damaged) * length)])


def answers(read: Callable[[], Any], use: Callable[[Any], Any] = lambda result: None) -> None:
    """Reading succeeds, and then using it too, or either ends with an error of the package."""
    with contextlib.suppress(DwattnError):
        use(read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm_vit()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Any:
    """A plan as JSON, with initial kernels as ``select`` writes them."""
    images = torch.randn(4, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    scores = dwattn.score(model, images, num_images=4, progress=False)
    return json.loads(dwattn.select(scores, heads=4).to_json())


def use_plan(model: nn.Module) -> Callable[[Plan], None]:
    def use(plan: Plan) -> None:
        assert Plan.from_json(plan.to_json()) == plan
        dwattn.replace(model, plan, dry_run=True)

    return use


@fuzz(100, changes=CHANGES)
def test_plans(plan: Any, model: nn.Module, changes: Any) -> None:
    text = json.dumps(changed(plan, changes))
    answers(lambda: Plan.from_json(text), use_plan(model))


@fuzz(30, text=TEXTS)
def test_texts_that_are_no_plans(text: bytes, folder: Path) -> None:
    path = folder / "plan.json"
    path.write_bytes(text)
    with pytest.raises(DwattnError):
        Plan.load(path)


@pytest.fixture(scope="module")
def scores_file(folder: Path, model: nn.Module) -> bytes:
    images = torch.randn(4, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    path = folder / "good-scores.safetensors"
    dwattn.score(model, images, num_images=4, progress=False, keep_maps=True).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def checkpoint_file(folder: Path) -> bytes:
    path = folder / "good-student.safetensors"
    dwattn.save(convert(), path)
    return path.read_bytes()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any], numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def with_record(data: bytes, change: Callable[[Any], str]) -> bytes:
    """The file with another JSON record in its metadata."""
    header, numbers = split(data)
    header["__metadata__"]["dwattn"] = change(json.loads(header["__metadata__"]["dwattn"]))
    return joined(header, numbers)


def use_scores(scores: Scores) -> None:
    scores.table()
    json.dumps(scores.to_dict())
    for criterion in ("variance", "residual", "perturbation"):
        answers(lambda c=criterion: dwattn.select(scores, blocks=1, criterion=c))
        answers(lambda c=criterion: dwattn.select(scores, heads=2, criterion=c))


DAMAGE: dict[str, st.SearchStrategy[Any]] = {
    "flips": st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 255)), max_size=4),
    "length": st.sampled_from([1.0, 1.0, 0.999, 0.5, 0.01, 0.0]),
}


@fuzz(60, **DAMAGE)
def test_damaged_scores(scores_file: bytes, folder: Path, flips: Any, length: float) -> None:
    path = folder / "scores.safetensors"
    path.write_bytes(flipped(scores_file, flips, length))
    answers(lambda: Scores.load(path), use_scores)


@fuzz(60, changes=CHANGES)
def test_scores_with_another_record(scores_file: bytes, folder: Path, changes: Any) -> None:
    path = folder / "scores.safetensors"
    path.write_bytes(with_record(scores_file, lambda r: json.dumps(changed(r, changes))))
    answers(lambda: Scores.load(path), use_scores)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind":' * 50_000])
def test_records_nested_without_end(
    scores_file: bytes, checkpoint_file: bytes, folder: Path, text: str
) -> None:
    path = folder / "nested.safetensors"
    path.write_bytes(with_record(scores_file, lambda _: text))
    with pytest.raises(DwattnError):
        Scores.load(path)
    path.write_bytes(with_record(checkpoint_file, lambda _: text))
    with pytest.raises(DwattnError):
        dwattn.load(timm_vit(), path)


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda t: torch.ones(t.shape, dtype=torch.int32),
    "bool": lambda t: torch.ones(t.shape, dtype=torch.bool),
    "fp16": lambda t: t.half(),
    "transpose": lambda t: t.unsqueeze(0).transpose(0, -1).contiguous(),
    "scalar": lambda t: torch.tensor(1.0),
    "nan": lambda t: torch.full(t.shape, float("nan")),
}
TENSORS = st.tuples(st.integers(0, 10**6), st.sampled_from(["drop", "add", *OTHER]))


def other_tensors(data: bytes, path: Path, changes: list[tuple[int, str]]) -> None:
    """Write the file with some of its tensors missing, or of another shape or dtype."""
    path.write_bytes(data)
    header, _ = split(data)
    tensors = load_file(path)
    for pick, how in changes:
        name = sorted(tensors)[pick % len(tensors)]
        if how == "drop":
            del tensors[name]
        elif how == "add":
            tensors[f"{name}.more"] = tensors[name].clone()
        else:
            tensors[name] = OTHER[how](tensors[name])
    save_file(tensors, path, metadata=header["__metadata__"])


@fuzz(60, changes=st.lists(TENSORS, min_size=1, max_size=3))
def test_scores_with_other_tensors(scores_file: bytes, folder: Path, changes: Any) -> None:
    path = folder / "scores.safetensors"
    other_tensors(scores_file, path, changes)
    answers(lambda: Scores.load(path), use_scores)


def load_into_fresh(path: Path, like: dict[str, Tensor]) -> None:
    """A checkpoint is loaded whole, and computes; or the model stays as it was."""
    fresh = timm_vit()
    try:
        dwattn.load(fresh, path)
    except DwattnError:
        state = fresh.state_dict()
        assert list(state) == list(like)
        assert all(torch.equal(state[name], like[name]) for name in like)
        return
    with torch.no_grad():
        fresh(torch.zeros(1, 3, 32, 24))


@pytest.fixture(scope="module")
def untouched(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@fuzz(40, **DAMAGE)
def test_damaged_checkpoints(
    checkpoint_file: bytes, folder: Path, untouched: Any, flips: Any, length: float
) -> None:
    path = folder / "student.safetensors"
    path.write_bytes(flipped(checkpoint_file, flips, length))
    load_into_fresh(path, untouched)


@fuzz(60, changes=CHANGES)
def test_checkpoints_with_another_record(
    checkpoint_file: bytes, folder: Path, untouched: Any, changes: Any
) -> None:
    path = folder / "student.safetensors"
    path.write_bytes(with_record(checkpoint_file, lambda r: json.dumps(changed(r, changes))))
    load_into_fresh(path, untouched)


@fuzz(40, changes=st.lists(TENSORS, min_size=1, max_size=3))
def test_checkpoints_with_other_tensors(
    checkpoint_file: bytes, folder: Path, untouched: Any, changes: Any
) -> None:
    path = folder / "student.safetensors"
    other_tensors(checkpoint_file, path, changes)
    load_into_fresh(path, untouched)


@fuzz(40, ending=st.sampled_from([".safetensors", ".pth", ".bin", ".npz"]), text=TEXTS, **DAMAGE)
def test_weights(
    checkpoint_file: bytes, folder: Path, ending: str, text: bytes, flips: Any, length: float
) -> None:
    path = folder / f"weights{ending}"
    path.write_bytes(text if flips else flipped(checkpoint_file, flips, length))
    answers(lambda: read_weights(path))


@fuzz(60, changes=st.lists(TENSORS, min_size=1, max_size=3), count=st.integers(-2, 3))
def test_states_of_attention_statistics(changes: Any, count: int, folder: Path) -> None:
    state = AttentionVariance(1)
    state.update(*(torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0)),) * 2)
    path = folder / "state.safetensors"
    save_file({**state.state_dict(), "count": torch.tensor([count])}, path, metadata={"of": "this"})
    other_tensors(path.read_bytes(), path, changes)

    def use(restored: AttentionVariance) -> None:
        restored.sigma()
        restored.merge(state)

    answers(lambda: AttentionVariance.from_state_dict(load_file(path)), use)


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    return json.loads(make_results(folder).model_dump_json())


@fuzz(40, changes=CHANGES)
def test_results_of_the_demo(results: Any, folder: Path, changes: Any) -> None:
    from dwattn.report.results import Results

    path = folder / "results.json"
    path.write_text(json.dumps(changed(results, changes)))
    answers(lambda: Results.load(path))
