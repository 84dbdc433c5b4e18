"""Fetch the photos in Debian's packages without installing them: ``python -m dwattn.demo.debian
FOLDER``.

Needs ``apt-get`` and ``dpkg`` (Debian, Ubuntu), no root. Only the image files the demo can use are
unpacked (38 MB); the downloaded packages (265 MB) are deleted. Best effort: without it the demo
uses the photos in Python packages. opencv-doc is Apache-2.0, the tuxpaint packages are GPL-2: the
files are used where they lie and never become part of anything dwattn writes except thumbnails in a
report of yours.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from dwattn.demo.photos import LOCAL_FOLDER, OPENCV, STAMPS, TEMPLATES
from dwattn.errors import DataError

PACKAGES = {"opencv-doc": OPENCV, "tuxpaint-data": TEMPLATES, "tuxpaint-stamps-default": STAMPS}
_IMAGES = (".jpg", ".jpeg", ".png")
_DOWNLOAD_SECONDS = 300


def missing(folder: Path) -> list[str]:
    """Packages whose photos are neither installed nor unpacked in ``folder``."""
    roots = (folder, Path("/"))
    return [
        name
        for name, inside in PACKAGES.items()
        if not any((root / inside).is_dir() for root in roots)
    ]


def fetch(folder: Path) -> list[str]:
    """Download what is missing and unpack its images under ``folder``; returns the packages that
    were added.

    Raises:
        DataError: this is not a Debian-like system, or a download failed.
    """
    wanted = missing(folder)
    if not wanted:
        return []
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"{tool} was not found: {', '.join(wanted)} can only be fetched on Debian or "
                f"Ubuntu."
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        for name in wanted:
            _unpack(_download(name, work), PACKAGES[name], folder)
    return wanted


def _download(package: str, work: Path) -> Path:
    """``apt-get download``; with package lists of our own if the system's are empty, which needs no
    root either.
    """
    if _apt(["download", package], work) != 0:
        lists = work / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        private = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={work}"]
        if (
            _apt([*private, "update"], work) != 0
            or _apt([*private, "download", package], work) != 0
        ):
            raise DataError(
                f"apt-get could not download {package}; check its package sources and the network."
            )
    found = sorted(work.glob(f"{package}_*.deb"))
    if not found:
        raise DataError(f"apt-get download {package} left no package file.")
    return found[-1]


def _apt(arguments: list[str], work: Path) -> int:
    try:
        done = subprocess.run(
            ["apt-get", "-q", *arguments],
            cwd=work,
            capture_output=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"apt-get {' '.join(arguments)} took longer than {_DOWNLOAD_SECONDS} s."
        ) from error
    return done.returncode


def _unpack(package: Path, inside: str, folder: Path) -> None:
    """Unpack the images below ``inside``; renamed into place at the end, so that a half is never
    taken for all.
    """
    staging = package.with_suffix(".unpacked")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        with tarfile.open(fileobj=reader.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and _is_wanted(name, inside):
                    target = staging / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    with content, target.open("wb") as out:
                        shutil.copyfileobj(content, out)
    package.unlink()
    if reader.returncode != 0 or not (staging / inside).is_dir():
        raise DataError(f"{package.name} has no images below {inside}.")
    (folder / inside).parent.mkdir(parents=True, exist_ok=True)
    (staging / inside).rename(folder / inside)


def _is_wanted(name: str, inside: str) -> bool:
    return name.startswith(f"{inside}/") and name.endswith(_IMAGES) and ".." not in Path(name).parts


def main() -> int:
    """Command line; never fails a build, because the demo works without these photos."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else LOCAL_FOLDER)
    try:
        added = fetch(folder)
    except (DataError, OSError) as error:
        print(f"Photos from Debian packages are left out: {error}")
        return 0
    print(
        f"Photos of {', '.join(added)} are in {folder}."
        if added
        else "The photos of Debian's packages are there."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
