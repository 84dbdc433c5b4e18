"""The CSV file of a training run, for plots."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from dwattn.errors import CheckpointError
from dwattn.files import write_atomically


class CsvLog:
    """A CSV file with one row per step; columns are those of the first row.

    Args:
        path: of the file, or None to write nothing.
        done: steps that the resumed run has done; later rows, written after its last checkpoint, are dropped.

    ``last`` is the step of the last row, 0 before the first one.
    """

    def __init__(self, path: Path | None, done: int = 0) -> None:
        self.path, self.last = path, 0
        self._columns: list[str] | None = None
        if path is None or not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            # A row that was cut short by a kill is not there yet.
            rows = [row for row in reader if _step(row) <= done and None not in row.values()]
            columns = list(reader.fieldnames or [])
        # A header without rows may have been cut short too, and comes again with the first row.
        lines = [columns, *(list(row.values()) for row in rows)] if rows else []
        with write_atomically(path, CheckpointError) as temporary:
            temporary.write_text("".join(map(_line, lines)), encoding="utf-8")
        if rows:
            self._columns, self.last = columns, _step(rows[-1])

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Append a row that begins with ``step``.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self.path is None:
            return
        columns = self._columns or list(row)
        lines = [] if self._columns else [columns]
        lines.append([_text(row.get(column, "")) for column in columns])
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write("".join(map(_line, lines)))
        except OSError as error:
            with contextlib.suppress(OSError):  # no half of a line for the next one to join
                os.truncate(self.path, size)
            raise CheckpointError(f"Cannot write {str(self.path)!r}: {error.strerror}.") from error
        self._columns, self.last = columns, int(row["step"])


def _step(row: Mapping[str, str]) -> int:
    text = row.get("step") or ""
    return int(text) if text.isdigit() else 1 << 62


def _text(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(row: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row)
    return line.getvalue()
