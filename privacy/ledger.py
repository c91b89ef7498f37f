"""What does the consortium write down of a study's budget? Four kinds of entry, and which may follow which.

RESERVE names the whole plan before anything runs; STEP is one release, signed by the site that made it; COMMIT or
ABORT ends the study for good. A leaf of the log is the canonical encoding (RFC 8785, no floats) of a document of kind
"ledger-…"; kind and version stand inside, so a leaf is never taken for another. STEP carries its site's signature;
the coordinator's own entries are signed by the head over them. An entry holds public things only: no counts of
patients, no sizes of batches, no losses (RULES B8).

Formal rules (`admit`), for each study apart:
    RESERVE comes first and once; COMMIT or ABORT comes last and once.
    A STEP is of a site with a grant, its slot is at most T_max and above the site's last one, and the site's own
    counter goes 1, 2, 3, … without a gap (RULES B7): a release that was left out stops the site's next one.
    COMMIT names at least the highest slot that was signed and at most T_max.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity, Signature
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import leaf_hash
from privacy.roster import SiteName

LEAF_LIMIT = 1 << 14
MOST_SLOTS = 2**31 - 1
MOST_SITES = 50

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Amount = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,5})(\.[0-9]{0,17}[1-9])?$")]
"""A decimal number of 0 or more in its one plain spelling: no exponent, no zeros at the end."""
Slot = Annotated[int, Field(ge=1, le=MOST_SLOTS)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    KIND: ClassVar[str]
    ledger: Literal[1] = 1
    study: Hash

    def document(self) -> Document:
        """The entry as a document, not signed."""
        return Document(self.KIND, self.model_dump(mode="json"))

    @classmethod
    def of(cls, body: dict[str, Any]) -> Self:
        """Check a body.

        Raises:
            Refusal: MALFORMED.
        """
        if set(body) != set(cls.model_fields):  # nothing is filled in: an entry has one spelling
            raise Refusal(RefusalCode.MALFORMED, cls.KIND)
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise Refusal(RefusalCode.MALFORMED, cls.KIND) from error


class Reserve(_Entry):
    """The whole plan, charged before it runs: at most `slots` releases a site, for (ε, δ) as claimed at signing.

    Attributes:
        plan: digest of the plan of events that the accountant charged (`privacy.accounting`).
        slots: T_max.
        grants: site → digest of its officer's grant (RULES B6).
        epsilon_aggregate: tier one, against everyone who sees aggregates only.
        epsilon_broken: tier two, if secure aggregation were wholly broken.
        delta: the δ of both.
    """

    KIND: ClassVar[str] = "ledger-reserve"
    plan: Hash
    slots: Slot
    grants: dict[SiteName, Hash] = Field(min_length=1, max_length=MOST_SITES)
    epsilon_aggregate: Amount
    epsilon_broken: Amount
    delta: Amount

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not 0 < Decimal(self.epsilon_aggregate) <= Decimal(self.epsilon_broken):
            raise ValueError("ε is above 0, and without secure aggregation it is no smaller")
        if not 0 < Decimal(self.delta) < 1:
            raise ValueError("δ lies between 0 and 1")
        return self


class Step(_Entry):
    """One release of one site, signed by it before a byte leaves.

    Attributes:
        counter: the site's own count of its releases in this study: 1, 2, 3, …
        request: hash of the whole request that the slot is bound to (RULES S2).
        release: SHA-256 of the released (masked) vector's bytes.
    """

    KIND: ClassVar[str] = "ledger-step"
    site: SiteName
    slot: Slot
    counter: Slot
    request: Hash
    release: Hash


class Commit(_Entry):
    """The study is done; slots above `slots_used` were never served and never will be."""

    KIND: ClassVar[str] = "ledger-commit"
    slots_used: int = Field(ge=0, le=MOST_SLOTS)


Reason = Literal["stopped", "failed", "too-few-sites", "diverged", "grant-revoked", "state-lost"]


class Abort(_Entry):
    """The study was given up, for one of a fixed list of reasons."""

    KIND: ClassVar[str] = "ledger-abort"
    reason: Reason


Entry = Reserve | Step | Commit | Abort
KINDS: dict[str, type[Reserve] | type[Step] | type[Commit] | type[Abort]] = {
    kind.KIND: kind for kind in (Reserve, Step, Commit, Abort)
}


@dataclass(frozen=True)
class Leaf:
    """An entry and the bytes that stand for it in the log."""

    entry: Entry
    data: bytes
    signature: Signature | None = field(default=None, compare=False)

    @cached_property
    def hash(self) -> bytes:
        """The leaf's hash in the tree, 32 bytes."""
        return leaf_hash(self.data)

    @classmethod
    def of(cls, entry: Reserve | Commit | Abort) -> Leaf:
        """The leaf of an entry of the coordinator's own."""
        return cls(entry, entry.document().encode())

    @classmethod
    def signed(cls, step: Step, site: Identity) -> Leaf:
        """The leaf of a release, signed by the site that made it."""
        document = step.document().signed_by(site)
        return cls(step, document.encode(), document.signatures[0])

    @classmethod
    def read(cls, data: bytes) -> Leaf:
        """Read a leaf strictly. The signature of a STEP is parsed here, not verified: call `verify`.

        Raises:
            Refusal: MALFORMED for anything that is not the one spelling of an entry, or TOO_LARGE.
        """
        kind = next((kind for kind in KINDS if f'"kind":"{kind}"'.encode() in data), Reserve.KIND)
        document = Document.decode(data, kind, LEAF_LIMIT)
        if len(document.signatures) != (1 if kind == Step.KIND else 0):
            raise Refusal(RefusalCode.MALFORMED, kind)
        return cls(KINDS[kind].of(document.body), data, next(iter(document.signatures), None))

    @classmethod
    def known(cls, data: bytes) -> Leaf:
        """Read a leaf that `read` has passed before: its spelling is not checked again, which is five times as fast.

        Only for bytes whose hash is compared with a tree that was built of such leaves.

        Raises:
            Refusal: MALFORMED.
        """
        try:
            value = json.loads(data)
            signature = next((Signature(**one) for one in value["signatures"]), None)
            return cls(KINDS[value["kind"]].of(value["body"]), data, signature)
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(RefusalCode.MALFORMED, "entry") from error

    def verify(self, keys: Collection[str]) -> None:
        """Check that a STEP was signed with one of its site's pinned keys; other entries pass.

        Raises:
            Refusal: BAD_SIGNATURE, or NOT_IN_STUDY when no key is pinned.
        """
        if not isinstance(self.entry, Step):
            return
        if not keys:
            raise Refusal(RefusalCode.NOT_IN_STUDY, self.entry.site)
        if self.signature is None or self.signature.key not in keys:
            raise Refusal(RefusalCode.BAD_SIGNATURE, f"step of {self.entry.site}")
        replace(self.entry.document(), signatures=(self.signature,)).verify(self.signature.key)


