"""Does the log still tell this site the truth? What a site remembers of the log, and when it cosigns a head.

Each site is a witness of the consortium's log: it keeps the last head that it cosigned, counts and keeps its own
releases until the log holds them, and cosigns a newer head only when that head continues the last one and holds every
release of its own but the newest few, and what it holds of the site's studies is true (`privacy.standing`). A `Witness`
is a value: each step gives a new one, which the agent makes durable *before* it hands out the release or the
cosignature (RULES S3, B7).

What is found, by whom:
    the log goes back, or was restored from an old copy     OLDER_HEAD, at every site that cosigned a newer head
    a historic byte changed; two trees for two sites        SPLIT_VIEW, at the next head; and no head of either tree
                                                            gathers more than (n + c) / 2 cosignatures meanwhile
    a release left out                                      STEP_MISSING, at its site, after `patience` slots
    a plan that was not reserved, or reserved otherwise     RESERVE_MISSING, RESERVE_WRONG, RESERVED_TWICE, at each of
    than each site approved and was granted                 its sites with the first head that holds a release of it
    an end that counts fewer slots than a site served       SLOTS_USED, at that site
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
from privacy.ledger import Abort, Commit, Leaf, Reserve, Step
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import EMPTY, consistent
from privacy.proposal import Proposal, whole
from privacy.standing import End, Judge, Standing

PATIENCE = 3
"""k of RULES B7: how many slots a release may be away from the log before its site stops."""
STATE_LIMIT = 1 << 24


class WrongEntry(LedgerRefusal):
    """The signed log says something untrue of a study of this site's. `state`, made durable, stops the study."""

    def __init__(self, refusal: LedgerRefusal, study: str, state: Witness) -> None:
        super().__init__(refusal.code, refusal.subject)
        self.study, self.state = study, state


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
        standings: study → what the log was shown to say of it.
    """

    site: str
    consortium: str
    log: str
    head: Note | None = None
    counters: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    signed: int = 0
    pending: tuple[tuple[int, Leaf], ...] = ()
    standings: Mapping[str, Standing] = field(default_factory=dict)

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
            LedgerRefusal: SLOT_OLD when the slot is not above the last one of this study; STUDY_CLOSED, or what the log
                was found to say wrongly of it.
        """
        self.standing(study).check(study)
        counter, last = self.counters.get(study, (0, 0))
        if slot <= last:
            raise LedgerRefusal(LedgerCode.SLOT_OLD, f"slot {slot}, study {study[:16]}")
        step = Step(study=study, site=self.site, slot=slot, counter=counter + 1, request=request, release=release)
        leaf = Leaf.signed(step, identity)
        signed = self.signed + 1
        counters = {**self.counters, study: (counter + 1, slot)}
        return replace(self, counters=counters, signed=signed, pending=(*self.pending, (signed, leaf))), leaf

    def standing(self, study: str) -> Standing:
        """What the log was shown to say of a study."""
        return self.standings.get(study, Standing())

    def check(self, patience: int = PATIENCE, *, study: str = "", slot: int = 0) -> None:
        """Whether this site may go on: none of its releases has been missing for more than `patience` slots.

        Args:
            study, slot: the slot it is asked to serve next, if there is one.

        Raises:
            LedgerRefusal: STEP_MISSING, and the site stops; STUDY_CLOSED or a fault, and the study stops.
        """
        self.standing(study).check(study)
        for signed, leaf in self.pending:
            step = leaf.entry
            assert isinstance(step, Step)
            newest = max(self.counters[step.study][1], slot if step.study == study else 0)
            if max(newest - step.slot, self.signed - signed) > patience:
                raise LedgerRefusal(LedgerCode.STEP_MISSING, f"slot {step.slot}, study {step.study[:16]}")

    def cosign(
        self, identity: Identity, proposal: Proposal, at: int, judge: Judge, patience: int = PATIENCE
    ) -> tuple[Witness, NoteSignature]:
        """Check a proposed head, and cosign it: the state to make durable, and then the cosignature to hand out.

        Releases of a study that the log was shown to have closed are waited for no longer: they can never come into it.

        Args:
            at: now, in seconds since 1970, UTC.
            judge: holds a RESERVE against the study that this site approved.

        Raises:
            Refusal: BAD_SIGNATURE of the log.
            WrongEntry: RESERVE_MISSING, RESERVE_WRONG, RESERVED_TWICE, STUDY_CLOSED or SLOTS_USED.
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
        standings = self._shown(proposal, judge)
        left = tuple(
            (n, leaf)
            for n, leaf in self.pending
            if proposal.shows(leaf) is None and not standings.get(leaf.entry.study, Standing()).end
        )
        head = Note(fresh).adding(*_own(proposal.note, self.log))
        known = replace(self, head=head, pending=left, standings=standings)
        known.check(patience)
        return known, cosign(fresh, self.name, identity, at)

    def _shown(self, proposal: Proposal, judge: Judge) -> dict[str, Standing]:
        """What is known of each study once the proven entries are taken in, in the order of their places.

        Only faults outlive a head that is not cosigned: what else it holds may be otherwise in the next one.
        """
        known, wrong = dict(self.standings), dict[str, LedgerRefusal]()
        leaves = [*proposal.entries, *(leaf for _, leaf in self.pending)]
        placed = [(place, leaf) for leaf in leaves if (place := proposal.shows(leaf)) is not None]
        for place, leaf in sorted(placed, key=lambda pair: pair[0]):
            try:
                known |= self._follow(known, place, leaf, judge)
            except LedgerRefusal as refusal:
                study = leaf.entry.study
                if refusal.code is not LedgerCode.RESERVE_MISSING or not self.standing(study).fault:
                    wrong.setdefault(study, refusal)
        kept = {study: LedgerRefusal(s.fault, f"study {study[:16]}") for study, s in known.items() if s.fault}
        if faults := {**kept, **wrong}:
            marked = {study: replace(self.standing(study), fault=fault.code) for study, fault in faults.items()}
            first = next(iter(faults))
            raise WrongEntry(faults[first], first, replace(self, standings={**self.standings, **marked}))
        return known

    def _follow(self, known: Mapping[str, Standing], place: int, leaf: Leaf, judge: Judge) -> dict[str, Standing]:
        """What one proven entry changes; nothing when it is about a study of other sites."""
        entry, study = leaf.entry, leaf.entry.study
        old, took_part = known.get(study, Standing()), study in self.counters
        if isinstance(entry, Step):
            return {study: old.released(place, study)}
        if isinstance(entry, Commit | Abort):
            if old.reserve is None and not took_part:
                return {}
            return {study: old.ended(place, entry, self.counters.get(study, (0, 0))[1])}
        assert isinstance(entry, Reserve)
        if old.reserve == place or not (took_part or self.site in entry.grants):
            return {}
        wrong = judge(entry)
        return {study: old.reserved(place, entry, wrong)} if took_part or wrong is not None else {}

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
                "standings": {
                    study: [_place(s.reserve), s.slots, _place(s.final), s.end, s.fault]
                    for study, s in self.standings.items()
                },
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
            pending = tuple((whole(signed), Leaf.read(text.encode())) for signed, text in value.pop("pending"))
            counters = {study: (whole(a), whole(b)) for study, (a, b) in value.pop("counters").items()}
            standings = {study: _standing(*row) for study, row in value.pop("standings").items()}
            state = cls(
                standings=standings,
                head=Note.decode(head.encode()) if head else None,
                counters=counters,
                pending=pending,
                signed=whole(value.pop("signed")),
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


def _own(note: Note, key: str) -> tuple[NoteSignature, ...]:
    """The log's own signature, which is all that is kept of a note's."""
    name = note.checkpoint.origin
    return tuple(s for s in note.signatures if s.name == name and s.key == key_id(name, key, LOG))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text is expected")
    return value


def _place(place: int | None) -> int:
    """A place that JSON can say: 0 for none, else one more than the place."""
    return 0 if place is None else place + 1


def _standing(reserve: Any, slots: Any, final: Any, end: Any, fault: Any) -> Standing:
    ends: dict[Any, End] = {"": "", "committed": "committed", "aborted": "aborted"}
    places = [at - 1 if (at := whole(number)) else None for number in (reserve, final)]
    return Standing(places[0], whole(slots), places[1], ends[end], LedgerCode(fault) if fault else "")
