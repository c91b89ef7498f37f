"""What has happened in one study? Its slots, who answered in them, its checkpoints, evaluations and deliveries.

The order of writing makes every crash harmless. A slot's signed request is here before anyone is asked, so what is
sent again is the same bytes (RULES S2). A checkpoint's blobs are on the disk before the one transaction that names
them, closes the slot and notes the metrics; a kill leaves either the old model with its open slot, or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from privacy.errors import ConsiliumError
from server import tables as t
from server.blobs import Blobs
from server.records import (
    Checkpoint,
    Delivery,
    Evaluation,
    Outcome,
    OutcomeState,
    SlotRecord,
    SlotState,
)


class Course:
    """The course of one study. Given out by `Registry.course`."""

    def __init__(self, database: t.Database, blobs: Blobs, study: str, stamp: Callable[[], str]) -> None:
        self._db, self._blobs, self._study, self._stamp = database, blobs, study, stamp

    # ---- slots -----------------------------------------------------------------------------------------------

    def open_slot(self, slot: SlotRecord) -> SlotRecord:
        """Bind the next slot to a request, durably; its cohort is waiting.

        Raises:
            ConsiliumError: another slot is open, or the number is not the next one.
        """
        with self._db.write() as db:
            last = db.execute(
                sa.select(t.slots.c.slot, t.slots.c.state)
                .where(t.slots.c.study == self._study)
                .order_by(t.slots.c.slot.desc())
                .limit(1)
            ).one_or_none()
            number, state = (last.slot, last.state) if last is not None else (0, SlotState.DONE)
            if state == SlotState.OPEN or slot.slot != number + 1:
                raise ConsiliumError(
                    "Another process runs this study", f"slot {slot.slot}", "Stop one of the two coordinators."
                )
            db.execute(
                t.slots.insert().values(
                    study=self._study,
                    slot=slot.slot,
                    session=slot.session,
                    round=slot.round,
                    kind=slot.kind,
                    attempt=slot.attempt,
                    request=slot.request,
                    hash=slot.hash,
                    payload=slot.payload,
                    cohort=json.dumps(slot.cohort),
                    state=SlotState.OPEN,
                    opened=self._stamp(),
                )
            )
            db.execute(
                t.outcomes.insert(),
                [
                    {"study": self._study, "slot": slot.slot, "site": site, "state": OutcomeState.WAITING}
                    for site in slot.cohort
                ],
            )
            what = f"round {slot.round}" if slot.kind == "train" else f"{slot.kind} of the model of round {slot.round}"
            again = f", try {slot.attempt}" if slot.attempt > 1 else ""
            self._event(
                db,
                "slot",
                f"{what} begins{again}",
                data={"slot": slot.slot, "round": slot.round, "kind": slot.kind, "cohort": list(slot.cohort)},
            )
        return self.slot(slot.slot)

    def slot(self, number: int) -> SlotRecord:
        """One slot."""
        with self._db.read() as db:
            row = db.execute(
                sa.select(t.slots).where((t.slots.c.study == self._study) & (t.slots.c.slot == number))
            ).one()
        return _slot(row)

    def slots(self) -> list[SlotRecord]:
        """All slots, in order."""
        with self._db.read() as db:
            rows = db.execute(sa.select(t.slots).where(t.slots.c.study == self._study).order_by(t.slots.c.slot)).all()
        return [_slot(row) for row in rows]

    def reopen(self, number: int) -> None:
        """Ask again, in the same slot, whoever is not in: a new process takes up an open slot."""
        with self._db.write() as db:
            where = (t.outcomes.c.study == self._study) & (t.outcomes.c.slot == number)
            db.execute(
                t.outcomes.update().where(where).values(state=OutcomeState.WAITING, code="", reason="", bytes=0, at="")
            )
            self._event(db, "resumed", f"slot {number} goes on with the same request", data={"slot": number})

    def outcome(self, number: int, outcome: Outcome) -> None:
        """Note what became of one site in a slot."""
        with self._db.write() as db:
            where = (
                (t.outcomes.c.study == self._study)
                & (t.outcomes.c.slot == number)
                & (t.outcomes.c.site == outcome.site)
            )
            db.execute(
                t.outcomes.update()
                .where(where)
                .values(
                    state=outcome.state,
                    code=outcome.code,
                    reason=outcome.reason,
                    bytes=outcome.bytes,
                    seconds=outcome.seconds,
                    at=self._stamp(),
                )
            )
            text = f"{outcome.site}: {outcome.state.value}{f', {outcome.reason}' if outcome.reason else ''}"
            self._event(
                db,
                "outcome",
                text,
                site=outcome.site,
                data={
                    "slot": number,
                    "state": outcome.state,
                    "code": outcome.code,
                    "bytes": outcome.bytes,
                    "seconds": round(outcome.seconds, 3),
                },
            )

    def outcomes(self, number: int) -> list[Outcome]:
        """What became of each site of a slot's cohort, by name."""
        where = (t.outcomes.c.study == self._study) & (t.outcomes.c.slot == number)
        with self._db.read() as db:
            rows = db.execute(sa.select(t.outcomes).where(where).order_by(t.outcomes.c.site)).all()
        return [Outcome(r.site, OutcomeState(r.state), r.code, r.reason, r.bytes, r.seconds, r.at) for r in rows]

    def close_slot(self, number: int, state: SlotState, reason: str = "") -> None:
        """End a slot that led to nothing (`failed`), so that the same round may be tried in the next."""
        with self._db.write() as db:
            self._close(db, number, state, reason)
            self._event(db, "slot-failed", f"slot {number} led to nothing: {reason}", data={"slot": number})

    def _close(self, db: sa.Connection, number: int, state: SlotState, reason: str) -> None:
        where = (t.slots.c.study == self._study) & (t.slots.c.slot == number) & (t.slots.c.state == SlotState.OPEN)
        done = db.execute(t.slots.update().where(where).values(state=state, reason=reason, closed=self._stamp()))
        if done.rowcount != 1:
            raise ConsiliumError(
                "Another process runs this study", f"slot {number}", "Stop one of the two coordinators."
            )

    @staticmethod
    def abandon(db: sa.Connection, study: str, stamp: str) -> None:
        """Give up the open slot of a study, inside a transaction that begins a new session."""
        where = (t.slots.c.study == study) & (t.slots.c.state == SlotState.OPEN)
        db.execute(t.slots.update().where(where).values(state=SlotState.ABANDONED, reason="new session", closed=stamp))

    # ---- checkpoints and evaluations -------------------------------------------------------------------------

    def commit_round(
        self,
        slot: SlotRecord,
        weights: str,
        memory: tuple[str, ...],
        evaluation: Evaluation | None,
        metrics: Mapping[str, float],
    ) -> None:
        """A training round is done: new checkpoint, the received model's evaluation, the slot closed, all at once.

        Args:
            slot: the round's slot.
            weights, memory: blobs that are on the disk already.
            evaluation: of the model that was sent out, that of round - 1.
            metrics: figures of the round itself, for whoever watches.
        """
        with self._db.write() as db:
            db.execute(
                t.checkpoints.insert().values(
                    study=self._study,
                    round=slot.round,
                    slot=slot.slot,
                    weights=weights,
                    memory=json.dumps(memory),
                    at=self._stamp(),
                )
            )
            if evaluation is not None:
                self._evaluated(db, evaluation)
            self._close(db, slot.slot, SlotState.DONE, "")
            self._event(
                db,
                "round",
                f"round {slot.round} done",
                data={"round": slot.round, "slot": slot.slot, "metrics": dict(metrics)},
            )

    def void_round(self, round_: int, slot: int, reason: str) -> None:
        """A round that is over without a step: its checkpoint is the one before, and the next round goes on from it.

        Args:
            slot: the last slot that tried it; it is closed if it is open.
        """
        before = next(row for row in self.checkpoints() if row.round == round_ - 1)
        with self._db.write() as db:
            self._close_open(db, SlotState.FAILED, reason)
            db.execute(
                t.checkpoints.insert().values(
                    study=self._study, round=round_, slot=slot, weights=before.weights,
                    memory=json.dumps(before.memory), at=self._stamp(),
                )
            )  # fmt: skip
            self._event(db, "round-void", f"round {round_} changes nothing: {reason}", data={"round": round_})

    def roll_back(self, round_: int) -> None:
        """Let the model of an earlier round be the newest: the rounds after it are over, and change nothing.

        Round numbers go on from where they are, because sites that helped to open a round refuse another attempt at it
        (RULES S4). The optimiser's memory goes back too where it is still kept.

        Raises:
            ConsiliumError: there is no such round before the last, or its weights are no longer kept.
        """
        rows = self.checkpoints()
        last = rows[-1].round
        found = next((row for row in rows if row.round == round_ and row.weights and round_ < last), None)
        if found is None:
            kept = ", ".join(str(row.round) for row in rows[:-1] if row.weights)
            raise ConsiliumError(
                "There is no such round to go back to", f"round {round_}", f"These are kept: {kept or 'none'}."
            )
        with self._db.write() as db:
            self._close_open(db, SlotState.FAILED, f"rolled back to round {round_}")
            where = (t.checkpoints.c.study == self._study) & (t.checkpoints.c.round == last)
            values = {"weights": found.weights, "memory": json.dumps(found.memory)}
            db.execute(t.checkpoints.update().where(where).values(**values))
            evaluated = (t.evaluations.c.study == self._study) & (t.evaluations.c.round == last)
            db.execute(t.evaluations.delete().where(evaluated))
            text = f"back to the model of round {round_}; round {last + 1} goes on from it"
            self._event(db, "rolled-back", text, data={"round": round_, "last": last})

    def _close_open(self, db: sa.Connection, state: SlotState, reason: str) -> None:
        where = (t.slots.c.study == self._study) & (t.slots.c.state == SlotState.OPEN)
        db.execute(t.slots.update().where(where).values(state=state, reason=reason, closed=self._stamp()))

    def commit_evaluation(self, slot: SlotRecord, evaluation: Evaluation) -> None:
        """A validation or test slot is done."""
        with self._db.write() as db:
            self._evaluated(db, evaluation)
            self._close(db, slot.slot, SlotState.DONE, "")
            self._event(
                db,
                "evaluation",
                f"{evaluation.split} of the model of round {evaluation.round} done",
                data={"round": evaluation.round, "split": evaluation.split, "metrics": dict(evaluation.metrics)},
            )

    def _evaluated(self, db: sa.Connection, evaluation: Evaluation) -> None:
        db.execute(
            t.evaluations.insert().values(
                study=self._study,
                round=evaluation.round,
                split=evaluation.split,
                slot=evaluation.slot,
                sites=json.dumps(evaluation.sites),
                statistics=np.asarray(evaluation.statistics, dtype="<f8").tobytes(),
                metrics=json.dumps(dict(evaluation.metrics)),
                at=self._stamp(),
            )
        )

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, from round 0 (the initial weights) on."""
        query = sa.select(t.checkpoints).where(t.checkpoints.c.study == self._study).order_by(t.checkpoints.c.round)
        with self._db.read() as db:
            rows = db.execute(query).all()
        return [Checkpoint(r.round, r.slot, r.weights, tuple(json.loads(r.memory)), r.at) for r in rows]

    def evaluations(self, split: str) -> dict[int, Evaluation]:
        """Evaluations on "validation" or "test", by the round of the model."""
        where = (t.evaluations.c.study == self._study) & (t.evaluations.c.split == split)
        with self._db.read() as db:
            rows = db.execute(sa.select(t.evaluations).where(where).order_by(t.evaluations.c.round)).all()
        return {
            r.round: Evaluation(
                r.round,
                r.split,
                r.slot,
                tuple(json.loads(r.sites)),
                np.frombuffer(bytes(r.statistics), dtype="<f8"),
                json.loads(r.metrics),
                r.at,
            )
            for r in rows
        }

    def prune(self, keep: Iterable[int], recent: int = 1) -> None:
        """Forget the weights of rounds that can no longer be published, and the optimiser's memory.

        Args:
            keep: rounds whose weights stay.
            recent: of so many last rounds everything stays, so that one may go back to them.
        """
        rows = self.checkpoints()
        last = max(row.round for row in rows)
        newest = set(range(last - recent + 1, last + 1))
        kept = {*keep, 0, *newest}
        gone: set[str] = set()
        with self._db.write() as db:
            for row in rows:
                values: dict[str, str] = {}
                if row.memory and row.round not in newest:
                    values["memory"] = "[]"
                    gone |= set(row.memory)
                if row.weights and row.round not in kept:
                    values["weights"] = ""
                    gone.add(row.weights)
                if values:
                    where = (t.checkpoints.c.study == self._study) & (t.checkpoints.c.round == row.round)
                    db.execute(t.checkpoints.update().where(where).values(**values))
            gone -= _named(db)
        for name in gone:
            self._blobs.delete(name)

    # ---- deliveries ------------------------------------------------------------------------------------------

    def delivery(self, site: str, state: str, reason: str = "") -> None:
        """Note whether a site has the finished model."""
        with self._db.write() as db:
            where = (t.deliveries.c.study == self._study) & (t.deliveries.c.site == site)
            values = {"state": state, "reason": reason, "at": self._stamp()}
            if not db.execute(t.deliveries.update().where(where).values(**values)).rowcount:
                db.execute(t.deliveries.insert().values(study=self._study, site=site, **values))
            self._event(db, "delivery", f"{site}: {state}{f', {reason}' if reason else ''}", site=site)

    def deliveries(self) -> list[Delivery]:
        """Who has the finished model, by name; empty before it is published."""
        query = sa.select(t.deliveries).where(t.deliveries.c.study == self._study).order_by(t.deliveries.c.site)
        with self._db.read() as db:
            rows = db.execute(query).all()
        return [Delivery(r.site, r.state, r.reason, r.at) for r in rows]

    def _event(
        self, db: sa.Connection, kind: str, text: str, site: str = "", data: Mapping[str, object] | None = None
    ) -> None:
        t.add_event(db, self._stamp(), self._study, kind, text, site, data)


def _slot(row: Any) -> SlotRecord:
    return SlotRecord(
        slot=row.slot,
        session=row.session,
        round=row.round,
        kind=row.kind,
        attempt=row.attempt,
        request=bytes(row.request),
        hash=row.hash,
        payload=row.payload,
        cohort=tuple(json.loads(row.cohort)),
        state=SlotState(row.state),
        reason=row.reason,
        opened=row.opened,
        closed=row.closed,
    )


def _named(db: sa.Connection) -> set[str]:
    """Every blob that some row names."""
    names: set[str] = set()
    for row in db.execute(sa.select(t.checkpoints.c.weights, t.checkpoints.c.memory)):
        names |= {row.weights, *json.loads(row.memory)}
    for row in db.execute(sa.select(t.studies.c.initial, t.studies.c.weights)):
        names |= {row.initial, row.weights}
    for slot in db.execute(sa.select(t.slots.c.payload).where(t.slots.c.state == SlotState.OPEN)):
        names.add(slot.payload)
    names |= set(db.scalars(sa.select(t.models.c.package)))
    return names
