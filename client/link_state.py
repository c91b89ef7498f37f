"""What is the connector doing? A small file that it writes and that `status` and `preflight` read.

The file tells; the lock proves: a connector holds an exclusive lock on `connector/lock` for as long as it lives, so a
file left by a killed one is never taken for a living one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from client.home import SiteHome
from privacy.errors import ConsiliumError
from privacy.files import write_atomically
from privacy.roster import timestamp

Phase = Literal["connecting", "connected", "waiting", "stopped"]


class Trouble(BaseModel):
    """The last thing that went wrong, in an error's three parts."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    what: str
    subject: str
    remedy: str
    at: str

    @classmethod
    def of(cls, error: ConsiliumError) -> Trouble:
        """This error, now."""
        return cls(what=error.what, subject=error.subject, remedy=error.remedy, at=moment())


class LinkState(BaseModel):
    """`connector/state.json`. Times are RFC 3339; an empty string means never."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    superlink: str = ""
    phase: Phase = "connecting"
    since: str = ""
    node_id: str = ""
    last_kind: str = ""
    last_at: str = ""
    answered: int = 0
    working: tuple[str, ...] = ()
    network: Trouble | None = None
    agent: Trouble | None = None
    pid: int = 0


def moment() -> str:
    """The present, RFC 3339."""
    return timestamp(datetime.now(UTC))


def state_file(home: SiteHome) -> Path:
    """Where the connector tells."""
    return home.connector / "state.json"


def write(home: SiteHome, state: LinkState) -> None:
    """Replace the file, whole or not at all; a full disk or a lost folder must not stop the connector."""
    with suppress(OSError):
        write_atomically(state_file(home), state.model_dump_json().encode() + b"\n", 0o644)


def read(home: SiteHome) -> LinkState | None:
    """What the last connector told; None when there was none or the file is damaged.

    Raises:
        ConsiliumError: the folder may not be read by this user.
    """
    try:
        value: Any = json.loads(state_file(home).read_text(encoding="utf-8"))
        return LinkState.model_validate(value)
    except PermissionError as error:
        raise ConsiliumError(
            "The connector's folder may not be read by this user",
            str(home.connector),
            "Run the command as the connector's user or as root.",
        ) from error
    except (OSError, ValueError, ValidationError):
        return None


class Lock:
    """An exclusive lock on a file, held until `release` or the process (and its children that inherit it) end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self, patience: float = 0.0) -> bool:
        """Take the lock, trying for `patience` seconds."""
        end = time.monotonic() + patience
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= end:
                    os.close(handle)
                    return False
                time.sleep(0.05)
            else:
                self._handle = handle
                return True

    @property
    def handle(self) -> int:
        """The open file, to be handed to a child that shares the lock."""
        if self._handle is None:
            raise RuntimeError("the lock is not held")
        return self._handle

    def release(self) -> None:
        """Let go; a child that inherited the lock still holds it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def connector_lock(home: SiteHome) -> Lock:
    """One connector per home."""
    return Lock(home.connector / "lock")


def connector_alive(home: SiteHome) -> bool:
    """Whether a connector holds its lock now."""
    lock = connector_lock(home)
    try:
        taken = lock.acquire()
    except OSError:
        return False
    lock.release()
    return not taken
