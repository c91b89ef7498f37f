"""Does the log still tell this site the truth? What a site remembers of the log, and when it cosigns a head.

Each site is a witness of the consortium's log: it keeps the last head that it cosigned, counts and keeps its own
releases until the log holds them, and cosigns a newer head only when that head continues the last one and holds every
release of its own but the newest few. A `Witness` is a value: each step gives a new one, which the agent makes
durable *before* it hands out the release or the cosignature (RULES S3, B7).

What is found, by whom:
    the log goes back, or was restored from an old copy     OLDER_HEAD, at every site that cosigned a newer head
    a historic byte changed; two trees for two sites        SPLIT_VIEW, at the next head; and no head of either tree
                                                            gathers more than (n + c) / 2 cosignatures meanwhile
    a release left out                                      STEP_MISSING, at its site, after `patience` slots
    this site's own records restored from an old copy       STATE_LOST, from its own cosignature
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from privacy.canonical import canonical, parse
from privacy.checkpoint import (
    COSIGNATURE,
    LOG,
    Checkpoint,
    Note,
    NoteSignature,
    cosign,
    cosigned_at,
    key_id,
    origin,
    witness_name,
)
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Identity
from privacy.ledger import Leaf, Step
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import EMPTY, Proof, consistent, included, pack, unpack

PATIENCE = 3
"""k of RULES B7: how many slots a release may be away from the log before its site stops."""
STATE_LIMIT = 1 << 24
PROPOSAL_LIMIT = 1 << 20


@dataclass(frozen=True)
class Inclusion:
    """Where a leaf stands in the tree of the proposed head, and the proof of it."""

    index: int
    proof: Proof


@dataclass(frozen=True)
class Proposal:
    """What the coordinator puts before a site for its cosignature.

    Attributes:
        note: the new head, signed by the log.
        since: the size that the consistency proof starts from; it must be the site's own.
        consistency: the proof from `since` to the new head.
        included: leaf hash → inclusion proof, of releases of this site.
        last: the last head that this site cosigned by the coordinator's records, with that cosignature.
    """

    note: Note
    since: int
    consistency: Proof = ()
    included: Mapping[bytes, Inclusion] = field(default_factory=dict)
    last: Note | None = None

    def encode(self) -> bytes:
        """As canonical JSON."""
        rows = {h.hex(): {"index": i.index, "proof": pack(i.proof).hex()} for h, i in self.included.items()}
        return canonical(
            {
                "proposal": 1,
                "note": self.note.encode().decode(),
                "since": self.since,
                "consistency": pack(self.consistency).hex(),
                "included": rows,
                "last": self.last.encode().decode() if self.last else "",
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Proposal:
        """Read a proposal.

        Raises:
            Refusal: MALFORMED or TOO_LARGE.
        """
        value = parse(data, PROPOSAL_LIMIT)
        try:
            if set(value) != {"proposal", "note", "since", "consistency", "included", "last"} or value["proposal"] != 1:
                raise ValueError("other fields")
            rows = {
                _hex(name): Inclusion(_whole(row.pop("index")), unpack(_hex(row.pop("proof"))))
                for name, row in value["included"].items()
                if len(row) == 2
            }
            if len(rows) != len(value["included"]):
                raise ValueError("a row has other fields")
            last = Note.decode(value["last"].encode()) if value["last"] else None
            note, since = Note.decode(value["note"].encode()), _whole(value["since"])
            return cls(note, since, unpack(_hex(value["consistency"])), rows, last)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refusal(RefusalCode.MALFORMED, "proposal") from error


@dataclass(frozen=True)
class Witness:
    """What one site remembers of one log.

    Attributes:
        site: its name in the roster.
        consortium: whose log it is.
        log: the pinned key of the log, 64 hex digits.
        head: the last head that it cosigned, with the log's signature as evidence; None before the first.
        counters: study → (own last counter, own last slot).
        signed: how many releases it has signed in all.
        pending: releases that no cosigned head was shown to hold: (`signed` at the time, leaf), oldest first.
    """

    site: str
    consortium: str
    log: str
    head: Note | None = None
    counters: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    signed: int = 0
    pending: tuple[tuple[int, Leaf], ...] = ()

    @property
    def size(self) -> int:
        """Leaves under the head it cosigned last."""
        return self.head.checkpoint.size if self.head else 0

    @property
    def root(self) -> bytes:
        """The root of the head it cosigned last."""
        return self.head.checkpoint.root if self.head else EMPTY

    @property
    def name(self) -> str:
        """The name of its key under a note."""
        return witness_name(origin(self.consortium), self.site)

    def step(self, identity: Identity, study: str, slot: int, request: str, release: str) -> tuple[Witness, Leaf]:
        """Sign the next release, before a byte of it leaves: the state to make durable, and the leaf to hand in.

        Args:
            request: hash of the whole request.
            release: SHA-256 of the released vector.

        Raises:
            LedgerRefusal: SLOT_OLD when the slot is not above the last one of this study.
        """
        counter, last = self.counters.get(study, (0, 0))
        if slot <= last:
            raise LedgerRefusal(LedgerCode.SLOT_OLD, f"slot {slot}, study {study[:16]}")
        step = Step(study=study, site=self.site, slot=slot, counter=counter + 1, request=request, release=release)
        leaf = Leaf.signed(step, identity)
        signed = self.signed + 1
        counters = {**self.counters, study: (counter + 1, slot)}
        return replace(self, counters=counters, signed=signed, pending=(*self.pending, (signed, leaf))), leaf

    def check(self, patience: int = PATIENCE, *, study: str = "", slot: int = 0) -> None:
        """Whether this site may go on: none of its releases has been missing for more than `patience` slots.

        Args:
            study, slot: the slot it is asked to serve next, if there is one.

        Raises:
            LedgerRefusal: STEP_MISSING, and the site stops.
        """
        for signed, leaf in self.pending:
            step = leaf.entry
            assert isinstance(step, Step)
            newest = max(self.counters[step.study][1], slot if step.study == study else 0)
            if max(newest - step.slot, self.signed - signed) > patience:
                raise LedgerRefusal(LedgerCode.STEP_MISSING, f"slot {step.slot}, study {step.study[:16]}")

    def cosign(
        self, identity: Identity, proposal: Proposal, at: int, patience: int = PATIENCE
    ) -> tuple[Witness, NoteSignature]:
        """Check a proposed head, and cosign it: the state to make durable, and then the cosignature to hand out.

        Args:
            at: now, in seconds since 1970, UTC.

        Raises:
            Refusal: BAD_SIGNATURE of the log.
            LedgerRefusal: OTHER_LOG, STATE_LOST, OTHER_START, OLDER_HEAD, SPLIT_VIEW or STEP_MISSING.
        """
        fresh = proposal.note.checkpoint
        if fresh.origin != origin(self.consortium):
            raise LedgerRefusal(LedgerCode.OTHER_LOG, fresh.origin)
        proposal.note.verify(self.log)
        for note in (proposal.note, proposal.last):
            self._not_ours(identity.public, note)
        about = f"size {fresh.size}, this site cosigned size {self.size}"
        if fresh.size < self.size:
            raise LedgerRefusal(LedgerCode.OLDER_HEAD, about)
        if proposal.since != self.size:
            raise LedgerRefusal(LedgerCode.OTHER_START, f"{proposal.since}, this site cosigned size {self.size}")
        if not consistent(self.size, self.root, fresh.size, fresh.root, proposal.consistency):
            raise LedgerRefusal(LedgerCode.SPLIT_VIEW, about)
        left = tuple((n, leaf) for n, leaf in self.pending if not _shown(leaf, proposal, fresh))
        known = replace(self, head=Note(fresh).adding(*_own(proposal.note, self.log)), pending=left)
        known.check(patience)
        return known, cosign(fresh, self.name, identity, at)

    def recovered(self, key: str, proposal: Proposal) -> Witness:
        """The state to go on from when these records turned out to be old: the newest head that this site cosigned.

        Releases that the old records wait for are given up; the studies that they belong to are over at this site.

        Args:
            key: the site's own public key.
        """
        ours = key_id(self.name, key, COSIGNATURE)
        heads = [
            note
            for note in (proposal.note, proposal.last)
            if note is not None and any(s.name == self.name and s.key == ours for s in note.signatures)
        ]
        newest = max(heads, key=lambda note: note.checkpoint.size)
        newest.verify(self.log)
        return replace(self, head=Note(newest.checkpoint).adding(*_own(newest, self.log)), pending=())

    def giving_up(self, study: str) -> tuple[Witness, tuple[Leaf, ...]]:
        """Wait no longer for the releases of one study, and which they are: an operator's decision, never a program's.

        Needed when a study was closed before they reached the log; the leaves, signed, are the evidence of it.
        """
        lost = tuple(leaf for _, leaf in self.pending if leaf.entry.study == study)
        return replace(self, pending=tuple(p for p in self.pending if p[1].entry.study != study)), lost

    def _not_ours(self, key: str, note: Note | None) -> None:
        """Refuse when this site's key stands under a head that its records do not know (RULES S3)."""
        if note is None or note.checkpoint.origin != origin(self.consortium):
            return
        ours = key_id(self.name, key, COSIGNATURE)
        for signature in note.signatures:
            if signature.name == self.name and signature.key == ours:
                cosigned_at(note.checkpoint, signature, key)
                size, root = note.checkpoint.size, note.checkpoint.root
                if size > self.size or (size == self.size and root != self.root):
                    raise LedgerRefusal(LedgerCode.STATE_LOST, f"size {size}, this site's records end at {self.size}")

    def encode(self) -> bytes:
        """The state as canonical JSON, for the site's own disk."""
        return canonical(
            {
                "witness": 1,
                "site": self.site,
                "consortium": self.consortium,
                "log": self.log,
                "head": self.head.encode().decode() if self.head else "",
                "counters": {study: list(pair) for study, pair in self.counters.items()},
                "signed": self.signed,
                "pending": [[signed, leaf.data.decode()] for signed, leaf in self.pending],
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Witness:
        """Read what `encode` wrote; the head's signature is verified again.

        Raises:
            Refusal: MALFORMED, TOO_LARGE or BAD_SIGNATURE: the state was damaged or changed.
        """
        value = parse(data, STATE_LIMIT)
        try:
            if value.pop("witness") != 1:
                raise ValueError("another version")
            head = value.pop("head")
            pending = tuple((_whole(signed), Leaf.read(text.encode())) for signed, text in value.pop("pending"))
            counters = {study: (_whole(a), _whole(b)) for study, (a, b) in value.pop("counters").items()}
            state = cls(
                head=Note.decode(head.encode()) if head else None,
                counters=counters,
                pending=pending,
                signed=_whole(value.pop("signed")),
                **{name: _text(value.pop(name)) for name in ("site", "consortium", "log")},
            )
            known = all(isinstance(leaf.entry, Step) and leaf.entry.study in counters for _, leaf in pending)
            if value or not known:
                raise ValueError("other fields")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refusal(RefusalCode.MALFORMED, "witness") from error
        if state.head is not None:
            state.head.verify(state.log)
        return state


def _shown(leaf: Leaf, proposal: Proposal, head: Checkpoint) -> bool:
    """Whether the proposal proves that the leaf stands under the head."""
    found = proposal.included.get(leaf.hash)
    return found is not None and included(leaf.hash, found.index, head.size, found.proof, head.root)


def _own(note: Note, key: str) -> tuple[NoteSignature, ...]:
    """The log's own signature, which is all that is kept of a note's."""
    name = note.checkpoint.origin
    return tuple(s for s in note.signatures if s.name == name and s.key == key_id(name, key, LOG))


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a whole number of 0 or more is expected")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text is expected")
    return value


def _hex(text: str) -> bytes:
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("small hexadecimal digits are expected")
    return data
