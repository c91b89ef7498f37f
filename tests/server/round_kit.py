"""A consortium in one process: a real registry, real identities, and small honest sites that really sign and store.

The carrier `Wire` passes on what it is given. Time is simulated: it moves only when somebody waits, so a test of
deadlines takes no time and always goes the same way.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from models import additive, tasks
from privacy.canonical import sha256
from privacy.errors import RefusalCode
from privacy.identity import Identity
from privacy.messages import SLOTTED, Answer, Request, refused
from privacy.roster import Roster, RosterSite
from privacy.study import Study, approval
from server.flower import Outgoing, Reply
from server.home import CoordinatorConfig, CoordinatorHome
from server.records import Evaluation, StudyRecord
from server.registry import Registry

D = 50
INITIAL = b"the initial state, opaque to the coordinator"


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


NODE_KEYS = [node_key() for _ in range(6)]


def study_of(sites: Iterable[str], **changes: dict) -> Study:
    body = {
        "study": {"name": "chest", "title": "Chest", "purpose": "To test."},
        "task": {"classes": ["normal", "finding"]},
        "network": {"name": "densenet-small"},
        "input": {"size": [8, 8]},
        "rounds": {"count": 3, "deadline_seconds": 60, "reserve": 2},
        "sites": list(sites),
    }
    for section, values in changes.items():
        body[section] = {**body.get(section, {}), **values}
    return Study.model_validate(body)


class SimulatedClock:
    def __init__(self) -> None:
        self.time = 0.0
        self.watch: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.watch()


@dataclass
class Site:
    """An honest site: approves, opens, binds a slot to one request for ever, and sends stored bytes only.

    `delay` is how long it works; `tamper` may replace what it says (document, payload) before it leaves.
    """

    name: str
    study: Study
    number: int
    identity: Identity = field(default_factory=Identity.generate)
    decision: str = "approved"
    delay: float = 0.5
    examples: int = 10
    tamper: Callable[[Request, bytes, bytes], tuple[bytes, bytes]] | None = None
    refuse: Callable[[Request], RefusalCode | None] = lambda _: None
    session: int = 0
    initial: bytes = b""
    finished: bool = False
    bound: dict[int, tuple[str, bytes, bytes]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def serve(self, document: bytes, payload: bytes) -> tuple[bytes, bytes]:
        request = Request.decode(document, None)
        self.log.append(request.header.kind if not payload else f"{request.header.kind}+{len(payload)}")
        answer, data = self._answer(request, payload)
        return self.tamper(request, answer, data) if self.tamper else (answer, data)

    def _answer(self, request: Request, payload: bytes) -> tuple[bytes, bytes]:
        header = request.header
        assert header.payload_sha256 == sha256(payload)
        assert header.payload_bytes == len(payload)
        code = self.refuse(request)
        if code is None and header.kind != "offer":
            code = self._inadmissible(request)
        if code is not None:
            return refused(header, request.hash, self.name, code).signed(self.identity).encode(), b""
        if header.kind == "offer":
            yes = approval(self.study.hash, self.name, "images").signed_by(self.identity).encode().hex()
            detail = {"state": self.decision, "approval": yes if self.decision == "approved" else ""}
            return self.say(request, detail), b""
        if header.kind == "open":
            self.session, self.initial = header.session, payload or self.initial
            return self.say(request, {"initial": "held" if self.initial else "needed"}), b""
        if header.kind == "deliver":
            self.finished = True
            return self.say(request, {}), b""
        if header.slot not in self.bound:
            data = self.compute(request, payload)
            self.bound[header.slot] = (request.hash, self.say(request, {}, data), data)
        return self.bound[header.slot][1:]

    def _inadmissible(self, request: Request) -> RefusalCode | None:
        header = request.header
        if self.decision != "approved":
            return RefusalCode.WITHDRAWN if self.decision == "withdrawn" else RefusalCode.NOT_APPROVED
        if header.session < self.session:
            return RefusalCode.SESSION_CLOSED
        if header.kind in SLOTTED:
            if header.session > self.session or not self.initial:
                return RefusalCode.SESSION_UNKNOWN
            if header.slot > self.study.slots:
                return RefusalCode.SLOT_LIMIT
            if self.bound.get(header.slot, (request.hash,))[0] != request.hash:
                return RefusalCode.SLOT_BOUND
            if header.slot not in self.bound and header.slot < max(self.bound, default=0):
                return RefusalCode.SLOT_OLD
        return None

    def compute(self, request: Request, payload: bytes) -> bytes:
        header, task = request.header, tasks.get(self.study.spec())
        model = np.frombuffer(payload, "<f4")
        noise = np.random.default_rng([self.number, header.round])
        scores = noise.normal(size=(20, 2))
        sums = task.statistics(scores, np.arange(20) % 2, np.ones(20))
        statistics = np.zeros(additive.size(task), np.float32)
        trained = header.kind == "train"
        additive.fill(
            statistics,
            sums,
            train_examples=self.examples * trained,
            train_loss_sum=2.0 * trained,
            train_steps=4 * trained,
        )
        delta = (noise.normal(size=len(model)) - 0.1 * model).astype("<f4") if trained else np.zeros(0, "<f4")
        return delta.tobytes() + statistics.tobytes()

    def say(self, request: Request, detail: dict[str, str], data: bytes = b"") -> bytes:
        header = request.header
        statistics = additive.size(tasks.get(self.study.spec())) if header.kind in SLOTTED else 0
        answer = Answer(
            study=header.study, session=header.session, slot=header.slot, site=self.name, request=request.hash,
            status="done", payload_sha256=sha256(data) if data else "", payload_bytes=len(data),
            statistics=statistics, detail=detail,
        )  # fmt: skip
        return answer.signed(self.identity).encode()


class Wire:
    """A carrier between the loop and the sites, on simulated time. It keeps no secrets and checks nothing."""

    def __init__(self, clock: SimulatedClock, keys: dict[str, str]) -> None:
        self.clock, self.keys = clock, keys
        self.online: dict[str, Site] = {}
        self._numbers = itertools.count(1)
        self._due: list[tuple[float, int, str, Reply]] = []
        self.calls = 0
        self.before: Callable[[int], None] = lambda _: None
        self.requests: dict[int, set[str]] = {}
        self.errors: Callable[[Site, str], str] = lambda _site, _kind: ""
        self.lost: Callable[[Site, str], str] = lambda _site, _kind: ""

    def _call(self) -> None:
        self.calls += 1
        self.before(self.calls)

    def nodes(self) -> dict[str, int]:
        self._call()
        return {self.keys[name]: site.number for name, site in self.online.items()}

    def send(self, requests: Iterable[Outgoing], ttl: float) -> dict[str, int]:
        self._call()
        sent: dict[str, int] = {}
        for request in requests:
            site = next((s for s in self.online.values() if s.number == request.node_id), None)
            if site is None:
                continue
            number = next(self._numbers)
            message = f"m{number}"
            data = request.payload.read_bytes() if isinstance(request.payload, Path) else request.payload or b""
            header = Request.decode(request.document, None)
            if header.header.kind in SLOTTED:
                self.requests.setdefault(header.header.slot, set()).add(header.hash)
            sent[message] = site.number
            error = self.errors(site, request.kind)
            answer, payload = (b"", b"") if error else site.serve(request.document, data)
            error = error or self.lost(site, request.kind)
            delay = site.delay if request.kind in SLOTTED else 0.01
            if delay <= ttl:
                pieces = [payload[i : i + 64] for i in range(0, len(payload), 64)]
                reply = Reply(message, site.number, answer, len(payload), error, lambda p=pieces: iter(p))
                heapq.heappush(self._due, (self.clock.time + delay, number, message, reply))
        return sent

    def poll(self, message_ids: Collection[str], wait: float = 1.0) -> Iterator[Reply]:
        self._call()
        mine = [entry for entry in self._due if entry[2] in set(message_ids)]
        first = min((entry[0] for entry in mine), default=float("inf"))
        self.clock.sleep(max(0.0, min(wait, first - self.clock.time)))
        for entry in sorted(mine):
            if entry[0] <= self.clock.time:
                self._due.remove(entry)
                yield entry[3]

    def drop(self, message_ids: Collection[str]) -> None:
        self._call()
        self._due = [entry for entry in self._due if entry[2] not in set(message_ids)]
        heapq.heapify(self._due)


def _unsynced(connection: Any, *_: Any) -> None:
    """Without fsync: what these tests kill is the coordinator, never the machine, so what it wrote is still there."""
    connection.execute("PRAGMA synchronous=OFF")


class Bench:
    """A coordinator's home with one study, `count` sites and a carrier."""

    def __init__(
        self,
        root: Path,
        count: int = 3,
        keys: dict[str, str] | None = None,
        initial: bytes = INITIAL,
        **changes: dict,
    ) -> None:
        self.home = CoordinatorHome(root)
        self.home.make_folders()
        self.home.write_config(CoordinatorConfig(name="consortium"))
        self.identity = Identity.create(self.home.identity_key)
        names = ["anna", "bert", "cleo", "dora", "emil", "fred"][:count]
        self.study = study_of(names, initial={"sha256": hashlib.sha256(initial).hexdigest()}, **changes)
        self.sites = {name: Site(name, self.study, 101 + i) for i, name in enumerate(names)}
        self.keys = keys or dict(zip(names, NODE_KEYS, strict=False))
        self.registry = Registry(self.home)
        sa.event.listen(self.registry._db.engine, "checkout", _unsynced)
        self.registry.save_roster(self.roster(1).signed(self.identity))
        weights = np.linspace(-1, 1, D).astype("<f4")
        record = self.registry.add_study(
            self.study.document().signed_by(self.identity),
            self.registry.blobs.put(initial),
            self.registry.blobs.put(weights.tobytes()),
        )
        self.hash = record.hash
        self.clock = SimulatedClock()
        self.wire = Wire(self.clock, self.keys)
        self.wire.online = dict(self.sites)
        self.published: list[tuple[int, list[Evaluation], Evaluation | None]] = []

    @property
    def course(self):
        return self.registry.course(self.hash)

    def roster(self, version: int, revoked: Collection[str] = ()) -> Roster:
        sites = tuple(
            RosterSite(
                name=name,
                identity=site.identity.public,
                node_key=self.keys[name],
                not_after="2099-01-01T00:00:00Z",
                revoked=name in revoked,
            )
            for name, site in sorted(self.sites.items())
        )
        return Roster(consortium="consortium", version=version, coordinator=self.identity.public, sites=sites)

    def publish(
        self, record: StudyRecord, round_: int, weights: Path, history: list[Evaluation], test: Evaluation | None
    ) -> Path:
        self.published.append((round_, history, test))
        path = self.home.study(record.hash) / "package.zip"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(weights.read_bytes() + json.dumps([round_, len(history)]).encode())
        return path

    def loop(self):
        from server.rounds import Loop

        record = self.registry.study(self.hash)
        return Loop(self.registry, record, self.identity, self.wire, self.publish, self.clock)

    def run(self):
        self.registry.launch(self.hash)
        return self.loop().run()

    def weights(self, round_: int | None = None) -> np.ndarray:
        checkpoints = self.course.checkpoints()
        found = checkpoints[-1] if round_ is None else checkpoints[round_]
        return np.frombuffer(self.registry.blobs.path(found.weights).read_bytes(), "<f4")
