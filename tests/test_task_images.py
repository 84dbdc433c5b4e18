"""Where the benchmarks' photographs and labelled images come from, and that nothing is measured on what was fitted."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dwattn.demo import photos
from dwattn.errors import DataError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import more_photos  # noqa: E402
import task_images  # noqa: E402


def bundle(contents: dict[str, tuple[bytes, int]], version: int = 3) -> bytes:
    """A Qt resource bundle with a folder ``pictures`` of files ``{name: (stored bytes, flags)}``."""
    names, data = b"", b""
    head = 24 if version >= 3 else 20
    places: list[tuple[int, int, int]] = []
    folder_name = len(names)
    words = ["pictures", *contents]
    offsets = {}
    for word in words:
        offsets[word] = len(names)
        names += struct.pack(">HI", len(word), 0) + word.encode("utf-16-be")
    for word, (content, flags) in contents.items():
        places.append((offsets[word], flags, len(data)))
        data += struct.pack(">I", len(content)) + content
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
    tree += struct.pack(">IHIIQ", folder_name, 2, len(contents), 2, 0)
    for name, flags, place in places:
        tree += struct.pack(">IHHHIQ", name, flags, 0, 0, place, 0)
    sections = struct.pack(">IIII", version, head + len(data) + len(names), head, head + len(data))
    return b"qres" + sections + (b"\0" * 4 if version >= 3 else b"") + data + names + tree


@pytest.mark.parametrize("version", [2, 3])
def test_files_of_a_resource_bundle(version: int) -> None:
    packed = zlib.compress(b"text")
    found = dict(
        more_photos.files(
            bundle({"a.webp": (b"one", 0), "b.txt": (packed, 1), "ç.jpg": (b"two2", 0)}, version)
        )
    )
    assert found == {"/pictures/a.webp": b"one", "/pictures/ç.jpg": b"two2"}


def test_other_files_are_refused() -> None:
    with pytest.raises(DataError, match="no Qt resource bundle"):
        more_photos.files(b"PK\3\4")
    with pytest.raises(DataError, match="format 9 are unknown"):
        more_photos.files(b"qres" + struct.pack(">4I", 9, 0, 0, 0))


def test_icons_and_drawings_are_left_out(tmp_path: Path) -> None:
    def picture(side: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (side, side + 9)).save(file, "WEBP")
        return file.getvalue()

    contents = {"large.webp": (picture(240), 0), "icon.webp": (picture(64), 0), "a.svg": (b"<", 0)}
    for activity in more_photos.ACTIVITIES:
        (tmp_path / f"{activity}.rcc").write_bytes(bundle(contents))
    more_photos._extract(tmp_path, tmp_path / "photos")
    found = more_photos.photos(tmp_path / "photos")
    assert {p.path.name for p in found} == {f"{a}-large.webp" for a in more_photos.ACTIVITIES}
    assert photos.load(found)[0].shape == (len(found), 3, 224, 224)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        more_photos.photos(tmp_path / "empty")


@pytest.fixture
def garments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set in Fashion-MNIST's format, each picture of a grey of its own: 60 to train on, 40 to test on."""
    folder = tmp_path / task_images.FASHION
    folder.mkdir(parents=True)
    for part, first, count in (("train", 0, 60), ("t10k", 100, 40)):
        greys = np.arange(first, first + count, dtype=np.uint8)
        pictures = np.broadcast_to(greys[:, None, None], (count, 28, 28)).astype(np.uint8)
        for kind, sizes, content in (
            ("images-idx3", (count, 28, 28), pictures), ("labels-idx1", (count,), greys % 10),
        ):  # fmt: skip
            header = bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + content.tobytes())
    monkeypatch.setattr(photos, "data_folders", lambda: [tmp_path])


def shades(views: object) -> set[int]:
    """The greys of all pictures, as they were in the file."""
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (task_images.PIXEL_MEAN, task_images.PIXEL_STD)
    )
    found = [views[index, 0]["pixels"] * std + mean for index in range(len(views))]  # type: ignore[arg-type, index]
    return {round(float(pixels.mean()) * 255) for pixels in found}


@pytest.mark.usefixtures("garments")
def test_a_recipe_is_chosen_on_training_pictures_that_are_not_trained_on() -> None:
    train, test = task_images.fashion(30, 20, 14)
    same, validation = task_images.fashion(30, 20, 14, validation=True)
    assert shades(train) == shades(same)
    assert [len(shades(v)) for v in (train, test, validation)] == [30, 20, 20]
    assert shades(train) | shades(validation) <= set(range(60))
    assert not shades(train) & shades(validation)
    assert shades(test) <= set(range(100, 140))
    with pytest.raises(DataError, match="70 pictures were asked for; train holds 60"):
        task_images.fashion(50, 20, 14, validation=True)
    with pytest.raises(DataError, match="41 pictures were asked for; t10k holds 40"):
        task_images.fashion(10, 41, 14)


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_what_is_measured_on_shows_other_photos_and_if_wanted_other_cutouts(
    known: bool, validation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [[Path(f"{kind}-{i}.png") for i in range(9)] for kind in range(8)]
    pool = [photos.Photo(f"p{i}", "a package", f"scene {i}", Path(f"p{i}.jpg")) for i in range(27)]
    seen: list[tuple[set[str], list[set[Path]]]] = []

    def composed(backgrounds: list[photos.Photo], by_kind: list[list[Path]], *_: int) -> object:
        seen.append(({photo.name for photo in backgrounds}, [set(paths) for paths in by_kind]))
        return torch.zeros(1, 3, 14, 14), torch.zeros(1, 14, 14, dtype=torch.uint8)

    monkeypatch.setattr(task_images, "_composed", composed)
    monkeypatch.setattr(task_images, "_package", lambda *_: Path())
    monkeypatch.setattr(
        task_images, "_stamps", lambda *_: ([k[3:] for k in kinds], [k[:3] for k in kinds])
    )
    monkeypatch.setattr(photos, "pool", lambda *_: pool)
    task_images.cutouts(1, 1, 14, validation=validation, known=known)
    (fitted, fitted_cutouts), (kept, kept_cutouts) = seen
    assert not fitted & kept
    assert len(fitted) == (12 if validation else 18)
    assert len(kept) == (6 if validation else 9)
    for kind, one, other in zip(kinds, fitted_cutouts, kept_cutouts, strict=True):
        # Cut-outs of the test take no part while a recipe is chosen.
        allowed = set(kind[3:]) if validation else set(kind)
        if known:
            assert one == other == allowed
        else:
            assert one | other == allowed
            assert not one & other
