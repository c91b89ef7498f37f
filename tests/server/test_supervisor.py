"""`consilium-coordinator serve` with real processes: what is killed comes back, what ends leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from models import weights
from privacy.errors import ConsiliumError
from privacy.identity import Identity
from privacy.roster import Enrolment, enrol, expiry
from privacy.study import Study
from privacy.study_text import template
from privacy.terminal import run
from server import tls
from server.cli import app
from server.guards import check_certificate, check_port, is_serving
from server.home import CoordinatorHome
from server.records import State
from server.registry import Registry

PATIENCE = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    root = tmp_path / "home"
    options = ["init", "lungs", "--host", "localhost", "--listen", "127.0.0.1", "--port", str(free_port())]
    assert run(app, "consilium-coordinator", ["-H", str(root), *options]) == 0
    return CoordinatorHome(root)


@pytest.fixture
def study(home: CoordinatorHome) -> str:
    """A signed study of one site that never comes."""
    identity = Identity.generate()
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    now = datetime.now(UTC)
    body = Enrolment(consortium="lungs", site="anna", identity=identity.public, node_key=pem, not_after=expiry(now))
    state = weights._save({"a": np.zeros(4, np.float32)}, [])
    with Registry(home) as registry:
        registry.save_roster(enrol(registry.roster()[1], body, now).signed(home.identity()))
        initial = registry.blobs.put(state)
        flat = registry.blobs.put(b"\0" * 16)
        draft = Study.from_toml(template("chest", ["anna"]))
        signed = draft.model_copy(update={"initial": draft.initial.model_copy(update={"sha256": initial})})
        return registry.add_study(signed.document().signed_by(home.identity()), initial, flat).hash


class Served:
    """A supervisor in a process of its own."""

    def __init__(self, home: CoordinatorHome) -> None:
        self.home = home
        self.log = home.root.parent / "serve.log"
        with open(self.log, "ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "-H", str(home.root), "serve"],
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self.known: set[psutil.Process] = set()

    def children(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.known |= set(found)
        return found

    def link(self) -> int:
        """Process id of the SuperLink that takes calls now."""
        try:
            return int(json.loads((self.home.run / "superlink.json").read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return 0

    def wait_for_link(self, other_than: int = 0) -> int:
        until(lambda: self.link() not in (0, other_than), "the SuperLink did not come up")
        self.children()
        return self.link()

    def end(self) -> int:
        if self.process.poll() is None:
            self.children()
            self.process.terminate()
        return self.process.wait(PATIENCE)

    def nothing_is_left(self) -> bool:
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in self.known)


@pytest.fixture
def serve(home: CoordinatorHome) -> Iterator[Callable[[], Served]]:
    started: list[Served] = []

    def start() -> Served:
        started.append(Served(home))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


def test_a_killed_superlink_comes_back_and_the_end_is_clean(home: CoordinatorHome, serve: Callable[[], Served]) -> None:
    served = serve()
    first = served.wait_for_link()
    assert is_serving(home)
    os.kill(first, signal.SIGKILL)
    served.wait_for_link(other_than=first)
    assert "The SuperLink ended (killed by SIGKILL)" in served.log.read_text()
    assert served.end() == 0
    assert served.nothing_is_left()
    assert not is_serving(home)
    check_port("127.0.0.1", home.config().port, patience=0)


def test_a_killed_supervisor_takes_its_children_along(home: CoordinatorHome, serve: Callable[[], Served]) -> None:
    served = serve()
    served.wait_for_link()
    served.process.kill()
    served.process.wait()
    until(served.nothing_is_left, "a child outlived its supervisor")
    again = serve()
    again.wait_for_link()
    assert again.end() == 0


def test_a_killed_study_is_interrupted_with_its_reason_and_can_go_on(
    home: CoordinatorHome, study: str, serve: Callable[[], Served]
) -> None:
    served = serve()
    served.wait_for_link()
    with Registry(home) as registry:
        registry.launch(study)
        until(lambda: registry.study(study).state is State.WAITING, "the study did not start")
        (runner,) = [p for p in served.children() if "server.app" in p.cmdline()]
        runner.kill()
        until(lambda: registry.study(study).state is State.INTERRUPTED, "nobody said that the study died")
        assert "killed by SIGKILL" in registry.study(study).reason
        registry.resume(study)
        until(lambda: registry.study(study).state is State.WAITING, "the study did not go on")
        assert served.end() == 0
        assert served.nothing_is_left()
        assert registry.study(study).state is State.INTERRUPTED


def test_a_study_left_running_is_interrupted_at_the_next_start(
    home: CoordinatorHome, study: str, serve: Callable[[], Served]
) -> None:
    with Registry(home) as registry:
        registry.launch(study)
        registry.transition(study, State.RUNNING)
        served = serve()
        until(lambda: registry.study(study).state is State.INTERRUPTED, "the study still counts as running")
        assert "shut down" in registry.study(study).reason
        served.end()


def test_a_taken_port_is_named(home: CoordinatorHome) -> None:
    port = home.config().port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ConsiliumError, match=f"The port is taken by another program: 127.0.0.1:{port}"):
            check_port("127.0.0.1", port, patience=0)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConsiliumError, match="This machine has no such address"):
        check_port("192.0.2.1", free_port(), patience=0)


def test_an_expired_certificate_stops_the_start_and_one_that_ends_soon_warns(
    home: CoordinatorHome, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    tls.create_server(home.tls, ["localhost"], days=20)
    assert "ends in 19 days" in check_certificate(home)
    tls.create_server(home.tls, ["localhost"], days=40)
    assert check_certificate(home) == ""
    with pytest.raises(ConsiliumError, match="expired"):
        check_certificate(home, now + timedelta(days=41))
    tls.create_server(home.tls, ["localhost"], days=1, now=now - timedelta(days=2))
    capsys.readouterr()
    assert run(app, "consilium-coordinator", ["-H", str(home.root), "serve"]) == 1
    assert "The server certificate has expired" in capsys.readouterr().err
    assert not is_serving(home)


def test_the_supervisor_process_stays_light() -> None:
    code = (
        "import sys, server.cli, server.supervisor;"
        "sys.exit(any(name in sys.modules for name in ('flwr', 'torch', 'monai', 'matplotlib', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE).returncode == 0
