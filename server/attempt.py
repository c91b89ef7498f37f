"""What becomes of one exchange? Each site is asked its request, and each ends in, late, refused or lost.

Nothing a site does or fails to do ends the exchange for the others. It ends when all are in, when those that are not
cannot be expected and enough are in, when enough can no longer come in, or with the deadline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from privacy.errors import Refusal, RefusalCode
from server.desk import Call, Desk, Said, words
from server.members import Members
from server.records import Outcome, OutcomeState

BUSY_PAUSE = 2.0
LOST_PAUSE = 1.0
GUEST_PAUSE = 15.0
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
MOST_OPENS = 3
PASSING = frozenset({RefusalCode.DISK_FULL, RefusalCode.NO_DATA, RefusalCode.INTERNAL})
"""Refusals after which an agent may still answer the very same request."""


class Attempt:
    """One exchange. `take` judges and uses an answer that is properly signed; it raises `Refusal` to turn it away."""

    def __init__(
        self,
        members: Members,
        desk: Desk,
        calls: Mapping[str, Call],
        take: Callable[[Said], None],
        minimum: int,
        note: Callable[[Outcome], None] = lambda _: None,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare an exchange.

        Args:
            calls: what each site is asked.
            minimum: with fewer answers than this there is no use in an end before the deadline.
            note: told what became of each site.
            enough: whether to end although some may still come in.
        """
        self._members, self._desk, self._calls = members, desk, calls
        self._take, self._minimum, self._note, self._enough = take, minimum, note, enough
        self._settled: dict[str, Outcome] = {}
        self._trouble: dict[str, Outcome] = {}
        self._pauses: Counter[str] = Counter()
        self._opens: Counter[str] = Counter()

    def run(self, seconds: float, obey: Callable[[], None]) -> None:
        """Ask until it ends, at most `seconds`, then note who did not come in."""
        self._desk.canvass(self._wanted, self._hear, self._done, seconds, obey)
        hopeless = self._hopeless()
        for site in [] if self._enough() else self._missing():
            if site in self._trouble:
                self._settled[site] = self._trouble[site]
            elif not self._desk.enrolled(site):
                self._settle(site, OutcomeState.LOST, RefusalCode.REVOKED, words(RefusalCode.REVOKED))
            elif self._desk.online(site) and hopeless:
                self._settle(site, OutcomeState.LOST, "", "not waited for, since too few others were left")
            elif self._desk.online(site):
                self._settle(site, OutcomeState.LATE, RefusalCode.LATE, "no answer before the deadline")
            else:
                self._settle(site, OutcomeState.LOST, "", "not connected")

    @property
    def taken(self) -> tuple[str, ...]:
        """The sites that are in, by name."""
        return tuple(sorted(s for s, outcome in self._settled.items() if outcome.state is OutcomeState.IN))

    @property
    def codes(self) -> set[str]:
        """Every refusal code that ended somebody's part."""
        return {outcome.code for outcome in self._settled.values() if outcome.code}

    def summary(self) -> str:
        """Who is not in and why, for people."""
        out = [o for o in self._settled.values() if o.state is not OutcomeState.IN]
        return "; ".join(f"{o.site} {o.state.value}: {o.reason.lower()}" for o in sorted(out, key=lambda o: o.site))

    def _missing(self) -> list[str]:
        return [site for site in self._calls if site not in self._settled]

    def _wanted(self) -> dict[str, Call]:
        guests = {s: call for s, call in self._members.guests().items() if s not in self._calls}
        return guests | {site: self._members.preparation(site) or self._calls[site] for site in self._missing()}

    def _hopeless(self) -> bool:
        return len(self.taken) + len(self._missing()) < self._minimum

    def _done(self) -> bool:
        missing, taken = self._missing(), len(self.taken)
        if self._hopeless() or self._enough():
            return True
        if taken < self._minimum:
            return not missing
        return all(site in self._trouble or self._desk.lost(site) for site in missing)

    def _hear(self, said: Said) -> float:
        if said.site not in self._calls:
            self._members.hear(said)
            return GUEST_PAUSE
        if said.lost:
            return LOST_PAUSE
        if said.answer is None:
            self._settle(said.site, OutcomeState.REFUSED, said.code, said.reason)
            return 0.0
        if said.call is not self._calls[said.site]:
            code = self._members.hear(said)
            return self._refused(said, code) if code else 0.0
        if said.answer.status == "refused":
            self._members.undo(said.site, said.answer.code)
            return self._refused(said, said.answer.code)
        try:
            self._take(said)
        except Refusal as refusal:
            self._settle(
                said.site,
                OutcomeState.REFUSED,
                refusal.code.value,
                f"its answer was turned away: {refusal.what.lower()}",
            )
        else:
            self._settle(said.site, OutcomeState.IN, size=said.bytes, seconds=said.seconds)
        return 0.0

    def _refused(self, said: Said, code: str) -> float:
        if code == RefusalCode.BUSY:
            return BUSY_PAUSE
        if code == RefusalCode.SESSION_UNKNOWN and self._opens[said.site] < MOST_OPENS:
            self._opens[said.site] += 1
            return 0.0
        if code in PASSING:
            self._pauses[said.site] += 1
            outcome = Outcome(said.site, OutcomeState.REFUSED, code, words(code))
            if self._trouble.get(said.site) != outcome:
                self._trouble[said.site] = outcome
                self._note(outcome)
            return float(min(FIRST_PAUSE * 2 ** (self._pauses[said.site] - 1), LONGEST_PAUSE))
        late = code == RefusalCode.LATE
        about = said.answer.detail.get("about", "") if said.answer else ""
        self._settle(said.site, OutcomeState.LATE if late else OutcomeState.REFUSED, code, words(code), about=about)
        return 0.0

    def _settle(
        self,
        site: str,
        state: OutcomeState,
        code: str = "",
        reason: str = "",
        size: int = 0,
        seconds: float = 0.0,
        about: str = "",
    ) -> None:
        self._settled[site] = Outcome(site, state, str(code), reason, size, seconds, about=about)
        self._note(self._settled[site])
