"""Files: written so that an interruption or a full disk leaves the old one as it was, and JSON read
from anybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwattn.errors import DwattnError


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str], error: type[DwattnError]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it takes its place when the block
    succeeds.

    Whatever happens inside the block (also Ctrl-C), no partial file is left and an old file stays.

    Args:
        path: the file to write.
        error: class to raise for an operating system error, with path and reason.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        if target.is_dir():
            raise error(
                f"Cannot write {str(target)!r}: it is a directory. Give the name of a file in it."
            )
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
        )
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        # mkstemp makes files private; the result gets the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except OSError as failure:
        raise error(f"Cannot write {str(target)!r}: {failure.strerror or failure}.") from failure
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for text of unknown origin.

    Raises:
        ValueError: not JSON, also where Python's parser gives up with a ``RecursionError``.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
