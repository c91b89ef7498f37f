"""How does a coordinator survive the loss of its machine? One encrypted file with keys, registry and blobs.

The file is a head and sealed pieces. Head: magic, salt, passphrase check. The key comes from the passphrase by scrypt
(RFC 7914; N = 2^17, r = 8, p = 1). Each piece of 1 MiB is sealed by AES-256-GCM under the head; its nonce is the
piece's number and whether it is the last, so pieces cannot be changed, moved, repeated or cut off (STREAM: Hoang,
Reyhanitabar, Rogaway, Vizár, CRYPTO 2015). Inside is a tar archive of plain files.
"""

from __future__ import annotations

import hmac
import io
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from sqlalchemy.engine import make_url

from privacy.errors import ConsiliumError
from privacy.files import sync_folder
from server.home import CoordinatorHome

MAGIC = b"consilium backup 1\n\0"
PIECE = 1 << 20
TAG = 16
SALT, CHECK = 32, 16
HEAD = len(MAGIC) + SALT + CHECK
SHORTEST = 12
FILES = ("identity.key", "consortium.json", "audit.jsonl")
FOLDERS = ("tls", "studies")
CONFIG, REGISTRY, BLOBS = "coordinator.toml", "registry.db", "blobs"


@dataclass(frozen=True)
class Content:
    """What a backup holds: number of files, bytes before sealing, and whether the registry is among them."""

    files: int
    bytes: int
    registry: bool


def backup(home: CoordinatorHome, out: Path, passphrase: str) -> Content:
    """Write a backup of `home` to the new file `out`, durably, and read it back before it gets its name.

    May run while the coordinator serves. A registry in PostgreSQL is not included: its own tools back it up.

    Raises:
        ConsiliumError: no coordinator here, the passphrase is too short, or the file exists.
        OSError: the disk is full or not writable; nothing remains at `out`.
    """
    config = home.config()
    if len(passphrase) < SHORTEST:
        raise ConsiliumError(
            "The passphrase is too short",
            f"{len(passphrase)} characters",
            f"Use at least {SHORTEST}; the file holds the coordinator's keys.",
        )
    if out.exists():
        raise ConsiliumError("The file exists already", str(out), "Name another one, or remove it first.")
    part = out.with_name(f".{out.name}.part")
    salt = os.urandom(SALT)
    key, check = _derive(passphrase, salt)
    head = MAGIC + salt + check
    files = size = 0
    with ExitStack() as stack:
        stack.callback(part.unlink, missing_ok=True)
        home.run.mkdir(exist_ok=True, mode=0o700)
        stage = home.run / f"backup-{os.getpid()}"
        stage.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, stage, ignore_errors=True)
        registry = _snapshot(home, home.registry_url(config), stage)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(head)
            with closing(_Sealer(file, key, head)) as sealer, tarfile.open(fileobj=sealer, mode="w|") as archive:
                for name, path in _members(home, stage):
                    size += _add(archive, name, path)
                    files += 1
            file.flush()
            os.fsync(file.fileno())
        with open(part, "rb") as file:
            for _ in _open_pieces(file, passphrase, part):
                pass
        os.replace(part, out)
        sync_folder(out.resolve().parent)
    return Content(files, size, registry)


def restore(home: CoordinatorHome, source: Path, passphrase: str) -> Content:
    """Make the empty folder `home` the coordinator that `source` holds; either wholly or not at all.

    Raises:
        ConsiliumError: the folder is not empty, the passphrase is wrong, or the file is damaged or not a backup.
        OSError: the disk is full or not writable; the folder is empty again.
    """
    root = home.root
    made = not root.exists()
    if not made and (not root.is_dir() or [p for p in root.iterdir() if p.name != "lost+found"]):
        raise ConsiliumError(
            "The folder is not empty", str(root), "Restore into a new folder: `--home NEW restore FILE`."
        )
    files = size = 0
    with ExitStack() as undo:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if made:
            undo.callback(_remove_if_empty, root)
        stage = root / ".restore"
        stage.mkdir(mode=0o700)
        undo.callback(shutil.rmtree, stage, ignore_errors=True)
        with open(source, "rb") as file:
            stream = _Opener(_open_pieces(file, passphrase, source))
            try:
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    for member in archive:
                        size += _extract(archive, member, stage)
                        files += 1
                stream.drain()
            except tarfile.TarError as error:
                raise _damaged(source) from error
        registry = _examine(stage, source)
        names = sorted((path.name for path in stage.iterdir()), key=lambda name: name == CONFIG)
        for name in names:  # the settings come last: without them there is no coordinator here
            undo.callback(_remove, root / name)
            os.replace(stage / name, root / name)
        stage.rmdir()
        sync_folder(root)
        undo.pop_all()
    home.make_folders()
    return Content(files, size, registry)


def _derive(passphrase: str, salt: bytes) -> tuple[bytes, bytes]:
    material = Scrypt(salt=salt, length=32 + CHECK, n=1 << 17, r=8, p=1).derive(passphrase.encode())
    return material[:32], material[32:]


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


class _Sealer(io.RawIOBase):
    """A stream that seals what is written, piece by piece. `close` seals the last piece; the file stays open."""

    def __init__(self, file: BinaryIO, key: bytes, head: bytes) -> None:
        self._file, self._cipher, self._head = file, AESGCM(key), head
        self._pending, self._number = bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._pending += data
        while len(self._pending) > PIECE:
            self._seal(bytes(self._pending[:PIECE]), last=False)
            del self._pending[:PIECE]
        return len(data)

    def close(self) -> None:
        try:
            if not self.closed:
                self._seal(bytes(self._pending), last=True)
        finally:
            super().close()

    def _seal(self, piece: bytes, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._number, last), piece, self._head))
        self._number += 1


