"""Folders of labelled images: classes by subfolder, masks beside images, and what is wrong with them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dwattn.errors import DataError
from dwattn.finetune import LabelledViews, MaskedViews, MaskFolder, labelled_folder


def save_image(path: Path, size: tuple[int, int] = (20, 16), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_mask(
    path: Path, value: int = 1, size: tuple[int, int] = (20, 16), mode: str = "L"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[:, size[0] // 2 :] = value
    Image.fromarray(mask).convert(mode).save(path)


def test_a_folder_of_masks(tmp_path: Path) -> None:
    for index in range(3):
        save_image(tmp_path / "images" / "a" / f"{index}.jpg", seed=index)
        save_mask(tmp_path / "masks" / "a" / f"{index}.png", 255 if index == 2 else 1)
    data = MaskFolder(tmp_path / "images", tmp_path / "masks", (8, 8), 2, mask_size=(4, 4))
    item = data[0, 0]
    assert item["pixels"].shape == (3, 8, 8)
    assert item["mask"].tolist() == [[0, 0, 1, 1]] * 4
    assert set(data[2, 0]["mask"].unique().tolist()) == {0, 255}


@pytest.mark.parametrize(("bits", "highest"), [(2, 3), (4, 15)])
def test_masks_of_few_bits_keep_their_classes(bits: int, highest: int, tmp_path: Path) -> None:
    """Readers of images spread the greys of such files over 0 to 255, where the last would count as no class."""
    save_image(tmp_path / "images" / "0.jpg", (8, 1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels = [0, 1, 2, 3, 0, 0, highest, highest]
    row = int("".join(f"{p:0{bits}b}" for p in pixels), 2).to_bytes(bits, "big")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )
    data = MaskFolder(tmp_path / "images", tmp_path / "masks", (1, 8), highest + 1)
    assert data[0, 0]["mask"].tolist() == [pixels]


def test_as_many_classes_as_a_byte_has_values() -> None:
    masks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert MaskedViews(torch.zeros(1, 3, 16, 16), masks, 255)[0, 0]["mask"].max() == 255
    with pytest.raises(DataError, match="255 marks pixels without a class, so that 256 classes"):
        MaskedViews(torch.zeros(1, 3, 16, 16), masks, 256)


def test_faults_of_masks_are_named(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"

    def build() -> MaskFolder:
        return MaskFolder(images, masks, (8, 8), 2)

    save_image(images / "0.jpg")
    save_image(images / "1.jpg")
    with pytest.raises(DataError, match="no folder of masks"):
        build()
    save_mask(masks / "0.png")
    with pytest.raises(DataError, match=r"1 of 2 images have no mask: .*1\.png"):
        build()
    save_mask(masks / "1.png", size=(16, 20))
    with pytest.raises(DataError, match=r"1\.png has 16 x 20 pixels.*20 x 16"):
        build()
    save_mask(masks / "1.png", value=7)
    with pytest.raises(DataError, match=r"1\.png have class ids \[7\]; with 2 classes"):
        build()
    save_mask(masks / "1.png", mode="RGB")
    with pytest.raises(DataError, match=r"1\.png has the mode RGB"):
        build()
    (masks / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        build()


def test_faults_of_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        labelled_folder(tmp_path / "none", (8, 8))
    save_image(tmp_path / "train" / "cat" / "0.jpg")
    with pytest.raises(DataError, match="1 class folders"):
        labelled_folder(tmp_path / "train", (8, 8))
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match="dog holds no images"):
        labelled_folder(tmp_path / "train", (8, 8))
    save_image(tmp_path / "train" / "dog" / "1.png")
    for hidden in (".cache/0.png", "dog/.1.png"):  # of file managers and notebooks
        save_image(tmp_path / "train" / hidden)
    data, names = labelled_folder(tmp_path / "train", (8, 8))
    assert (names, len(data)) == (["cat", "dog"], 2)
    assert [int(data[i, 0]["label"]) for i in range(2)] == [0, 1]
    save_image(tmp_path / "test" / "cow" / "0.jpg")
    with pytest.raises(DataError, match="no class of the training images: cow"):
        labelled_folder(tmp_path / "test", (8, 8), classes=names)
    with pytest.raises(DataError, match=r"class ids \[-1, 3\]; with 3 classes they are 0 to 2"):
        LabelledViews(torch.zeros(3, 3, 8, 8), [0, 3, -1], 3)
    with pytest.raises(DataError, match=r"labels of shape \(2,\)"):
        LabelledViews(torch.zeros(3, 3, 8, 8), [0, 1], 3)
