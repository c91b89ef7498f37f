"""What must the coordinator remember of secure aggregation? Which ring of keys a session has, and how far a slot went.

A ring is noted as begun before the first key is asked for, so that a session whose set-up broke off is never taken for
a good one. The request of a stage is here before anyone is asked, so that what a new process sends is the same bytes.
None of this is secret: these are the sites' own signed messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from privacy.identity import Document
from privacy.secagg.ring import Ring
from server import tables as t

BEGUN, READY = "begun", "ready"


@dataclass(frozen=True)
class RingRecord:
    """The keys of one session: what the ring's sites said, and those of them (`members`) that hold everything."""

    session: int
    members: tuple[str, ...]
    ring: Ring


@dataclass(frozen=True)
class StageRecord:
    """A stage that was begun for a slot: its signed request, the same for all, and the payload."""

    stage: str
    request: Document
    payload: bytes


class RingRecords:
    """Rings and stages of one study. Given out by `Registry.rings`."""

    def __init__(self, database: t.Database, study: str, stamp: Callable[[], str]) -> None:
        self._db, self._study, self._stamp = database, study, stamp

    def begun(self, session: int) -> bool:
        """Whether keys were ever asked for in this session."""
        with self._db.read() as db:
            return db.scalar(sa.select(t.rings.c.state).where(self._where(session))) is not None

    def begin(self, session: int, first: int, last: int) -> None:
        """Note that a session's set-up begins, durably."""
        with self._db.write() as db:
            db.execute(
                t.rings.insert().values(
                    study=self._study, session=session, first=first, last=last, state=BEGUN, members="[]",
                    documents=b"", at=self._stamp(),
                )
            )  # fmt: skip

    def ready(self, found: RingRecord) -> None:
        """The ring stands: slots may be masked under it. Older sessions' documents are let go."""
        place = found.ring.place
        with self._db.write() as db:
            db.execute(
                t.rings.update()
                .where(self._where(found.session))
                .values(state=READY, members=json.dumps(found.members), documents=found.ring.to_bytes())
            )
            older = (t.rings.c.study == self._study) & (t.rings.c.session < found.session)
            db.execute(t.rings.update().where(older).values(documents=b""))
            text = f"{', '.join(found.members)} have keys for slots {place.first_slot} to {place.last_slot}"
            t.add_event(db, self._stamp(), self._study, "ring", text, data={"members": list(found.members)})

    def ring(self, session: int) -> RingRecord | None:
        """A session's ring, or None when none stands."""
        with self._db.read() as db:
            row = db.execute(sa.select(t.rings).where(self._where(session))).one_or_none()
        if row is None or row.state != READY or not row.documents:
            return None
        return RingRecord(row.session, tuple(json.loads(row.members)), Ring.from_bytes(bytes(row.documents)))

    def begin_stage(self, slot: int, stage: str, request: Document, payload: bytes) -> StageRecord:
        """Bind a stage of a slot to its request, before anyone is asked."""
        with self._db.write() as db:
            db.execute(
                t.stages.insert().values(
                    study=self._study, slot=slot, stage=stage, request=request.encode(), payload=payload,
                    at=self._stamp(),
                )
            )  # fmt: skip
        return StageRecord(stage, request, payload)

    def stages(self, slot: int) -> dict[str, StageRecord]:
        """The stages that were begun for a slot."""
        where = (t.stages.c.study == self._study) & (t.stages.c.slot == slot)
        with self._db.read() as db:
            rows = db.execute(sa.select(t.stages).where(where)).all()
        return {
            r.stage: StageRecord(r.stage, Document.decode(bytes(r.request), "request"), bytes(r.payload)) for r in rows
        }

    def _where(self, session: int) -> sa.ColumnElement[bool]:
        return (t.rings.c.study == self._study) & (t.rings.c.session == session)