class _Opener(io.RawIOBase):
    """A readable stream over opened pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._pending = pieces, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        parts = []
        while size:
            if not self._pending and not (piece := next(self._pieces, b"")):
                break
            self._pending = self._pending or piece
            taken = self._pending if size < 0 else self._pending[:size]
            self._pending = self._pending[len(taken) :]
            parts.append(taken)
            size -= len(taken) if size > 0 else 0
        return b"".join(parts)

    def drain(self) -> None:
        """Read to the end, so that a cut is noticed even after the archive's own end."""
        for _ in self._pieces:
            pass


def _open_pieces(file: BinaryIO, passphrase: str, source: Path) -> Iterator[bytes]:
    head = file.read(HEAD)
    if len(head) < HEAD or not head.startswith(MAGIC):
        raise ConsiliumError(
            "This is not a backup of a coordinator", str(source), "`consilium-coordinator backup` writes one."
        )
    key, check = _derive(passphrase, head[len(MAGIC) : len(MAGIC) + SALT])
    if not hmac.compare_digest(check, head[-CHECK:]):
        raise ConsiliumError(
            "The passphrase does not open this backup",
            str(source),
            "Try again with the passphrase given when it was written; without it the file cannot be opened.",
        )
    cipher, number = AESGCM(key), 0
    sealed = file.read(PIECE + TAG)
    while sealed:
        following = file.read(PIECE + TAG)
        try:
            yield cipher.decrypt(_nonce(number, not following), sealed, head)
        except InvalidTag as error:
            raise _damaged(source) from error
        sealed, number = following, number + 1
    if not number:
        raise _damaged(source)


def _damaged(source: Path) -> ConsiliumError:
    return ConsiliumError(
        "The backup was changed or cut off", str(source), "Use another copy; nothing was restored from this one."
    )


def _snapshot(home: CoordinatorHome, url: str, stage: Path) -> bool:
    """Freeze registry and blobs under `stage`: every blob that the copied registry names is linked there.

    A blob is written before the row that names it and deleted after; so blobs are linked before and after the copy.
    """
    (stage / BLOBS).mkdir()
    _link(home.blobs, stage / BLOBS)
    parsed = make_url(url)
    included = parsed.get_backend_name() == "sqlite"
    if included:
        database = Path(parsed.database or "")
        if not database.is_file():
            raise ConsiliumError("The registry is missing", str(database), "Restore an earlier backup.")
        try:
            with (
                closing(sqlite3.connect(database, timeout=30)) as live,
                closing(sqlite3.connect(stage / REGISTRY)) as copy,
            ):
                live.backup(copy)
        except sqlite3.Error as error:
            raise ConsiliumError(
                "The registry could not be copied",
                f"{database} ({error})",
                "Free disk space if it is full, or stop `consilium-coordinator serve` and try again.",
            ) from error
    _link(home.blobs, stage / BLOBS)
    return included


def _link(blobs: Path, stage: Path) -> None:
    for path in blobs.iterdir() if blobs.is_dir() else ():
        target = stage / path.name
        if path.name.startswith(".") or target.exists():
            continue
        try:
            os.link(path, target)
        except FileNotFoundError:
            continue  # deleted meanwhile: nothing names it any more


def _members(home: CoordinatorHome, stage: Path) -> Iterator[tuple[str, Path]]:
    yield CONFIG, home.config_file
    for name in FILES:
        if (home.root / name).is_file():
            yield name, home.root / name
    for folder in (*(home.root / name for name in FOLDERS), stage / BLOBS):
        base = folder.parent
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and not path.is_symlink() and not path.name.endswith(".part"):
                yield path.relative_to(base).as_posix(), path
    if (stage / REGISTRY).is_file():
        yield REGISTRY, stage / REGISTRY


def _add(archive: tarfile.TarFile, name: str, path: Path) -> int:
    with open(path, "rb") as file:
        entry = tarfile.TarInfo(name)
        entry.size = os.fstat(file.fileno()).st_size  # a log may grow meanwhile: its beginning is a whole log
        archive.addfile(entry, file)
    return entry.size


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, stage: Path) -> int:
    """Write one plain file below `stage`, readable by its owner only."""
    relative = PurePosixPath(member.name)
    content = archive.extractfile(member) if member.isreg() else None
    if content is None or relative.is_absolute() or ".." in relative.parts:
        raise tarfile.TarError(f"unexpected entry {member.name}")
    target = stage / relative
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        _copy(content, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(target.parent)
    return member.size


def _copy(source: IO[bytes], target: BinaryIO) -> None:
    while piece := source.read(PIECE):
        target.write(piece)


def _examine(stage: Path, source: Path) -> bool:
    """Make sure that a coordinator can live on what was unpacked."""
    unpacked = CoordinatorHome(stage)
    config = unpacked.config()
    unpacked.identity()
    if not (stage / REGISTRY).is_file():
        return False
    with closing(sqlite3.connect(stage / REGISTRY)) as database:
        if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise _damaged(source)
    if config.registry:
        unpacked.write_config(config.model_copy(update={"registry": ""}))  # it now stands in this folder
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
