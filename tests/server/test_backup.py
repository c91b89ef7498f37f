"""A coordinator that lost its machine comes back whole from one file, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tarfile
import threading
from contextlib import closing
from pathlib import Path

import pytest

from privacy.errors import ConsiliumError
from privacy.roster import Roster
from privacy.terminal import run
from server import backup as module
from server.backup import HEAD, PIECE, TAG, backup, restore
from server.cli import app
from server.home import CoordinatorHome
from server.registry import Registry

PASSPHRASE = "a long passphrase, kept elsewhere"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    root = tmp_path_factory.mktemp("original") / "old"
    assert run(app, "consilium-coordinator", ["-H", str(root), "init", "lungs", "--host", "localhost"]) == 0
    made = CoordinatorHome(root)
    with Registry(made) as registry:
        registry.blobs.put(os.urandom(3 * PIECE + 17))  # larger than a piece
        registry.note("", "test", "something happened")
    (made.root / "studies" / "aa" / "approvals").mkdir(parents=True)
    (made.root / "studies" / "aa" / "approvals" / "anna.json").write_text("{}")
    (made.root / "audit.jsonl").write_text("one\ntwo\n")
    return made


@pytest.fixture(scope="module")
def written(original: CoordinatorHome, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """One backup for all tests: the passphrase's derivation is slow by purpose."""
    file = tmp_path_factory.mktemp("written") / "file"
    content = backup(original, file, PASSPHRASE)
    assert content.registry
    assert content.files >= 10
    assert file.stat().st_mode & 0o077 == 0
    return file.read_bytes()


@pytest.fixture
def home(original: CoordinatorHome, tmp_path: Path) -> CoordinatorHome:
    shutil.copytree(original.root, tmp_path / "old")
    return CoordinatorHome(tmp_path / "old")


