"""Files written so that an interruption or a full disk leaves the old one as it was; strict JSON; results on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dwattn.errors import DwattnError

EXIT_TERMINATED = 143


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str], error: type[DwattnError]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it takes its place when the block
    succeeds. Of a link, the file that it points to is written.

    Whatever happens inside the block (also Ctrl-C), no partial file is left and an old file stays.

    Args:
        path: the file to write.
        error: class to raise for an operating system error, with path and reason.
    """
    temporary: Path | None = None
    try:
        target = target_file(path, error)
        # Known before the file is there: Ctrl-C may come between the two.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600))
        yield temporary
        _flush(temporary)
        # It was private until now; the result gets the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except OSError as failure:
        raise _cannot_write(path, error, failure) from failure
    finally:
        if temporary is not None:
            # It may not be there: where it could not be made there was an error.
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: dict[str, Any],
    error: type[DwattnError],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file as :func:`write_atomically` does.

    Raises:
        error: it cannot be written, with path and reason.
    """
    from safetensors import SafetensorError  # imported here: dwattn-deploy does without
    from safetensors.torch import save_file

    with write_atomically(path, error) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as failure:  # which it also makes of a full disk
            raise error(f"Cannot write {os.fspath(path)!r}: {failure}.") from failure


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that temporary files are removed; then the process ends with 143.

    Neither becomes another error, whatever a library inside makes of it.
    """

    came: BaseException | None = None

    def stop(number: int, _: object) -> None:
        nonlocal came
        came = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(EXIT_TERMINATED)
        raise came

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What the caller handles or ignores stays so.
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    taken = {number: how for number, how in usual.items() if signal.getsignal(number) == how}
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if came is not None:  # such as safetensors' ValueError for a Ctrl-C amid its reading
            raise type(came)(*came.args) from error
        raise
    finally:
        for number, how in taken.items():
            signal.signal(number, how)


def target_file(path: str | os.PathLike[str], error: type[DwattnError]) -> Path:
    """The file to write, with links followed.

    Raises:
        error: the name is that of a folder, or of a device, pipe or socket, which writing would replace by a file.
    """
    target = Path(path)
    if target.is_dir():
        raise error(
            f"Cannot write {str(target)!r}: it is a directory. Give the name of a file in it."
        )
    if target.exists() and not target.is_file():
        raise error(
            f"Cannot write {str(target)!r}: it is a device, pipe or socket. Give the name of a file."
        )
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def require_writable(
    path: str | os.PathLike[str],
    error: type[DwattnError],
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Check before long work that :func:`write_atomically` can write there; no file is left.

    Args:
        inputs: files that the work reads, None for those that were not given.

    Raises:
        error: the folder is missing or refuses files, something that is no file has that name, or it is an input.
    """
    require_apart(path, error, inputs)
    try:
        tempfile.TemporaryFile(dir=target_file(path, error).parent).close()
    except OSError as failure:
        raise _cannot_write(path, error, failure) from failure


def make_folder(path: Path, error: type[DwattnError]) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        error: it cannot be made, with path and reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise error(f"Cannot make the folder {path}: {failure.strerror}.") from failure


def require_apart(
    path: str | os.PathLike[str],
    error: type[DwattnError],
    inputs: Iterable[str | os.PathLike[str] | None],
) -> None:
    """Refuse to write a file that is also read, under whatever name: its contents would be lost.

    Raises:
        error: it is one of ``inputs``.
    """
    target = os.path.realpath(path)
    if any(file is not None and os.path.realpath(file) == target for file in inputs):
        raise error(
            f"Cannot write {os.fspath(path)!r}: it is also read, and what it holds would be lost. Give another name."
        )


def _cannot_write(
    path: str | os.PathLike[str], error: type[DwattnError], failure: OSError
) -> DwattnError:
    return error(f"Cannot write {os.fspath(path)!r}: {failure.strerror or failure}.")


@contextlib.contextmanager
def sole_writer(
    folder: str | os.PathLike[str], error: type[DwattnError], patience: float = 10.0
) -> Iterator[None]:
    """Keep other processes from writing into ``folder`` during the block: each would remove the other's unfinished files.

    The lock is on the folder itself, leaves no file and ends with the process, however that ends. There is none where
    the system or the file system has no such locks.

    Args:
        folder: an existing folder.
        error: class to raise where another process holds it.
        patience: seconds to wait for it; PyTorch's workers look every five seconds whether their parent was killed.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows, or a folder that may not be read
        yield
        return
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise error(
                        f"Another process is at work in {str(folder)!r}; let it finish, or give another folder."
                    ) from None
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for text from an untrusted source.

    Raises:
        ValueError: not JSON, also where Python's parser gives up with a ``RecursionError``; an object with a key twice,
            of which Python would drop one.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def strict_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Indented JSON that any parser reads: null for NaN and infinity, which JSON does not have.

    Args:
        default: as for ``json.dumps``.
    """
    finite = json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """A block that prints a result to stdout; fails if the result could not be written.

    Raises:
        DwattnError: it cannot be written, for example to a full disk.
        SystemExit: nobody reads it any longer (``| head``).
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as failure:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(failure, BrokenPipeError):
            raise SystemExit(1) from None
        raise DwattnError(f"Cannot write the result to stdout: {failure.strerror}.") from failure


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
