"""What does the agent do with a message? Verify, bind, compute, keep, answer: in this order, and only this order.

`Agent` is called in process, by the two gRPC doors, by simulation and by tests alike. Whatever goes wrong leaves as
a typed refusal with constant words; the full story stands in the agent's own log (RULES S1 to S3, S7).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

from client.agent import policy
from client.agent.calls import Calls
from client.agent.closing import Closing
from client.agent.desk import Desk
from client.agent.gate import Gate
from client.agent.history import REFUSAL, History
from client.agent.logbook import Logbook
from client.agent.payload import Payload, into_bytes, into_vector
from client.agent.policy import Site
from client.agent.private import Private
from client.agent.purse import Purse
from client.agent.rows import State, StudyRow
from client.agent.secure import Secure
from client.agent.spool import Spool, lock_home, vector_name
from client.agent.store import Store
from client.agent.voice import Voice
from client.agent.workshop import Workshop
from client.home import SiteHome
from privacy.airlock import Airlock, Released, Stored
from privacy.canonical import canonical
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.journal import Journal
from privacy.messages import OPENING, PROTOCOL, SETTING_UP, SLOTTED, Request, all_finite
from privacy.roster import Roster
from privacy.study import KIND, Study, approval

FETCH_LIMIT = 4 << 20
COMPUTING = SLOTTED | SETTING_UP | OPENING
"""Requests whose answers come of patients' images, or open what does."""
ABOUT_A_PEER = frozenset({RefusalCode.PEER_KEYS, RefusalCode.PEER_SHARES})
"""Refusals whose reason is another site's message, which the coordinator only carried."""

log = logging.getLogger("consilium.agent")


