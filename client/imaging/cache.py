"""Where do prepared images wait, so that a restarted agent is quick? In one folder of the agent, for its eyes only.

An entry is a folder named by a hash of everything that shaped it (source, input, classes, key). It is written
beside its place, image by image into mapped files, and moved there when complete: a reader meets a whole entry or none,
and images need not fit into memory. A cache that cannot be written costs time, never a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEEP = 4
"""How many entries stay; the least recently used ones beyond it are removed."""

_under_way: set[str] = set()

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each array by its name; the first axis of all is the images."""


def fetch(folder: Path, name: str) -> tuple[Arrays, dict[str, Any]] | None:
    """The arrays (mapped read-only) and facts of an entry; None: absent or damaged."""
    entry = folder / name
    try:
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        arrays: Arrays = {}
        for key, (shape, dtype) in facts["arrays"].items():
            file = entry / f"{key}.raw"
            if file.stat().st_size != np.dtype(dtype).itemsize * int(np.prod(shape)):
                return None
            arrays[key] = np.memmap(file, dtype=dtype, mode="r", shape=tuple(shape))
        os.utime(entry)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None
    return arrays, facts


class Work:
    """An entry in the making, or plain memory where there is no folder or its disk is full.

    Args:
        shapes: of the arrays, for as many images as there may be.
    """

    def __init__(self, folder: Path | None, shapes: Shapes) -> None:
        self._folder = folder
        self._place: Path | None = None
        self._shapes = dict(shapes)
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._place = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
                _under_way.add(self._place.name)
        try:
            self.arrays: Arrays = {key: self._made(key, *about) for key, about in shapes.items()}
        except OSError:
            self.discard()
            self.arrays = {key: np.empty(*about) for key, about in shapes.items()}

    def _made(self, key: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        if self._place is None or size == 0:
            return np.empty(shape, dtype)
        with (self._place / f"{key}.raw").open("xb") as stream:
            # Writing into a mapped file on a full disk would kill the process: the room is taken now, or refused.
            os.posix_fallocate(stream.fileno(), 0, size)
        return np.memmap(self._place / f"{key}.raw", dtype=dtype, mode="r+", shape=shape)

    def finish(self, name: str, count: int, facts: Mapping[str, Any]) -> Arrays:
        """Keep the first `count` images under a name, durably; returns them, from the entry or from memory."""
        arrays = {key: array[:count] for key, array in self.arrays.items()}
        if self._folder is None or self._place is None or count == 0:
            self.discard()
            return arrays
        try:
            about = {key: [[count, *shape[1:]], dtype] for key, (shape, dtype) in self._shapes.items()}
            for key, (shape, dtype) in about.items():
                array = self.arrays[key]
                if isinstance(array, np.memmap):
                    array.flush()
                with (self._place / f"{key}.raw").open("r+b") as stream:
                    stream.truncate(np.dtype(str(dtype)).itemsize * int(np.prod(np.array(shape))))
                    os.fsync(stream.fileno())
            with (self._place / "facts.json").open("x", encoding="utf-8") as text:
                json.dump({**facts, "arrays": about}, text)
                text.flush()
                os.fsync(text.fileno())
            shutil.rmtree(self._folder / name, ignore_errors=True)
            self._place.rename(self._folder / name)
            _under_way.discard(self._place.name)
            self._place = None
            _prune(self._folder)
        except OSError:
            arrays = {key: np.array(array) for key, array in arrays.items()}
            self.discard()
            return arrays
        kept = fetch(self._folder, name)
        return kept[0] if kept else arrays

    def discard(self) -> None:
        """Take back what was written."""
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)
            _under_way.discard(self._place.name)
            self._place = None


def _prune(folder: Path) -> None:
    for left in folder.glob(".new-*"):
        if left.name not in _under_way:  # a killed agent's unfinished entry
            shutil.rmtree(left, ignore_errors=True)
    finished = (item for item in folder.iterdir() if item.is_dir() and item.name not in _under_way)
    entries = sorted(finished, key=lambda entry: entry.stat().st_mtime)
    for old in entries[:-KEEP]:
        with contextlib.suppress(OSError):
            shutil.rmtree(old)
