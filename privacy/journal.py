"""What has left, in order, without gaps? An append-only journal of JSON lines, each holding the hash of the one before.

A line is on the disk (fsync) before `append` returns, so what the journal does not name has not left. A torn last
line, from a crash in the middle of a write, is cut off when the journal is opened: nothing was released under it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from privacy.canonical import canonical
from privacy.errors import ConsiliumError, Refusal, RefusalCode

GENESIS = "0" * 64
RESERVE = 1 << 18


class Journal:
    """One file, one writer. `head` is the hash of the last line, `count` the number of lines."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path`.

        Raises:
            ConsiliumError: an earlier line was changed or removed.
        """
        self._path = path
        self._reserve = path.with_suffix(".reserve")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.count, self.head, good = 0, GENESIS, 0
        if path.exists():
            for entry, end in _lines(path):
                self.count, self.head, good = entry["seq"], entry["hash"], end
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(self._file, good)
        os.lseek(self._file, good, os.SEEK_SET)
        self._size = good
        self._keep_reserve()

    def append(self, entry: dict[str, Any]) -> str:
        """Write one entry durably and return its hash.

        Raises:
            Refusal: DISK_FULL when not even the reserve suffices; then nothing may leave.
        """
        with self._lock:
            body = {**entry, "seq": self.count + 1, "prev": self.head}
            digest = hashlib.sha256(canonical(body)).hexdigest()
            line = canonical({**body, "hash": digest}) + b"\n"
            try:
                self._write(line)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                self._reserve.unlink(missing_ok=True)
                self._rewind()
                try:
                    self._write(line)
                except OSError as again:
                    self._rewind()
                    raise Refusal(RefusalCode.DISK_FULL) from again
            self.count, self.head, self._size = self.count + 1, digest, self._size + len(line)
            return digest

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)

    def _rewind(self) -> None:
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)

    def _keep_reserve(self) -> None:
        """Hold some disk back, so that a full disk can still be said, and recorded, in a refusal."""
        try:
            with open(self._reserve, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE)
        except OSError:
            self._reserve.unlink(missing_ok=True)


def verify(path: Path) -> int:
    """Check every line of a journal and return their number.

    Raises:
        ConsiliumError: the chain is broken; the message names the line.
    """
    count = 0
    for entry, _ in _lines(path):
        count = entry["seq"]
    return count


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a verified journal, oldest first."""
    for entry, _ in _lines(path):
        yield entry


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries with the file offset after each; stops before a torn last line."""
    head, end, number = GENESIS, 0, 0
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            number += 1
            try:
                entry = json.loads(raw)
                body = {key: value for key, value in entry.items() if key != "hash"}
                sound = (
                    entry["hash"] == hashlib.sha256(canonical(body)).hexdigest()
                    and entry["prev"] == head
                    and entry["seq"] == number
                )
            except (ValueError, TypeError, KeyError, AttributeError):
                sound = False
            if not sound:
                raise ConsiliumError(
                    "The journal was changed",
                    f"{path}, line {number}",
                    "Keep the file as evidence, find out who wrote to it, and restore the last good copy.",
                )
            head, end = entry["hash"], end + len(raw)
            yield entry, end
