"""Honest sites that take part in secure sums, and a consortium of them: real keys, real masks, on simulated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models import additive, tasks
from privacy.errors import Refusal, RefusalCode
from privacy.messages import OPENING, SETTING_UP, SLOTTED, Request, refused
from privacy.secagg import site as protocol
from privacy.secagg.fixed import encode
from privacy.secagg.messages import Choice, Keys, Shares, Survivors
from privacy.secagg.plan import Plan
from privacy.secagg.states import Keyed, Ready, Shared
from privacy.stages import FIRST, LAST, TRANSCRIPT, Enclosure
from tests.server.round_kit import Bench, D, Site

ROOM = 1 << 24
STAGED = SLOTTED | OPENING
NAMES = ("anna", "bert", "cleo", "dora", "emil")


@dataclass
class SecureSite(Site):
    """Answers every stage once, like an agent. `plain` keeps what it computed before it was masked, by slot."""

    roster: dict[str, str] = field(default_factory=dict)
    keyed: Keyed | None = None
    shared: Shared | None = None
    ready: Ready | None = None
    stages: dict[tuple[int, int, str], tuple[str, bytes, bytes]] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    attempts: dict[int, str] = field(default_factory=dict)
    cohorts: dict[int, tuple[str, ...]] = field(default_factory=dict)
    plain: dict[int, np.ndarray] = field(default_factory=dict)
    shift: Callable[[np.ndarray], np.ndarray] = lambda words: words

    @property
    def plan(self) -> Plan:
        return Plan.of(self.study, D, additive.size(tasks.get(self.study.spec())))

    def _answer(self, request: Request, payload: bytes) -> tuple[bytes, bytes]:
        header = request.header
        if header.kind == "open" and header.session > self.session:
            self.keyed = self.shared = self.ready = None
        if header.kind not in SETTING_UP | OPENING:
            try:
                return super()._answer(request, payload)
            except Refusal as refusal:
                return refused(header, request.hash, self.name, refusal.code).signed(self.identity).encode(), b""
        code = self.refuse(request) or self._inadmissible(request)
        if code is not None:
            return refused(header, request.hash, self.name, code).signed(self.identity).encode(), b""
        key = (header.session, header.slot, header.kind)
        if key in self.stages:
            asked, *answer = self.stages[key]
            if asked == request.hash:
                return answer[0], answer[1]
            code = RefusalCode.SLOT_BOUND
            return refused(header, request.hash, self.name, code).signed(self.identity).encode(), b""
        try:
            detail, data = getattr(self, f"_{header.kind}")(request, payload)
        except Refusal as refusal:
            about = refusal.subject if refusal.subject in self.roster else ""
            no = refused(header, request.hash, self.name, refusal.code, about)
            return no.signed(self.identity).encode(), b""
        self.stages[key] = (request.hash, self.say(request, detail, data), data)
        return self.stages[key][1:]

    def _inadmissible(self, request: Request) -> RefusalCode | None:
        header = request.header
        if header.kind in OPENING | SETTING_UP and header.session > self.session:
            return RefusalCode.SESSION_UNKNOWN
        return super()._inadmissible(request)

    def compute(self, request: Request, payload: bytes) -> bytes:
        header = request.header
        attempt = f"{header.kind}/{header.round}"
        protocol.check_attempt(self.attempts, self.choices, header.slot, attempt)
        if self.ready is None or header.parameters != {TRANSCRIPT: self.ready.transcript}:
            raise Refusal(RefusalCode.OUT_OF_ORDER)
        numbers = np.frombuffer(super().compute(request, payload), "<f4")
        m = additive.size(tasks.get(self.study.spec()))
        words = encode(self.plan, numbers[:-m] if header.kind == "train" else None, numbers[-m:])
        self.attempts[header.slot], self.cohorts[header.slot] = attempt, header.cohort
        self.plain[header.slot] = words = self.shift(words).copy()
        masked = words.copy()
        protocol.mask(self.ready, header.slot, request.hash, header.cohort, masked)
        return masked.tobytes()

    def _keys(self, request: Request, payload: bytes) -> tuple[dict[str, str], bytes]:
        header = request.header
        first, last = int(header.parameters[FIRST]), int(header.parameters[LAST])
        self.keyed, document = protocol.begin(
            self.plan, header.session, first, last, self.name, self.identity, self.roster
        )
        return {"keys": document.encode().decode()}, b""

    def _shares(self, request: Request, payload: bytes) -> tuple[dict[str, str], bytes]:
        keys = Enclosure.decode(payload, ROOM, {"keys": Keys.KIND}).documents["keys"]
        assert self.keyed is not None
        self.shared, document, parcels = protocol.share(self.keyed, keys, self.identity)
        return {"shares": document.encode().decode()}, Enclosure(parcels=parcels).encode()

    def _seal(self, request: Request, payload: bytes) -> tuple[dict[str, str], bytes]:
        found = Enclosure.decode(payload, ROOM, {"shares": Shares.KIND}, parcels=True)
        assert self.shared is not None
        self.ready = protocol.receive(self.shared, found.documents["shares"], found.parcels)
        return {TRANSCRIPT: self.ready.transcript}, b""

    def _survivors(self, request: Request, payload: bytes) -> tuple[dict[str, str], bytes]:
        slot = request.header.slot
        assert self.ready is not None
        choice, document = protocol.survive(
            self.ready, slot, self.bound[slot][0], self.cohorts[slot], request.header.cohort, self.choices,
            self.identity,
        )  # fmt: skip
        self.choices[slot] = choice
        return {"survivors": document.encode().decode()}, b""

    def _unmask(self, request: Request, payload: bytes) -> tuple[dict[str, str], bytes]:
        slot, survivors = request.header.slot, request.header.cohort
        kind = "answer" if survivors == self.cohorts[slot] else Survivors.KIND
        proof = Enclosure.decode(payload, ROOM, {"proof": kind}).documents["proof"]
        assert self.ready is not None
        choice, document = protocol.open_(
            self.ready, slot, self.bound[slot][0], self.cohorts[slot], survivors, proof, self.choices, self.identity
        )
        self.choices[slot] = choice
        return {"opening": document.encode().decode()}, b""


class SecureBench(Bench):
    """A coordinator with one study under secure aggregation: n sites, one of which may collude."""

    def __init__(self, root: Path, count: int = 4, **changes: dict) -> None:
        minimum = (count + 1) // 2 + 1
        aggregation = {"minimum_sites": max(3, minimum), **changes.pop("aggregation", {})}
        secagg = {"mode": "on", "update_bound": 8, **changes.pop("secagg", {})}
        super().__init__(root, count, aggregation=aggregation, secagg=secagg, **changes)
        self.sites = {
            name: SecureSite(**{f: getattr(s, f) for f in ("name", "study", "number", "identity")})
            for name, s in self.sites.items()
        }
        for site in self.sites.values():
            site.roster = {name: other.identity.public for name, other in self.sites.items()}
        self.wire.online = dict(self.sites)

    def vanishes(
        self, name: str, kind: str, *, served: bool = False, back: float = float("inf"), slot: int = 1
    ) -> None:
        """Let a site go at a message of a kind, before it is served or (`served`) after, for `back` seconds.

        Args:
            slot: the message is of this slot, or comes before it.
        """
        moment = "lost" if served else "errors"
        before, watch, gone = getattr(self.wire, moment), self.clock.watch, list[float]()

        def errors(site: SecureSite, asked: str) -> str:
            if site.name == name and asked == kind and not gone and len(self.course.slots()) >= slot * (kind in STAGED):
                gone.append(self.clock.time)
                self.wire.online.pop(name, None)
                return "gone"
            return before(site, asked)

        def tick() -> None:
            watch()
            if gone and self.clock.time >= gone[0] + back:
                self.wire.online.setdefault(name, self.sites[name])

        setattr(self.wire, moment, errors)
        self.clock.watch = tick

    def opened(self, slot: int, sites: tuple[str, ...]) -> np.ndarray:
        """What the sum of these sites' own numbers is, uint32 [d + m] or [m]."""
        total = np.zeros_like(self.sites[sites[0]].plain[slot])
        for name in sites:
            total += self.sites[name].plain[slot]
        return total