@pytest.fixture
def saved(written: bytes, tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(written)
    return tmp_path / "file"


def tree(root: Path) -> dict[str, bytes]:
    skip = ("run/", "log/", "registry.db")
    return {
        name: path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not (name := path.relative_to(root).as_posix()).startswith(skip)
    }


def rows(home: CoordinatorHome) -> list[str]:
    with closing(sqlite3.connect(home.database)) as database:
        return list(database.iterdump())


def test_what_was_saved_comes_back(home: CoordinatorHome, saved: Path, tmp_path: Path) -> None:
    new = CoordinatorHome(tmp_path / "new")
    assert restore(new, saved, PASSPHRASE).registry
    assert tree(new.root) == tree(home.root)
    assert rows(new) == rows(home)
    assert new.identity().public == home.identity().public
    for secret in (new.identity_key, new.certificate_key, new.database):
        assert secret.stat().st_mode & 0o077 == 0


def test_secrets_are_not_readable_in_the_file(home: CoordinatorHome, saved: Path) -> None:
    data = saved.read_bytes()
    for secret in (home.identity_key, home.certificate_key, home.config_file):
        assert secret.read_bytes().splitlines()[1] not in data
    assert b"lungs" not in data


def test_two_backups_share_no_key(home: CoordinatorHome, saved: Path, tmp_path: Path) -> None:
    backup(home, tmp_path / "other", PASSPHRASE)
    salts = {path.read_bytes()[len(module.MAGIC) :][: module.SALT] for path in (saved, tmp_path / "other")}
    assert len(salts) == 2


def test_a_wrong_passphrase_restores_nothing(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="The passphrase does not open this backup"):
        restore(CoordinatorHome(tmp_path / "new"), saved, PASSPHRASE + "!")
    assert not (tmp_path / "new").exists()


def _flip(data: bytearray, position: int) -> bytearray:
    data[position] ^= 1
    return data


DAMAGE = {
    "salt": lambda data: _flip(data, len(module.MAGIC)),
    "first piece": lambda data: _flip(data, HEAD + 100),
    "middle": lambda data: _flip(data, len(data) // 2),
    "last byte": lambda data: _flip(data, len(data) - 1),
    "last byte missing": lambda data: data[:-1],
    "last piece missing": lambda data: data[: HEAD + (len(data) - HEAD) // (PIECE + TAG) * (PIECE + TAG)],
    "only the head": lambda data: data[:HEAD],
    "half the head": lambda data: data[: HEAD // 2],
    "empty": lambda data: data[:0],
    "two pieces swapped": lambda data: (
        data[:HEAD]
        + data[HEAD + PIECE + TAG : HEAD + 2 * (PIECE + TAG)]
        + data[HEAD : HEAD + PIECE + TAG]
        + data[HEAD + 2 * (PIECE + TAG) :]
    ),
    "a piece repeated": lambda data: data[: HEAD + PIECE + TAG] + data[HEAD:],
    "more behind": lambda data: data + b"more",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_changed_file_restores_nothing(saved: Path, tmp_path: Path, damage: str) -> None:
    changed = DAMAGE[damage](bytearray(saved.read_bytes()))
    assert bytes(changed) != saved.read_bytes()
    (tmp_path / "changed").write_bytes(changed)
    (tmp_path / "new").mkdir()
    with pytest.raises(ConsiliumError) as caught:
        restore(CoordinatorHome(tmp_path / "new"), tmp_path / "changed", PASSPHRASE)
    assert caught.value.remedy
    assert list((tmp_path / "new").iterdir()) == []


def test_a_used_folder_is_left_alone(home: CoordinatorHome, saved: Path) -> None:
    before = tree(home.root)
    with pytest.raises(ConsiliumError, match="The folder is not empty"):
        restore(home, saved, PASSPHRASE)
    assert tree(home.root) == before


def test_an_existing_file_is_never_written_over(home: CoordinatorHome, saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(ConsiliumError, match="The file exists already"):
        backup(home, saved, PASSPHRASE)
    assert saved.read_bytes() == before


def test_a_short_passphrase_is_refused(home: CoordinatorHome, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="too short"):
        backup(home, tmp_path / "file", "short")
    assert not (tmp_path / "file").exists()


def test_a_full_disk_leaves_no_file_behind(
    home: CoordinatorHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module._Sealer, "_seal", full)
    with pytest.raises(OSError, match="No space left"):
        backup(home, tmp_path / "file", PASSPHRASE)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert not [path for path in home.run.iterdir() if path.name.startswith("backup")]


def test_a_full_disk_at_restore_leaves_an_empty_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        restore(CoordinatorHome(tmp_path / "new"), saved, PASSPHRASE)
    assert not (tmp_path / "new").exists()


def test_a_failure_between_two_moves_leaves_an_empty_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if len(moved) == 3:
            raise OSError(errno.EIO, "Input/output error")
        moved.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(module.os, "replace", replace)
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="Input/output"):
        restore(CoordinatorHome(tmp_path / "new"), saved, PASSPHRASE)
    assert list((tmp_path / "new").iterdir()) == []
    assert "coordinator.toml" not in moved  # the settings make it a coordinator, so they come last


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "content").write_text("x")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.addfile(member := tarfile.TarInfo(name))
    with tarfile.open(tmp_path / "t.tar") as archive, pytest.raises(tarfile.TarError):
        module._extract(archive, archive.getmember(member.name), tmp_path / "stage")
    assert not (tmp_path / "outside").exists()


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.addfile(member)
    with tarfile.open(tmp_path / "t.tar") as archive, pytest.raises(tarfile.TarError):
        module._extract(archive, archive.getmember("link"), tmp_path / "stage")


def test_a_backup_made_while_the_registry_is_written_fits_together(home: CoordinatorHome, tmp_path: Path) -> None:
    """Every blob that the copied registry names is in the backup, whatever comes meanwhile."""
    stop = threading.Event()

    def write() -> None:
        with Registry(home) as registry:
            while not stop.wait(0.005):
                registry.note("", "blob", registry.blobs.put(os.urandom(1000)))

    worker = threading.Thread(target=write)
    worker.start()
    try:
        for number in range(2):
            backup(home, tmp_path / f"file{number}", PASSPHRASE)
    finally:
        stop.set()
        worker.join()
    for number in range(2):
        new = CoordinatorHome(tmp_path / f"new{number}")
        restore(new, tmp_path / f"file{number}", PASSPHRASE)
        with Registry(new) as registry:
            names = [event.text for event in registry.events(limit=1_000_000) if event.kind == "blob"]
            assert names
            assert all(registry.blobs.path(name).is_file() for name in names)


def test_a_registry_elsewhere_comes_back_into_the_folder(home: CoordinatorHome, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.db"
    with closing(sqlite3.connect(home.database)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.move(home.database, elsewhere)
    home.write_config(home.config().model_copy(update={"registry": f"sqlite:///{elsewhere}"}))
    backup(home, tmp_path / "file", PASSPHRASE)
    new = CoordinatorHome(tmp_path / "new")
    restore(new, tmp_path / "file", PASSPHRASE)
    assert new.config().registry == ""
    with Registry(new) as registry:
        assert isinstance(registry.roster()[1], Roster)


def test_the_commands(
    home: CoordinatorHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, new = tmp_path / "file", tmp_path / "new"
    monkeypatch.delenv("CONSILIUM_PASSPHRASE", raising=False)
    assert run(app, "c", ["-H", str(home.root), "backup", "--out", str(file)]) == 1
    assert "No passphrase was given" in capsys.readouterr().err
    (tmp_path / "pass").write_text(PASSPHRASE + "\n")
    given = ["--passphrase-file", str(tmp_path / "pass")]
    assert run(app, "c", ["-H", str(home.root), "backup", "--out", str(file), *given]) == 0
    monkeypatch.setenv("CONSILIUM_PASSPHRASE", PASSPHRASE)
    assert run(app, "c", ["-H", str(new), "restore", str(file)]) == 0
    assert run(app, "c", ["-H", str(new), "sites", "list"]) == 0
    assert run(app, "c", ["-H", str(new), "restore", str(tmp_path / "nope")]) == 1
    assert "There is no such file" in capsys.readouterr().err
