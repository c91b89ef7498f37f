"""The connector between a real SuperLink and a real agent: messages get through, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch

from client import enrolment, link_state
from client.agent_client import Local, Outward
from client.connector import LONGEST_PAUSE, Backoff
from client.flower import public_pem
from client.home import SiteHome
from models import weights
from privacy.canonical import canonical, sha256
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.messages import Answer, Header
from privacy.roster import Roster
from privacy.study import Study
from privacy.study_text import template
from server.flower import Exchange, Outgoing, acquire, start_run
from server.superlink import secrets
from tests.client.agent.bed import with_sides
from tests.client.site_kit import LIVENESS, REPOSITORY, Link, Proxy, child_environment, new_site, running_link, until

SITE = "st-anna"
pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Coordinator:
    """The far end: signs requests and exchanges them through the SuperLink, as a ServerApp does."""

    link: Link
    study: Document
    roster: Document
    initial: bytes
    exchange: Exchange | None = None

    @property
    def hash(self) -> str:
        return self.study.digest

    def begin(self) -> None:
        shared = secrets(self.link.home)
        start_run(self.link.private, shared.control, self.hash)
        task = acquire(self.link.private, shared.runtime, self.hash)
        assert task is not None
        self.exchange = Exchange(self.link.private, task[0], self.hash).__enter__()

    def end(self) -> None:
        if self.exchange is not None:
            self.exchange.__exit__(None, None, None)
            self.exchange = None

    def request(self, kind: str, payload: bytes = b"", session: int = 0, slot: int = 0, round_: int = 0) -> bytes:
        header = Header(
            kind=kind,  # type: ignore[arg-type]
            study=self.hash,
            session=session,
            slot=slot,
            round=round_,
            cohort=(SITE,),
            payload_sha256=sha256(payload),
            payload_bytes=len(payload),
            deadline_seconds=120,
        )
        return header.signed(self.link.identity).encode()

    def send(self, kind: str, document: bytes, payload: bytes = b"", ttl: float = 120.0) -> str:
        exchange = self.exchange
        assert exchange is not None
        until(lambda: bool(exchange.nodes()), "the site is connected")
        (node,) = exchange.nodes().values()
        (message,) = exchange.send([Outgoing(node, kind, document, payload or None)], ttl)
        return message

    def hear(self, message: str, seconds: float = LIVENESS) -> tuple[bytes, bytes]:
        """The answer's document and payload."""
        assert self.exchange is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for reply in self.exchange.poll([message], 1.0):
                assert not reply.error, reply.error
                return reply.document, b"".join(reply.chunks())
        raise AssertionError("no answer came")

    def ask(self, kind: str, payload: bytes = b"", **where: int) -> tuple[Answer, bytes]:
        document, data = self.hear(self.send(kind, self.request(kind, payload, **where), payload))
        identity = Roster.of(self.roster).site(SITE).identity
        answer = Answer.verified(document, identity)
        assert sha256(data) == (answer.payload_sha256 or sha256(b""))
        return answer, data

    def offer(self) -> Answer:
        payload = canonical({part.kind: json.loads(part.encode()) for part in (self.study, self.roster)})
        return self.ask("offer", payload)[0]


