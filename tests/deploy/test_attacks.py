"""Who attacks, and what do they get? Every attacker of docs/threat-model.md against one running federation.

Three hospitals and a coordinator run as real processes. `bystander` is a study that goes on while the others are
attacked, and must end as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from client.agent import agent_pb2 as pb
from client.agent import agent_pb2_grpc as stubs
from client.agent_client import Local
from client.fleet import create_key, load_key, public_pem
from client.flower import Incoming, Node, NodeError
from client.home import SiteHome
from client.supervisor import Part
from deploy.federation import Federation
from models import weights
from privacy.canonical import canonical, sha256
from privacy.errors import RefusalCode
from privacy.identity import Document, Identity
from privacy.journal import read as read_journal
from privacy.messages import PROTOCOL, Answer, Header
from privacy.roster import Roster
from server import gate
from server.flower import Exchange, Outgoing, acquire, start_run
from server.records import OutcomeState, State, StudyRecord
from server.runs import Control, Runtime, control, runtime
from server.superlink import private_url, secrets
from tests.deploy.lab import LIVENESS, Lab, connect_images

SITES = ("north", "south", "west")
PATIENCE = 60.0
INTRUDER = 54321
BYSTANDING = 40
GROUP, GROUP_NUMBER = "games", 60
LOCAL = pb.DESCRIPTOR.services_by_name["Local"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The federation; folders that every user may enter, so that only the doors' own permissions keep one out."""
    root = Path(tempfile.mkdtemp(prefix="atk-"))
    root.chmod(0o755)
    patch = pytest.MonkeyPatch()
    patch.setenv("FLWR_HOME", str(root / "flwr"))
    federation = Federation(root, SITES, env={"OMP_NUM_THREADS": "1", "COLUMNS": "400"})
    try:
        with federation:
            federation.create("alps")
            if os.geteuid() == 0:
                home = SiteHome(federation.site_home("north"))
                home.write_config(home.config().model_copy(update={"outward_group": GROUP}))
            federation.serve()
            federation.start()
            for number, site in enumerate(SITES):
                connect_images(federation, site, number)
            made = Lab(federation)
            try:
                yield made
            finally:
                made.close()
    finally:
        patch.undo()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def bystander(lab: Lab) -> StudyRecord:
    """A study that runs through all of this."""
    return lab.launch("bystander", rounds=BYSTANDING, minimum=3)


def home(lab: Lab, site: str) -> SiteHome:
    return SiteHome(lab.federation.site_home(site))


# ---- a stranger on the public port ---------------------------------------------------------------------------------


