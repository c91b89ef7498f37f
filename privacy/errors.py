"""How does Consilium say no? One error for people, one typed refusal for the protocol.

A `ConsiliumError` is for the person at the keyboard: what happened, to what, what to do. A `Refusal` is what
an agent answers across the airlock. Its words are constants chosen by its code, so a refusal can never carry
anything derived from a patient.
"""

from __future__ import annotations

from enum import StrEnum


class ConsiliumError(Exception):
    """Something a person can put right: `what` happened, to which `subject`, and the `remedy`."""

    def __init__(self, what: str, subject: str, remedy: str) -> None:
        super().__init__(what, subject, remedy)
        self.what, self.subject, self.remedy = what, subject, remedy

    def __str__(self) -> str:
        subject = f": {self.subject}" if self.subject else ""
        return f"{self.what}{subject}. {self.remedy}"


class RefusalCode(StrEnum):
    """Every reason for which an agent or a coordinator declines a message."""

    MALFORMED = "malformed"
    VERSION = "version"
    UNKNOWN_STUDY = "unknown-study"
    NOT_APPROVED = "not-approved"
    DECLINED = "declined"
    WITHDRAWN = "withdrawn"
    BAD_SIGNATURE = "bad-signature"
    WRONG_COORDINATOR = "wrong-coordinator"
    NOT_IN_STUDY = "not-in-study"
    REVOKED = "revoked"
    SESSION_UNKNOWN = "session-unknown"
    SESSION_CLOSED = "session-closed"
    SLOT_BOUND = "slot-bound"
    SLOT_OLD = "slot-old"
    SLOT_SPENT = "slot-spent"
    SLOT_LIMIT = "slot-limit"
    MODEL_HASH = "model-hash"
    MODEL_SHAPE = "model-shape"
    NON_FINITE = "non-finite"
    TOO_LARGE = "too-large"
    NO_DATA = "no-data"
    DISK_FULL = "disk-full"
    LATE = "late"
    BUSY = "busy"
    INTERNAL = "internal"
    RING = "ring"
    PEER_KEYS = "peer-keys"
    PEER_SHARES = "peer-shares"
    OUT_OF_ORDER = "out-of-order"
    SLOT_SESSION = "slot-session"
    COHORT = "cohort"
    SURVIVORS = "survivors"
    CHOICE_BOUND = "choice-bound"
    ROUND_OPENED = "round-opened"
    TOO_FEW = "too-few"
    OPENING = "opening"
    NO_GRANT = "no-grant"
    GRANT_REVOKED = "grant-revoked"
    GRANT_SPENT = "grant-spent"
    BUDGET_SPENT = "budget-spent"
    LEDGER = "ledger"