class Agent:
    """One site's agent over one home; a second one on the same home is refused while this one lives.

    Args:
        home: a folder with site.toml, consortium.json and agent/identity.key.
        now: the clock (for expiry and for records).
        desk: makes what computes; a simulation has one that reads several sites' images.

    Raises:
        ConsiliumError: the home is incomplete, in use, or its records were changed.
    """

    def __init__(
        self, home: SiteHome, *, now: Callable[[], datetime] | None = None, desk: Callable[..., Desk] = Desk
    ) -> None:
        self.home, self._now = home, now or (lambda: datetime.now(UTC))
        self.config, consortium = home.config(), home.consortium()
        self._guard = lock_home(home)
        try:
            identity = Identity.load(home.identity_key)
            self.site = Site(self.config.site, identity.public, consortium.name, consortium.coordinator)
            self._voice = Voice(identity, self.site.name)
            self.journal_file = home.agent / "journal.jsonl"
            self.journal = Journal(self.journal_file)
            self._answers = home.agent / "answers"
            self._airlock = Airlock(self.journal, self._answers, self._now)
            self.store = Store(home.agent / "agent.db", self._now)
            self._history = History(self.journal_file)
            for study in self._history.slots:
                self._history.hold_against(self.store, study)
            self.desk = desk(home, fresh=not self.store.studies(), threads=self.config.threads)
            self.purse = self._purse()
            self._spool = Spool(home.agent / "inbox")
            self._secure = Secure(self.store, self._voice, self.site, identity, self.desk.sizes)
            self._logbook = Logbook(self.store, identity, self.site, self._now, self.purse)
            self._workshop = Workshop(
                self.store, self._airlock, self.desk, self._answers, self._voice, self._secure,
                Private(self._airlock, self.purse), self._logbook,
            )  # fmt: skip
            self.gate = Gate(self.store, self.purse, self._workshop, self._known)
            self._closing = Closing(
                self.store, self.purse, self._logbook, self._workshop, self.desk, self._spool, self.models()
            )
            self._closing.ended()
        except BaseException:
            os.close(self._guard)
            raise
        self._identity = identity
        self._studies: dict[str, Study] = {}
        self._calls = Calls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def warm_up(self) -> None:
        """Load libraries, and whatever the studies in progress need, in the background."""
        self._workshop.load_libraries()
        for row in self.store.studies():
            study = self.study(row.hash)
            if study is not None and row.state is State.APPROVED and row.session:
                self._workshop.prepare(study)

    def stop(self) -> None:
        """Stop what is being computed; its slot stays bound, and the same request is computed again later."""
        self._workshop.stop()

    def close(self) -> None:
        """Stop, let calls under way end, and release the home."""
        self._workshop.close()
        self._calls.close()
        self.store.close()
        self.journal.close()
        os.close(self._guard)

    # ---- the outward face ------------------------------------------------------------------------------------

    def hello(self) -> Released:
        """Who is here: canonical JSON {"protocol", "site", "version"}."""
        greeting = {"protocol": PROTOCOL, "site": self.site.name, "version": version("consilium")}
        return self._airlock.release("hello", canonical(greeting))

    def submit(self, document: bytes, payload: Payload = b"") -> Released:
        """Serve one request.

        Args:
            document: the signed request.
            payload: what the header announces, in any form; read only as far as it is needed.

        Returns:
            The signed answer document, a refusal included. A request that cannot be read or was not signed by the
            coordinator is answered under the study "000…", naming the SHA-256 of its raw bytes.

        Raises:
            Refusal: DISK_FULL, when not even the journal can take a line; then nothing leaves. BUSY, when the agent
                is stopping.
        """
        with self._calls:
            return self._submit(document, payload, time.monotonic())

    def _submit(self, document: bytes, payload: Payload, received: float) -> Released:
        try:
            request = policy.read_request(document, self.site.coordinator)
        except Refusal as refusal:
            return self._airlock.release(REFUSAL, self._voice.unread(document, refusal.code))
        header, about = request.header, ""
        try:
            data = self._serve(request, payload, received)
            with self.gate.passing(header.study) if header.kind in COMPUTING else nullcontext():
                return self._airlock.release(self._secure.named(request), data, header.study, header.slot)
        except Refusal as refusal:
            code = refusal.code
            if code in ABOUT_A_PEER and refusal.subject in header.cohort:
                about = refusal.subject
        except Exception:
            log.exception("serving %s of study %s failed", header.kind, header.study)
            code = RefusalCode.INTERNAL
        self._note_refusal(request, code)
        return self._airlock.release(REFUSAL, self._voice.refused(request, code, about), header.study, header.slot)

    def fetch(self, study: str, session: int, slot: int, request: str, offset: int, length: int) -> Released:
        """A range of a stored answer's payload, at most 4 MiB.

        Raises:
            Refusal: the study's state forbids it, SESSION_CLOSED, SESSION_UNKNOWN, SLOT_BOUND (other request),
                SLOT_SPENT (no stored bytes), MALFORMED (range), TOO_LARGE, DISK_FULL.
        """
        if length > FETCH_LIMIT:
            raise Refusal(RefusalCode.TOO_LARGE)
        with self._calls, self.gate.passing(study) as known:
            stage = self.store.rings.answered(study, session, slot, request)
            if stage is not None:
                return self._airlock.release_range(f"{stage.stage} payload", stage.payload, offset, length, study, slot)
            found = self.store.look(study, session, slot, request, known.slots)
            if found is None or found.state != "stored" or found.size == 0:
                raise Refusal(RefusalCode.SLOT_SPENT, str(slot))
            stored = Stored(self._answers / vector_name(study, slot), found.sha256, found.size)
            return self._airlock.fetch(f"{found.kind} vector", stored, offset, length, study=study, slot=slot)

    def refusal(self, code: RefusalCode) -> Released:
        """The code that ends a call without an answer document.

        Raises:
            Refusal: DISK_FULL, when the journal cannot take a line.
        """
        return self._airlock.release(REFUSAL, code.value.encode())

    # ---- what the operator's door needs ----------------------------------------------------------------------

    def import_document(self, document: bytes) -> tuple[str, str]:
        """Take a signed study or roster that was handed over as a file; returns its kind and name.

        Raises:
            Refusal: not one of them, not signed by our coordinator, not for this site.
        """
        for kind in (KIND, Roster.KIND):
            try:
                read = Document.decode(document.strip(), kind)
            except Refusal:
                continue
            if kind == KIND:
                study = policy.read_study(read, self.site)
                self._add_study(study, read.encode())
                return kind, study.hash
            roster = policy.read_roster(read, self.site)
            self.store.take_roster(roster.version, read.encode())
            return kind, f"version {roster.version}"
        raise Refusal(RefusalCode.MALFORMED)

    def decide(self, study: str, state: State, data: str = "") -> bytes:
        """Write the operator's decision and return the signed approval (empty for a no).

        Raises:
            Refusal: UNKNOWN_STUDY; SESSION_CLOSED when the study is finished.
        """
        row, known = self._known(study)
        if row is None or known is None:
            raise Refusal(RefusalCode.UNKNOWN_STUDY, study)
        if row.state is State.FINISHED:
            raise Refusal(RefusalCode.SESSION_CLOSED, study)
        yes = state is State.APPROVED
        if yes and known.secagg.mode == "on":
            self.store.rings.pin(study, self.identities(known))
        one = any(row.one_image_per_patient for row in self.store.sources() if row.name == data)
        said = approval(known.hash, self.site.name, data, one_image_per_patient=one)
        signed = said.signed_by(self._identity).encode() if yes else b""
        self.gate.decide(study, state, data, signed)
        self.desk.forget(study)
        return signed

    def study(self, study: str) -> Study | None:
        """A known study by its hash."""
        return self._known(study)[1]

    def models(self) -> Path:
        """Where delivered models lie, one folder per study."""
        return self.home.agent / "models"

    def working(self) -> str:
        """What is being computed now, in words; empty when nothing."""
        return self._workshop.words()

    def roster(self) -> Roster | None:
        """The newest verified roster, or None."""
        held = self.store.roster()
        return None if held is None else policy.read_roster(Document.decode(held, Roster.KIND), self.site)

    def identities(self, study: Study) -> dict[str, str]:
        """The identity keys of a study's sites by the newest roster; approving pins them for secure sums."""
        roster = self.roster()
        return {line.name: line.identity for line in roster.sites if line.name in study.sites} if roster else {}

    # ---- one kind after the other ----------------------------------------------------------------------------

    def _serve(self, request: Request, payload: Payload, received: float) -> bytes:
        header = request.header
        if header.kind == "offer":
            return self._offer(request, payload)
        row, study = self._known(header.study)
        policy.admit(header, row, study, self.roster(), self.site, self._now())
        assert row is not None
        assert study is not None
        if header.kind in COMPUTING:
            self.gate.check(header.study)
        if header.kind in SLOTTED:
            return self._compute(request, study, payload, received)
        if header.kind in SETTING_UP | OPENING:
            return self._stage(request, study, payload)
        if header.session < row.session:
            raise Refusal(RefusalCode.SESSION_CLOSED, str(header.session))
        policy.check_size(header, self.desk.sizes(study))
        if header.kind == "open":
            return self._open(request, study, payload)
        if header.kind == "witness":
            data = into_bytes(payload, header.payload_sha256, header.payload_bytes)
            said = self._logbook.cosign(header.study, data)
            self._closing.ended()
            return self._voice.done(request, said)
        self._closing.deliver(request, row, study, payload)
        return self._voice.done(request, {})

    def _offer(self, request: Request, payload: Payload) -> bytes:
        header = request.header
        policy.check_size(header, None)
        with self._spool.only_one("offer"):
            data = into_bytes(payload, header.payload_sha256, header.payload_bytes)
        offer = policy.read_offer(data, header, self.site)
        self.store.take_roster(offer.roster.version, offer.roster_document)
        row = self._add_study(offer.study, offer.study_document)
        return self._voice.done(request, {"state": row.state.value, "approval": row.approval.hex()})

    def _open(self, request: Request, study: Study, payload: Payload) -> bytes:
        header, held = request.header, self.desk.initial(study)
        if header.session == 0:
            raise Refusal(RefusalCode.MALFORMED)
        noised = study.privacy.mode != "none" and not self.purse.closed(study.hash)  # closed: the model may still come
        granted = {"grant": self.purse.granted(study)} if noised else {}
        if header.payload_bytes:
            if header.payload_sha256 != study.initial.sha256:
                raise Refusal(RefusalCode.MODEL_HASH)
            if not held.exists():
                with self._spool.file(request, payload) as part:
                    held.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    os.replace(part, held)
        self.store.open_session(header.study, header.session)
        self.store.rings.wipe()
        self._workshop.cancel(header.study, RefusalCode.SESSION_CLOSED, older_than=header.session)
        if not held.exists():
            return self._voice.done(request, {"initial": "needed"})
        self._workshop.prepare(study)
        return self._voice.done(request, {"initial": "held", **granted})

    def _stage(self, request: Request, study: Study, payload: Payload) -> bytes:
        header = request.header
        if study.secagg.mode == "off":
            raise Refusal(RefusalCode.MALFORMED, header.kind)
        if found := self._secure.answered(request):
            return found
        if header.payload_bytes > self._secure.room(study):
            raise Refusal(RefusalCode.TOO_LARGE)
        with self._spool.only_one(header.study):
            data = into_bytes(payload, header.payload_sha256, header.payload_bytes)
        return self._secure.serve(request, study, data)

    def _compute(self, request: Request, study: Study, payload: Payload, received: float) -> bytes:
        header = request.header
        found = self.store.look(header.study, header.session, header.slot, request.hash, study.slots)
        if found is not None and found.state == "stored":
            return found.answer
        running = self._workshop.running(request)
        if running is not None:
            return running.result()
        if not self.desk.initial(study).exists():
            raise Refusal(RefusalCode.SESSION_UNKNOWN, str(header.session))
        if study.secagg.mode == "on":
            self._secure.admit(request, study)
        if study.privacy.mode != "none":
            self._logbook.check(header.study, header.slot)
        sizes = self.desk.sizes(study)
        policy.check_size(header, sizes)
        with self._spool.only_one(header.study):
            vector = into_vector(payload, header.payload_sha256, sizes.received(header.kind), sizes.statistics)
        if not all_finite(vector):
            raise Refusal(RefusalCode.NON_FINITE)
        noised = study.privacy.mode != "none"  # then whether a site is late hangs on nothing that a message says
        seconds = study.rounds.deadline_seconds if noised else header.deadline_seconds
        begun = self._workshop.begin(request, study, vector, received + seconds)
        del vector
        return begun if isinstance(begun, bytes) else begun.result()

    # ---- helpers ---------------------------------------------------------------------------------------------

    def _purse(self) -> Purse:
        """The patients' budgets, held against the journal and added up; a ledger in doubt charges nothing."""
        purse = self.store.purse(self.site.name)
        for study, slot in self._history.slots.items():
            purse.hold_against(study, slot)
        try:
            purse.verify_whole(self.desk.key)
        except Refusal:
            log.error("the privacy ledger is in doubt: %s", purse.trouble())
        return purse

    def _add_study(self, study: Study, document: bytes) -> StudyRow:
        row = self.store.add_study(study.hash, study.study.name, document)
        self._history.hold_against(self.store, study.hash)
        self.purse.hold_against(study.hash, self._history.slots.get(study.hash, 0))
        return row

    def _known(self, study: str) -> tuple[StudyRow | None, Study | None]:
        row = self.store.study(study)
        if row is not None and study not in self._studies:
            self._studies[study] = policy.read_study(Document.decode(row.document, KIND), self.site)
        return row, self._studies.get(study)

    def _note_refusal(self, request: Request, code: RefusalCode) -> None:
        header = request.header
        log.warning("refused %s of study %s, slot %d: %s", header.kind, header.study, header.slot, code.value)
        try:
            self.store.note(header.study, f"{header.kind} refused: {code.value}")
        except Refusal:
            log.warning("the refusal could not be noted: the disk is full")
