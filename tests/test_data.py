"""Everything that may be passed as images, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dwattn.data import count_images, is_reiterable, iterate, require_reiterable
from dwattn.errors import DataError
from dwattn.finetune.labelled import labelled_folder
from dwattn.image_files import image_folder, require_readable

IMAGES = torch.arange(10 * 3 * 4 * 6, dtype=torch.float32).view(10, 3, 4, 6)
LABELS = torch.arange(10)


def read(data: Any, **options: Any) -> tuple[list[int], Tensor]:
    """Batch sizes and all pixels."""
    batches = list(iterate(data, **options))
    return [b.size for b in batches], torch.cat([b.pixels for b in batches if b.pixels is not None])


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (IMAGES, [4, 4, 2]),
        (list(IMAGES), [4, 4, 2]),
        (tuple(IMAGES), [4, 4, 2]),
        (list(zip(IMAGES, LABELS.tolist(), strict=True)), [4, 4, 2]),
        ([IMAGES[:7], IMAGES[7:]], [7, 3]),
        ([IMAGES[:2], *IMAGES[2:7], IMAGES[7:]], [2, 4, 1, 3]),
        ([(IMAGES[:7], LABELS[:7]), [IMAGES[7:], LABELS[7:]]], [7, 3]),
        ([{"pixel_values": IMAGES[:7], "labels": LABELS[:7]}, {"x": IMAGES[7:]}], [7, 3]),
        (TensorDataset(IMAGES, LABELS), [4, 4, 2]),
        (DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3), [3, 3, 3, 1]),
        (DataLoader(IMAGES, batch_size=5), [5, 5]),  # type: ignore[arg-type]
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_forms_give_all_images(data: Any, sizes: list[int]) -> None:
    got, pixels = read(data, batch_size=4)
    assert got == sizes
    assert torch.equal(pixels, IMAGES)
    again, _ = read(data, batch_size=4)
    assert again == sizes
    assert is_reiterable(data)
    cut, pixels = read(data, batch_size=4, num_images=8)
    assert sum(cut) == 8
    assert torch.equal(pixels, IMAGES[:8])


def test_one_shot_iterators() -> None:
    def generate() -> Any:
        yield from IMAGES.split(4)

    assert read(generate())[0] == [4, 4, 2]
    for data in (generate(), iter([IMAGES]), map(str, "ab")):
        assert not is_reiterable(data)
        with pytest.raises(DataError, match=r"one-shot iterator .* because two passes are needed"):
            require_reiterable(data, "two passes are needed")
    require_reiterable([IMAGES], "two passes are needed")


class Recorder(nn.Module):
    """Keeps its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def test_how_the_model_is_called() -> None:
    model = Recorder()
    args, kwargs = next(iterate([(IMAGES, LABELS)])).call(model)
    assert torch.equal(args[0], IMAGES)
    assert (len(args), kwargs) == (1, {})
    inputs = {"pixel_values": IMAGES, "labels": LABELS, "interpolate_pos_encoding": True}
    batch = next(iterate([inputs], num_images=4, dtype=torch.float64))
    args, kwargs = batch.call(model)
    assert args == ()
    assert sorted(kwargs) == ["interpolate_pos_encoding", "pixel_values"]
    assert kwargs["pixel_values"].dtype == torch.float64
    assert torch.equal(kwargs["pixel_values"].float(), IMAGES[:4])
    text = next(iterate([{"pixel_values": IMAGES, "input_ids": LABELS[:, None]}], num_images=4))
    _, kwargs = text.call(model)
    assert kwargs["input_ids"].dtype == torch.int64
    assert len(kwargs["input_ids"]) == 4
    assert "labels" in inputs


