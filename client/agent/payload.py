"""How does a payload get in? Piece by piece, counted and hashed on the way, never larger than was announced.

A vector goes straight into the memory it is computed with; anything else goes to a file. Both are checked against
the size and the SHA-256 that the signed header names.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from privacy.errors import Refusal, RefusalCode
from privacy.messages import Vector

Payload = bytes | bytearray | memoryview | Path | IO[bytes] | Iterable[bytes]
PIECE = 1 << 20


def pieces(payload: Payload) -> Iterator[memoryview]:
    """Any form of payload as pieces; nothing is read before it is asked for."""
    if isinstance(payload, bytes | bytearray | memoryview):
        view = memoryview(payload).cast("B")
        for start in range(0, len(view), PIECE):
            yield view[start : start + PIECE]
    elif isinstance(payload, Path):
        with open(payload, "rb") as file:
            yield from pieces(file)
    elif hasattr(payload, "read"):
        while piece := payload.read(PIECE):
            yield memoryview(piece)
    else:
        for piece in payload:
            yield memoryview(piece)


def into_vector(payload: Payload, sha256: str, received: int, room: int) -> Vector:
    """Read `received` numbers into the front of a fresh float32 vector with `room` more behind them.

    Returns:
        float32 [received + room]; the room is zero. The update is later written over the received model, so that one
        model and one update are all that is held.

    Raises:
        Refusal: TOO_LARGE, MODEL_HASH for bytes that are not the announced ones, NON_FINITE.
    """
    vector = np.zeros(received + room, dtype="<f4")
    target = vector[:received].data.cast("B") if received else memoryview(b"")
    digest, at = hashlib.sha256(), 0
    for piece in pieces(payload):
        if at + len(piece) > len(target):
            raise Refusal(RefusalCode.TOO_LARGE)
        target[at : at + len(piece)] = piece
        digest.update(piece)
        at += len(piece)
    if at != len(target) or digest.hexdigest() != sha256:
        raise Refusal(RefusalCode.MODEL_HASH)
    return vector


def into_bytes(payload: Payload, sha256: str, size: int) -> bytes:
    """Read exactly `size` bytes into memory; for the small payloads of an offer and of the stages of a secure sum.

    Raises:
        Refusal: TOO_LARGE, MODEL_HASH.
    """
    data = bytearray()
    for piece in pieces(payload):
        data += piece
        if len(data) > size:
            raise Refusal(RefusalCode.TOO_LARGE)
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise Refusal(RefusalCode.MODEL_HASH)
    return bytes(data)


def into_file(payload: Payload, sha256: str, size: int, path: Path) -> None:
    """Read exactly `size` bytes into a new file at `path`, fsynced; a file that is not as announced is removed.

    Raises:
        Refusal: TOO_LARGE, MODEL_HASH, DISK_FULL.
    """
    digest, at = hashlib.sha256(), 0
    try:
        with open(path, "wb") as file:
            for piece in pieces(payload):
                at += len(piece)
                if at > size:
                    raise Refusal(RefusalCode.TOO_LARGE)
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if at != size or digest.hexdigest() != sha256:
            raise Refusal(RefusalCode.MODEL_HASH)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise Refusal(RefusalCode.DISK_FULL) from error
        raise
