"""A real PostgreSQL for one test session: its own cluster in a temporary folder, on a Unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
SECONDS = 30


def programs() -> Path | None:
    """Where `initdb` and `postgres` are; None when PostgreSQL is not installed."""
    found = shutil.which("postgres")
    folders = [*PLACES, *([Path(found).parent] if found else [])]
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def _owner() -> pwd.struct_passwd | None:
    """Whom to run it as: PostgreSQL declines to run as root."""
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else None


@contextmanager
def running(fsync: bool = False) -> Iterator[str]:
    """A fresh server; gives the folder of its socket, and ends it by its own process id.

    Tests end their own processes, never the machine, so they need no fsync; measurements do.
    """
    binaries, owner = programs(), _owner()
    assert binaries is not None
    root = Path(tempfile.mkdtemp(prefix="consilium-pg-"))
    who: dict[str, object] = {}
    if owner is not None:
        os.chown(root, owner.pw_uid, owner.pw_gid)
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    data = root / "data"
    server = None
    try:
        options = ["-D", str(data), "-U", "consilium", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [str(binaries / "initdb"), *options], check=True, capture_output=True, timeout=120, cwd=root, **who
        )
        command = [
            str(binaries / "postgres"),
            "-D",
            str(data),
            "-k",
            str(root),
            "-c",
            "listen_addresses=",
            "-c",
            f"fsync={fsync}",
        ]
        with open(root / "log", "wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=root, **who)
        deadline = time.monotonic() + SECONDS
        while not (root / ".s.PGSQL.5432").exists() or _status(data) != "ready":
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((root / "log").read_text(errors="replace"))
            time.sleep(0.05)
        yield str(root)
    finally:
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            try:
                server.wait(SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        shutil.rmtree(root, ignore_errors=True)


def _status(data: Path) -> str:
    """The last line of the server's own pid file says whether it takes connections."""
    try:
        return (data / "postmaster.pid").read_text().splitlines()[7].strip()
    except (OSError, IndexError):
        return ""


def url(socket: str) -> str:
    """The SQLAlchemy URL of this server's one database."""
    return f"postgresql+pg8000://consilium@/postgres?unix_sock={socket}/.s.PGSQL.5432"
