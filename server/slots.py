"""How is a slot asked until enough sites have answered? Who is asked, with which signed request, and when it is over.

A slot's request is in the registry before it is sent, and a slot that is still open is asked again with the same bytes
(RULES S1, S2). A slot that came to nothing is closed, and the same round is tried in the next one, as far as slots and
what sites may answer (RULES S4) allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from privacy.errors import ConsiliumError, RefusalCode
from privacy.identity import Document
from privacy.messages import Kind
from privacy.patient import EVALUATION_TRIES
from privacy.study import Study
from server.aggregate import Aggregate, Total
from server.attempt import BUSY_PAUSE, Attempt
from server.books import Books
from server.desk import Call, Desk, Said, words
from server.masked import Masked
from server.members import Members
from server.records import OutcomeState, SlotRecord, SlotState, State, StudyRecord
from server.registry import Registry
from server.secure import Secure

FOREVER = math.inf
AFTER_TRAINING = 2
"""So many slots are kept for the last validation and the test."""


class Halt(Exception):
    """The loop ends here, with the study in `state` for `reason`."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class RoundOver(Exception):
    """Sites have helped to open a sum of this round and will not do so again (RULES S4), yet nothing was opened."""


def used_up(study: Study, slots: Sequence[SlotRecord], spare: int = AFTER_TRAINING) -> bool:
    """Whether no slot is left to begin when `spare` must remain for what comes after; one that is open goes on."""
    return not (slots and slots[-1].state is SlotState.OPEN) and len(slots) + 1 > study.slots - spare


