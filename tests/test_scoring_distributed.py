"""Two gloo processes give the scores of one, to the same bits on both, and fail together."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dwattn
from dwattn.errors import DwattnError, ScoreError
from dwattn.ranks import Ranks
from dwattn.scores import Scores
from dwattn.variance import AttentionVariance
from support.models import BY_NAME

FAMILY = BY_NAME["hub-reg4"]  # needs no other library: the processes start quickly
IMAGES = 11
SHARES: dict[str, Any] = {
    "interleaved": lambda x, rank: x[rank::2],
    "contiguous": lambda x, rank: (x[:3], x[3:])[rank],
}


def attempt(call: Any) -> str:
    """The error of a call, as text."""
    try:
        call()
    except DwattnError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def work(rank: int, folder: str) -> None:
    """One process; writes what it got to ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = Path(folder)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path / 'store'}", rank=rank, world_size=2
    )
    model, images = FAMILY.build(), FAMILY.images(IMAGES)
    warnings.simplefilter("ignore")
    for name, share in SHARES.items():
        mine = share(images, rank)
        scores = dwattn.score(model, mine, batch_size=4, progress=False, keep_maps=True)
        scores.save(path / f"{name}-{rank}.safetensors")
    layer = 3 * 16 * (2 * 16 + 5) * 8 + 4 * 48 * 17**2 * 8
    mine = SHARES["interleaved"](images, rank)
    scores = dwattn.score(model, mine, batch_size=4, progress=False, memory_budget=2 * layer)
    scores.save(path / f"passes-{rank}.safetensors")
    scores = dwattn.score(model, images[rank::2], 7, batch_size=4, progress=False)
    scores.save(path / f"seven-{rank}.safetensors")
    alone = dwattn.score(model, images, IMAGES, batch_size=4, progress=False, distributed=False)
    alone.save(path / f"alone-{rank}.safetensors")

    q, k = torch.randn(2, 9, 2, 6, 4, dtype=torch.float64)
    state = AttentionVariance(1)
    state.update(q[rank::2], k[rank::2])
    state.merge_ranks()
    whole = AttentionVariance(1)
    whole.update(q, k)
    torch.testing.assert_close(state.m2, whole.m2, rtol=1e-9, atol=0)
    torch.testing.assert_close(state.mean, whole.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(state.prefix_mean, whole.prefix_mean, rtol=1e-9, atol=0)
    assert state.count == 9

    errors = {
        "none on one": attempt(lambda: dwattn.score(model, images[: 4 * rank], 8, progress=False)),
        "sizes": attempt(
            lambda: dwattn.score(
                model,
                torch.randn(4, 3, 56, 56 + 14 * rank),
                8,
                progress=False,
            )
        ),
        "one image": attempt(lambda: dwattn.score(model, images[:1], 1 + 1, progress=False)),
    }
    (path / f"errors-{rank}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("name", [*SHARES, "passes"])
def test_two_processes_equal_one(folder: Path, name: str) -> None:
    one = Scores.load(folder / "alone-0.safetensors")
    two = Scores.load(folder / f"{name}-0.safetensors")
    assert two.num_images == one.num_images == IMAGES
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.name == b.name
        torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.mean_kernel, b.mean_kernel, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.prefix_mass, b.prefix_mass, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.residual, b.residual, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [*SHARES, "passes", "seven"])
def test_both_processes_have_the_same_bits(folder: Path, name: str) -> None:
    first, second = (Scores.load(folder / f"{name}-{rank}.safetensors") for rank in range(2))
    assert first.to_dict() == second.to_dict()
    for a, b in zip(first.layers, second.layers, strict=True):
        assert (a.std_map is None) == (b.std_map is None)
        assert a.std_map is None or torch.equal(a.std_map, b.std_map)


def test_num_images_is_divided(folder: Path) -> None:
    assert Scores.load(folder / "seven-0.safetensors").num_images == 7
    assert [Ranks(rank, 3).share(8) for rank in range(3)] == [3, 3, 2]


def test_an_error_of_one_process_is_raised_in_both(folder: Path) -> None:
    first, second = (json.loads((folder / f"errors-{rank}.json").read_text()) for rank in range(2))
    assert first["none on one"].startswith("DataError: The data holds no images")
    assert "Process 0 of 2 failed with DataError: The data holds no images" in second["none on one"]
    for errors in (first, second):
        assert "ScoreError: The processes have different image sizes" in errors["sizes"]
        assert errors["one image"] == "no error"


def test_without_a_process_group() -> None:
    assert Ranks.find(None) == Ranks.find(False) == Ranks(0, 1)
    with pytest.raises(ScoreError, match="torchrun"):
        Ranks.find(True)
