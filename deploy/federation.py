"""How is a whole federation run on one machine? Real processes, real TLS, real folders, through the real commands.

The demo, the fault tests and the benchmarks all use this one class, so that what is shown is what is tested. Every
process is started by the command a person would type and ended by its own pid.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from privacy.errors import ConsiliumError
from privacy.terminal import ending

POLL_SECONDS = 0.1
ROLES = {
    "superlink": "server.superlink",
    "serverapp": "server.app",
    "agent": "client.agent",
    "connector": "client.connector",
}


def free_port() -> int:
    """A TCP port on loopback that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Federation:
    """One coordinator and its sites under `root`.

    Attributes:
        root: folder that holds every home; short, because Unix sockets have short names.
        sites: site names.
        port: the public TLS port on loopback.
        env: extra environment for every process.
    """

    root: Path
    sites: Sequence[str]
    port: int = field(default_factory=free_port)
    env: dict[str, str] = field(default_factory=dict)
    echo: Callable[[str], None] = lambda line: None
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator_home(self) -> Path:
        """The coordinator's folder."""
        return self.root / "coordinator"

    def site_home(self, site: str) -> Path:
        """One site's folder."""
        return self.root / site

    def coordinator(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `consilium-coordinator` with arguments."""
        return self._command("consilium-coordinator", "server.cli", self.coordinator_home, arguments, check)

    def site(self, site: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `consilium-site` at one site."""
        return self._command("consilium-site", "client.cli", self.site_home(site), arguments, check)

    def create(self, name: str = "alpine") -> None:
        """Make the consortium and enrol every site: the exchange of files, end to end."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.coordinator("init", name, "--host", "127.0.0.1", "--port", str(self.port))
        for site in self.sites:
            self.enrol(site)

    def enrol(self, site: str) -> None:
        """One site's files out, the coordinator's yes."""
        consortium = self.coordinator_home / "consortium.json"
        card = self.root / f"{site}.enrol.json"
        self.site(site, "init", site, "--consortium", str(consortium))
        self.site(site, "enrol", "--out", str(card))
        self.coordinator("sites", "add", str(card), "--yes")

    def serve(self) -> None:
        """Start the coordinator and wait until its public port answers."""
        self._start("coordinator", "server.cli", "--home", str(self.coordinator_home), "serve")
        self.until(self.answering, "the coordinator to answer", 60)

    def start(self, *sites: str) -> None:
        """Start site nodes (all of them by default) and wait until their agents listen."""
        chosen = sites or tuple(self.sites)
        for site in chosen:
            self._start(site, "client.cli", "--home", str(self.site_home(site)), "start")
        for site in chosen:
            self.until(self._listening(site), f"the agent of {site}", 90)

    def answering(self) -> bool:
        """Whether something listens on the public port."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def process(self, owner: str, role: str) -> psutil.Process | None:
        """One living process: role `superlink` or `serverapp` of "coordinator", `agent` or `connector` of a site."""
        return next(iter(self.processes(owner, role)), None)

    def processes(self, owner: str, role: str | None = None) -> Iterator[psutil.Process]:
        """The supervisor of an owner and everything below it, or only the processes of one role."""
        top = self._running.get(owner)
        if top is None or top.poll() is not None:
            return
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(top.pid)
            if role is None:
                yield parent
            for child in parent.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if role is None or _runs(child, ROLES[role]):
                        yield child

    def kill(self, owner: str, role: str) -> int:
        """kill −9 one process and return its pid.

        Raises:
            RuntimeError: no such process runs.
        """
        process = self.process(owner, role)
        if process is None:
            raise RuntimeError(f"{owner} has no {role} running")
        process.kill()
        return int(process.pid)

    def crash(self, owner: str) -> int:
        """kill −9 one supervisor, and only it, as when a machine's memory is full; returns its pid.

        What it started must end by itself; this waits until it has.

        Raises:
            RuntimeError: it does not run.
        """
        top = self._running.pop(owner, None)
        if top is None or top.poll() is not None:
            raise RuntimeError(f"{owner} does not run")
        family = psutil.Process(top.pid).children(recursive=True)
        top.kill()
        top.wait()
        self.until(lambda: not any(child.is_running() for child in family), f"what {owner} started to end", 60)
        return top.pid

    def end(self, *owners: str) -> None:
        """End supervisors the polite way, all at once, and make sure of it; a second Ctrl-C does not cut it short."""
        with _undisturbed():
            tops = [top for owner in owners if (top := self._running.pop(owner, None)) is not None]
            family: list[psutil.Process] = []
            for top in tops:
                with contextlib.suppress(psutil.Error):
                    family += psutil.Process(top.pid).children(recursive=True)
                if top.poll() is None:
                    top.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            for top in tops:
                try:
                    top.wait(timeout=max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    top.kill()
                    top.wait()
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def stop(self) -> None:
        """End every process of this federation."""
        self.end(*self.sites, "coordinator")

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait for something that must happen.

        Raises:
            ConsiliumError: it did not, or a supervisor ended meanwhile; the message carries the end of the logs.
        """
        end = time.monotonic() + seconds
        while not condition():
            dead = [owner for owner, top in self._running.items() if top.poll() is not None]
            if dead or time.monotonic() > end:
                reason = f"{', '.join(dead)} ended" if dead else f"{seconds:.0f} s passed"
                raise ConsiliumError(f"Waited for {what} in vain", reason, f"The logs say:\n{self.logs()}")
            time.sleep(POLL_SECONDS)

    def logs(self, lines: int = 25) -> str:
        """The last lines of every log of this federation."""
        parts = []
        for path in sorted(self.root.glob("*/log/*.log")) + sorted(self.root.glob("*.out")):
            tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.relative_to(self.root)}", *tail]))
        return "\n".join(parts)

    def _listening(self, site: str) -> Callable[[], bool]:
        path = self.site_home(site) / "run" / "local" / "agent.sock"

        def check() -> bool:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
                return True
            return False

        return check

    def _command(
        self, program: str, module: str, home: Path, arguments: Sequence[str], check: bool
    ) -> subprocess.CompletedProcess[str]:
        self.echo(f"{program} {' '.join(arguments)}")
        done = subprocess.run(
            [sys.executable, "-m", module, "--home", str(home), *arguments],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            message = (done.stderr or done.stdout).strip()
            raise ConsiliumError(f"`{program} {' '.join(arguments[:2])}` failed", message, "See the message above.")
        return done

    def _start(self, owner: str, module: str, *arguments: str) -> None:
        with open(self.root / f"{owner}.out", "ab") as output:
            self._running[owner] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        threads = str(max(1, (os.cpu_count() or 1) // max(1, len(self.sites))))  # the agents share this machine
        return {**os.environ, "OMP_NUM_THREADS": threads, "COLUMNS": "120", "NO_COLOR": "1", **self.env}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal that ends a program cut the block short; only the main thread may say so, others need not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ending()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _runs(process: psutil.Process, module: str) -> bool:
    line = process.cmdline()
    return any(a == "-m" and b == module for a, b in itertools.pairwise(line))
