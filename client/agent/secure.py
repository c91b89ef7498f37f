"""How does a site take part in a secure sum? The stages before and after the masked vector, each answered once.

The protocol itself is `privacy.secagg`: pure functions over values. Here its states are read from the agent's records
and written back in one transaction with the answer they led to (`client.agent.rings`), so that the same question
gets the same bytes, another question a refusal, and a choice is on the disk before its answer leaves (RULES S2 to S4).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from client.agent.policy import Site, Sizes
from client.agent.rows import SlotRow
from client.agent.store import Store
from client.agent.voice import Voice
from privacy.canonical import canonical, sha256
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Identity
from privacy.messages import Request, Vector
from privacy.secagg import site
from privacy.secagg.fixed import Words, encode
from privacy.secagg.messages import Choice, Keys, Shares, Survivors
from privacy.secagg.plan import Plan
from privacy.secagg.states import Keyed, Ready, Shared
from privacy.stages import FIRST, LAST, TRANSCRIPT, Enclosure, room
from privacy.study import Study


@dataclass(frozen=True)
class Reply:
    """What a stage came to, before it is written down."""

    detail: dict[str, str]
    payload: bytes = b""
    state: bytes = b""
    choice: tuple[str, int, bytes, bool] | None = None


class Secure:
    """The secure sums of one agent."""

    def __init__(
        self, store: Store, voice: Voice, here: Site, identity: Identity, sizes: Callable[[Study], Sizes]
    ) -> None:
        self._store, self._voice, self._here, self._identity, self._sizes = store, voice, here, identity, sizes
        self._lock = threading.Lock()

    # ---- the masked vector -----------------------------------------------------------------------------------

    def admit(self, request: Request, study: Study) -> None:
        """Everything that must hold before a masked slot is bound; nothing is changed.

        Raises:
            Refusal: OUT_OF_ORDER without this session's keys or with another transcript, SLOT_SESSION, COHORT,
                ROUND_OPENED.
        """
        header = request.header
        ready = self._ready(study, header.session)
        if header.parameters != {TRANSCRIPT: ready.transcript}:
            raise Refusal(RefusalCode.OUT_OF_ORDER, str(header.slot))
        ready.index(header.slot)
        ready.place.plan.check_group(header.cohort, ready.ring, RefusalCode.COHORT)
        if self._store.rings.opened(header.study, header.kind, header.round, but=header.slot):
            raise Refusal(RefusalCode.ROUND_OPENED, str(header.round))

    def mask(self, request: Request, study: Study, result: Vector) -> Words:
        """A computed vector on the plan's grid, masked for the request's cohort.

        Args:
            result: float32 [d + m] for train, [m] otherwise.

        Returns:
            uint32 of the same length.

        Raises:
            Refusal: NON_FINITE; SESSION_CLOSED when the keys are gone meanwhile.
        """
        header, sizes = request.header, self._sizes(study)
        ready = self._ready(study, header.session)
        update = result[: len(result) - sizes.statistics] if header.kind == "train" else None
        words = encode(ready.place.plan, update, result[-sizes.statistics :])
        site.mask(ready, header.slot, request.hash, header.cohort, words)
        return words

    def hide(self, request: Request, study: Study, words: Words) -> None:
        """Mask words that are on the study's grid already and carry their noise, uint32 [d + m] or [m], in place.

        Raises:
            Refusal: SESSION_CLOSED when the keys are gone meanwhile.
        """
        header = request.header
        site.mask(self._ready(study, header.session), header.slot, request.hash, header.cohort, words)

    # ---- the stages ------------------------------------------------------------------------------------------

    def room(self, study: Study) -> int:
        """The most bytes a stage's request may bring."""
        return room(len(study.sites), study.secagg.session_slots)

    def serve(self, request: Request, study: Study, payload: bytes) -> bytes:
        """Answer a stage; the answer is on the disk, with what follows from it, before it is returned.

        Args:
            payload: whole, its hash checked.

        Raises:
            Refusal: as the protocol says; SLOT_BOUND for another request in a stage that was answered; SLOT_SPENT
                when the answer is gone; SESSION_CLOSED, SESSION_UNKNOWN.
        """
        header = request.header
        with self._lock:
            found = self.answered(request)
            if found:
                return found
            reply = getattr(self, f"_{header.kind}")(request, study, payload)
            answer = self._voice.done(
                request, reply.detail, sha256=sha256(reply.payload) if reply.payload else "", size=len(reply.payload)
            )
            self._store.rings.keep(
                header.study, header.session, header.slot, header.kind, request.hash, answer,
                payload=reply.payload, state=reply.state, choice=reply.choice,
            )  # fmt: skip
        return answer

    def answered(self, request: Request) -> bytes:
        """The stored answer to this very request; empty when the stage is still open.

        Raises:
            Refusal: SESSION_CLOSED, SESSION_UNKNOWN, SLOT_BOUND, SLOT_SPENT.
        """
        header, row = request.header, self._store.study(request.header.study)
        if row is None or header.session < row.session:
            raise Refusal(RefusalCode.SESSION_CLOSED, str(header.session))
        if header.session > row.session or not header.session:
            raise Refusal(RefusalCode.SESSION_UNKNOWN, str(header.session))
        found = self._store.rings.stage(header.study, header.session, header.slot, header.kind)
        if found is None:
            return b""
        if found.request != request.hash:
            raise Refusal(RefusalCode.SLOT_BOUND, str(header.slot))
        if not found.answer:
            raise Refusal(RefusalCode.SLOT_SPENT, str(header.slot))
        return found.answer

    def named(self, request: Request) -> str:
        """What the journal calls the answer to a stage; what opened a round is told so that it can be read again."""
        header = request.header
        row = self._store.slot(header.study, header.slot) if header.kind == "unmask" else None
        return f"answer to {header.kind}" + (f" of {row.kind} {row.round}" if row is not None else "")

    # ---- one stage after the other ---------------------------------------------------------------------------

    def _keys(self, request: Request, study: Study, payload: bytes) -> Reply:
        header = request.header
        if payload or set(header.parameters) != {FIRST, LAST}:
            raise Refusal(RefusalCode.MALFORMED)
        first, last = (_number(header.parameters[name]) for name in (FIRST, LAST))
        pins = self._store.rings.pins(header.study)
        keyed, document = site.begin(
            self._plan(study), header.session, first, last, self._here.name, self._identity, pins
        )
        return Reply({"keys": document.encode().decode()}, state=keyed.to_bytes())

    def _shares(self, request: Request, study: Study, payload: bytes) -> Reply:
        found = Enclosure.decode(payload, self.room(study), {"keys": Keys.KIND})
        keyed = Keyed.from_bytes(self._state(study.hash, request.header.session))
        shared, document, parcels = site.share(keyed, found.documents["keys"], self._identity)
        enclosed = Enclosure(parcels=parcels).encode()
        return Reply({"shares": document.encode().decode()}, enclosed, state=shared.to_bytes())

    def _seal(self, request: Request, study: Study, payload: bytes) -> Reply:
        found = Enclosure.decode(payload, self.room(study), {"shares": Shares.KIND}, parcels=True)
        shared = Shared.from_bytes(self._state(study.hash, request.header.session))
        ready = site.receive(shared, found.documents["shares"], found.parcels)
        return Reply({TRANSCRIPT: ready.transcript}, state=ready.to_bytes())

    def _survivors(self, request: Request, study: Study, payload: bytes) -> Reply:
        row, ready = self._masked(request, study)
        if payload:
            raise Refusal(RefusalCode.MALFORMED)
        choice, document = site.survive(
            ready, row.slot, row.request, row.cohort.split(), request.header.cohort, self._choices(study),
            self._identity,
        )  # fmt: skip
        return Reply({"survivors": document.encode().decode()}, choice=_kept(row, choice))

    def _unmask(self, request: Request, study: Study, payload: bytes) -> Reply:
        row, ready = self._masked(request, study)
        cohort, survivors = tuple(row.cohort.split()), request.header.cohort
        kind = "answer" if survivors == cohort else Survivors.KIND
        proof = Enclosure.decode(payload, self.room(study), {"proof": kind}).documents["proof"]
        choice, opening = site.open_(
            ready, row.slot, row.request, cohort, survivors, proof, self._choices(study), self._identity
        )
        if self._store.rings.opened(study.hash, row.kind, row.round, but=row.slot):
            raise Refusal(RefusalCode.ROUND_OPENED, str(row.round))
        return Reply({"opening": opening.encode().decode()}, choice=_kept(row, choice))

    # ---- what is remembered ----------------------------------------------------------------------------------

    def _masked(self, request: Request, study: Study) -> tuple[SlotRow, Ready]:
        """The slot whose masked vector left, and the keys it was masked with."""
        header, row = request.header, self._store.slot(study.hash, request.header.slot)
        if row is None or row.session != header.session or row.round != header.round:
            raise Refusal(RefusalCode.OUT_OF_ORDER, str(header.slot))
        if row.state != "stored" or not row.size:
            raise Refusal(RefusalCode.SLOT_SPENT, str(header.slot))
        return row, self._ready(study, header.session)

    def _ready(self, study: Study, session: int) -> Ready:
        return Ready.from_bytes(self._state(study.hash, session))

    def _state(self, study: str, session: int) -> bytes:
        state = self._store.rings.secrets(study, session)
        if state is None:
            raise Refusal(RefusalCode.OUT_OF_ORDER, str(session))
        return state

    def _choices(self, study: Study) -> Mapping[int, Choice]:
        found = (Choice.from_body(json.loads(data)) for data in self._store.rings.choices(study.hash) if data)
        return {choice.slot: choice for choice in found}

    def _plan(self, study: Study) -> Plan:
        sizes = self._sizes(study)
        return Plan.of(study, sizes.trainable, sizes.statistics)


def _kept(row: SlotRow, choice: Choice) -> tuple[str, int, bytes, bool]:
    """As `Rings.keep` writes it down: the set is the same bytes whether it was only signed or opened as well."""
    return row.kind, row.round, canonical({**choice.body(), "released": False}), choice.released


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 8) or str(int(text)) != text:
        raise Refusal(RefusalCode.MALFORMED)
    return int(text)
