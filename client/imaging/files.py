"""Which files does a folder hold, and which of them may be opened? Links never lead out of the folder.

Paths are relative to the folder and written with forward slashes; absolute paths, `..` and links that leave the folder
are refused, whoever wrote them: a label table is input like any other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from client.imaging.records import Reason, Unusable

MAX_FILE_BYTES = 1 << 30


def walk(root: Path) -> Iterator[str]:
    """Every file below `root`, and every linked folder as one entry; links to folders are not followed."""
    base = len(os.fspath(root)) + 1
    for folder, subfolders, files in os.walk(root, followlinks=False):
        linked = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *linked]:
            yield os.path.join(folder, name)[base:].replace(os.sep, "/")


def opened(root: Path, path: str) -> os.stat_result:
    """The state of a regular file inside `root`.

    Raises:
        Unusable: SYMLINK where a link leaves the folder, NOT_REGULAR for pipes, devices, folders and files this user
            cannot see, FILE_SIZE above `MAX_FILE_BYTES`.
    """
    full = root / path
    try:
        info = full.lstat()
        if stat.S_ISLNK(info.st_mode):
            if not full.resolve().is_relative_to(root):
                raise Unusable(Reason.SYMLINK)
            info = full.stat()
    except (OSError, ValueError, RuntimeError):
        raise Unusable(Reason.NOT_REGULAR) from None
    if not stat.S_ISREG(info.st_mode):
        raise Unusable(Reason.NOT_REGULAR)
    if info.st_size > MAX_FILE_BYTES:
        raise Unusable(Reason.FILE_SIZE, f"{info.st_size >> 20} MB")
    return info


def inside(root: Path, path: str) -> str:
    """A path that a table names, made relative to `root`.

    Raises:
        Unusable: it leaves the folder (SYMLINK), or there is no such regular file (NO_FILE).
    """
    full = root / tidy(path)
    try:
        real = full.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise Unusable(Reason.NO_FILE) from None
    if not real.is_relative_to(root):
        raise Unusable(Reason.SYMLINK)
    if not real.is_file():
        raise Unusable(Reason.NO_FILE)
    return real.relative_to(root).as_posix()


def leaves(root: Path, path: str) -> bool:
    """Does a path that a table names lead out of `root`, whether or not anything is there?"""
    return not Path(os.path.normpath(root / tidy(path))).is_relative_to(root)


def tidy(path: str) -> str:
    """A path as a table may write it (backslashes, `./`) in this module's form."""
    return PurePosixPath(path.replace("\\", "/")).as_posix()
