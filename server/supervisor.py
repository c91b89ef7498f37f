"""Who keeps the coordinator's processes alive? `consilium-coordinator serve`: one SuperLink, one ServerApp per study.

The supervisor holds no study data and no connection. It starts the SuperLink and starts it again when it dies, starts
a ServerApp for each study that was asked for, and says in the registry when one died without having said why. It ends
its children by their own process ids, ServerApps first; should it be killed itself, the kernel ends them (prctl(2),
PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from privacy.errors import ConsiliumError
from privacy.terminal import ending
from server.guards import check_certificate, check_port, lock, runs
from server.home import CoordinatorHome
from server.records import LIVE, State
from server.registry import Registry
from server.superlink import QUIET

TICK = 0.25
ROSTER_EVERY = 60.0
BACK_OFF = (1.0, 30.0)
STEADY = 60.0
LOG_LIMIT = 20 << 20
PATIENCE_STUDY, PATIENCE_LINK = 20.0, 10.0
PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]


@dataclass
class Child:
    """One process of ours and the log it writes to."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def last_words(self) -> str:
        """The last line of its log, for people."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4096))
                lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return lines[-1].strip()[:300] if lines else ""

    def end(self, patience: float) -> None:
        """Ask it to end, by its own id; insist when `patience` seconds are over."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Supervisor:
    """The loop. `say` takes lines for the person at the terminal."""

    def __init__(self, home: CoordinatorHome, registry: Registry, say: Say) -> None:
        self._home, self._registry, self._say = home, registry, say
        self._stop = threading.Event()
        self._link: Child | None = None
        self._link_again, self._pause = 0.0, BACK_OFF[0]
        self._studies: dict[str, Child] = {}
        self._next_roster = 0.0
        self._trouble = ""

    def stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask the loop to end; fit to be a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop`; then end every child."""
        self._registry.blobs.sweep()
        self._interrupt_orphans()
        try:
            while not self._stop.is_set():
                self._tick()
                self._stop.wait(TICK)
        finally:
            self._end()

    def _tick(self) -> None:
        self._keep_link()
        try:
            self._reap()
            if self._ready():
                self._start_requested()
            if time.monotonic() >= self._next_roster:
                self._next_roster = time.monotonic() + ROSTER_EVERY
                with contextlib.suppress(ConsiliumError):  # nobody is enrolled yet
                    self._registry.refresh_nodes()
            self._trouble = ""
        except (ConsiliumError, OSError) as error:
            if str(error) != self._trouble:  # said once, tried again at every tick
                self._trouble = str(error)
                self._say(self._trouble)

    # ---- the SuperLink ---------------------------------------------------------------------------------------

    def _keep_link(self) -> None:
        if self._link is not None and self._link.process.poll() is not None:
            lived = time.monotonic() - self._link.started
            self._pause = BACK_OFF[0] if lived > STEADY else self._pause
            code = self._link.process.returncode
            self._say(
                f"The SuperLink ended ({_cause(code)}): {self._link.last_words() or 'no message'}. "
                f"It starts again in {self._pause:.0f} s; its log is {self._link.log}."
            )
            self._link, self._link_again = None, time.monotonic() + self._pause
            self._pause = min(2 * self._pause, BACK_OFF[1])
        if self._link is None and time.monotonic() >= self._link_again:
            config = self._home.config()
            (self._home.run / "superlink.json").unlink(missing_ok=True)
            options = ["--host", config.listen, "--port", str(config.port), "--private-port", str(config.private_port)]
            self._link = self._start("superlink", "server.superlink", [str(self._home.root.resolve()), *options])

    def _ready(self) -> bool:
        """Whether the SuperLink of our own child takes calls."""
        if self._link is None:
            return False
        try:
            facts = json.loads((self._home.run / "superlink.json").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return False
        return bool(facts.get("pid") == self._link.process.pid)

    # ---- studies ---------------------------------------------------------------------------------------------

    def _start_requested(self) -> None:
        for record in self._registry.studies():
            waits = record.state is State.REQUESTED and record.hash not in self._studies
            if waits and not runs(self._home, record.hash):
                arguments = [str(self._home.root.resolve()), record.hash]
                self._studies[record.hash] = self._start(f"study-{record.hash[:12]}", "server.app", arguments)
                self._say(f"Study `{record.name}` starts; `consilium-coordinator study status {record.name}` shows it.")

    def _reap(self) -> None:
        for study, child in list(self._studies.items()):
            code = child.process.poll()
            if code is None:
                continue
            record = self._registry.study(study)
            if record.state in LIVE | {State.REQUESTED} and not runs(self._home, study):
                why = f": {words}" if code > 0 and (words := child.last_words()) else ""
                reason = f"the process running it ended ({_cause(code)}){why}; {_remedy(record.name)}"
                record = self._registry.transition(study, State.INTERRUPTED, reason)
            del self._studies[study]
            self._say(f"Study `{record.name}` is {record.state.value}{f': {record.reason}' if record.reason else ''}.")

    def _interrupt_orphans(self) -> None:
        """Studies that a supervisor before us left running, and that no process runs any more."""
        for record in self._registry.studies():
            if record.state in LIVE and not runs(self._home, record.hash):
                reason = f"the coordinator was shut down; {_remedy(record.name)}"
                self._registry.transition(record.hash, State.INTERRUPTED, reason)
                self._say(
                    f"Study `{record.name}` was interrupted; "
                    f"go on with `consilium-coordinator study resume {record.name}`."
                )

    # ---- children --------------------------------------------------------------------------------------------

    def _start(self, name: str, module: str, arguments: list[str]) -> Child:
        log = self._home.logs / f"{name}.log"
        log.parent.mkdir(exist_ok=True, mode=0o700)
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))
        with open(log, "ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                env={**os.environ, **QUIET},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=self._home.root,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which ends them in order
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - one thread, and the call cannot block
            )
        return Child(name, process, log)

    def _end(self) -> None:
        for child in self._studies.values():
            if child.process.poll() is None:
                child.process.terminate()
        until = time.monotonic() + PATIENCE_STUDY
        for child in self._studies.values():
            child.end(max(0.1, until - time.monotonic()))
        with contextlib.suppress(ConsiliumError, OSError):  # the next start says what could not be said now
            self._reap()
        if self._link is not None:
            self._link.end(PATIENCE_LINK)


def serve(home: CoordinatorHome, say: Say) -> None:
    """Serve a home in the foreground until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConsiliumError: no coordinator here, one serves it already, the certificate or the port cannot be used.
    """
    config = home.config()
    home.make_folders()
    with lock(home), Registry(home) as registry:
        if warning := check_certificate(home):
            say(warning)
        check_port(config.listen, config.port)
        supervisor = Supervisor(home, registry, say)
        before = {number: signal.signal(number, supervisor.stop) for number in ending()}
        say(f"Serving `{config.name}` at {config.superlink}. Logs are in {home.logs}. Ctrl-C ends it.")
        try:
            supervisor.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        say("All processes have ended.")


def _remedy(name: str) -> str:
    return f"resume with consilium-coordinator study resume {name}"


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _die_with(parent: int) -> Callable[[], None]:
    """For the moment between fork and exec: let the kernel end this child when its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
