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
from privacy.errors import Refusal
from privacy.identity import Identity
from privacy.messages import Kind
from server import optimizers
from server.aggregate import Total, advance, payload
from server.books import Books
from server.delivery import deliver
from server.desk import Clock, Desk, Link, Said
from server.masked import Masked
from server.members import Members
from server.records import Evaluation, SlotRecord, SlotState, State, StudyRecord
from server.registry import Registry
from server.secure import KEPT_BACK, suspicion
from server.slots import AFTER_TRAINING, FOREVER, Halt, RoundOver, Slots

APPROVAL_PATIENCE = 60.0
Publisher = Callable[[StudyRecord, int, Path, list[Evaluation], Evaluation | None], Path]


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
        self._registry, self._study = registry, record.study
        self._course = registry.course(record.hash)
        self._clock, self._publish, self._interrupted = clock, publish, interrupted
        self._task = tasks.get(self._study.spec())
        self._noised = self._study.privacy.mode != "none"
        self._minimum = self._study.aggregation.minimum_sites
        self._identity = identity
        self._desk = Desk(registry, record, identity, link, clock)
        self._members = Members(registry, self._desk)
        statistics = additive.size(self._task)
        self._slots = Slots(registry, record, self._desk, self._members, statistics, self._obey, self._state)
        self._shown: tuple[State, str] | None = None

    @property
    def _record(self) -> StudyRecord:
        return self._desk.record

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
                    self._slots.books = Books(
                        ledger, self._identity, self._desk,
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
        if self._slots.books is not None:
            self._slots.books.close(self._members.ready(), len(self._course.slots()), self._obey)
        self._deliver()

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

    # ---- rounds ----------------------------------------------------------------------------------------------

    def _train(self) -> None:
        last = self._course.checkpoints()[-1]
        if last.round >= self._study.rounds.count:
            return
        blobs, rule, sites = self._registry.blobs, self._study.aggregation, len(self._study.sites)
        aggregate = self._slots.total(blobs.size(last.weights) // 4 * (1 + optimizers.of(rule).sent))
        while last.round < self._study.rounds.count:
            began = self._clock.now()
            optimizer = optimizers.of(rule, sites, last.round if last.memory else 0)
            sent = payload(blobs, optimizer, last.weights, last.memory)
            try:
                found = self._slots.run("train", last.round + 1, sent, aggregate, AFTER_TRAINING)
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
            if self._slots.books is not None:
                self._slots.books.witness(self._members.ready(), slot.slot, self._obey)
            if sent != last.weights:
                blobs.delete(sent)
            last = self._course.checkpoints()[-1]
            best = {self._best()} if self._study.publish.choose == "best-validation" else set()
            self._course.prune(best, KEPT_BACK if self._slots.secure else 1)
            looked_at = {} if self._noised or not self._slots.secure else self._course.evaluations("validation")
            if problem := suspicion(looked_at, slot.round - 1):
                raise Halt(State.PAUSED, f"{problem}. Go back: {self._back(slot.round - 2)}")

    def _back(self, round_: int) -> str:
        return f"consilium-coordinator study resume {self._record.name} --back-to {round_}"

    def _validate(self) -> None:
        last = self._course.checkpoints()[-1]
        if last.round not in self._course.evaluations("validation"):
            self._evaluate("validate", last.round, spare=1)

    def _evaluate(self, kind: Kind, round_: int, spare: int) -> None:
        weights, aggregate = self._outcome(round_), self._slots.total(0)
        try:
            found, why = self._slots.run(kind, round_, weights, aggregate, spare), "no slot is left"
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
        weights = self._registry.blobs.path(self._outcome(chosen))
        package = self._publish(self._record, chosen, weights, history, test)
        name = self._registry.blobs.put(package)
        self._registry.add_model(self._record.hash, chosen, name, test.metrics if test is not None else {})

    def _outcome(self, round_: int) -> str:
        """The blob of what is judged and published of a round: its model, or the average of the models until then."""
        found = next(row for row in self._course.checkpoints() if row.round == round_)
        return optimizers.outcome(self._study.aggregation, found.weights, found.memory)

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
