"""Where do large things rest? In files named by their SHA-256, written piece by piece and whole or not at all.

A blob is on the disk (file and folder fsynced) before its name is known to anyone, so a row that names it can be
trusted. Nothing here holds a blob in memory: a model of 1 GB passes through a buffer of a few megabytes.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from privacy.errors import ConsiliumError
from privacy.files import sync_folder

NAME = re.compile(r"[0-9a-f]{64}\Z")
PIECE = 4 << 20
_serial = itertools.count()


class BlobWriter:
    """A blob in the making. Leaving the `with` block without `commit` leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._part = folder / f".{os.getpid()}-{next(_serial)}.part"
        self._file: BinaryIO = open(self._part, "wb")  # noqa: SIM115 - closed by commit and by __exit__
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            ConsiliumError: the disk is full.
        """
        try:
            self._file.write(data)
        except OSError as error:
            raise _disk(error, self._folder) from error
        self._hash.update(data)
        self.size += len(data)

    def commit(self) -> str:
        """Make the blob durable and return its name, 64 hex digits.

        Raises:
            ConsiliumError: the disk is full.
        """
        name = self._hash.hexdigest()
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self._folder / name)
            sync_folder(self._folder)
        except OSError as error:
            raise _disk(error, self._folder) from error
        return name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            if kind is None:
                raise _disk(failure, self._folder) from failure
        finally:
            self._part.unlink(missing_ok=True)


class Blobs:
    """A folder of blobs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def writer(self) -> BlobWriter:
        """Start a blob; use it in a `with` block and end with `commit`."""
        return BlobWriter(self._folder)

    def put(self, data: bytes | Iterable[bytes] | Path) -> str:
        """Store bytes, pieces, or a copy of a file, and return the blob's name."""
        with self.writer() as writer:
            if isinstance(data, Path):
                with open(data, "rb") as file:
                    while piece := file.read(PIECE):
                        writer.write(piece)
            else:
                for piece in (data,) if isinstance(data, bytes) else data:
                    writer.write(piece)
            return writer.commit()

    def path(self, name: str) -> Path:
        """The file of a blob.

        Raises:
            ConsiliumError: it is not there.
        """
        path = self._folder / name
        if not NAME.match(name) or not path.is_file():
            raise ConsiliumError(
                "A stored file is missing", f"blob {name[:16]}", "Restore the folder `blobs` from your backup."
            )
        return path

    def size(self, name: str) -> int:
        """Bytes of a blob."""
        return self.path(name).stat().st_size

    def delete(self, name: str) -> None:
        """Remove a blob that no row names any more."""
        (self._folder / name).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove unfinished blobs of processes that are gone; returns how many."""
        count = 0
        for part in self._folder.glob(".*.part"):
            process = part.name[1:].split("-")[0]
            if process.isdigit() and not Path(f"/proc/{process}").exists():
                part.unlink(missing_ok=True)
                count += 1
        return count


def _disk(error: OSError, folder: Path) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ConsiliumError(
            "The coordinator's disk is full",
            str(folder),
            "Free space, then `consilium-coordinator study resume`: nothing that was finished is lost.",
        )
    return error