class Node:
    """`consilium-site start` as a process."""

    def __init__(self, home: SiteHome) -> None:
        self.home = home
        command = [sys.executable, "-m", "client.cli", "--home", str(home.root), "start"]
        with open(home.root / "start.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, env=child_environment(), stderr=log)

    def pid(self, name: str) -> int | None:
        """The process id of one of the two, however often it was started again."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                if f"client.{name}" in child.cmdline():
                    return child.pid
        return None

    def kill(self, name: str) -> None:
        until(lambda: self.pid(name) is not None, f"the {name} runs")
        os.kill(self.pid(name) or 0, signal.SIGKILL)

    def ready(self) -> None:
        until(lambda: phase(self.home) == "connected", "the connector is connected", self.logs)
        with Outward(self.home.outward_socket) as door:
            until(lambda: answers(door), "the agent answers", self.logs)

    def logs(self) -> str:
        paths = [self.home.root / "start.log", *sorted(self.home.logs.glob("*.log"))]
        return "\n".join(path.read_text()[-2000:] for path in paths if path.exists())

    def stop(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        assert self.process.wait(LIVENESS) == 0
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def answers(door: Outward) -> bool:
    try:
        return door.hello().site == SITE
    except ConsiliumError:
        return False


def phase(home: SiteHome) -> str:
    state = link_state.read(home)
    return state.phase if state is not None and link_state.connector_alive(home) else ""


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with running_link(tmp_path_factory.mktemp("link")) as link:
        yield link


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, link: Link) -> SiteHome:
    return new_site(tmp_path_factory.mktemp("site"), link, SITE)


@pytest.fixture(scope="module")
def coordinator(link: Link, home: SiteHome) -> Iterator[Coordinator]:
    text = template("chest", [SITE]).replace("densenet-small", "plain-cnn").replace("[64, 64]", "[16, 16]")
    text = text.replace('norm = "group" ', 'norm = "group"\nparameters = { width = 2 } ')
    study = Study.from_toml(text.replace("local_steps = 20", "local_steps = 1"))
    initial = weights.initial_state(study.spec(), study.initial.seed)
    study = study.model_copy(update={"initial": study.initial.model_copy(update={"sha256": sha256(initial)})})
    roster = link.admit(enrolment.enrolment(home)).signed(link.identity)
    coordinator = Coordinator(link, study.document().signed_by(link.identity), roster, initial)
    coordinator.begin()
    yield coordinator
    coordinator.end()


@pytest.fixture(scope="module")
def node(home: SiteHome, coordinator: Coordinator) -> Iterator[Node]:
    node = Node(home)
    try:
        node.ready()
        yield node
    finally:
        node.stop()


@pytest.fixture(scope="module")
def training(node: Node, coordinator: Coordinator, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The study is offered, approved, and open; the starting weights are held. Returns the trainable vector."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    dice = np.random.default_rng(1)
    np.savez(path, **with_sides({"images": dice.integers(0, 255, (40, 16, 16), np.uint8), "labels": np.arange(40) % 2}))
    assert coordinator.offer().detail["state"] == "pending"
    with Local(node.home.local_socket) as door:
        door.connect("images", json.dumps({"kind": "npz", "path": str(path), "one_image_per_patient": True}))
        door.decide(coordinator.hash, "approve")
    assert coordinator.offer().detail["state"] == "approved"
    assert coordinator.ask("open", session=1)[0].detail == {"initial": "needed"}
    answer, _ = coordinator.ask("open", coordinator.initial, session=1)
    assert answer.detail == {"initial": "held"}
    return weights.state_vector(coordinator.initial)


def test_a_model_travels_both_ways_in_pieces(coordinator: Coordinator, training: np.ndarray) -> None:
    answer, data = coordinator.ask("train", training.tobytes(), session=1, slot=1, round_=1)
    assert (answer.status, answer.code) == ("done", "")
    assert len(data) == 4 * (len(training) + answer.statistics) > 10 << 20
    assert np.abs(np.frombuffer(data[: 4 * len(training)], "<f4")).max() > 0


def test_the_same_request_gets_the_same_bytes(coordinator: Coordinator, training: np.ndarray) -> None:
    first = coordinator.ask("train", training.tobytes(), session=1, slot=2, round_=1)
    assert coordinator.ask("train", training.tobytes(), session=1, slot=2, round_=1) == first


def test_an_agent_killed_in_the_middle_answers_after_its_restart(
    node: Node, coordinator: Coordinator, training: np.ndarray
) -> None:
    message = coordinator.send("train", coordinator.request("train", training.tobytes(), 1, 3, 1), training.tobytes())
    node.kill("agent")
    document, data = coordinator.hear(message)
    answer = Answer.read(Document.decode(document, "answer").body)
    assert answer.status == "done", answer.code
    assert sha256(data) == answer.payload_sha256


def test_a_connector_killed_in_the_middle_takes_the_message_again(
    node: Node, coordinator: Coordinator, training: np.ndarray
) -> None:
    message = coordinator.send("train", coordinator.request("train", training.tobytes(), 1, 4, 1), training.tobytes())
    node.kill("connector")
    document, data = coordinator.hear(message)
    assert Answer.read(Document.decode(document, "answer").body).payload_sha256 == sha256(data)


def test_a_killed_superlink_is_found_again_and_the_slot_answers_with_its_stored_bytes(
    node: Node, coordinator: Coordinator, training: np.ndarray
) -> None:
    before = coordinator.ask("train", training.tobytes(), session=1, slot=5, round_=1)
    coordinator.exchange = None
    coordinator.link.stop(kill=True)
    until(lambda: phase(node.home) == "waiting", "the connector says that it is not connected")
    trouble = link_state.read(node.home)
    assert trouble is not None
    assert trouble.network is not None
    assert trouble.network.remedy
    coordinator.link.start()
    coordinator.begin()
    assert coordinator.ask("train", training.tobytes(), session=1, slot=5, round_=1) == before


def test_hostile_bytes_are_refused_and_do_no_harm(node: Node, coordinator: Coordinator) -> None:
    before = node.pid("connector"), node.pid("agent")
    for document in (b"\x00" * 1000, b"{}", Document("request", {"run": "rm"}).encode()):
        reply, _ = coordinator.hear(coordinator.send("train", document, b"payload"))
        answer = Answer.read(Document.decode(reply, "answer").body)
        assert (answer.status, answer.code) == ("refused", RefusalCode.MALFORMED.value)
    forged = Identity.generate()
    header = Header.read(Document.decode(coordinator.request("offer", b"{}"), "request").body)
    reply, _ = coordinator.hear(coordinator.send("offer", header.signed(forged).encode(), b"{}"))
    assert Answer.read(Document.decode(reply, "answer").body).code == RefusalCode.BAD_SIGNATURE.value
    assert (node.pid("connector"), node.pid("agent")) == before


def test_the_agent_runs_without_a_network(node: Node) -> None:
    node.ready()
    with Local(node.home.local_socket) as door:
        status = door.status()
    assert not status.network
    pid = node.pid("agent")
    if os.geteuid() == 0:
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def test_a_second_node_in_the_same_home_is_refused(node: Node) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "client.connector", str(node.home.root)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIVENESS,
        check=False,
    )
    assert second.returncode == 2
    assert "A connector is running already" in second.stderr
    assert "Traceback" not in second.stderr


def test_an_answer_can_be_fetched_only_with_its_request(node: Node, training: np.ndarray) -> None:
    with Outward(node.home.outward_socket) as door, pytest.raises(Refusal):
        door.fetch("a" * 64, 1, 1, "b" * 64, 0, 10)


def test_a_renewed_key_is_taken_into_use_once_the_coordinator_has_it(
    node: Node, coordinator: Coordinator, link: Link
) -> None:
    node.ready()
    old = public_pem(node.home.node_key)
    renewed = enrolment.enrolment(node.home, renew=True)
    assert coordinator.offer().status == "done"
    assert public_pem(node.home.node_key) == old
    link.admit(renewed)
    until(lambda: public_pem(node.home.node_key) != old, "the connector adopts the new key", node.logs)
    assert not enrolment.following(node.home.node_key).exists()
    assert coordinator.offer().status == "done"


def test_a_site_behind_a_proxy(link: Link, coordinator: Coordinator, node: Node) -> None:
    with Proxy() as proxy:
        node.home.write_config(node.home.config().model_copy(update={"proxy": proxy.url}))
        node.kill("connector")
        until(lambda: bool(proxy.seen), "the connector goes through the proxy")
        assert coordinator.offer().status == "done"
        node.home.write_config(node.home.config().model_copy(update={"proxy": ""}))
    assert coordinator.offer().status == "done"


def test_the_pauses_grow_to_five_seconds_and_are_never_equal() -> None:
    backoff = Backoff()
    pauses = [backoff.pause() for _ in range(12)]
    assert 0.25 <= pauses[0] <= 0.5
    assert all(LONGEST_PAUSE / 2 <= pause <= LONGEST_PAUSE for pause in pauses[5:])
    assert len(set(pauses)) == len(pauses)
    backoff.reset()
    assert backoff.pause() <= 0.5
