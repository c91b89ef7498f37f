"""Files that are written whole or not at all, where the disk really ends in the middle."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from privacy.files import replacing, write_atomically, write_once
from privacy.identity import Document, Identity
from privacy.terminal import os_error


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may become larger; writing further fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_document_that_finds_no_room_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path, old = tmp_path / "a.json", Document("study", {"text": "old"})
    old.write(path)
    with room_for(64), pytest.raises(OSError, match="File too large") as caught:
        Document("study", {"text": "new" * 100}).write(path)
    assert caught.value.filename == str(path)
    assert Document.read(path, "study") == old
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_key_that_finds_no_room_can_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    with room_for(10), pytest.raises(OSError, match="File too large"):
        Identity.create(path)
    assert not path.exists()
    assert Identity.create(path).public == Identity.load(path).public


def test_what_is_there_is_not_written_over_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"there")
    with pytest.raises(FileExistsError):
        write_once(path, b"new")
    assert path.read_bytes() == b"there"


def test_a_full_disk_names_the_file_that_is_written_not_the_one_that_is_read(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with pytest.raises(OSError, match="No space left") as caught, replacing(target):
        raise OSError(errno.ENOSPC, "No space left on device", "source.bin", None, "part")
    assert os_error(caught.value).subject == str(target)
    copied = OSError(errno.ENOSPC, "No space left on device", "source.bin", None, "copy.bin")
    assert os_error(copied).subject == "copy.bin"
    with pytest.raises(FileNotFoundError) as gone, replacing(target):
        (tmp_path / "source.bin").read_bytes()
    assert gone.value.filename == str(tmp_path / "source.bin")
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path: Path) -> None:
    link = tmp_path / "link"
    (tmp_path / "kept").mkdir()
    link.symlink_to(tmp_path / "kept" / "file")
    write_atomically(link, b"new", 0o600)
    assert link.is_symlink()
    assert (tmp_path / "kept" / "file").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "kept" / "file").stat().st_mode) == 0o600
    write_atomically(Path(os.devnull), b"gone")
    assert Path(os.devnull).is_char_device()