def with_bad_pixel(value: float) -> Tensor:
    images = IMAGES.clone()
    images[5, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IMAGES[:0], "holds no images"),
        ([], "holds no images"),
        (iter([]), "holds no images"),
        (IMAGES[0], r"4 dimensions \(N, 3, H, W\), got shape \(3, 4, 6\).*images\[None\]"),
        (torch.zeros(3), "4 dimensions"),
        ([IMAGES[0, 0]], r"shape \(4, 6\); expected \(B, 3, H, W\)"),
        ([IMAGES[:0]], "is empty"),
        ([IMAGES.byte()], "dtype torch.uint8.*divide by 255"),
        ([IMAGES[0], IMAGES[1, :, :3]], r"\(3, 3, 6\), \(3, 4, 6\)"),
        (with_bad_pixel(float("nan")), r"Images \[1\] of a batch \(after 4 images\).*NaN"),
        (with_bad_pixel(float("-inf")), "infinite"),
        (["a.png"], "is a str; expected a tensor"),
        ([("a.png", 3)], "starts with str"),
        ([()], "starts with nothing"),
        ([{"labels": LABELS}], r"no tensors; its keys are \['labels'\]"),
        ([{"pixel_values": IMAGES[0]}], r"shape \(3, 4, 6\)"),
        ("photos", r"got str \('photos'\); read a folder with dwattn\.image_files\.image_folder"),
        (Path("photos"), "image_folder"),
        ({"pixel_values": IMAGES}, r"put one dictionary .* into a list"),
        (7, "got int"),
        (None, "got NoneType"),
        ([None], "is a NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(iterate(data, batch_size=4))


def test_bad_numbers() -> None:
    for options in ({"batch_size": 0}, {"num_images": 0}, {"num_images": -2}):
        name, value = next(iter(options.items()))
        with pytest.raises(DataError, match=f"{name}={value} must be at least 1"):
            list(iterate(IMAGES, **options))


def test_nothing_is_read_beyond_num_images() -> None:
    taken = []

    def generate() -> Any:
        for part in IMAGES.split(2):
            taken.append(len(part))
            yield part

    assert read(generate(), num_images=4)[0] == [2, 2]
    assert taken == [2, 2]


def test_counting_for_progress_bars() -> None:
    assert count_images(IMAGES) == 10
    assert count_images([IMAGES[:7], IMAGES[7]]) == 8
    assert count_images([(IMAGES, LABELS)]) == 10
    assert count_images(DataLoader(TensorDataset(IMAGES), batch_size=3)) == 10
    assert count_images(iter([IMAGES])) is None
    assert count_images(["a"]) is None


# --- folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    for index, (mode, name) in enumerate(
        [("RGB", "b.png"), ("L", "a.PNG"), ("RGBA", "more/c.png"), ("P", "more/d.png")]
    ):
        Image.new("RGB", (20 + index, 10), (40 * index, 100, 200)).convert(mode).save(
            tmp_path / name
        )
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder(photos: Path) -> None:
    folder = image_folder(photos, (8, 6), batch_size=3)
    assert [file.name for file in folder.files] == ["a.PNG", "b.png", "c.png", "d.png"]
    assert len(folder) == 2
    assert count_images(folder) == 4
    for _ in range(2):
        assert [tuple(batch.shape) for batch in folder] == [(3, 3, 8, 6), (1, 3, 8, 6)]
    assert read(folder, num_images=2)[0] == [2]
    assert len(image_folder(photos, 8, limit=3).files) == 3
    assert image_folder(photos / "b.png", 8).files == [photos / "b.png"]


def test_pixels_are_resized_cropped_and_normalised(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 51))
    image.paste((0, 255, 0), (0, 0, 8, 20))  # cut off by the crop of the middle 20 columns
    image.save(tmp_path / "a.png")
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.5, 0.2)
    pixels = next(iter(image_folder(tmp_path, 10, mean, std)))[0]
    expected = torch.tensor([1.0, -0.5, 0.5])[:, None, None].expand(3, 10, 10)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.03)  # bicubic rounds to levels


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_grey_values_of_16_bits_are_scaled(ending: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / f"a.{ending}")
    pixels = next(iter(image_folder(tmp_path, 4, (0, 0, 0), (1, 1, 1))))[0]
    expected = torch.linspace(0, 1, 16).view(4, 4).expand(3, 4, 4)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.full((4, 4), 0.5, np.float32), r"from 0\.5 to 0\.5 \(mode F\)"),
        (np.full((4, 4), 70000, np.int32), r"from 70000 to 70000 \(mode I\)"),
    ],
)
def test_grey_values_of_unknown_range_are_refused(values: Any, told: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=rf"a\.tiff has grey values {told}.*8 or 16 bits"):
        list(image_folder(tmp_path, 4))


