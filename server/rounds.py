"""How does a study run from its first offer to its last delivery? The loop, over small ports.

Everything that must survive a kill is in the registry before it has an effect: a slot's request before it is sent, a
checkpoint before the next round. So the loop has no state of its own worth saving: a new process reads where the study
stands and goes on with the open slot, with the same bytes, and the agents answer from what they stored (RULES S1, S2).

    offers → approvals → rounds of [ask, add up, step, checkpoint] → validate → choose → test → publish → deliver

With secure aggregation the sites share keys before the first slot (`server.ring`), and what is added up is masked until
enough of them help to open the sum (`server.masked_slot`); the rest of the loop is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from models import additive, bounds, tasks
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.messages import Kind
from privacy.patient import EVALUATION_TRIES
from server import optimizers
from server.aggregate import Aggregate, Total, advance, payload
from server.attempt import BUSY_PAUSE, Attempt
from server.books import Books
from server.delivery import deliver
from server.desk import Call, Clock, Desk, Link, Said
from server.masked import Masked
from server.members import Members
from server.records import Evaluation, OutcomeState, SlotRecord, SlotState, State, StudyRecord
from server.registry import Registry
from server.secure import KEPT_BACK, Secure, suspicion

APPROVAL_PATIENCE = 60.0
FOREVER = math.inf
Publisher = Callable[[StudyRecord, int, Path, list[Evaluation], Evaluation | None], Path]


class Halt(Exception):
    """The loop ends here, with the study in `state` for `reason`."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class RoundOver(Exception):
    """Sites have helped to open a sum of this round and will not do so again (RULES S4), yet nothing was opened."""


