"""How does the loop use secure sums? Keys before a slot, a masked slot in place of a plain one, and a look at the sum.

Nobody here sees a single hospital's numbers, so a wrong update can be found in the sum alone: its norm, which honest
sites cannot exceed, and the loss of the model that it led to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models import tasks
from privacy.secagg.plan import Plan
from privacy.stages import TRANSCRIPT
from server.desk import Call, Desk, Said
from server.masked import Masked
from server.masked_slot import CLOSED, MaskedSlot
from server.members import Members
from server.noised import Noised
from server.records import Evaluation, SlotRecord, StudyRecord
from server.registry import Registry
from server.ring import Rings

KEPT_BACK = 4
"""Of so many last rounds the model and the optimiser's memory are kept, so that one can go back to them."""
WORSE_FACTOR, WORSE_BY = 2.0, 0.5
"""A round is suspicious when the loss is more than twice the one before and half a nat."""


class Secure:
    """The secure sums of one run of one study."""

    def __init__(
        self,
        registry: Registry,
        record: StudyRecord,
        desk: Desk,
        members: Members,
        renew: Callable[[], None],
        statistics: int,
        obey: Callable[[], None],
        heard: Callable[[Said], None],
    ) -> None:
        """Prepare; nothing is sent.

        Args:
            renew: begins a new session.
            statistics: m, numbers of the statistics.
            obey: called about once a second; may raise to end everything.
            heard: told of every masked vector before it is added.
        """
        self._heard = heard
        self._registry, self._study, self._desk, self._members = registry, record.study, desk, members
        self._statistics, self._obey = statistics, obey
        self._course, self._records = registry.course(record.hash), registry.rings(record.hash)
        size = registry.blobs.size(record.weights) // 4
        self._plan = Plan.of(record.study, size, statistics)
        shared = record.study.privacy.mode == "shared"
        self._noised = Noised(record.study, tasks.get(record.study.spec()), size) if shared else None
        self._rings = Rings(registry, desk, members, renew, self._plan, obey)

    def cohort(self, slot: int) -> tuple[str, ...]:
        """The sites to ask in a slot, after setting up keys where that is needed; () when too few have them."""
        return self._rings.cohort(slot)

    @property
    def problem(self) -> str:
        """Why there is no cohort."""
        return self._rings.problem

    def parameters(self) -> Mapping[str, str]:
        """What the request of a masked slot names beside the rest: the keys it is masked with (RULES S5)."""
        return {TRANSCRIPT: self._rings.transcript}

    def total(self, size: int) -> Masked:
        """Room for the masked sum of `size` numbers of an update (0: statistics only)."""
        return Masked(self._plan, size, self._noised)

    def released(self, slot: int) -> bool:
        """Whether some site may have released shares for a slot (RULES S4)."""
        return "unmask" in self._records.stages(slot)

    def attempt(self, slot: SlotRecord, call: Call, total: Masked) -> tuple[tuple[str, ...], str, set[str]]:
        """Run one slot; returns who is in, why it does not count ("" when it does), and all refusal codes."""
        found = self._rings.found
        if found is None or found.session != slot.session:
            return (), f"the keys of its session are not known any more; {CLOSED}", set()
        total.begin(slot, found.ring)
        masked = MaskedSlot(
            self._course, self._records, self._members, self._desk, slot, total,
            self._study.rounds.deadline_seconds, self._obey, self._heard,
        )  # fmt: skip
        problem = masked.run(call)
        self._rings.lost_keys(masked.codes)
        return masked.taken, problem, set(masked.codes.values())


def suspicion(evaluations: Mapping[int, Evaluation], round_: int) -> str:
    """Why the model of a round looks as if its update was not honest; "" when nothing speaks for it."""
    before = max((r for r in evaluations if r < round_), default=None)
    if before is None or round_ not in evaluations:
        return ""
    old, new = (evaluations[r].metrics.get("loss") for r in (before, round_))
    if old is None or new is None or new <= WORSE_FACTOR * old + WORSE_BY:
        return ""
    return (
        f"the model of round {round_} is much worse than that of round {before} (validation loss {new:.3g} after "
        f"{old:.3g}), as after a wrong or hostile update"
    )
