"""How does a slot's masked sum come to be opened? Masks, then survivors where somebody dropped, then the opening.

Two exchanges when nobody drops: masked vectors in, their signed answers out to all, shares back. Three when somebody
does: those who came in first sign who they are. The request of each stage is in the registry before anyone is asked,
and it fixes who is summed: a process that takes the slot up again asks the same sites the same, and they answer from
what they stored. Below the threshold nothing is opened, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from privacy.canonical import sha256
from privacy.errors import Refusal
from privacy.identity import Document
from privacy.messages import Header, Kind
from privacy.secagg.checks import check_opening, check_survivor
from privacy.secagg.messages import Opening, Survivors
from privacy.stages import Enclosure
from server.attempt import Attempt
from server.course import Course
from server.desk import Call, Desk, Said
from server.masked import Masked
from server.members import Members
from server.records import Outcome, SlotRecord
from server.ring_records import RingRecords, StageRecord

CLOSED = "nothing is opened"


class MaskedSlot:
    """One slot of a study with secure aggregation. `taken`: who is summed; `codes`: refusal codes by site."""

    def __init__(
        self,
        course: Course,
        records: RingRecords,
        members: Members,
        desk: Desk,
        slot: SlotRecord,
        total: Masked,
        seconds: int,
        obey: Callable[[], None],
        heard: Callable[[Said], None],
    ) -> None:
        """Prepare a slot, new or open since an earlier process.

        Args:
            total: begun for this slot; takes the masked vectors, and opens their sum.
            seconds: the most that one exchange may take.
            heard: told of every masked vector before it is added; may raise `Refusal` to turn it away.
        """
        self._course, self._records, self._members, self._desk = course, records, members, desk
        self._slot, self._total, self._seconds, self._obey = slot, total, seconds, obey
        self._heard = heard
        self._minimum, self._threshold = total.plan.minimum, total.plan.threshold
        self.codes: dict[str, str] = {}
        self.taken: tuple[str, ...] = ()

    def run(self, call: Call) -> str:
        """Run the stages; the sum is in `total` then. Returns why there is none, or "".

        Args:
            call: the slot's request.
        """
        begun = self._records.stages(self._slot.slot)
        fixed = next((_cohort(begun[stage]) for stage in ("unmask", "survivors") if stage in begun), None)
        if problem := self._mask(call, fixed):
            return problem
        self._total.sum.close()
        if "unmask" not in begun:
            if self._total.sum.complete:
                self._stage("unmask", self._total.sum.submissions)
            elif problem := self._agree(begun.get("survivors")):
                return problem
        return self._open()

    # ---- the exchanges ---------------------------------------------------------------------------------------

    def _mask(self, call: Call, fixed: tuple[str, ...] | None) -> str:
        """Collect masked vectors; `fixed` are the sites that an earlier process has settled on."""

        def take(said: Said) -> None:
            assert said.answer is not None
            self._heard(said)
            self._total.add(said.answer, Document.decode(said.document, "answer"), said.chunks())

        minimum = len(fixed) if fixed else self._minimum
        attempt = self._exchange(dict.fromkeys(fixed or self._slot.cohort, call), take, minimum, note=True)
        self.taken = attempt.taken
        if len(self.taken) >= minimum:
            return ""
        needed = f"all {minimum} that the sum was fixed on" if fixed else f"at least {minimum} sites"
        return f"{len(self.taken)} of {needed} answered ({attempt.summary()}); {CLOSED}"

    def _agree(self, begun: StageRecord | None) -> str:
        """Let those who are in sign that they are the ones; when enough have, the opening can begin."""
        stage = begun or self._stage("survivors")
        signed: dict[str, Document] = {}

        def take(said: Said) -> None:
            document = said.statement("survivors", Survivors.KIND)
            total = self._total.sum
            check_survivor(total.ring.place, total.slot, total.header, self.taken, said.site, document)
            signed[said.site] = document

        attempt = self._exchange(dict.fromkeys(self.taken, _call(stage)), take, self._threshold)
        if len(signed) < self._threshold:
            return (
                f"{len(signed)} of at least {self._threshold} sites agreed on who is summed ({attempt.summary()}); "
                f"{CLOSED}"
            )
        self._stage("unmask", signed)
        return ""

    def _open(self) -> str:
        """Collect shares until they open the sum."""
        stage = self._records.stages(self._slot.slot)["unmask"]
        agreed: Mapping[str, Document] = {}
        if not self._total.sum.complete:
            limit = len(stage.payload)
            agreed = Enclosure.decode(stage.payload, limit, {"proof": Survivors.KIND}).documents["proof"]
        openings: dict[str, Document] = {}
        opened, why = False, ""

        def take(said: Said) -> None:
            nonlocal opened, why
            document, total = said.statement("opening", Opening.KIND), self._total.sum
            check_opening(total.ring.place, total.slot, total.header, total.cohort, self.taken, said.site, document)
            openings[said.site] = document
            try:
                bad = self._total.open(openings, agreed)
                self.codes |= {site: refusal.code for site, refusal in bad.items()}
                opened = True
            except Refusal as refusal:
                why = f": {refusal.what.lower()} {refusal.subject}".rstrip()

        needed = self._threshold
        attempt = self._exchange(dict.fromkeys(self.taken, _call(stage)), take, needed, enough=lambda: opened)
        if opened:
            return ""
        return (
            f"{len(openings)} of at least {needed} sites helped to open the sum ({attempt.summary() or why}); {CLOSED}"
        )

    # ---- helpers ---------------------------------------------------------------------------------------------

    def _exchange(
        self,
        calls: Mapping[str, Call],
        take: Callable[[Said], None],
        minimum: int,
        *,
        note: bool = False,
        enough: Callable[[], bool] = lambda: False,
    ) -> Attempt:
        def heard(outcome: Outcome) -> None:
            if outcome.code:
                self.codes[outcome.site] = outcome.code
            if note:
                self._course.outcome(self._slot.slot, outcome)

        attempt = Attempt(self._members, self._desk, calls, take, minimum, heard, enough)
        attempt.run(self._seconds, self._obey)
        return attempt

    def _stage(self, kind: Kind, proof: Mapping[str, Document] | None = None) -> StageRecord:
        """Begin a stage for those who are in: its request is bound before it is sent."""
        payload = Enclosure({"proof": proof}).encode() if proof else b""
        request = self._desk.sign(
            kind,
            cohort=self.taken,
            payload=payload,
            payload_sha256=sha256(payload),
            seconds=self._seconds,
            slot=self._slot.slot,
            round_=self._slot.round,
        )
        return self._records.begin_stage(self._slot.slot, kind, request, payload)


def _cohort(stage: StageRecord) -> tuple[str, ...]:
    return Header.read(stage.request.body).cohort


def _call(stage: StageRecord) -> Call:
    return Call.of(stage.request, stage.payload)
