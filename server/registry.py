"""What must the coordinator never forget? Sites (`Rosters`), studies and their states; a study's course is `Course`.

The SuperLink keeps nothing across a restart, so this is the truth. Every change is one transaction, on the disk
before the method returns, and every change of a study's state is checked against `TRANSITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self

import sqlalchemy as sa

from privacy.errors import ConsiliumError, Refusal
from privacy.identity import Document
from privacy.ledger import Abort, Leaf
from privacy.study import Study, read_approval, read_signed
from server import tables as t
from server.blobs import Blobs
from server.course import Course
from server.home import CoordinatorHome
from server.ledger import Ledger
from server.records import (
    LIVE,
    TRANSITIONS,
    ApprovalRecord,
    State,
    StudyRecord,
)
from server.ring_records import RingRecords
from server.rosters import Rosters

BUSY = LIVE | {State.REQUESTED, State.PAUSED, State.INTERRUPTED}


class Registry(Rosters):
    """The coordinator's memory. Any number of processes may have it open; safe between threads."""

    def __init__(
        self, home: CoordinatorHome, url: str | None = None, now: Callable[[], datetime] | None = None
    ) -> None:
        """Open the registry of a home, creating it when new.

        Args:
            url: SQLAlchemy URL; None takes the one in `coordinator.toml`.
            now: the clock.

        Raises:
            ConsiliumError: it cannot be opened.
        """
        self._url = url or home.registry_url()
        super().__init__(t.Database(self._url), now or (lambda: datetime.now(UTC)), home)
        self.blobs = Blobs(home.blobs)

    def ledger(self) -> Ledger:
        """The consortium's log, in the same database; the caller closes it."""
        return Ledger(self._url, self._home.config().name, self.now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    # ---- studies ---------------------------------------------------------------------------------------------

    def add_study(self, document: Document, initial: str, weights: str) -> StudyRecord:
        """Keep a study the coordinator signed; adding the same one again changes nothing.

        Args:
            initial: blob of the full initial state (safetensors); its name is what the study says.
            weights: blob of its trainable part, flat little-endian float32: the model of round 0.

        Raises:
            ConsiliumError: a blob is missing or another, or a study of that name is still going on.
        """
        study = read_signed(document, self._home.identity().public)
        if study.initial.sha256 != initial:
            raise ConsiliumError(
                "The initial weights are not the ones the study names", study.study.name, "Sign the study again."
            )
        self.blobs.path(initial)
        self.blobs.path(weights)
        with self._db.write() as db:
            rows = db.execute(
                sa.select(t.studies.c.hash, t.studies.c.state).where(t.studies.c.name == study.study.name)
            )
            known = {row.hash: State(row.state) for row in rows}
            if study.hash not in known:
                if any(state in BUSY for state in known.values()):
                    raise ConsiliumError(
                        "A study of this name is going on",
                        study.study.name,
                        "Choose another name, or stop the other: `consilium-coordinator study stop`.",
                    )
                stamp = self._stamp()
                db.execute(
                    t.studies.insert().values(
                        hash=study.hash,
                        name=study.study.name,
                        document=document.encode(),
                        state=State.SIGNED,
                        initial=initial,
                        weights=weights,
                        created=stamp,
                        updated=stamp,
                    )
                )
                db.execute(
                    t.approvals.insert(),
                    [{"study": study.hash, "site": s, "state": "", "document": b"", "at": ""} for s in study.sites],
                )
                db.execute(
                    t.checkpoints.insert().values(
                        study=study.hash, round=0, slot=0, weights=weights, memory="[]", at=stamp
                    )
                )
                self._event(db, study.hash, "signed", f"study `{study.study.name}` signed")
        return self.study(study.hash)

    def studies(self) -> list[StudyRecord]:
        """All studies, newest first."""
        with self._db.read() as db:
            rows = db.execute(sa.select(t.studies).order_by(t.studies.c.created.desc(), t.studies.c.hash)).all()
        return [_study(row) for row in rows]

    def study(self, name: str) -> StudyRecord:
        """One study by its hash, a beginning of it (6 digits or more), or its name (then the newest).

        Raises:
            ConsiliumError: none, or several hashes begin so.
        """
        with self._db.read() as db:
            order = sa.select(t.studies).order_by(t.studies.c.created.desc(), t.studies.c.hash)
            rows = db.execute(order.where(t.studies.c.name == name)).all()
            if not rows and len(name) >= 6:
                rows = db.execute(order.where(t.studies.c.hash.startswith(name, autoescape=True))).all()
                if len(rows) > 1:
                    raise ConsiliumError(
                        "Several studies begin so", name, f"Give more digits: {', '.join(r.hash[:16] for r in rows)}."
                    )
        if not rows:
            names = ", ".join(sorted({record.name for record in self.studies()})) or "none yet"
            raise ConsiliumError("No such study", name, f"Signed studies: {names}.")
        return _study(rows[0])

    def course(self, study: str) -> Course:
        """Slots, outcomes, checkpoints and evaluations of one study (by its full hash)."""
        return Course(self._db, self.blobs, study, self._stamp)

    def rings(self, study: str) -> RingRecords:
        """What secure aggregation needs to have remembered of one study."""
        return RingRecords(self._db, study, self._stamp)

    # ---- what a person asks ----------------------------------------------------------------------------------

    def launch(self, study: str) -> StudyRecord:
        """Ask for a run in a new session: for a study just signed, stopped, or failed."""
        return self._ask(study, {State.SIGNED, State.STOPPED, State.FAILED}, "launched")

    def resume(self, study: str) -> StudyRecord:
        """Ask for a run that goes on where it stood, in the same session; a finished study only delivers again."""
        return self._ask(study, {State.PAUSED, State.INTERRUPTED, State.FINISHED}, "resumed")

    def back_to(self, study: str, round_: int) -> StudyRecord:
        """Let a study that rests go on from the model of an earlier round.

        Raises:
            ConsiliumError: the study is not paused or interrupted, or that round's model is no longer kept.
        """
        record = self.study(study)
        if record.state not in {State.PAUSED, State.INTERRUPTED}:
            raise _not_now(record, "taken back")
        self._runs_again(record)
        self.course(record.hash).roll_back(round_)
        return record

    def pause(self, study: str) -> StudyRecord:
        """Ask the running process to pause; a study whose process has not started pauses at once."""
        return self._halt(study, "pause", State.PAUSED, {State.REQUESTED})

    def stop(self, study: str) -> StudyRecord:
        """Ask the running process to stop; a study without a process stops at once."""
        idle = {State.SIGNED, State.REQUESTED, State.PAUSED, State.INTERRUPTED, State.FAILED}
        return self._halt(study, "stop", State.STOPPED, idle)

    def abort(self, study: str) -> StudyRecord:
        """Give a study with noise up for good: ABORT in the ledger, under a head of its own; it never runs again.

        Raises:
            ConsiliumError: the study has no noise, runs, is finished, or has reserved nothing.
        """
        record = self.study(study)
        if record.study.privacy.mode == "none":
            raise ConsiliumError(
                "Only a study with noise is aborted: one without keeps no budget",
                record.name,
                "End it with `consilium-coordinator study stop`.",
            )
        if record.state in LIVE:
            raise ConsiliumError(
                "The study runs, and what is under way must end first",
                f"{record.name} is {record.state.value}",
                "Stop it with `consilium-coordinator study stop`, then abort it.",
            )
        with self.ledger() as ledger:
            account = ledger.account(record.hash)
            if account is None:
                raise ConsiliumError(
                    "Nothing was reserved for the study yet, so there is nothing to abort",
                    record.name,
                    "`consilium-coordinator study stop` ends it.",
                )
            if not account.open:
                raise ConsiliumError(
                    "The ledger holds the end of this study already",
                    record.name,
                    "`consilium-coordinator ledger show` says which; a longer run is a new study.",
                )
            if State.STOPPED in TRANSITIONS[record.state]:
                self.transition(record.hash, State.STOPPED, "aborted for good", expected=record.state)
            ledger.append([Leaf.of(Abort(study=record.hash, reason="stopped"))])
            ledger.checkpoint(self._home.identity())
        with self._db.write() as db:
            self._event(db, record.hash, "aborted", "aborted for good; the ledger says so")
        return self.study(record.hash)

    def _runs_again(self, record: StudyRecord) -> None:
        """Refuse when the ledger says that the study was given up (RULES B2)."""
        if record.study.privacy.mode == "none":
            return
        with self.ledger() as ledger:
            account = ledger.account(record.hash)
        if account is not None and isinstance(account.final, Abort):
            raise ConsiliumError(
                "The study was aborted, and a plan that was aborted never runs again",
                f"{record.name} ({account.final.reason})",
                "Draft a new study: `consilium-coordinator study new`; it reserves a budget of its own.",
            )

    def _ask(self, study: str, allowed: set[State], word: str) -> StudyRecord:
        record = self.study(study)
        self._runs_again(record)
        if record.state not in allowed:
            raise _not_now(record, word)
        return self.transition(record.hash, State.REQUESTED, f"{word} by the coordinator", expected=record.state)

    def _halt(self, study: str, request: str, state: State, idle: set[State]) -> StudyRecord:
        record = self.study(study)
        if record.state in idle:
            return self.transition(record.hash, state, "by the coordinator", expected=record.state)
        if record.state not in LIVE:
            raise _not_now(record, "paused" if request == "pause" else "stopped")
        with self._db.write() as db:
            db.execute(t.studies.update().where(t.studies.c.hash == record.hash).values(request=request))
            self._event(db, record.hash, "request", f"{request} asked for")
        return self.study(record.hash)

    # ---- what the running process and its supervisor say -----------------------------------------------------

    def transition(self, study: str, state: State, reason: str = "", expected: State | None = None) -> StudyRecord:
        """Move a study to another state, if that is a move it can make.

        A move to `requested` from signed, stopped or failed begins a new session (RULES S7) and gives up its open
        slot; any move out of waiting or running clears what was asked of the process.

        Raises:
            ConsiliumError: no such move, or the study has moved meanwhile.
        """
        with self._db.write() as db:
            row = db.execute(sa.select(t.studies).where(t.studies.c.hash == study)).one_or_none()
            if row is None:
                raise ConsiliumError("No such study", study[:16], "`consilium-coordinator study status` lists them.")
            old = State(row.state)
            if state is old and state in LIVE:
                db.execute(t.studies.update().where(t.studies.c.hash == study).values(reason=reason))
                return _study(db.execute(sa.select(t.studies).where(t.studies.c.hash == study)).one())
            if (expected is not None and old is not expected) or state not in TRANSITIONS[old]:
                raise _not_now(_study(row), state.value)
            values: dict[str, Any] = {"state": state, "reason": reason, "updated": self._stamp()}
            if state not in LIVE:
                values["request"] = ""
            if state is State.REQUESTED and old in {State.SIGNED, State.STOPPED, State.FAILED}:
                values["session"] = row.session + 1
                Course.abandon(db, study, self._stamp())
            db.execute(t.studies.update().where(t.studies.c.hash == study).values(**values))
            self._event(db, study, "state", f"{state.value}{f': {reason}' if reason else ''}", data={"state": state})
            return _study(db.execute(sa.select(t.studies).where(t.studies.c.hash == study)).one())

    def renew_session(self, study: str) -> None:
        """Let the next run of a study begin a new session: somebody else's has replaced this one (RULES S7)."""
        with self._db.write() as db:
            db.execute(t.studies.update().where(t.studies.c.hash == study).values(session=t.studies.c.session + 1))
            Course.abandon(db, study, self._stamp())

    def requested(self, study: str) -> str:
        """What is asked of the running process: "", "pause" or "stop"."""
        with self._db.read() as db:
            return str(db.scalar(sa.select(t.studies.c.request).where(t.studies.c.hash == study)) or "")

    # ---- approvals -------------------------------------------------------------------------------------------

    def approvals(self, study: str) -> list[ApprovalRecord]:
        """What each site of a study has said, by name."""
        with self._db.read() as db:
            rows = db.execute(
                sa.select(t.approvals).where(t.approvals.c.study == study).order_by(t.approvals.c.site)
            ).all()
        return [ApprovalRecord(r.site, r.state, bytes(r.document), r.at) for r in rows]

    def set_approval(self, study: str, site: str, state: str, document: bytes = b"") -> None:
        """Note what a site said. The caller has checked the signature; an approval file goes through `add_approval`."""
        with self._db.write() as db:
            where = (t.approvals.c.study == study) & (t.approvals.c.site == site)
            row = db.execute(sa.select(t.approvals).where(where)).one_or_none()
            if row is None:
                raise ConsiliumError("The study does not name this site", site, "Draft a new study to add one.")
            if (row.state, bytes(row.document)) == (state, document):
                return
            db.execute(t.approvals.update().where(where).values(state=state, document=document, at=self._stamp()))
            self._event(db, study, "approval", f"{site}: {state}", site=site)

    def add_approval(self, document: Document) -> ApprovalRecord:
        """Take a site's signed approval that came as a file.

        Raises:
            ConsiliumError: it is for no study here, of no site of it, not whole, or not signed by that site.
        """
        record = self.study(str(document.body.get("study", "")))
        site = str(document.body.get("site", ""))
        try:
            document.verify(self.roster()[1].site(site).identity)
            read_approval(document)
        except Refusal as error:
            raise ConsiliumError(error.what, f"approval of {site or 'nobody'}", error.remedy) from error
        if site not in record.study.sites:
            raise ConsiliumError("The study does not name this site", site, "Draft a new study to add one.")
        self.set_approval(record.hash, site, "approved", document.encode())
        return next(item for item in self.approvals(record.hash) if item.site == site)


def _study(row: Any) -> StudyRecord:
    document = Document.decode(bytes(row.document), "study")
    return StudyRecord(
        hash=row.hash,
        name=row.name,
        document=document,
        study=Study.from_body(document.body),
        state=State(row.state),
        reason=row.reason,
        request=row.request,
        session=row.session,
        initial=row.initial,
        weights=row.weights,
        created=row.created,
        updated=row.updated,
    )


def _not_now(record: StudyRecord, word: str) -> ConsiliumError:
    why = f" ({record.reason})" if record.reason else ""
    remedies = {
        State.SIGNED: "Launch it: `consilium-coordinator study launch`.",
        State.REQUESTED: "It starts within seconds when `consilium-coordinator serve` runs.",
        State.WAITING: "It waits for the sites' approvals; `consilium-coordinator study status` shows which.",
        State.RUNNING: "Watch it with `consilium-coordinator study status`.",
        State.PAUSED: "Go on with `consilium-coordinator study resume`, or end it with `study stop`.",
        State.STOPPED: "Begin again with `consilium-coordinator study launch`.",
        State.INTERRUPTED: "Go on with `consilium-coordinator study resume`.",
        State.FINISHED: "Its model is in `consilium-coordinator models list`; training again is a new study.",
        State.FAILED: "Begin again with `consilium-coordinator study launch`, or draft a new study.",
    }
    return ConsiliumError(
        f"The study cannot be {word} now", f"{record.name} is {record.state.value}{why}", remedies[record.state]
    )