@dataclass(frozen=True)
class Account:
    """What the log says of one study so far.

    Attributes:
        reserve: the plan.
        steps: site → (its last counter, its last slot).
        final: COMMIT or ABORT, once there is one.
    """

    reserve: Reserve
    steps: Mapping[str, tuple[int, int]]
    final: Commit | Abort | None = None

    @property
    def slots_used(self) -> int:
        """The highest slot that any site signed a release for."""
        return max((slot for _, slot in self.steps.values()), default=0)

    @property
    def open(self) -> bool:
        """Whether releases may still follow."""
        return self.final is None


def admit(account: Account | None, entry: Entry) -> Account:
    """The study's account with one more entry, if the entry may stand there. Signatures are the caller's to check.

    Raises:
        LedgerRefusal: it may not.
    """
    study = entry.study[:16]
    if isinstance(entry, Reserve):
        if account is not None:
            raise LedgerRefusal(LedgerCode.RESERVED_TWICE, study)
        return Account(entry, {})
    if account is None:
        raise LedgerRefusal(LedgerCode.NOT_RESERVED, study)
    if not account.open:
        raise LedgerRefusal(LedgerCode.STUDY_CLOSED, study)
    if isinstance(entry, Step):
        return _step(account, entry)
    if isinstance(entry, Commit) and not account.slots_used <= entry.slots_used <= account.reserve.slots:
        raise LedgerRefusal(LedgerCode.SLOTS_USED, f"{entry.slots_used}, study {study}")
    return replace(account, final=entry)


def _step(account: Account, step: Step) -> Account:
    where = f"{step.site}, slot {step.slot}, counter {step.counter}, study {step.study[:16]}"
    if step.site not in account.reserve.grants:
        raise LedgerRefusal(LedgerCode.NOT_GRANTED, where)
    if step.slot > account.reserve.slots:
        raise LedgerRefusal(LedgerCode.SLOT_LIMIT, where)
    counter, slot = account.steps.get(step.site, (0, 0))
    if step.counter != counter + 1:
        raise LedgerRefusal(LedgerCode.COUNTER, where)
    if step.slot <= slot:
        raise LedgerRefusal(LedgerCode.SLOT_OLD, where)
    return Account(account.reserve, {**account.steps, step.site: (step.counter, step.slot)})


def admit_all(books: Mapping[str, Account], entries: Iterable[Entry]) -> dict[str, Account]:
    """The accounts, by study, that change when all of `entries` follow in order; `books` itself stays as it is.

    Raises:
        LedgerRefusal: one of them may not stand there; then none does.
    """
    changed: dict[str, Account] = {}
    for entry in entries:
        changed[entry.study] = admit(changed.get(entry.study) or books.get(entry.study), entry)
    return changed