REFUSALS: dict[RefusalCode, tuple[str, str]] = {
    RefusalCode.MALFORMED: (
        "The message is not well formed",
        "Make sure both sides run the same release; if they do, treat the sender as hostile.",
    ),
    RefusalCode.VERSION: (
        "The two sides speak different protocol versions",
        "Install the same release of Consilium on both sides.",
    ),
    RefusalCode.UNKNOWN_STUDY: (
        "This site does not know the study",
        "Launch the study, or hand its file over with `consilium-site study import FILE`.",
    ),
    RefusalCode.NOT_APPROVED: (
        "The site has not approved this study",
        "The site decides with `consilium-site study review` and `consilium-site study approve`.",
    ),
    RefusalCode.DECLINED: (
        "The site declined this study",
        "Ask the site why; a changed study is a new study with a new hash.",
    ),
    RefusalCode.WITHDRAWN: (
        "The site withdrew from this study",
        "The study goes on without it; the site can approve again while the study runs.",
    ),
    RefusalCode.BAD_SIGNATURE: (
        "A signature does not match",
        "The document was changed or signed by another key. Fetch it again from its author.",
    ),
    RefusalCode.WRONG_COORDINATOR: (
        "The sender is not the coordinator this site enrolled with",
        "Compare the coordinator's fingerprint by telephone before enrolling again.",
    ),
    RefusalCode.NOT_IN_STUDY: (
        "This site is not part of the study",
        "Only sites that the signed study names take part. Draft a new study to add one.",
    ),
    RefusalCode.REVOKED: (
        "The site's enrolment was revoked or has expired",
        "Expired: `consilium-site enrol --renew`, then `consilium-coordinator sites add FILE`. Revoked: that is for "
        "good; the hospital enrols under a new name.",
    ),
    RefusalCode.SESSION_UNKNOWN: (
        "The site has no open session for this study",
        "The coordinator opens one by itself at the next round.",
    ),
    RefusalCode.SESSION_CLOSED: (
        "A newer session of this study has replaced this one",
        "Only one coordinator may run a study. Stop the other, then `consilium-coordinator study resume`.",
    ),
    RefusalCode.SLOT_BOUND: (
        "This slot is already bound to another request",
        "A slot serves one request for ever. If nobody changed the coordinator's records, it may be an attack.",
    ),
    RefusalCode.SLOT_OLD: (
        "This slot is older than one already answered",
        "Slots only go up. If nobody restored an old backup at the coordinator, it may be an attack.",
    ),
    RefusalCode.SLOT_SPENT: (
        "This slot was used and its answer is gone",
        "Nothing to do: the coordinator goes on with the next slot.",
    ),
    RefusalCode.SLOT_LIMIT: (
        "The study's number of slots is used up",
        "The signed study allows no more. A longer run is a new study.",
    ),
    RefusalCode.MODEL_HASH: (
        "The model is not the one the request names",
        "The bytes were damaged or changed on the way. The coordinator sends them again on resume.",
    ),
    RefusalCode.MODEL_SHAPE: (
        "The model does not fit the study's network",
        "Make sure both sides run the same release.",
    ),
    RefusalCode.NON_FINITE: (
        "The numbers are not all finite",
        "Training has diverged: lower the learning rate in a new study.",
    ),
    RefusalCode.TOO_LARGE: (
        "The message is larger than the study allows",
        "Make sure both sides run the same release; if they do, treat the sender as hostile.",
    ),
    RefusalCode.NO_DATA: (
        "The site has no usable images for this study",
        "At the site: `consilium-site data connect`, then `consilium-site data check`.",
    ),
    RefusalCode.DISK_FULL: (
        "The site's disk is full, so nothing could be recorded and nothing left",
        "Free space at the site; its node goes on by itself.",
    ),
    RefusalCode.LATE: (
        "The site did not finish before the deadline",
        "The study goes on without it this round. A longer deadline is a new study.",
    ),
    RefusalCode.BUSY: (
        "The site is still working on another request",
        "Nothing to do: the coordinator asks again.",
    ),
    RefusalCode.INTERNAL: (
        "The site met an error of its own",
        "The site's own log names it: `consilium-site status` at the site says where.",
    ),
    RefusalCode.RING: (
        "The sites that set up keys together are not those the signed study allows",
        "At least the study's minimum of its own sites must be there; the coordinator sets up keys again.",
    ),
    RefusalCode.PEER_KEYS: (
        "Another site's keys for the secure sum cannot be used",
        "The coordinator sets up keys again without that site. If its owner changed nothing, it may be an attack.",
    ),
    RefusalCode.PEER_SHARES: (
        "What another site sent for the secure sum does not open or does not match its signature",
        "The coordinator sets up keys again without that site. If its owner changed nothing, it may be an attack.",
    ),
    RefusalCode.OUT_OF_ORDER: (
        "A message of the secure sum belongs to another stage, session or request",
        "The coordinator goes on with the next slot. If it repeats, it may be an attack.",
    ),
    RefusalCode.SLOT_SESSION: (
        "The slot is not one that this set of keys serves",
        "The coordinator sets up new keys by itself at the next round.",
    ),
    RefusalCode.COHORT: (
        "The sites asked for one sum are too few, or not those with keys",
        "The study's minimum of sites must be asked together; the coordinator goes on with the next slot.",
    ),
    RefusalCode.SURVIVORS: (
        "The set of sites to be summed is not one that this site may sign or open",
        "It must hold this site and the study's minimum, all of them asked. If it repeats, it may be an attack.",
    ),
    RefusalCode.CHOICE_BOUND: (
        "The site has already chosen which sites are summed in this slot",
        "A choice stands for ever. If nobody changed the coordinator's records, it may be an attack.",
    ),
    RefusalCode.ROUND_OPENED: (
        "The site has already helped to open this round",
        "A round is opened once. The coordinator goes on with the next round.",
    ),
    RefusalCode.TOO_FEW: (
        "Too few sites are left to open the sum, so nothing is opened",
        "The study goes on with the next round. If it repeats, see which sites are away.",
    ),
    RefusalCode.OPENING: (
        "A part of the key to the sum is wrong",
        "It was made by a site that lies or lost its records; the coordinator goes on without it where it can.",
    ),
    RefusalCode.NO_GRANT: (
        "The privacy officer of this site has not granted the study, or the grant is too small or has expired",
        "The officer writes one with `consilium-officer grant`; at the site: `consilium-site grant import FILE`.",
    ),
    RefusalCode.GRANT_REVOKED: (
        "The privacy officer's grant for this study was revoked at the site",
        "Nothing more is computed for it here; only a new grant by the officer lets it go on.",
    ),
    RefusalCode.GRANT_SPENT: (
        "What the privacy officer granted for this study is used up, or the study was closed in the site's ledger",
        "A closed plan never runs again. More rounds are a new study, with a grant of its own.",
    ),
    RefusalCode.BUDGET_SPENT: (
        "The study costs more than the lifetime budget of a patient who was never in any study",
        "Draft a new study with more noise or fewer rounds, or ask the site's privacy officer for a larger allowance.",
    ),
    RefusalCode.LEDGER: (
        "The site's privacy ledger is not whole, is older than what has left, or lacks an entry in the common log",
        "Nothing noised leaves until that is settled: `consilium-site budget` at the site says what is wrong.",
    ),
}


class Refusal(ConsiliumError):
    """A typed no. `subject` must be a public name: a study's hash, a site, a slot number."""

    def __init__(self, code: RefusalCode, subject: str = "") -> None:
        what, remedy = REFUSALS[code]
        super().__init__(what, subject, remedy)
        self.code = code
