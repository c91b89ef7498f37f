"""Is a delivered model what it should be? A zip from the coordinator, opened as one opens a parcel from a stranger.

Only the expected names, each once, each no larger than the study's network implies; sizes are counted while reading,
because a zip's own table may lie.
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from client.agent.policy import PAGES_LIMIT, Sizes
from models.weights import Layout
from privacy.errors import Refusal, RefusalCode

MODEL = "model.safetensors"
PAGES = frozenset({"MODEL_CARD.md", "metrics.json", "study.json"})
RESULT = "site-test.json"
PIECE = 1 << 20


def unpack(parcel: Path, target: Path, sizes: Sizes, result: str) -> None:
    """Put a delivered model at `target`, whole or not at all, with this site's own test result beside it.

    Raises:
        Refusal: MALFORMED, TOO_LARGE, MODEL_SHAPE, DISK_FULL.
    """
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True, mode=0o700)
        _extract(parcel, part, sizes)
        if Layout.of_state(part / MODEL).count != sizes.trainable:
            raise Refusal(RefusalCode.MODEL_SHAPE)
        (part / RESULT).write_text(result or "{}", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise Refusal(RefusalCode.DISK_FULL) from error
        raise
    except ValueError as error:
        raise Refusal(RefusalCode.MODEL_SHAPE) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _extract(parcel: Path, folder: Path, sizes: Sizes) -> None:
    try:
        with zipfile.ZipFile(parcel) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) != len(names) or MODEL not in names or not set(names) <= PAGES | {MODEL}:
                raise Refusal(RefusalCode.MALFORMED)
            for entry in entries:
                limit = sizes.state if entry.filename == MODEL else PAGES_LIMIT // len(PAGES)
                _copy(archive, entry, folder / entry.filename, limit)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Refusal(RefusalCode.MALFORMED) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # its table points before the file's beginning
            raise Refusal(RefusalCode.MALFORMED) from error
        raise


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> None:
    left = limit
    with archive.open(entry) as source, open(path, "xb") as file:
        while piece := source.read(PIECE):
            left -= len(piece)
            if left < 0:
                raise Refusal(RefusalCode.TOO_LARGE)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
