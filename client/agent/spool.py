"""Where do bytes lie on their way in, and which stored vectors stay? The agent's folders, bounded and swept."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.agent.payload import Payload, into_file
from client.home import SiteHome
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.messages import Request

RECEIVE_WAIT_SECONDS = 10.0


class Spool:
    """Payloads on their way in: one at a time per study, so that memory and disk stay bounded.

    What an earlier process left in `folder` is removed: nothing of it was recorded, so nothing of it left.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._receiving: dict[str, threading.Lock] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)

    @contextmanager
    def only_one(self, name: str) -> Iterator[None]:
        """Receive one payload under this name; a second one waits a little.

        Raises:
            Refusal: BUSY.
        """
        with self._lock:
            lock = self._receiving.setdefault(name, threading.Lock())
        if not lock.acquire(timeout=RECEIVE_WAIT_SECONDS):
            raise Refusal(RefusalCode.BUSY)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def file(self, request: Request, payload: Payload) -> Iterator[Path]:
        """The whole, checked payload as a file that is gone afterwards unless it was moved.

        Raises:
            Refusal: BUSY, TOO_LARGE, MODEL_HASH, DISK_FULL.
        """
        header = request.header
        with self.only_one(header.study):
            part = self._folder / f"{request.hash}.part"
            into_file(payload, header.payload_sha256, header.payload_bytes, part)
            try:
                yield part
            finally:
                part.unlink(missing_ok=True)


def vector_name(study: str, slot: int) -> str:
    """The file name of a slot's stored vector."""
    return f"{study}-{slot:06d}.f32"


def discard(answers: Path, keep: set[tuple[str, int]]) -> None:
    """Delete every vector, whole or half written, of slots that are not in `keep`; their rows stay."""
    stems = {Path(vector_name(study, slot)).stem for study, slot in keep}
    for path in answers.iterdir():
        if path.stem not in stems:
            path.unlink(missing_ok=True)


def lock_home(home: SiteHome) -> int:
    """Take a home for this process; the lock is the kernel's and ends with the process.

    Raises:
        ConsiliumError: another agent has it.
    """
    home.agent.mkdir(parents=True, exist_ok=True)
    home.agent.chmod(0o700)
    guard = os.open(home.agent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(guard)
        raise ConsiliumError(
            "An agent is running on this site already", str(home.root), "End the other `consilium-site start` first."
        ) from error
    return guard