def test_damaged_exif_leaves_the_image_readable(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[Base.Orientation], exif[Base.XResolution] = 6, 72.0
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01")  # bytes, no fraction
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "a.jpg", exif=damaged)
    assert next(iter(image_folder(tmp_path, 4))).shape == (1, 3, 4, 4)


def test_a_limit_takes_images_of_all_subfolders(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")
    files = [str(f.relative_to(tmp_path)) for f in image_folder(tmp_path, 4, limit=6).files]
    assert files == ["a/0.png", "a/2.png", "b/0.png", "b/2.png", "c/0.png", "c/2.png"]
    assert len(image_folder(tmp_path, 4, limit=100).files) == 12


def test_links_to_folders_are_followed_and_hidden_files_are_not_read(photos: Path) -> None:
    images = photos / "linked"
    images.mkdir()
    (images / "there").symlink_to(photos / "more", target_is_directory=True)
    (photos / "more" / "back").symlink_to(images, target_is_directory=True)
    (photos / "more" / "self").symlink_to(photos / "more", target_is_directory=True)
    (photos / "more" / "._c.png").write_bytes(b"what macOS keeps beside a file")
    shutil.copytree(photos / "more", images / ".trash", symlinks=True)
    files = [str(file.relative_to(images)) for file in image_folder(images, 8).files]
    assert files == ["there/c.png", "there/d.png"]


def test_folders_that_cannot_be_read(photos: Path) -> None:
    with pytest.raises(DataError, match="There is no folder or image"):
        image_folder(photos / "missing", 8)
    with pytest.raises(DataError, match="holds no images"):
        image_folder(photos / "notes.txt", 8)
    with pytest.raises(DataError, match=r"size=\(0, 8\)"):
        image_folder(photos, (0, 8))
    (photos / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        list(image_folder(photos, 8))
    Image.effect_noise((40, 40), 80).save(photos / "broken.png")
    (photos / "broken.png").write_bytes((photos / "broken.png").read_bytes()[:800])
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        list(image_folder(photos, 8))


def test_a_folder_that_may_not_be_read_is_not_left_out(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "secret").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"The folder .*secret cannot be read: Permission denied"):
        image_folder(photos, 8)
    with pytest.raises(DataError, match=r"The folder .*secret cannot be read: Permission denied"):
        labelled_folder(photos / "secret", (8, 8))


def test_damaged_files_are_found_before_work_begins(photos: Path) -> None:
    whole = image_folder(photos, 8)
    require_readable(whole.files)
    noise = Image.effect_noise((400, 300), 80)
    for mode, kind in (("L", "jpg"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGB", "png")):
        noise.convert(mode).save(photos / f"{mode}-whole.{kind}")
    noise.convert("RGB").save(photos / "late.jpg", progressive=True)
    Image.new("RGB", (3, 2)).save(photos / "tiny.jpg")
    require_readable(image_folder(photos, 8).files)
    for name in ("late.jpg", "L-whole.jpg"):
        data = (photos / name).read_bytes()
        (photos / name).write_bytes(data[: len(data) * 98 // 100])
    files = image_folder(photos, 8).files
    seen = []
    with pytest.raises(DataError) as caught:
        require_readable(files, lambda found: (seen.append(one) or one for one in found))
    assert len(seen) == len(files)
    assert str(caught.value).startswith(f"2 of {len(files)} images cannot be read. ")
    assert all(
        f"{name} cannot be read as an image" in str(caught.value)
        for name in ("late.jpg", "L-whole.jpg")
    )
    (photos / "late.jpg").unlink()
    with pytest.raises(
        DataError, match=r"^\S*L-whole\.jpg cannot be read.*Remove or replace the file\.$"
    ):
        require_readable(image_folder(photos, 8).files)
