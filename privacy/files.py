"""How is a file written whole or not at all? A full disk or a kill leaves the old one, or none; never a half."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Where to write the new content of a file; it takes its place, durably, when the block ends well.

    A link is followed. What is there and is no file (a device, a pipe) is written to as it is.

    Args:
        mode: permissions of the new file, less the umask.

    Raises:
        OSError: it names `path`, not the temporary file beside it, and nothing remains of that.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
        yield part
        _sync(part)
        os.replace(part, target)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.errno in FULL or error.filename in {None, part, str(part)}):
            raise _named(error, path) from error
        raise
    sync_folder(target.parent)


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole, durably: a crash leaves the old one or the new one. Raises as `replacing`."""
    with replacing(path, mode) as part:
        part.write_bytes(data)


def write_once(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that must not be there yet, durably; nothing remains of it when that fails.

    Raises:
        FileExistsError: it is there; it is left alone.
        OSError: anything else; it names the file.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _named(error, path) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))