def talk(lab: Lab, request: bytes) -> bytes:
    """Send raw bytes over TLS and read until the other side hangs up."""
    context = ssl.create_default_context(cafile=lab.home.ca)
    with (
        socket.create_connection(("127.0.0.1", lab.federation.port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
    ):
        try:
            line.sendall(request)
        except OSError:
            return b""
        received = bytearray()
        while True:
            try:
                piece = line.recv(1 << 16)
            except ConnectionError:
                return bytes(received)
            if not piece:
                return bytes(received)
            received += piece


def answers(received: bytes) -> list[tuple[int, bytes]]:
    """(status, body) of each response."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        size = int(fields.get(b"content-length", b"0"))
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            size = len(received)
        found.append((int(head.split(b" ")[1]), received[:size]))
        received = received[size:]
        assert b"flower" not in head.lower()
        assert b"uvicorn" not in head.lower()
    return found


HIDDEN = [
    *gate.CONTROL_PATHS,
    *gate.RUNTIME_PATHS,
    *(f"/v1/fleet/{name}" for name in ("register-node", "unregister-node", "get-run", "get-fab")),
    "/", "/docs", "/redoc", "/openapi.json", "/health", "/healthz", "/metrics", "/v1", "/v1/fleet", "/favicon.ico",
    "/v1/%66leet/get-fab", "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/../control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run", "//v1/control/start-run", "/v1//control/start-run",
    "/v1/control/start-run/", "/V1/CONTROL/START-RUN", "/v1/Fleet/Pull-Messages", "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=1", "/v1/fleet/pull-messages;/../../control/start-run", "/v1/control/start-run%00",
    "/flwr.proto.Control/StartRun", "/flwr.proto.Fleet/CreateNode",
]  # fmt: skip


@pytest.mark.parametrize("path", HIDDEN)
def test_a_stranger_finds_no_path_but_the_fleets(lab: Lab, path: str) -> None:
    body = b"x" * 10
    for method in ("POST", "GET"):
        request = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        assert answers(talk(lab, request.encode() + body)) == [(404, b"")]


ODD = {
    "GET on a fleet path": b"GET /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\n\r\n",
    "PUT": b"PUT /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "HEAD": b"HEAD /v1/control/list-runs HTTP/1.1\r\nHost: a\r\n\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "TRACE": b"TRACE /v1/control/list-runs HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a\r\n\r\n",
    "an old protocol": b"POST /v1/control/list-runs HTTP/1.0\r\n\r\n",
    "an absolute one": b"POST http://127.0.0.1/v1/control/list-runs HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "a websocket": (
        b"GET /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ),
    "an upgrade to HTTP/2": (
        b"POST /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: 0\r\n\r\n"
    ),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": (
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nPOST /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    ),
    "a request behind another": (
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
        b"POST /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    ),
    "an announced giant": b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\nxxxx",
    "a giant to a hidden one": b"POST /v1/control/start-run HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\nxx",
    "no HTTP at all": b"\x16\x03\x01\x00\xa5" + bytes(200),
}


SPOKEN_TO_NOBODY: set[str] = set()
"""What gets no answer at all."""


@pytest.mark.parametrize("trick", ODD)
def test_a_stranger_with_a_trick_is_answered_404_or_401_and_hung_up_on(lab: Lab, trick: str) -> None:
    found = answers(talk(lab, ODD[trick]))
    assert len(found) == (0 if trick in SPOKEN_TO_NOBODY else 1), "hung up after the first refusal"
    for status, body in found:
        assert (status in {404, 401} and body == b"") or (status, body) == (400, b"Invalid HTTP request received.")


def test_a_stranger_cannot_fill_the_superlinks_memory(lab: Lab) -> None:
    superlink = lab.federation.process("coordinator", "superlink")
    assert superlink is not None
    before = superlink.memory_info().rss
    lines = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(1000))
    context = ssl.create_default_context(cafile=lab.home.ca)
    sent = 0
    with (
        socket.create_connection(("127.0.0.1", lab.federation.port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
        pytest.raises(OSError),  # noqa: PT011  the other side hangs up
    ):
        line.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\n")
        while sent < 100 << 20:
            line.sendall(lines)
            sent += len(lines)
    assert sent < 30 << 20
    body = b"POST /v1/control/start-run HTTP/1.1\r\nHost: a\r\nContent-Length: 300000000\r\n\r\n" + bytes(192 << 20)
    assert {status for status, _ in answers(talk(lab, body))} <= {404}
    assert superlink.memory_info().rss - before < 128 << 20
    assert superlink.is_running()


@pytest.mark.long
def test_a_stranger_who_says_nothing_or_says_it_slowly_is_hung_up_on(lab: Lab) -> None:
    began = time.monotonic()
    assert answers(talk(lab, b"")) == []
    assert answers(talk(lab, b"POST /v1/fleet/pull-mess")) == []
    assert time.monotonic() - began < 2 * PATIENCE


def signed_headers(key: Path) -> dict[str, str]:
    private, stamp = load_key(key), flower_now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_pem(key).encode()).decode(),
        TIMESTAMP_HEADER: stamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(private, stamp.encode())).decode(),
    }


def test_a_node_nobody_enrolled_and_one_that_cannot_prove_its_key_get_401(lab: Lab, tmp_path: Path) -> None:
    create_key(tmp_path / "node.key")
    with pytest.raises(NodeError) as caught:
        Node.connect(f"127.0.0.1:{lab.federation.port}", lab.home.ca, tmp_path / "node.key")
    assert caught.value.kind == "refused"
    unknown = signed_headers(tmp_path / "node.key")
    shown = FLEET_HTTP_PUBLIC_KEY_HEADER
    stolen = {**unknown, shown: b64encode(public_pem(home(lab, "north").node_key).encode()).decode()}
    verify = ssl.create_default_context(cafile=lab.home.ca)
    with httpx.Client(base_url=f"https://127.0.0.1:{lab.federation.port}", verify=verify, timeout=PATIENCE) as line:
        for path in gate.PUBLIC_PATHS:
            answer = line.post(path, headers=unknown)
            assert (answer.status_code, answer.content) == (401, b"")
            answer = line.post(path, headers={**stolen, "content-type": PROTOBUF_MEDIA_TYPE})
            assert answer.status_code == 401, path


def test_an_enrolled_node_gets_no_bundle_and_enrols_nobody(lab: Lab) -> None:
    verify = ssl.create_default_context(cafile=lab.home.ca)
    with httpx.Client(base_url=f"https://127.0.0.1:{lab.federation.port}", verify=verify, timeout=PATIENCE) as line:
        for name in ("get-fab", "get-run", "register-node", "unregister-node"):
            answer = line.post(f"/v1/fleet/{name}", headers=signed_headers(home(lab, "north").node_key))
            assert (answer.status_code, answer.content) == (404, b"")


def test_flower_tells_nobody_about_itself(lab: Lab, bystander: StudyRecord) -> None:
    """Telemetry and the check for updates are off in every process that loads Flower, and none talks to a stranger."""
    lab.reaches(bystander, State.RUNNING, State.FINISHED)
    for owner, role in (("coordinator", "superlink"), ("coordinator", "serverapp"), ("north", "connector")):
        process = lab.federation.process(owner, role)
        if process is None:
            assert role == "serverapp", f"{owner} has no {role}"
            continue  # the study has finished meanwhile
        settings = process.environ()
        assert settings["FLWR_TELEMETRY_ENABLED"] == "0"
        assert settings["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert {c.raddr.ip for c in process.net_connections("inet") if c.raddr} <= {"127.0.0.1", "::ffff:127.0.0.1"}


# ---- a bundle with a hostile ClientApp -----------------------------------------------------------------------------


def hostile_bundle(marker: Path) -> bytes:
    """A FAB as Flower builds it, whose ClientApp leaves a file when it is imported and when it is called."""
    manifest = (
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "evilapp"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "evil"\n[tool.flwr.app.components]\n'
        'serverapp = "evilapp:app"\nclientapp = "evilapp:app"\n'
    )
    code = (
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nfrom flwr.clientapp import ClientApp\n"
        f"app = ClientApp()\n@app.train()\ndef train(message, context):\n    Path({str(marker)!r}).touch()\n"
    )
    files = {"pyproject.toml": manifest.encode(), "evilapp/__init__.py": code.encode()}
    listing = "\n".join(f"{n},{hashlib.sha256(d).hexdigest()},{len(d) * 8}" for n, d in files.items())
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(".info/CONTENT", listing)
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


class HostileExchange(Exchange):
    """An exchange under a run that is not ours."""

    def __enter__(self) -> HostileExchange:
        task = self._call(self._client.PullTaskInput, PullTaskInputRequest())
        self.run_id, self.task_id, self.context = task.run.run_id, task.task_id, task.context
        self._thread.start()
        return self


def test_a_hostile_clientapp_runs_nowhere_and_enters_no_path(lab: Lab, bystander: StudyRecord) -> None:
    marker = lab.federation.root / "evil-was-here"
    private, shared = private_url(lab.home.root), secrets(lab.home.root)
    content = hostile_bundle(marker)
    name = hashlib.sha256(content).hexdigest()
    with Control(private, shared.control) as client:
        run = control(client.StartRun, StartRunRequest(fab=Fab(hash_str=name, content=content)), private).run_id
    assert run, "the coordinator's own token starts the run: the attack is under way"
    with Runtime(private, secret=shared.runtime) as client:
        task = runtime(client.AcquireTask, AcquireTaskRequest(agentapp_fab_hashes=[name]), private)
    before = {site: part(lab, site) for site in SITES}
    with HostileExchange(private, task.token, name) as exchange:
        lab.until(lambda: len(exchange.nodes()) == len(SITES), "all nodes")
        nodes = list(exchange.nodes().values())
        payload = b"import os" * 100
        sent = {
            kind: exchange.send([Outgoing(n, kind, b'{"run": "evilapp:app"}', payload) for n in nodes], 120)
            for kind in ("train", "offer", "deliver", "evilapp", "get_parameters", "exec")
        }
        told: Counter[str] = Counter()
        due = {message for kind in ("train", "offer", "deliver") for message in sent[kind]}
        end = time.monotonic() + LIVENESS
        while len(told) < len(due) and time.monotonic() < end:
            for reply in exchange.poll([m for messages in sent.values() for m in messages], 1.0):
                answer = Answer.read(Document.decode(reply.document, "answer").body)
                assert (answer.status, answer.code) == ("refused", RefusalCode.MALFORMED)
                told[reply.message_id] += 1
        assert set(told) == due, "our kinds are refused in the site's name, others are not answered at all"
    assert not marker.exists()
    assert not (lab.federation.root / "flwr" / "apps").exists()
    for site in SITES:
        assert part(lab, site) == before[site], "the same two processes, and nothing they started"
        found = lab.federation.site_home(site).rglob("*")
        assert [path for path in found if "evil" in path.name or path.suffix in {".py", ".fab"}] == []
        for path in (home(lab, site).agent / "inbox").iterdir():
            assert path.suffix == ".part", "nothing but what is on its way in"
    lab.reaches(bystander, State.RUNNING, State.FINISHED)  # it may have been waiting for its approvals till now


def part(lab: Lab, site: str) -> dict[int, tuple[str, ...]]:
    """The processes of a site, below its supervisor."""
    return {p.pid: tuple(p.cmdline()) for p in lab.federation.processes(site)}


# ---- a coordinator that lies ---------------------------------------------------------------------------------------


@dataclass
class Liar:
    """The coordinator's right key and token, put to wrong use: one study at one site, through the whole deployment."""

    lab: Lab
    record: StudyRecord
    exchange: Exchange
    site: str = "north"
    requests: dict[int, tuple[bytes, bytes, Answer]] = field(default_factory=dict)

    @property
    def vector(self) -> bytes:
        return weights.state_vector(self.initial).tobytes()

    @property
    def initial(self) -> bytes:
        return self.lab.registry.blobs.path(self.record.initial).read_bytes()

    def request(self, kind: str, payload: bytes, signer: Identity | None = None, **changes: Any) -> bytes:
        values: dict[str, Any] = {
            "kind": kind, "study": self.record.hash, "session": 1, "slot": 0, "round": 1,
            "cohort": self.record.study.sites,
            "payload_sha256": sha256(payload), "payload_bytes": len(payload), "deadline_seconds": 120,
        }  # fmt: skip
        return Header(**{**values, **changes}).signed(signer or self.lab.home.identity()).encode()

    def ask(
        self, kind: str, payload: bytes = b"", *, sent: bytes | None = None, **changes: Any
    ) -> tuple[Answer, bytes]:
        document = self.request(kind, payload, **changes)
        return self.carry(kind, document, payload if sent is None else sent)

    def carry(self, kind: str, document: bytes, payload: bytes) -> tuple[Answer, bytes]:
        _, roster = self.lab.registry.roster()
        line = roster.site(self.site)
        node = self.exchange.nodes()[line.node_key]
        (message,) = self.exchange.send([Outgoing(node, kind, document, payload or None)], 120)
        end = time.monotonic() + LIVENESS
        while time.monotonic() < end:
            for reply in self.exchange.poll([message], 1.0):
                return Answer.verified(reply.document, line.identity), b"".join(reply.chunks())
        raise AssertionError(f"no answer to {kind}")

    def code(self, kind: str, payload: bytes = b"", **changes: Any) -> str:
        return self.ask(kind, payload, **changes)[0].code

    def offer(self, roster: Roster | None = None) -> Answer:
        signed = roster.signed(self.lab.home.identity()) if roster else self.lab.registry.roster()[0]
        payload = canonical({"study": self.record.document.plain(), "roster": signed.plain()})
        return self.ask("offer", payload, session=0)[0]


@pytest.fixture(scope="module")
def liar(lab: Lab) -> Iterator[Liar]:
    """A study that only its signer drives, open at one site."""
    record = lab.sign("lies", rounds=12)
    private, shared = private_url(lab.home.root), secrets(lab.home.root)
    start_run(private, shared.control, record.hash)
    task = acquire(private, shared.runtime, record.hash)
    assert task is not None
    with Exchange(private, task[0], record.hash) as exchange:
        liar = Liar(lab, record, exchange)
        lab.until(lambda: len(exchange.nodes()) == len(SITES), "all nodes")
        assert liar.code("train", liar.vector, slot=1) == "unknown-study"
        assert liar.offer().detail["state"] == "pending"
        assert liar.code("open") == "not-approved"
        assert liar.code("train", liar.vector, slot=1) == "not-approved"
        with Local(home(lab, "north").local_socket) as door:
            door.decide(record.hash, "approve", "archive")
        assert liar.code("train", liar.vector, slot=1) == "session-unknown"
        assert liar.ask("open", liar.initial)[0].detail == {"initial": "held"}
        yield liar


def test_S2_another_model_under_the_same_slot_is_refused_and_the_stored_bytes_stay(liar: Liar) -> None:
    first, update = liar.ask("train", liar.vector, slot=1)
    assert first.status == "done"
    crafted = (np.frombuffer(liar.vector, "<f4") * np.float32(2)).tobytes()
    for changes in ({}, {"round": 2}, {"deadline_seconds": 121}, {"cohort": ("north",)}, {"parameters": {"a": "b"}}):
        payload = crafted if not changes else liar.vector
        assert liar.code("train", payload, slot=1, **changes) == "slot-bound"
    assert liar.code("validate", liar.vector, slot=1) == "slot-bound"
    again, same = liar.ask("train", liar.vector, slot=1)
    assert (again, same) == (first, update)


def test_S1_slots_beyond_the_plan_and_older_slots_are_refused(liar: Liar) -> None:
    assert liar.code("train", liar.vector, slot=liar.record.study.slots + 1) == "slot-limit"
    assert liar.ask("train", liar.vector, slot=4)[0].status == "done"
    assert liar.code("train", liar.vector, slot=3) == "slot-old"
    assert liar.code("train", liar.vector, slot=1) == "slot-spent"
    assert liar.ask("train", liar.vector, slot=4)[0].status == "done"


def test_a_payload_that_is_not_what_was_signed_is_refused_and_binds_nothing(liar: Liar) -> None:
    vector = np.frombuffer(liar.vector, "<f4")
    other = (vector + np.float32(1)).tobytes()
    for value in (np.nan, np.inf, -np.inf):
        poisoned = vector.copy()
        poisoned[-1] = value
        assert liar.code("train", poisoned.tobytes(), slot=5) == "non-finite"
    assert liar.code("train", liar.vector, sent=other, slot=5) == "model-hash"
    assert liar.code("train", liar.vector, sent=liar.vector[:-4], slot=5) == "model-hash"
    assert liar.code("train", liar.vector, sent=liar.vector + bytes(4), slot=5) == "too-large"
    assert liar.code("train", liar.vector[:-4], slot=5) == "model-shape"
    assert liar.code("train", liar.vector + bytes(4), slot=5) == "too-large"
    assert liar.code("open", other) == "model-hash"
    assert liar.code("train", liar.vector, slot=5, round=liar.record.study.rounds.count + 1) == "malformed"
    assert liar.code("train", liar.vector, slot=5, cohort=("south", "west")) == "not-in-study"
    assert liar.lab.agent("north", "SELECT 1 FROM slots WHERE study = ? AND slot = 5", liar.record.hash) == []
    assert liar.ask("train", liar.vector, slot=5)[0].status == "done"


def test_a_key_that_is_not_the_pinned_one_signs_nothing(liar: Liar) -> None:
    for signer in (Identity.generate(), Identity.load(home(liar.lab, "south").identity_key)):
        assert liar.code("train", liar.vector, slot=6, signer=signer) == "bad-signature"


def test_S7_an_unknown_session_and_a_former_one_are_refused(liar: Liar) -> None:
    assert liar.code("train", liar.vector, slot=7, session=2) == "session-unknown"
    assert liar.ask("open", session=2)[0].detail == {"initial": "held"}
    assert liar.code("train", liar.vector, slot=7, session=1) == "session-closed"
    assert liar.code("open", session=1) == "session-closed"
    assert liar.code("train", liar.vector, slot=4, session=2) in {"slot-bound", "slot-spent"}
    assert liar.ask("train", liar.vector, slot=7, session=2)[0].status == "done"


def test_a_roster_never_goes_back(liar: Liar) -> None:
    _, roster = liar.lab.registry.roster()
    newer = roster.model_copy(update={"version": roster.version + 5})
    revoked = roster.model_copy(
        update={"sites": tuple(s.model_copy(update={"revoked": s.name == "north"}) for s in roster.sites)}
    )
    with Local(home(liar.lab, "north").local_socket) as door:
        assert liar.offer(newer).status == "done"
        assert door.status().roster_version == newer.version
        for older in (roster, revoked, revoked.model_copy(update={"version": newer.version})):
            liar.offer(older)
            assert door.status().roster_version == newer.version
    assert liar.ask("train", liar.vector, slot=8, session=2)[0].status == "done", "not revoked by an older roster"


# ---- a connector that was taken over -------------------------------------------------------------------------------


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


@pytest.fixture
def door(lab: Lab) -> Iterator[stubs.OutwardStub]:
    """The outward door of `north`, as its connector has it."""
    with grpc.insecure_channel(f"unix:{home(lab, 'north').outward_socket}") as channel:
        yield stubs.OutwardStub(channel)


def submit(door: stubs.OutwardStub, document: bytes, payload: Any = b"") -> Answer:
    """Hand something in as a connector does; the answer as it stands, whoever signed it."""

    def chunks() -> Iterator[pb.SubmitChunk]:
        yield pb.SubmitChunk(document=document)
        for piece in [payload] if isinstance(payload, bytes) else payload:
            yield pb.SubmitChunk(data=piece)

    reply = door.Submit(chunks(), timeout=PATIENCE)
    return Answer.read(Document.decode(reply.data, "answer").body)


def test_a_connector_finds_no_local_call_at_its_door(lab: Lab) -> None:
    with grpc.insecure_channel(f"unix:{home(lab, 'north').outward_socket}") as channel:
        for method in LOCAL.methods:
            path = f"/{LOCAL.full_name}/{method.name}"
            for shape in (channel.unary_unary, channel.stream_unary):
                call = shape(path)
                argument = b"" if shape == channel.unary_unary else iter([b""])
                code, _ = refused(lambda c=call, a=argument: c(a, timeout=PATIENCE))
                assert code is grpc.StatusCode.UNIMPLEMENTED


INTRUSION = """
import errno, json, os, socket, sys
root, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([gid]); os.setgid(gid); os.setuid(uid)
def word(act):
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
def dial(path):
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
tries = {"outward": word(lambda: dial(root + "/run/outward/agent.sock")),
         "local": word(lambda: dial(root + "/run/local/agent.sock")),
         "list agent": word(lambda: os.listdir(root + "/agent")),
         "move the socket": word(lambda: os.rename(root + "/run/outward/agent.sock", root + "/run/outward/x")),
         "take its place": word(lambda: open(root + "/run/outward/agent2.sock", "w"))}
for name in ("identity.key", "agent.db", "journal.jsonl", "pseudonym.key", "answers/x", "cache/x"):
    tries[name] = word(lambda: open(root + "/agent/" + name, "rb"))
print(json.dumps(tries))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become the connector's own user")
def test_a_connector_with_its_own_user_opens_its_door_and_nothing_else(lab: Lab) -> None:
    root = str(home(lab, "north").root)
    command = [sys.executable, "-c", INTRUSION, root, str(INTRUDER), str(GROUP_NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    tries = json.loads(done.stdout)
    assert tries.pop("outward") == "ok", "the one door it may use: what follows is not closed by accident"
    assert set(tries.values()) == {"EACCES"}, tries


def test_a_connector_cannot_forge_or_change_a_request(lab: Lab, liar: Liar, door: stubs.OutwardStub) -> None:
    genuine = json.loads(liar.request("train", liar.vector, slot=9, session=2))
    own = Identity.generate()
    forged = [liar.request("train", liar.vector, slot=9, session=2, signer=own)]
    for changes in ({"slot": 10}, {"round": 3}, {"study": "a" * 64}, {"deadline_seconds": 9}, {"cohort": ["north"]}):
        forged.append(canonical({**genuine, "body": {**genuine["body"], **changes}}))
    forged.append(canonical({**genuine, "signatures": []}))
    resigned = Document("request", genuine["body"]).signed_by(own)
    forged.append(canonical({**genuine, "signatures": [{"key": genuine["signatures"][0]["key"], "value": s.value}
                                                       for s in resigned.signatures]}))  # fmt: skip
    for document in forged:
        assert submit(door, document, liar.vector).code == "bad-signature"
    for document in (b"", b"{}", b"\0" * 100, canonical({**genuine, "kind": "answer"})):
        assert submit(door, document, liar.vector).code == "malformed"
    assert lab.agent("north", "SELECT 1 FROM slots WHERE study = ? AND slot IN (9, 10)", liar.record.hash) == []


def test_a_connector_that_replays_a_request_gets_the_stored_bytes_whatever_it_sends_along(
    lab: Lab, liar: Liar, door: stubs.OutwardStub
) -> None:
    document = liar.request("train", liar.vector, slot=11, session=2)
    crafted = (np.frombuffer(liar.vector, "<f4") * np.float32(3)).tobytes()
    assert submit(door, document, crafted).code == "model-hash"
    first = submit(door, document, liar.vector)
    assert first.status == "done"
    assert submit(door, document, crafted) == first
    assert submit(door, document) == first
    assert [submit(door, liar.request("train", liar.vector, slot=1, session=2)).code,
            submit(door, liar.request("train", liar.vector, slot=11, session=1)).code] == [
                "slot-bound", "session-closed"]  # fmt: skip


def test_a_connector_gets_no_more_than_the_answer(
    lab: Lab, liar: Liar, bystander: StudyRecord, door: stubs.OutwardStub
) -> None:
    document = liar.request("train", liar.vector, slot=12, session=2)
    answer = submit(door, document, liar.vector)
    whole = {"study": answer.study, "session": 2, "slot": 12, "request": answer.request}

    def fetch(**changes: Any) -> bytes:
        asked = pb.FetchRequest(**{**whole, "offset": 0, "length": answer.payload_bytes, **changes})
        return b"".join(piece.data for piece in door.Fetch(asked, timeout=PATIENCE))

    assert sha256(fetch()) == answer.payload_sha256
    size = answer.payload_bytes
    for changes in (
        {"length": size + 1}, {"offset": 1}, {"offset": size}, {"length": 2**62}, {"offset": 2**63, "length": 8},
    ):  # fmt: skip
        assert refused(lambda c=changes: fetch(**c))[1] == "malformed"
    assert refused(lambda: fetch(study="../../agent/identity.key"))[1] == "unknown-study"
    assert refused(lambda: fetch(study="b" * 64))[1] == "unknown-study"
    assert refused(lambda: fetch(request="b" * 64))[1] == "slot-bound"
    assert refused(lambda: fetch(session=1))[1] == "session-closed"
    assert refused(lambda: fetch(slot=1, request="b" * 64))[1] in {"slot-bound", "slot-spent"}
    for slot in range(1, 5):
        code = refused(lambda s=slot: fetch(study=bystander.hash, session=1, slot=s, request="c" * 64))[1]
        assert code in {"slot-bound", "slot-spent", "slot-old", "session-closed", "session-unknown"}


def test_a_connector_cannot_exhaust_the_agent(lab: Lab, liar: Liar, door: stubs.OutwardStub) -> None:
    agent = lab.federation.process("north", "agent")
    assert agent is not None
    before, read = agent.memory_info().rss, 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while read < 4 << 30:
            read += 1 << 20
            yield bytes(1 << 20)

    offer = liar.request("offer", b"", session=0, payload_bytes=4 << 20)
    for document in (offer, liar.request("open", liar.initial, session=2), b"noise"):
        read = 0
        answer = submit(door, document, endless())
        assert answer.code in {"too-large", "malformed", ""}
        assert read < 64 << 20, "the rest is not taken"
    stop = threading.Event()

    def idle() -> Iterator[pb.SubmitChunk]:
        yield pb.SubmitChunk(document=offer)
        stop.wait(PATIENCE)

    calls = [door.Submit.future(idle(), timeout=PATIENCE) for _ in range(64)]
    try:
        lab.until(lambda: sum(call.done() for call in calls) >= 50, "calls beyond the agent's threads to be refused")
        codes = {call.code() for call in calls if call.done()}
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
    finally:
        stop.set()
        for call in calls:
            call.cancel()
    assert agent.is_running()
    assert agent.memory_info().rss - before < 512 << 20, "of 4 GiB; it trains for the bystander meanwhile"

    def greeted() -> bool:
        try:
            return bool(door.Hello(pb.HelloRequest(protocol=PROTOCOL), timeout=PATIENCE).data)
        except grpc.RpcError:
            return False

    lab.until(greeted, "the agent to answer again")


# ---- the agent, if it were taken over ------------------------------------------------------------------------------

ESCAPE = """
import json, socket, subprocess, sys
from client.agent.seal import seal
code = '''
import errno, json, socket
found = {}
for name in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
    try:
        socket.socket(getattr(socket, name), socket.SOCK_STREAM if "INET" in name else socket.SOCK_RAW).close()
        found[name] = "open"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
socket.socket(socket.AF_UNIX).close()
print(json.dumps(found))
'''
assert seal()
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


def test_the_agent_holds_no_network_socket_and_sees_no_network(lab: Lab, bystander: StudyRecord) -> None:
    lab.until(lambda: bool(lab.agent("north", "SELECT 1 FROM slots WHERE study = ?", bystander.hash)), "a slot")
    for site in SITES:
        agent = lab.federation.process(site, "agent")
        connector = lab.federation.process(site, "connector")
        assert agent is not None
        assert connector is not None
        assert agent.net_connections("inet") == []
        assert connector.net_connections("inet"), "the question is a good one: the connector's are seen"
        status = Path(f"/proc/{agent.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0:
            assert os.readlink(f"/proc/{agent.pid}/ns/net") != os.readlink("/proc/self/ns/net")
            lines = Path(f"/proc/{agent.pid}/net/dev").read_text().splitlines()[2:]
            assert [line.split(":")[0].strip() for line in lines] == ["lo"]
        with Local(home(lab, site).local_socket) as door:
            assert not door.status().network


def test_a_child_of_the_agent_opens_no_network_socket_either(lab: Lab) -> None:
    command = Part("agent").command(home(lab, "north"))
    locked = [*command[: command.index("--") + 1], sys.executable, "-c", ESCAPE]
    done = subprocess.run(locked, capture_output=True, text=True, timeout=PATIENCE, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) >= {"AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET"}
    assert set(found.values()) == {"EAFNOSUPPORT"}


# ---- a site that lies, and the journal of what left it -------------------------------------------------------------


@dataclass
class Puppet:
    """West's node key and identity in wrong hands: the real agent computes, and lies go out in its place."""

    lab: Lab
    study: str
    lies: dict[int, Callable[[Puppet, Answer, bytes], tuple[bytes, bytes]]]
    identity: Identity
    taken: list[bytes] = field(default_factory=list)
    kept: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    trouble: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        try:
            where = home(self.lab, "west")
            options = [("grpc.max_receive_message_length", 16 << 20)]
            with (
                grpc.insecure_channel(f"unix:{where.outward_socket}", options=options) as channel,
                Node.connect(f"127.0.0.1:{self.lab.federation.port}", where.ca, where.node_key) as node,
            ):
                door = stubs.OutwardStub(channel)
                while not self.stop.is_set():
                    try:
                        incoming = node.receive(1.0)
                        if incoming is not None:
                            self.serve(node, door, incoming)
                    except NodeError as error:
                        if error.kind != "gone":
                            raise
        except BaseException as error:
            self.trouble.append(error)

    def serve(self, node: Node, door: stubs.OutwardStub, incoming: Incoming) -> None:
        def chunks() -> Iterator[pb.SubmitChunk]:
            yield pb.SubmitChunk(document=incoming.document)
            for piece in incoming.payload():
                for start in range(0, len(piece), 1 << 20):
                    yield pb.SubmitChunk(data=piece[start : start + (1 << 20)])

        document = door.Submit(chunks(), timeout=LIVENESS).data
        self.taken.append(document)
        answer = Answer.verified(document, self.identity.public)
        payload = b""
        if answer.payload_bytes:
            asked = pb.FetchRequest(
                study=answer.study, session=answer.session, slot=answer.slot, request=answer.request,
                offset=0, length=answer.payload_bytes,
            )  # fmt: skip
            pieces = [piece.data for piece in door.Fetch(asked, timeout=LIVENESS)]
            self.taken += pieces
            payload = b"".join(pieces)
        if answer.study == self.study and answer.slot:
            self.kept[answer.slot] = (document, payload)
            if answer.slot in self.lies:
                document, payload = self.lies[answer.slot](self, answer, payload)
        node.reply(incoming, document, len(payload), (lambda o, n: payload[o : o + n]) if payload else None)

    def restate(
        self, answer: Answer, payload: bytes, signer: Identity | None = None, **changes: Any
    ) -> tuple[bytes, bytes]:
        new = {"payload_sha256": sha256(payload), "payload_bytes": len(payload), **changes}
        return answer.model_copy(update=new).signed(signer or self.identity).encode(), payload


def numbers(change: Callable[[np.ndarray, int], None]) -> Callable[[Puppet, Answer, bytes], tuple[bytes, bytes]]:
    """Other numbers, properly hashed and signed."""

    def lie(puppet: Puppet, answer: Answer, payload: bytes) -> tuple[bytes, bytes]:
        vector = np.frombuffer(payload, "<f4").copy()
        change(vector, len(vector) - answer.statistics)
        return puppet.restate(answer, vector.tobytes())

    return lie


def _set(vector: np.ndarray, place: int, value: float) -> None:
    vector[place] = value


LIES: dict[str, tuple[Callable[[Puppet, Answer, bytes], tuple[bytes, bytes]], str]] = {
    "for another site": (lambda p, a, d: p.restate(a, d, site="north"), "malformed"),
    "with another key": (lambda p, a, d: p.restate(a, d, Identity.generate(), site="north"), "bad-signature"),
    "NaN": (numbers(lambda v, m: _set(v, 0, np.nan)), "non-finite"),
    "too short": (lambda p, a, d: p.restate(a, d[:-4]), "model-shape"),
    "too long": (lambda p, a, d: p.restate(a, d + bytes(4 << 20)), "model-shape"),
    "other bytes than signed": (lambda p, a, d: (a.signed(p.identity).encode(), d[4:] + d[:4]), "model-hash"),
    "an old answer": (lambda p, a, d: p.kept[1], "malformed"),
    "1e30 examples": (numbers(lambda v, m: _set(v, m, 1e30)), "malformed"),
    "a negative number of examples": (numbers(lambda v, m: _set(v, m, -5)), "malformed"),
    "half an example": (numbers(lambda v, m: _set(v, m, 0.5)), "malformed"),
}  # fmt: skip


def test_a_lying_site_is_named_and_left_out_and_the_journal_names_every_byte_that_left_it(
    lab: Lab, bystander: StudyRecord
) -> None:
    lab.reaches(bystander, State.FINISHED)
    federation, where = lab.federation, home(lab, "west")
    federation.end("west")
    federation._start("west", "client.cli", "--home", str(where.root), "start", "--agent-only")
    federation.until(federation._listening("west"), "the agent of west", 90)
    before = len(list(read_journal(where.agent / "journal.jsonl")))
    plan = dict(enumerate(LIES.values(), 2))
    record = lab.sign("lied-to", rounds=1 + len(LIES), minimum=2)
    puppet = Puppet(lab, record.hash, {slot: lie for slot, (lie, _) in plan.items()}, Identity.load(where.identity_key))
    thread = threading.Thread(target=puppet.run, daemon=True)
    thread.start()
    try:
        lab.registry.launch(record.name)
        lab.approve(record)
        lab.reaches(record, State.FINISHED)
        lab.until(lambda: lab.delivered(record)["west"].state == "delivered", "the model to reach west")
    finally:
        puppet.stop.set()
        thread.join(PATIENCE)
    assert puppet.trouble == []
    rounds = [slot for slot in lab.slots(record) if slot.kind == "train"]
    assert [(slot.slot, slot.state) for slot in rounds] == [(n, "done") for n in range(1, 2 + len(LIES))]
    assert {o.state for o in lab.outcomes(record, 1).values()} == {OutcomeState.IN}
    for slot, (_, code) in plan.items():
        outcomes = lab.outcomes(record, slot)
        assert (outcomes["west"].state, outcomes["west"].code) == (OutcomeState.REFUSED, code), list(LIES)[slot - 2]
        assert "its answer was turned away" in outcomes["west"].reason
        assert {outcomes[site].state for site in ("north", "south")} == {OutcomeState.IN}
    entries = list(read_journal(where.agent / "journal.jsonl"))[before:]
    named = Counter((entry["size"], entry["sha256"]) for entry in entries)
    assert named == Counter((len(data), sha256(data)) for data in puppet.taken)
    federation.end("west")
    federation.start("west")


def test_what_the_outward_door_refuses_is_in_the_journal_too(lab: Lab, door: stubs.OutwardStub) -> None:
    path = home(lab, "north").agent / "journal.jsonl"
    asked = pb.FetchRequest(study="d" * 64, session=1, slot=1, request="d" * 64, length=4)
    _, details = refused(lambda: list(door.Fetch(asked, timeout=PATIENCE)))
    assert details == "unknown-study"
    hashes = {(entry["size"], entry["sha256"]) for entry in read_journal(path)}
    assert (len(details), sha256(details.encode())) in hashes


def test_a_study_that_ran_through_all_of_this_took_no_harm(lab: Lab, bystander: StudyRecord) -> None:
    lab.reaches(bystander, State.FINISHED)
    slots = [slot for slot in lab.slots(bystander) if slot.kind == "train"]
    tries = [(slot.round, slot.attempt) for slot in slots]
    assert tries == [(n, 1) for n in range(1, 1 + BYSTANDING)], lab.story(bystander)
    for slot in slots:
        assert {o.state for o in lab.outcomes(bystander, slot.slot).values()} == {OutcomeState.IN}


def test_psutil_sees_no_process_of_ours_on_a_foreign_port(lab: Lab) -> None:
    """The coordinator listens on its public port and on loopback; a site listens nowhere."""
    ports = {
        c.laddr.port
        for process in lab.federation.processes("coordinator")
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.ip != "127.0.0.1"
    }
    assert ports <= {lab.federation.port}
    for site in SITES:
        for process in lab.federation.processes(site):
            assert [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
