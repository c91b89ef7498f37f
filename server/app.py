"""Which process runs one study? `python -m server.app HOME STUDY`: a Flower ServerApp whose main is our round loop.

It starts a run at our SuperLink, takes the run's task, and works until the study is finished or halted. It holds no
learning library: updates are added up as flat vectors.

Exit status: 0 finished, paused or stopped; 1 interrupted or failed, with one line on stderr; 3 another process runs
this study.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privacy.errors import ConsiliumError
from server import flower
from server.desk import Link
from server.home import CoordinatorHome
from server.outputs import publisher
from server.records import LIVE, State
from server.registry import Registry
from server.rounds import Loop
from server.superlink import private_url, secrets

HOME = "CONSILIUM_HOME"
ANOTHER_RUNS = 3
TASK_PATIENCE = 10.0

app = ServerApp()
_ending = threading.Event()


class MonotonicClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds, never going back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait; an end that was asked for cuts it short."""
        _ending.wait(seconds)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study named in the run's configuration, over the exchange that stands in for the grid.

    Raises:
        ConsiliumError: the study ended without a result; the registry says why as well.
    """
    home = CoordinatorHome(Path(os.environ[HOME]))
    with Registry(home) as registry:
        record = registry.study(str(context.run_config["study"]))
        loop = Loop(
            registry,
            record,
            home.identity(),
            cast(Link, grid),
            publisher(home, registry),
            MonotonicClock(),
            _ending.is_set,
        )
        state = loop.run()
        record = registry.study(record.hash)
    if state in {State.FAILED, State.INTERRUPTED}:
        raise ConsiliumError(
            f"The study is {state.value}",
            f"{record.name} ({record.reason})",
            f"Go on with `consilium-coordinator study {_verb(state)} {record.name}`.",
        )


def run(home: CoordinatorHome, study: str) -> None:
    """Run a requested study in this process.

    Raises:
        ConsiliumError: not requested, the SuperLink is gone, or the study ended without a result.
    """
    os.environ[HOME] = str(home.root)
    with Registry(home) as registry:
        record = registry.study(study)
        if record.state is not State.REQUESTED:
            raise ConsiliumError(
                "Nobody asked for this study to run",
                f"{record.name} is {record.state.value}",
                "`consilium-coordinator study launch` or `study resume` asks for it.",
            )
        try:
            private, token = private_url(home.root), secrets(home.root)
            flower.run_serverapp(app, private, _task(private, token.control, token.runtime, record.hash), record.hash)
        except flower.LinkLost as error:
            forgotten = "the SuperLink restarted and forgot this run"
            reason = forgotten if error.kind == "forgotten" else "the SuperLink does not answer"
            remedy = f"resume with consilium-coordinator study resume {record.name}"
            _interrupt(registry, record.hash, f"{reason} ({error.subject}); {remedy}")
            raise
        except Exception as error:
            why = str(error) if isinstance(error, ConsiliumError | OSError) else f"an error of its own: {error!r}"
            _interrupt(registry, record.hash, why)
            raise


def _verb(state: State) -> str:
    return "launch" if state is State.FAILED else "resume"


def _task(private: str, control: str, secret: bytes, study: str) -> str:
    """The token of this study's task: of a run that was started and never taken up, or of a new one."""
    until = time.monotonic() + TASK_PATIENCE
    found = flower.acquire(private, secret, study)
    if found is None:
        flower.start_run(private, control, study)
    while found is None:
        if time.monotonic() > until:
            raise ConsiliumError(
                "The SuperLink does not hand out the run it started",
                study[:16],
                "Its log in the folder `log` says why; then `consilium-coordinator study resume`.",
            )
        found = flower.acquire(private, secret, study)
        if found is None:
            time.sleep(0.1)
    return found[0]


def _interrupt(registry: Registry, study: str, reason: str) -> None:
    if registry.study(study).state in LIVE | {State.REQUESTED}:
        registry.transition(study, State.INTERRUPTED, reason)


@contextlib.contextmanager
def sole_runner(home: CoordinatorHome, study: str) -> Iterator[bool]:
    """Whether this process is the only one that runs the study; it stays so inside the block."""
    home.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(_lock_file(home, study), "a", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _lock_file(home: CoordinatorHome, study: str) -> Path:
    return home.run / f"study-{study}.lock"


def _end(*_: Any) -> None:
    _ending.set()


def command(arguments: list[str]) -> int:
    """The process: HOME and STUDY in, exit status out."""
    if len(arguments) != 2:
        print("usage: python -m server.app HOME STUDY", file=sys.stderr)
        return 2
    home, study = CoordinatorHome(Path(arguments[0])), arguments[1]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        with sole_runner(home, study) as sole:
            if not sole:
                print(f"Another process runs this study: {study[:16]}. Stop that one first.", file=sys.stderr)
                return ANOTHER_RUNS
            run(home, study)
    except (ConsiliumError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
