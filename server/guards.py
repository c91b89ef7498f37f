"""May the coordinator be served now? Its one lock, its certificate, its port, and which studies still run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from privacy.errors import ConsiliumError
from server import tls
from server.home import CoordinatorHome

WARN_DAYS = 30
TRY_EVERY = 0.25


@contextlib.contextmanager
def lock(home: CoordinatorHome) -> Iterator[None]:
    """Be the only supervisor of a home.

    Raises:
        ConsiliumError: another one is.
    """
    home.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(home.run / "serve.lock", "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConsiliumError(
                "This coordinator is being served already",
                f"{home.root}, process {file.read().strip() or 'unknown'}",
                "End that one first, or name another folder with --home.",
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


def is_serving(home: CoordinatorHome) -> bool:
    """Whether a supervisor is running on this home."""
    try:
        with open(home.run / "serve.lock", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def check_certificate(home: CoordinatorHome, now: datetime | None = None) -> str:
    """A warning when the server certificate ends soon, else "".

    Raises:
        ConsiliumError: it has ended already, or cannot be used.
    """
    moment = now or datetime.now(UTC)
    days = (tls.check(home.certificate, home.certificate_key, moment) - moment).days
    if days >= WARN_DAYS:
        return ""
    return f"The server certificate ends in {days} days. Renew it: `consilium-coordinator certificate --renew`."


def check_port(host: str, port: int, patience: float = 5.0) -> None:
    """Make sure that the public port can be bound; a predecessor may need a moment to leave it.

    Raises:
        ConsiliumError: the port is taken, or this machine has no such address.
    """
    until = time.monotonic() + patience
    while True:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except PermissionError as error:
                raise ConsiliumError(
                    "Ports below 1024 are kept for the administrator",
                    f"{host}:{port}",
                    "Set `port` in coordinator.toml to one above 1023, and forward the low one to it.",
                ) from error
            except OSError as error:
                if isinstance(error, socket.gaierror) or error.errno != errno.EADDRINUSE:
                    raise ConsiliumError(
                        "This machine has no such address",
                        f"{host}:{port} ({error.strerror or error})",
                        "Set `listen` in coordinator.toml to an address of this machine; 0.0.0.0 means all.",
                    ) from error
                if time.monotonic() >= until:
                    raise ConsiliumError(
                        "The port is taken by another program",
                        f"{host}:{port}",
                        f"End that program (`ss -ltnp 'sport = :{port}'` names it), or set another `port` in "
                        "coordinator.toml and hand the sites a new consortium file.",
                    ) from error
            else:
                return
        time.sleep(TRY_EVERY)


def runs(home: CoordinatorHome, study: str) -> bool:
    """Whether some process holds the study's lock."""
    path = home.run / f"study-{study}.lock"
    try:
        with open(path, encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
