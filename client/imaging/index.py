"""What is known about each file already? An index kept beside the prepared images, brought up to date in one pass.

A file whose size and time are unchanged is not opened again; of the others the bytes are hashed and the header is
read, in parallel. Every few hundred files the index is saved, so a check that was broken off goes on where it was.
The index holds header values, patients' among them: it is private to the agent, like the images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from client.imaging import pool
from client.imaging.files import opened
from client.imaging.records import Reason, Tick, Unusable

Examine = Callable[[Path], Mapping[str, Any]]
"""The facts of one file's header as plain JSON values; raises `Unusable`."""

_VERSION = "1"
_SAVE_EVERY = 256
_CHUNK = 32


@dataclass(frozen=True)
class Entry:
    """One file as it was found: its facts, or the reason why it has none. `sha256` is of its bytes, "" if unread."""

    path: str
    size: int
    mtime: int
    sha256: str
    facts: Mapping[str, Any] | None
    reason: Reason | None = None
    detail: str = ""


def examined(
    root: Path,
    paths: Sequence[str],
    examine: Examine,
    store: Path | None,
    kind: str,
    tick: Tick,
    processes: int | None = None,
) -> list[Entry]:
    """Every file's entry, in the order of `paths`.

    Args:
        examine: reads one header; importable, so that other processes can run it.
        store: the index file; None keeps nothing.
        kind: what `examine` reads; an index made for another kind is made anew.
        processes: see `pool.processes_for`.
    """
    with _Store.open(store, kind) as kept:
        known = kept.all()
        found: dict[str, Entry] = {}
        new: list[str] = []
        for path in paths:
            entry = known.get(path)
            if entry is not None and _unchanged(root, entry):
                found[path] = entry
                tick()
            else:
                new.append(path)
        work = partial(_examined, root, examine)
        for entry in pool.each(work, new, _crashed, pool.processes_for(len(new), processes), _CHUNK):
            found[entry.path] = entry
            kept.put(entry)
            tick()
        kept.remove(known.keys() - found.keys())
    return [found[path] for path in paths]


def digest(entries: Sequence[Entry], table: Path | None) -> str:
    """Hex SHA-256 over each file's name and bytes, and the label table's: copying a folder does not change it."""
    total = hashlib.sha256(table.read_bytes() if table is not None else b"")
    for entry in entries:
        what = entry.sha256 or f"{entry.reason} {entry.size}"
        total.update(f"{entry.path}\0{what}\0".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _unchanged(root: Path, entry: Entry) -> bool:
    if not entry.sha256:
        return False
    try:
        info = opened(root, entry.path)
    except Unusable:
        return False
    return (info.st_size, info.st_mtime_ns) == (entry.size, entry.mtime)


def _examined(root: Path, examine: Examine, path: str) -> Entry:
    size = mtime = 0
    sha256 = ""
    try:
        info = opened(root, path)
        size, mtime = info.st_size, info.st_mtime_ns
        with (root / path).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return Entry(path, size, mtime, sha256, examine(root / path))
    except Unusable as bad:
        return Entry(path, size, mtime, sha256, None, bad.reason, bad.detail)
    except OSError as error:
        return Entry(path, size, mtime, sha256, None, Reason.NOT_REGULAR, type(error).__name__)


def _crashed(path: str) -> Entry:
    return Entry(path, 0, 0, "", None, Reason.CRASH)


class _Store:
    """The index file: SQLite, one row a file. One that cannot be used costs time, never a check."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection, self._unsaved, self._usable = connection, 0, True

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path | None, kind: str) -> Iterator[_Store]:
        connection = _connected(file, kind)
        store = cls(connection)
        try:
            yield store
        finally:
            with contextlib.suppress(sqlite3.Error):
                connection.commit()
            connection.close()

    def all(self) -> dict[str, Entry]:
        rows = self._connection.execute("SELECT path, size, mtime, sha256, facts, reason, detail FROM files")
        found = {}
        for path, size, mtime, sha256, facts, reason, detail in rows:
            name = path.decode("utf-8", "surrogateescape")
            parsed = json.loads(facts) if facts else None
            found[name] = Entry(name, size, mtime, sha256, parsed, Reason(reason) if reason else None, detail)
        return found

    def put(self, entry: Entry) -> None:
        facts = json.dumps(entry.facts) if entry.facts is not None else ""
        row = (_bytes(entry.path), entry.size, entry.mtime, entry.sha256, facts, entry.reason or "", entry.detail)
        if not self._usable:
            return
        try:
            self._connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self._unsaved += 1
            if self._unsaved >= _SAVE_EVERY:
                self._connection.commit()
                self._unsaved = 0
        except sqlite3.Error:  # the disk is full, or another check writes: this one goes on without
            self._usable = False

    def remove(self, paths: set[str]) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.executemany("DELETE FROM files WHERE path = ?", [(_bytes(path),) for path in paths])


def _connected(file: Path | None, kind: str) -> sqlite3.Connection:
    if file is not None:
        for _ in range(2):
            try:
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                file.touch(mode=0o600)
                return _prepared(sqlite3.connect(file, timeout=1.0, check_same_thread=False), kind)
            except (sqlite3.OperationalError, OSError):
                break  # in use, or the disk is full
            except (sqlite3.Error, ValueError):
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
    return _prepared(sqlite3.connect(":memory:"), kind)


def _prepared(connection: sqlite3.Connection, kind: str) -> sqlite3.Connection:
    connection.execute("CREATE TABLE IF NOT EXISTS made (kind TEXT)")
    found = connection.execute("SELECT kind FROM made").fetchall()
    if found != [(f"{_VERSION} {kind}",)]:
        connection.execute("DROP TABLE IF EXISTS files")
        connection.execute("DELETE FROM made")
        connection.execute("INSERT INTO made VALUES (?)", (f"{_VERSION} {kind}",))
    connection.execute(
        "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, sha256 TEXT, "
        "facts TEXT, reason TEXT, detail TEXT)"
    )
    _Store(connection).all()  # a damaged file shows here, and is made anew
    connection.commit()
    return connection


def _bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")