class Loop:
    """One run of one study."""

    def __init__(
        self,
        registry: Registry,
        record: StudyRecord,
        identity: Identity,
        link: Link,
        publish: Publisher,
        clock: Clock,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare a run.

        Args:
            record: the study, in state `requested`.
            link: carries messages; nothing it says is believed without a site's signature.
            publish: writes the outputs and returns the package for the sites; may be called again after a crash.
            interrupted: whether this process was asked to end.
        """
        self._registry, self._record, self._study = registry, record, record.study
        self._course = registry.course(record.hash)
        self._clock, self._publish, self._interrupted = clock, publish, interrupted
        self._task = tasks.get(self._study.spec())
        self._statistics = additive.size(self._task)
        self._minimum = self._study.aggregation.minimum_sites
        self._noised = self._study.privacy.mode != "none"
        self._identity = identity
        self._books: Books | None = None
        self._desk = Desk(registry, record, identity, link, clock)
        self._members = Members(registry, record, self._desk)
        self._secure = (
            Secure(registry, record, self._desk, self._members, self._renew, self._statistics, self._obey, self._hear)
            if self._study.secagg.mode == "on"
            else None
        )
        self._shown: tuple[State, str] | None = None

    def run(self) -> State:
        """Run until the study is finished, or is halted for a reason; returns its state.

        Raises:
            LinkLost: the SuperLink is gone; the caller notes it.
            ConsiliumError: the registry or the disk failed.
        """
        try:
            with ExitStack() as stack:
                if self._noised:
                    ledger = stack.enter_context(self._registry.ledger())
                    self._books = Books(
                        ledger, self._record, self._identity, self._desk,
                        lambda text: self._registry.note(self._record.hash, "waiting", text),
                    )  # fmt: skip
                self._run()
        except Halt as halt:
            return self._state(halt.state, halt.reason)
        away = [line.site for line in self._course.deliveries() if line.state != "delivered"]
        reason = f"not delivered yet to {', '.join(away)}; resume delivers again" if away else ""
        return self._state(State.FINISHED, reason)

    def _run(self) -> None:
        if self._published() is None:
            self._agree()
            self._train()
            self._validate()
            self._test_and_publish()
        if self._books is not None:
            self._books.commit()
            self._books.witness(self._members.ready(), 0, self._obey, now=True)
        self._deliver()

    def _hear(self, said: Said) -> None:
        """Whatever releases an answer brings are written down before its vector is used."""
        if self._books is not None:
            self._books.hear(said)

    # ---- before the first round ------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Offer the study until all have decided, or enough have and the others had time to."""
        began = self._clock.now()
        enough_since: list[float] = []

        def hear(said: Said) -> float:
            self._members.hear(said)
            self._state(State.WAITING, self._who_is_missing())
            return min(30.0, 1.0 + (self._clock.now() - began) / 10)

        def done() -> bool:
            if all(state in {"approved", "declined", "withdrawn"} for state in self._members.decisions.values()):
                return True
            if len(self._members.approved()) >= self._minimum and not enough_since:
                enough_since.append(self._clock.now())
            return bool(enough_since) and self._clock.now() - enough_since[0] >= APPROVAL_PATIENCE

        if not done():
            self._state(State.WAITING, self._who_is_missing())
            self._desk.canvass(self._members.guests, hear, done, FOREVER, self._obey)
        if len(self._members.approved()) < self._minimum:
            raise Halt(State.PAUSED, f"too few sites approve the study: {self._who_is_missing()}")
        self._state(State.RUNNING)

    def _who_is_missing(self) -> str:
        names = {"": "not reached yet", "pending": "has not decided"}
        parts = [
            f"{site} {names.get(state, state)}"
            for site, state in sorted(self._members.decisions.items())
            if state != "approved"
        ]
        return ", ".join(parts) or "some sites are no longer enrolled"

    # ---- slots -----------------------------------------------------------------------------------------------

    def _slot(
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
                if (slot.kind, slot.round, slot.payload, slot.session) != (kind, round_, weights, self._record.session):
                    raise ConsiliumError(
                        "The registry does not fit together", f"slot {slot.slot}", "Restore the last good backup."
                    )
                self._course.reopen(slot.slot)
            elif len(slots) + 1 > self._study.slots - spare:
                return None
            else:
                before = [s for s in slots if (s.kind, s.round) == (kind, round_)]
                if self._noised and kind != "train" and len(before) >= EVALUATION_TRIES:
                    return None
                if self._secure and any(self._secure.released(s.slot) for s in before):
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
            if self._secure and (self._secure.released(slot.slot) or RefusalCode.ROUND_OPENED in codes):
                raise RoundOver(problem)
            if RefusalCode.SESSION_CLOSED in codes:
                self._registry.renew_session(self._record.hash)
                raise Halt(
                    State.PAUSED, "another coordinator has opened a newer session of this study; stop it, then resume"
                )
            failures += 1
            self._desk.canvass(dict, lambda _: 0.0, lambda: False, min(60.0, 2.0 ** (failures - 1)), self._obey)

    def _attempt(self, slot: SlotRecord, aggregate: Total) -> tuple[tuple[str, ...], str, set[str]]:
        """Run one slot; returns who is in, why it does not count ("" when it does), and all refusal codes."""
        call = Call.of(Document.decode(slot.request, "request"), self._registry.blobs.path(slot.payload))
        if isinstance(aggregate, Masked):
            assert self._secure is not None
            taken, problem, codes = self._secure.attempt(slot, call, aggregate)
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
            session=self._record.session,
            cohort=cohort,
            payload=self._registry.blobs.path(weights),
            payload_sha256=weights,
            seconds=self._study.rounds.deadline_seconds,
            slot=number,
            round_=round_,
            parameters=self._secure.parameters() if self._secure else self._counted(kind),
        )
        return SlotRecord(
            slot=number,
            session=self._record.session,
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

    def _renew(self) -> StudyRecord:
        """Begin a new session between two slots, because the sites need new keys."""
        self._registry.renew_session(self._record.hash)
        self._record = self._registry.study(self._record.hash)
        self._members.begin(self._record)
        return self._record

    def _gather(self, slot: int) -> tuple[str, ...]:
        """The sites to ask in the next slot; waits, without using it up, until there are enough of them."""
        failures = 0
        while True:
            self._wait_for_sites()
            if self._books is not None:
                self._books.begin(self._members, self._obey)
            if self._secure is None:
                return tuple(sorted(self._members.approved()))
            if cohort := self._secure.cohort(slot):
                self._state(State.RUNNING)
                return cohort
            self._state(State.RUNNING, self._secure.problem)
            failures += 1
            self._desk.canvass(dict, lambda _: 0.0, lambda: False, min(60.0, 2.0 ** (failures - 1)), self._obey)

    def _wait_for_sites(self) -> None:
        """Wait until enough sites are approved and connected."""

        def enough() -> bool:
            return len(self._members.ready()) >= self._minimum

        def hear(said: Said) -> float:
            self._members.hear(said)
            return BUSY_PAUSE

        self._desk.look_around()
        if enough():
            return
        away = sorted(set(self._study.sites) - self._members.ready())
        reason = f"waiting for sites to connect: {', '.join(away)} (at least {self._minimum} are needed)"
        self._state(State.RUNNING, reason)
        self._registry.note(self._record.hash, "waiting", reason)
        self._desk.canvass(self._members.guests, hear, enough, FOREVER, self._obey)
        self._state(State.RUNNING)

    # ---- rounds ----------------------------------------------------------------------------------------------

    def _train(self) -> None:
        last = self._course.checkpoints()[-1]
        if last.round >= self._study.rounds.count:
            return
        blobs, optimizer = self._registry.blobs, optimizers.of(self._study.aggregation, len(self._study.sites))
        aggregate = self._aggregate(blobs.size(last.weights) // 4 * (1 + optimizer.sent))
        while last.round < self._study.rounds.count:
            began = self._clock.now()
            sent = payload(blobs, optimizer, last.weights, last.memory)
            try:
                found = self._slot("train", last.round + 1, sent, aggregate, spare=2)
            except RoundOver as over:
                self._course.void_round(last.round + 1, len(self._course.slots()), str(over))
                last = self._course.checkpoints()[-1]
                continue
            if found is None:
                raise Halt(
                    State.PAUSED,
                    f"the reserve of {self._study.rounds.reserve} repeated rounds is used up after round {last.round}; "
                    "a longer run is a new study",
                )
            slot, taken = found
            if isinstance(aggregate, Masked) and (problem := aggregate.excess()):
                self._course.void_round(slot.round, slot.slot, problem)
                raise Halt(State.PAUSED, f"round {slot.round} was left out: {problem}")
            try:
                weights, memory = advance(blobs, optimizer, aggregate, last.weights, last.memory)
            except Refusal as refusal:
                self._course.close_slot(slot.slot, SlotState.FAILED, refusal.what)
                raise Halt(State.FAILED, f"training diverged in round {slot.round}: {refusal.remedy}") from refusal
            evaluation = None if self._noised else self._evaluation(slot, last.round, "validation", taken, aggregate)
            figures = self._training_figures(aggregate) | {"sites": float(len(taken))}
            figures["seconds"] = round(self._clock.now() - began, 3)
            self._course.commit_round(slot, weights, memory, evaluation, figures)
            if self._books is not None:
                self._books.witness(self._members.ready(), slot.slot, self._obey)
            if sent != last.weights:
                blobs.delete(sent)
            last = self._course.checkpoints()[-1]
            best = {self._best()} if self._study.publish.choose == "best-validation" else set()
            self._course.prune(best, KEPT_BACK if self._secure else 1)
            looked_at = {} if self._noised or not self._secure else self._course.evaluations("validation")
            if problem := suspicion(looked_at, slot.round - 1):
                raise Halt(State.PAUSED, f"{problem}. Go back: {self._back(slot.round - 2)}")

    def _aggregate(self, size: int) -> Total:
        by_examples = self._study.aggregation.weights == "examples"
        if self._secure is not None:
            return self._secure.total(size)
        return Aggregate(size, self._statistics, by_examples=by_examples)

    def _back(self, round_: int) -> str:
        return f"consilium-coordinator study resume {self._record.name} --back-to {round_}"

    def _validate(self) -> None:
        last = self._course.checkpoints()[-1]
        if last.round not in self._course.evaluations("validation"):
            self._evaluate("validate", last.round, spare=1)

    def _evaluate(self, kind: Kind, round_: int, spare: int) -> None:
        weights = next(c.weights for c in self._course.checkpoints() if c.round == round_)
        aggregate = self._aggregate(0)
        try:
            found, why = self._slot(kind, round_, weights, aggregate, spare), "no slot is left"
        except RoundOver as over:
            found, why = None, str(over)
        if found is None:
            text = f"the model of round {round_} stays without {kind}: {why}"
            self._registry.note(self._record.hash, "waiting", text)
            return
        slot, taken = found
        split = "test" if kind == "test" else "validation"
        self._course.commit_evaluation(slot, self._evaluation(slot, round_, split, taken, aggregate))

    def _evaluation(
        self, slot: SlotRecord, round_: int, split: str, taken: tuple[str, ...], aggregate: Total
    ) -> Evaluation:
        statistics = aggregate.statistics.copy()
        if self._noised:
            additive.fill(statistics, bounds.settle(self._task, additive.task_sums(statistics)))
        try:
            metrics = self._task.metrics(additive.task_sums(statistics))
        except ValueError:
            metrics = {}
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return Evaluation(round_, split, slot.slot, taken, statistics, metrics, "")

    def _training_figures(self, aggregate: Total) -> dict[str, float]:
        sums = additive.leading(aggregate.statistics)
        figures = {} if self._noised else {"train_examples": sums["train_examples"]}
        with np.errstate(all="ignore"):
            if sums["train_steps"] > 0:
                figures["train_loss"] = sums["train_loss_sum"] / sums["train_steps"]
        return figures

    # ---- after the last round --------------------------------------------------------------------------------

    def _best(self) -> int:
        """The round with the best validation figure so far; the last one when none is known. Never round 0."""
        last = self._course.checkpoints()[-1].round
        name = self._task.primary
        known = {
            r: evaluation.metrics[name]
            for r, evaluation in self._course.evaluations("validation").items()
            if r > 0 and name in evaluation.metrics
        }
        return max(known, key=lambda r: (known[r], -r)) if known else last

    def _test_and_publish(self) -> None:
        chosen = self._best() if self._study.publish.choose == "best-validation" else self._study.rounds.count
        if chosen not in self._course.evaluations("test"):
            self._evaluate("test", chosen, spare=0)
        test = self._course.evaluations("test").get(chosen)
        history = list(self._course.evaluations("validation").values())
        weights = next(c.weights for c in self._course.checkpoints() if c.round == chosen)
        package = self._publish(self._record, chosen, self._registry.blobs.path(weights), history, test)
        name = self._registry.blobs.put(package)
        self._registry.add_model(self._record.hash, chosen, name, test.metrics if test is not None else {})

    def _published(self) -> tuple[int, str] | None:
        found = [(m.round, m.package) for m in self._registry.models() if m.study == self._record.hash]
        return found[0] if found else None

    def _deliver(self) -> None:
        published = self._published()
        assert published is not None
        self._state(State.RUNNING, "delivering the model")
        deliver(self._registry, self._record, self._desk, self._members, *published, self._obey)

    # ---- what a person asks ----------------------------------------------------------------------------------

    def _obey(self) -> None:
        if self._interrupted():
            again = f"resume with consilium-coordinator study resume {self._record.name}"
            raise Halt(State.INTERRUPTED, f"the coordinator was shut down; {again}")
        request = self._registry.requested(self._record.hash)
        if request:
            raise Halt(State.PAUSED if request == "pause" else State.STOPPED, "by the coordinator")

    def _state(self, state: State, reason: str = "") -> State:
        if (state, reason) != self._shown:
            self._registry.transition(self._record.hash, state, reason)
            self._shown = (state, reason)
        return state