class Slots:
    """The slots of one run of one study.

    Attributes:
        secure: its secure sums; None without.
        books: the consortium's log of a study with noise, once that is open; None without.
    """

    def __init__(
        self,
        registry: Registry,
        record: StudyRecord,
        desk: Desk,
        members: Members,
        statistics: int,
        obey: Callable[[], None],
        state: Callable[..., State],
    ) -> None:
        """Prepare; nothing is sent.

        Args:
            statistics: m, numbers of the statistics.
            obey: called about once a second; may raise to end everything.
            state: shows the study's state with a reason.
        """
        self._registry, self._study, self._desk, self._members = registry, record.study, desk, members
        self._course, self._statistics = registry.course(record.hash), statistics
        self._minimum, self._noised = record.study.aggregation.minimum_sites, record.study.privacy.mode != "none"
        self._obey, self._state = obey, state
        self.books: Books | None = None
        self.secure = (
            Secure(registry, record, desk, members, self._renew, statistics, obey, self._hear)
            if record.study.secagg.mode == "on"
            else None
        )

    def total(self, size: int) -> Total:
        """Room for what a slot adds up: `size` numbers of an update (0: statistics only)."""
        by_examples = self._study.aggregation.weights == "examples"
        if self.secure is not None:
            return self.secure.total(size)
        return Aggregate(size, self._statistics, by_examples=by_examples)

    def run(
        self, kind: Kind, round_: int, weights: str, aggregate: Total, spare: int
    ) -> tuple[SlotRecord, tuple[str, ...]] | None:
        """Ask until a slot has enough answers; they are in `aggregate`. None when no slot is left for it.

        Args:
            weights: blob of the model to send.
            spare: how many slots must remain for what comes after.

        Raises:
            RoundOver: no attempt at this round can follow.
        """
        failures = 0
        while True:
            slots = self._course.slots()
            if slots and slots[-1].state is SlotState.OPEN:
                slot = slots[-1]
                if (slot.kind, slot.round, slot.payload, slot.session) != (
                    kind,
                    round_,
                    weights,
                    self._desk.record.session,
                ):
                    raise ConsiliumError(
                        "The registry does not fit together", f"slot {slot.slot}", "Restore the last good backup."
                    )
                self._course.reopen(slot.slot)
            elif used_up(self._study, slots, spare):
                return None
            else:
                before = [s for s in slots if (s.kind, s.round) == (kind, round_)]
                if self._noised and kind != "train" and len(before) >= EVALUATION_TRIES:
                    return None
                if self.secure and any(self.secure.released(s.slot) for s in before):
                    raise RoundOver("its sum was to be opened in a slot that came to nothing")
                cohort = self._gather(len(slots) + 1)
                slot = self._course.open_slot(
                    self._new_slot(len(slots) + 1, kind, round_, 1 + len(before), weights, cohort)
                )
            aggregate.reset()
            taken, problem, codes = self._attempt(slot, aggregate)
            if not problem:
                return slot, taken
            self._course.close_slot(slot.slot, SlotState.FAILED, problem)
            if self.secure and (self.secure.released(slot.slot) or RefusalCode.ROUND_OPENED in codes):
                raise RoundOver(problem)
            if RefusalCode.SESSION_CLOSED in codes:
                self._desk.renew()
                raise Halt(
                    State.PAUSED, "another coordinator has opened a newer session of this study; stop it, then resume"
                )
            failures += 1
            self._desk.canvass(dict, lambda _: 0.0, lambda: False, min(60.0, 2.0 ** (failures - 1)), self._obey)

    def _attempt(self, slot: SlotRecord, aggregate: Total) -> tuple[tuple[str, ...], str, set[str]]:
        """Run one slot; returns who is in, why it does not count ("" when it does), and all refusal codes."""
        call = Call.of(Document.decode(slot.request, "request"), self._registry.blobs.path(slot.payload))
        if isinstance(aggregate, Masked):
            assert self.secure is not None
            taken, problem, codes = self.secure.attempt(slot, call, aggregate)
        else:
            assert isinstance(aggregate, Aggregate)
            taken, problem, codes = self._plain(slot, call, aggregate)
        if not problem and slot.kind == "train" and not aggregate.weight > 0:
            problem = "no site has training images"
        return taken, problem, codes

    def _plain(self, slot: SlotRecord, call: Call, aggregate: Aggregate) -> tuple[tuple[str, ...], str, set[str]]:
        """Add up answers as they are."""

        def take(said: Said) -> None:
            assert said.answer is not None
            self._hear(said)
            aggregate.add(said.answer, said.chunks())

        attempt = Attempt(
            self._members, self._desk, dict.fromkeys(slot.cohort, call), take, self._minimum,
            lambda outcome: self._course.outcome(slot.slot, outcome),
        )  # fmt: skip
        attempt.run(self._study.rounds.deadline_seconds, self._obey)
        problem = ""
        if len(attempt.taken) < self._minimum:
            problem = f"{len(attempt.taken)} of at least {self._minimum} sites answered ({attempt.summary()})"
        return attempt.taken, problem, attempt.codes

    def _new_slot(
        self, number: int, kind: Kind, round_: int, attempt: int, weights: str, cohort: tuple[str, ...]
    ) -> SlotRecord:
        document = self._desk.sign(
            kind,
            cohort=cohort,
            payload=self._registry.blobs.path(weights),
            payload_sha256=weights,
            seconds=self._study.rounds.deadline_seconds,
            slot=number,
            round_=round_,
            parameters=self.secure.parameters() if self.secure else self._counted(kind),
        )
        return SlotRecord(
            slot=number,
            session=self._desk.record.session,
            round=round_,
            kind=kind,
            attempt=attempt,
            request=document.encode(),
            hash=document.digest,
            payload=weights,
            cohort=cohort,
            state=SlotState.OPEN,
            reason="",
            opened="",
            closed="",
        )

    def _counted(self, kind: Kind) -> dict[str, str]:
        """For SCAFFOLD: the last round of each site that is in the model, so that a site goes on from that state."""
        if kind != "train" or self._study.aggregation.strategy != "scaffold":
            return {}
        last: dict[str, int] = {}
        for slot in self._course.slots():
            if slot.kind == "train" and slot.state is SlotState.DONE:
                found = self._course.outcomes(slot.slot)
                last |= {outcome.site: slot.round for outcome in found if outcome.state is OutcomeState.IN}
        return {"counted": ",".join(f"{site}:{number}" for site, number in sorted(last.items()))}

    def _renew(self) -> None:
        """Begin a new session between two slots, because the sites need new keys."""
        self._desk.renew()
        self._members.begin()

    def _gather(self, slot: int) -> tuple[str, ...]:
        """The sites to ask in the next slot; waits, without using it up, until there are enough of them."""
        failures = 0
        while True:
            self._wait_for_sites()
            problem = self.books.begin(self._members, self._minimum, self._obey) if self.books is not None else ""
            if not problem and self.secure is None:
                return tuple(sorted(self._members.askable()))
            if not problem and self.secure is not None:
                if cohort := self.secure.cohort(slot):
                    self._state(State.RUNNING)
                    return cohort
                problem = self.secure.problem
            self._state(State.RUNNING, problem)
            failures += 1
            self._desk.canvass(dict, lambda _: 0.0, lambda: False, min(60.0, 2.0 ** (failures - 1)), self._obey)

    def _wait_for_sites(self) -> None:
        """Wait until enough sites are approved and connected.

        Raises:
            Halt: so many have stopped by their own ledgers that waiting would lead to nothing.
        """

        def there() -> set[str]:
            return self._members.ready() & self._members.askable()

        def enough() -> bool:
            return len(there()) >= self._minimum

        def hear(said: Said) -> float:
            self._members.hear(said)
            return BUSY_PAUSE

        self._desk.look_around()
        if enough():
            return
        possible = set(self._study.sites if self._members.reserved is None else self._members.reserved)
        if (stopped := self._members.stopped) and len(possible - set(stopped)) < self._minimum:
            why = "; ".join(f"{site}: {words(code).lower()}" for site, code in sorted(stopped.items()))
            raise Halt(State.PAUSED, f"{why}. Without it fewer than {self._minimum} sites are left")
        away = sorted(possible - there())
        reason = f"waiting for sites to connect: {', '.join(away)} (at least {self._minimum} are needed)"
        self._state(State.RUNNING, reason)
        self._registry.note(self._desk.record.hash, "waiting", reason)
        self._desk.canvass(self._members.guests, hear, enough, FOREVER, self._obey)
        self._state(State.RUNNING)

    def _hear(self, said: Said) -> None:
        """Whatever releases an answer brings are written down before its vector is used."""
        if self.books is not None:
            self.books.hear(said)
