"""What has the log shown a site of one study in which it takes part? RESERVE, the end, and whether they are true.

A site cannot read the whole log. It is shown the entries about its own studies, each proven to stand under the head
that it is asked to cosign, and walks through them as `privacy.ledger.admit` walks through the whole: RESERVE is the one
that follows from the study that it approved and stands before its releases; the end stands behind them and counts them.
What was shown twice in one place is the same entry, because a log only grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from privacy.ledger import Abort, Commit, Reserve
from privacy.ledger_codes import LedgerCode, LedgerRefusal

Judge = Callable[[Reserve], Sequence[str] | None]
"""What a RESERVE says otherwise than the study that the site approved; None when the site does not know the study."""
End = Literal["", "committed", "aborted"]
HEALED = frozenset({LedgerCode.RESERVE_MISSING, LedgerCode.RESERVE_WRONG})
"""Faults that end when the right RESERVE is shown in its place."""


@dataclass(frozen=True)
class Standing:
    """What is known of one study; places count from 0.

    Attributes:
        reserve: where its RESERVE stands, once it was found right under a cosigned head.
        slots: T_max of it.
        final: where COMMIT or ABORT stands.
        end: which of the two. From then on the site releases nothing for the study, whatever is said.
        fault: why the log is not believed about this study; "" while it is. Nothing is released for it either.
    """

    reserve: int | None = None
    slots: int = 0
    final: int | None = None
    end: End = ""
    fault: LedgerCode | Literal[""] = ""

    def check(self, study: str) -> None:
        """Whether anything may still be released for the study.

        Raises:
            LedgerRefusal: STUDY_CLOSED, or the fault.
        """
        if self.fault:
            raise LedgerRefusal(self.fault, f"study {study[:16]}")
        if self.end:
            raise LedgerRefusal(LedgerCode.STUDY_CLOSED, f"study {study[:16]}")

    def reserved(self, place: int, entry: Reserve, wrong: Sequence[str] | None) -> Standing:
        """With the RESERVE that stands at a place, as it was judged.

        Raises:
            LedgerRefusal: RESERVED_TWICE or RESERVE_WRONG.
        """
        about = f"study {entry.study[:16]}"
        if self.reserve not in {None, place}:
            raise LedgerRefusal(LedgerCode.RESERVED_TWICE, about)
        if wrong is None or wrong:
            said = "; ".join(wrong or ["this site does not know the study"])
            raise LedgerRefusal(LedgerCode.RESERVE_WRONG, f"{about}: {said}")
        fault: LedgerCode | Literal[""] = "" if self.fault in HEALED else self.fault
        return replace(self, reserve=place, slots=entry.slots, fault=fault)

    def released(self, place: int, study: str) -> Standing:
        """With a release of the site's own at a place.

        Raises:
            LedgerRefusal: RESERVE_MISSING when no RESERVE stands before it, STUDY_CLOSED when it stands behind the end.
        """
        if self.reserve is None or place < self.reserve:
            raise LedgerRefusal(LedgerCode.RESERVE_MISSING, f"study {study[:16]}")
        if self.final is not None and place > self.final:
            raise LedgerRefusal(LedgerCode.STUDY_CLOSED, f"study {study[:16]}")
        return self

    def ended(self, place: int, entry: Commit | Abort, last: int) -> Standing:
        """With the COMMIT or ABORT that stands at a place.

        Args:
            last: the highest slot that the site itself has signed a release for.

        Raises:
            LedgerRefusal: RESERVE_MISSING, STUDY_CLOSED when it ended before, SLOTS_USED when COMMIT counts fewer slots
                than the site served or more than were reserved.
        """
        about = f"study {entry.study[:16]}"
        if self.reserve is None or place < self.reserve:
            raise LedgerRefusal(LedgerCode.RESERVE_MISSING, about)
        if self.final not in {None, place}:
            raise LedgerRefusal(LedgerCode.STUDY_CLOSED, about)
        if isinstance(entry, Commit) and not last <= entry.slots_used <= self.slots:
            raise LedgerRefusal(LedgerCode.SLOTS_USED, f"{entry.slots_used}, {about}")
        return replace(self, final=place, end="committed" if isinstance(entry, Commit) else "aborted")
