"""Scores as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dwattn
from dwattn.errors import ScoreError
from dwattn.scores import Scores
from support.models import BY_NAME
from support.scoring import IMAGES


@pytest.fixture(scope="module")
def scored() -> Scores:
    family = BY_NAME["timm-reg4"]
    images = family.images(IMAGES)
    return dwattn.score(family.build(), images, IMAGES, keep_maps=True, progress=False)


def test_save_and_load(scored: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored.save(path)
    again = Scores.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert again.to_dict() == scored.to_dict()
    assert again.model == scored.model
    for a, b in zip(again.layers, scored.layers, strict=True):
        assert torch.equal(a.std_map, b.std_map)
        assert torch.equal(a.mean_map, b.mean_map)
        assert torch.equal(a.sigma, b.sigma)
        assert a.block_residual == b.block_residual
    torch.testing.assert_close(again.layers[0].std_map.sum((1, 2)).double(), again.layers[0].sigma)
    assert "blocks.3.attn" in str([list(column.cells) for column in again.table().columns])


def rewrite(path: Path, tensors: Any = None, metadata: Any = None) -> None:
    """Write the file again with changed tensors or header."""
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    found = load_file(path)
    if tensors:
        tensors(found)
    save_file(found, path, metadata=metadata(header) if metadata else header)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "not a readable safetensors file"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
        (lambda p: p.unlink(), "There is no scores file"),
        (lambda p: rewrite(p, metadata=lambda h: {}), "holds no dwattn scores"),
        (lambda p: rewrite(p, metadata=lambda h: {"dwattn": "[1]"}), "holds no dwattn scores"),
        (
            lambda p: rewrite(
                p, metadata=lambda h: {"dwattn": h["dwattn"].replace('version":1', 'version":9', 1)}
            ),
            "schema_version=9",
        ),
        (
            lambda p: rewrite(
                p,
                metadata=lambda h: {
                    "dwattn": h["dwattn"].replace('"num_images":6', '"num_images":"x"')
                },
            ),
            "num_images: .*integer",
        ),
        (
            lambda p: rewrite(p, lambda t: t.pop("layers.1.sigma")),
            r"sigma of blocks\.1\.attn is missing",
        ),
        (
            lambda p: rewrite(p, lambda t: t.update({"layers.2.mean_kernel": torch.zeros(3, 9)})),
            r"mean_kernel of blocks\.2\.attn is of shape \(3, 9\), expected \(3, 3, 3\)",
        ),
    ],
)
def test_damaged_files(scored: Scores, tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "scores.safetensors"
    scored.save(path)
    damage(path)
    with pytest.raises(ScoreError, match=message):
        Scores.load(path)


def test_a_disk_that_fills_up_is_a_sentence(scored: Scores, tmp_path: Path) -> None:
    """safetensors has an error of its own for it, as for a file that may not grow."""
    resource = pytest.importorskip("resource", reason="limits of Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(ScoreError, match=r"Cannot write '.*full\.safetensors'"):
            scored.save(tmp_path / "full.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(scored: Scores, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="Cannot write"):
        scored.save(tmp_path / "missing" / "scores.safetensors")
    with pytest.raises(ScoreError, match="it is a directory"):
        scored.save(tmp_path)
    assert not list(tmp_path.iterdir())
