"""The benchmarks' augmentation of the demo's photos: repeatable, and nothing held out in what is fitted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dwattn.demo import photos, pretrained
from support.demo_photos import noise_photos

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import augmented_photos


@pytest.fixture
def some_photos(tmp_path: Path) -> list[photos.Photo]:
    return noise_photos(tmp_path)


def _plain(path: Path, colour: tuple[int, ...]) -> Path:
    Image.new("RGB" if len(colour) == 3 else "RGBA", (300, 260), colour).save(path)
    return path


def test_views_of_a_photo_depend_on_their_number_alone(some_photos: list[photos.Photo]) -> None:
    first, second = (
        augmented_photos.AugmentedPhotos(some_photos[:5], [], seed=2) for _ in range(2)
    )
    second[3, 7]
    assert torch.equal(first[1, 4]["pixels"], second[1, 4]["pixels"])
    assert torch.equal(first[2, 0]["pixels"], photos.load(some_photos[2:3])[0][0])
    assert not torch.equal(first[1, 4]["pixels"], first[1, 5]["pixels"])
    other = augmented_photos.AugmentedPhotos(some_photos[:5], [], seed=3)
    assert not torch.equal(first[1, 4]["pixels"], other[1, 4]["pixels"])
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()


def test_photos_named_again_stay_on_their_side_and_bring_new_views(
    some_photos: list[photos.Photo],
) -> None:
    fitting, chosen = some_photos[:6], set(some_photos[2:4])
    repeated = augmented_photos.with_repeats(fitting, chosen, times=3)
    assert repeated[:6] == fitting
    assert set(repeated[6:]) == chosen
    for index, photo in enumerate(repeated):
        assert (index % 4 == 3) == (fitting.index(photo) % 4 == 3)
    views = augmented_photos.AugmentedPhotos(repeated, [], seed=2)
    again = repeated.index(fitting[2], 6)
    assert torch.equal(views[2, 0]["pixels"], photos.load(fitting[2:3])[0][0])
    assert not torch.equal(views[again, 0]["pixels"], views[2, 0]["pixels"])
    assert augmented_photos.with_repeats(fitting, chosen, times=1) == fitting


def test_views_never_join_what_calibration_keeps_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = (
        _plain(tmp_path / f"{c}.png", rgb) for c, rgb in (("r", (200, 0, 0)), ("b", (0, 0, 200)))
    )
    reds, blues = (
        _plain(tmp_path / f"{c}s.png", rgb)
        for c, rgb in (("r", (200, 0, 0, 255)), ("b", (0, 0, 200, 255)))
    )
    some = [photos.Photo(f"p{i}", "p", f"s{i}", blue if i % 4 == 3 else red) for i in range(8)]
    cutouts = [blues if i % 4 == 3 else reds for i in range(8)]
    views = augmented_photos.AugmentedPhotos(some, cutouts, light=0.0)
    monkeypatch.setattr(augmented_photos, "MOSAICS", 0.7)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (pretrained.PIXEL_MEAN, pretrained.PIXEL_STD)
    )
    for index in (0, 3):
        for view in range(1, 8):
            colours = views[index, view]["pixels"] * std + mean
            assert float(colours[2 if index == 0 else 0].max()) < 0.05


def test_cutouts_of_held_out_photos_are_not_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / photos.STAMPS / "animals"
    folder.mkdir(parents=True)
    rgba = np.zeros((100, 100, 4), dtype=np.uint8)
    for name in "abc":
        rgba[20:80, 20:80] = np.random.default_rng(ord(name)).integers(0, 256, (60, 60, 4))
        rgba[20:80, 20:80, 3] = 255
        Image.fromarray(rgba).save(folder / f"{name}.png")
    monkeypatch.setenv(photos.DATA_FOLDER_VARIABLE, str(tmp_path))
    held = photos.Photo("p", "p", "s", tmp_path / "x.png", stamp=folder / "b.png")
    assert {path.stem for path in augmented_photos.free_cutouts([held])} == {"a", "c"}
