"""Why does the ledger say no? One typed refusal for the log, for those who write to it and for its witnesses.

The words are constants chosen by the code, as with `privacy.errors.Refusal`; the subject is a public name only.
"""

from __future__ import annotations

from enum import StrEnum

from privacy.errors import ConsiliumError


class LedgerCode(StrEnum):
    """Every reason for which an entry is not written, or a head not cosigned or not believed."""

    NOT_RESERVED = "not-reserved"
    RESERVED_TWICE = "reserved-twice"
    RESERVE_MISSING = "reserve-missing"
    RESERVE_WRONG = "reserve-wrong"
    NOT_GRANTED = "not-granted"
    STUDY_CLOSED = "study-closed"
    COUNTER = "counter"
    SLOT_LIMIT = "slot-limit"
    SLOT_OLD = "slot-old"
    SLOTS_USED = "slots-used"
    OTHER_LOG = "other-log"
    OTHER_START = "other-start"
    OLDER_HEAD = "older-head"
    SPLIT_VIEW = "split-view"
    STEP_MISSING = "step-missing"
    STATE_LOST = "state-lost"
    TOO_FEW_WITNESSES = "too-few-witnesses"


LEDGER_REFUSALS: dict[LedgerCode, tuple[str, str]] = {
    LedgerCode.NOT_RESERVED: (
        "No budget was reserved for this study",
        "The coordinator writes RESERVE with every site's grant before the first slot.",
    ),
    LedgerCode.RESERVED_TWICE: (
        "A budget was reserved for this study already",
        "A plan runs once. A changed or repeated plan is a new study with a new hash.",
    ),
    LedgerCode.RESERVE_MISSING: (
        "The log holds what this site released, and was not shown to hold a reservation before it",
        "The coordinator shows the RESERVE of each study with the head. If it repeats, it hides it: stop, and ask why.",
    ),
    LedgerCode.RESERVE_WRONG: (
        "What the log says was reserved is not what this site approved and its officer granted",
        "The site releases nothing more for the study and cosigns no head of this log. Keep the message as evidence, "
        "and treat the coordinator as hostile until it has explained itself.",
    ),
    LedgerCode.NOT_GRANTED: (
        "The site's officer granted this study nothing",
        "Only sites whose grant stands in RESERVE release anything for it.",
    ),
    LedgerCode.STUDY_CLOSED: (
        "The study was committed or aborted, and nothing follows that",
        "If a site released something after it, treat the coordinator as hostile.",
    ),
    LedgerCode.COUNTER: (
        "A site's own count of its releases has a gap or goes back",
        "Hand in the steps before this one first. If there are none, the site lost its records or signed twice.",
    ),
    LedgerCode.SLOT_LIMIT: (
        "The slot is above what was reserved",
        "The signed study allows no more. A longer run is a new study with a new reservation.",
    ),
    LedgerCode.SLOT_OLD: (
        "The slot is not above the site's last one in this study",
        "Slots only go up. If nobody restored an old backup, it may be an attack.",
    ),
    LedgerCode.SLOTS_USED: (
        "The number of slots used does not fit the steps written and the slots reserved",
        "Commit at least the highest slot that a site has signed, and no more than was reserved.",
    ),
    LedgerCode.OTHER_LOG: (
        "The head belongs to another log",
        "Compare the consortium's name and the coordinator's fingerprint by telephone.",
    ),
    LedgerCode.OTHER_START: (
        "The proof starts from another head than the one this site cosigned last",
        "The coordinator makes it again from the size that the site names.",
    ),
    LedgerCode.OLDER_HEAD: (
        "The head is older than one this site has cosigned",
        "The coordinator restored an old copy of the log or hides its end. Stop, and ask for the newer head.",
    ),
    LedgerCode.SPLIT_VIEW: (
        "The head does not continue the one this site has cosigned",
        "The log was changed or shows each site another one. Stop, and compare heads with the other sites.",
    ),
    LedgerCode.STEP_MISSING: (
        "A release that this site signed is not in the log",
        "The site releases nothing more until the log holds it. If it repeats, the coordinator hides releases.",
    ),
    LedgerCode.STATE_LOST: (
        "This site has cosigned a newer head than its own records know",
        "Its records were restored from an old copy: end all sessions, count every reserved slot as spent, and "
        "make new keys.",
    ),
    LedgerCode.TOO_FEW_WITNESSES: (
        "Too few sites have cosigned the head",
        "Wait for more sites. If they decline, ask them why before believing anything in the log.",
    ),
}


class LedgerRefusal(ConsiliumError):
    """A typed no of the ledger. `subject` must be a public name: a study's hash, a site, a slot, a size."""

    def __init__(self, code: LedgerCode, subject: str = "") -> None:
        what, remedy = LEDGER_REFUSALS[code]
        super().__init__(what, subject, remedy)
        self.code = code
