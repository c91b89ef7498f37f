"""Who keeps a hospital's node running? This starts agent and connector, restarts what ends, and ends both.

The agent starts inside an empty network namespace where the kernel permits. Each process has its own log, and under
root its own user. One node per home: a lock that the children inherit, so that even a killed supervisor leaves no
second agent beside the first; they end with it, by the kernel's own hand (prctl PDEATHSIG).
"""

from __future__ import annotations

import grp
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from client.home import SiteHome
from client.link_state import Lock
from privacy.errors import ConsiliumError
from privacy.terminal import ending

Name = Literal["agent", "connector"]
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
SETTLED = 30.0
GRACE = 15.0
LOG_LIMIT = 10 << 20
TICK = 0.2
QUIET = {"PYTHONUNBUFFERED": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class Part:
    """One process: `python -m client.NAME HOME`."""

    name: Name
    user: str = ""

    def command(self, home: SiteHome) -> list[str]:
        """What is executed. -P: the working folder never becomes a place to import from."""
        python = [sys.executable, "-P", "-m"]
        locked = ["client.isolation", "--parent", str(os.getpid())]
        if self.name == "agent":
            locked.append("--no-network")
        if self.user:
            locked += ["--user", self.user]
        return [*python, *locked, "--", *python, f"client.{self.name}", str(home.root.absolute())]


class _Child:
    """One part's present process and when to try again."""

    def __init__(self, part: Part, lock: Lock) -> None:
        self.part, self.lock = part, lock
        self.process: subprocess.Popen[bytes] | None = None
        self.started = self.due = 0.0
        self.pause = FIRST_PAUSE
        self.identity = 0


class Supervisor:
    """Runs `parts` of the site in `home`; `say` gets one sentence per event."""

    def __init__(self, home: SiteHome, parts: Sequence[Part], say: Callable[[str], None]) -> None:
        self._home, self._say = home, say
        self._children = [_Child(part, Lock(self._folder(part.name) / "start.lock")) for part in parts]
        self._stopping = False

    def run(self) -> None:
        """Until SIGTERM, SIGINT or SIGHUP; then both processes are ended by pid.

        Raises:
            ConsiliumError: the node runs already, or a user does not exist.
        """
        self._home.config()
        self._home.check_sockets()
        self._home.logs.mkdir(exist_ok=True)
        separate(self._home, [child.part for child in self._children])
        held = []
        try:
            for child in self._children:
                if not child.lock.acquire(patience=GRACE):
                    raise ConsiliumError(
                        f"The site's {child.part.name} is running already",
                        str(self._home.root),
                        "One is enough: see `consilium-site status`, or stop the other `consilium-site start`.",
                    )
                held.append(child)
            before = {number: signal.signal(number, self._on_signal) for number in ending()}
            try:
                while not self._stopping:
                    for child in self._children:
                        self._tend(child)
                    time.sleep(TICK)
            finally:
                self._end()
                for number, handler in before.items():
                    signal.signal(number, handler)
        finally:
            for child in held:
                child.lock.release()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _tend(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is None:
            if now >= child.due:
                self._start(child)
            return
        code = child.process.poll()
        if code is None:
            if child.part.name == "agent" and child.identity != _inode(self._home.identity_key):
                self._say("The identity was renewed: the agent starts again with it.")
                child.process.terminate()
                child.identity = _inode(self._home.identity_key)
            return
        child.process = None
        if now - child.started > SETTLED:
            child.pause = FIRST_PAUSE
        child.due, wait = now + child.pause, child.pause
        child.pause = min(child.pause * 2, LONGEST_PAUSE)
        self._say(
            f"The {child.part.name} ended ({_ending(code)}): {self._last_line(child.part.name)} "
            f"It starts again in {wait:g} s."
        )

    def _start(self, child: _Child) -> None:
        name = child.part.name
        path = self._home.logs / f"{name}.log"
        if path.exists() and path.stat().st_size > LOG_LIMIT:
            path.replace(path.with_suffix(".log.1"))
        child.identity = _inode(self._home.identity_key) if name == "agent" else 0
        with open(path, "ab") as log:
            child.process = subprocess.Popen(
                child.part.command(self._home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(child.lock.handle,),
                start_new_session=True,
                env={**os.environ, **QUIET},
            )
        child.started = time.monotonic()
        self._say(f"The {name} started (pid {child.process.pid}, log {path}).")

    def _end(self) -> None:
        """SIGTERM to each by pid, SIGKILL to what does not end."""
        running = [(child.part.name, child.process) for child in self._children if child.process is not None]
        for _, process in running:
            process.terminate()
        end = time.monotonic() + GRACE
        for name, process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._say(f"The {name} ended.")

    def _last_line(self, name: str) -> str:
        try:
            with open(self._home.logs / f"{name}.log", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
                lines = file.read().decode(errors="replace").strip().splitlines()
            return f"“{lines[-1][:300]}”." if lines else "its log is empty."
        except OSError:
            return "its log cannot be read."

    def _folder(self, name: Name) -> Path:
        return self._home.agent if name == "agent" else self._home.connector


def separate(home: SiteHome, parts: Sequence[Part]) -> None:
    """Give each process's folders to its user, so that the file system keeps them apart (root only).

    The groups that site.toml names may enter `run/outward` and `run/local`, and nothing else of the agent's; the
    agent's user must be a member of both, to give them its sockets.

    Raises:
        ConsiliumError: no such user or group, no group that both users share, or not root.
    """
    users = {part.name: part.user for part in parts if part.user}
    if not users:
        return
    if os.geteuid() != 0:
        raise ConsiliumError(
            "Only root can start processes under other users", ", ".join(users.values()), "Start it as root."
        )
    for name, user in users.items():
        try:
            entry = pwd.getpwnam(user)
        except KeyError as error:
            raise ConsiliumError(
                "There is no such user", user, f"Make one: `useradd --system --no-create-home {user}`."
            ) from error
        for folder in _owned(home, name):
            _give(folder, entry.pw_uid, entry.pw_gid)
    config = home.config()
    if len(set(users.values())) > 1 and not config.outward_group:
        raise ConsiliumError(
            "The connector's user could not reach the agent",
            " and ".join(users.values()),
            f"Make a group of both users and name it in {home.config_file}: outward_group.",
        )
    if "agent" in users:
        for folder, group in (
            (home.outward_socket.parent, config.outward_group),
            (home.local_socket.parent, config.operator_group),
        ):
            if group:
                try:
                    os.chown(folder, -1, grp.getgrnam(group).gr_gid)
                except KeyError as error:
                    raise ConsiliumError(
                        "There is no such group", f"{group} (in {home.config_file})", f"Make it: `groupadd {group}`."
                    ) from error
                folder.chmod(0o2750)


def _owned(home: SiteHome, name: str) -> list[Path]:
    if name == "agent":
        return [home.agent, home.outward_socket.parent, home.local_socket.parent]
    return [home.connector]


def _give(folder: Path, user: int, group: int) -> None:
    os.chown(folder, user, group)
    for path in folder.rglob("*"):
        os.chown(path, user, group, follow_symlinks=False)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
