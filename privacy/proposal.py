"""What is put before a site for its cosignature? A new head of the log, and the proofs that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from privacy.canonical import canonical, parse
from privacy.checkpoint import Note
from privacy.errors import Refusal, RefusalCode
from privacy.ledger import Leaf, Step
from privacy.merkle import Proof, included, pack, unpack

PROPOSAL_LIMIT = 1 << 20
_FIELDS = {"proposal", "note", "since", "consistency", "included", "last", "entries"}


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
        included: leaf hash → inclusion proof, of releases of this site and of `entries`.
        entries: RESERVE, COMMIT and ABORT of studies in which this site takes part.
        last: the last head that this site cosigned by the coordinator's records, with that cosignature.
    """

    note: Note
    since: int
    consistency: Proof = ()
    included: Mapping[bytes, Inclusion] = field(default_factory=dict)
    last: Note | None = None
    entries: tuple[Leaf, ...] = ()

    def shows(self, leaf: Leaf) -> int | None:
        """The place of a leaf under the proposed head, when it is proven; None when it is not."""
        found, head = self.included.get(leaf.hash), self.note.checkpoint
        if found is None or not included(leaf.hash, found.index, head.size, found.proof, head.root):
            return None
        return found.index

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
                "entries": [leaf.data.decode() for leaf in self.entries],
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
            if set(value) != _FIELDS or value["proposal"] != 1:
                raise ValueError("other fields")
            rows = {
                hexadecimal(name): Inclusion(whole(row.pop("index")), unpack(hexadecimal(row.pop("proof"))))
                for name, row in value["included"].items()
                if len(row) == 2
            }
            if len(rows) != len(value["included"]):
                raise ValueError("a row has other fields")
            last = Note.decode(value["last"].encode()) if value["last"] else None
            note, since = Note.decode(value["note"].encode()), whole(value["since"])
            entries = tuple(Leaf.read(text.encode()) for text in value["entries"])
            if any(isinstance(leaf.entry, Step) for leaf in entries):
                raise ValueError("releases are known to the site")
            return cls(note, since, unpack(hexadecimal(value["consistency"])), rows, last, entries)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refusal(RefusalCode.MALFORMED, "proposal") from error


def whole(value: Any) -> int:
    """A whole number of 0 or more from JSON; ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a whole number of 0 or more is expected")
    return value


def hexadecimal(text: str) -> bytes:
    """Bytes from small hexadecimal digits, their one spelling; ValueError for anything else."""
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("small hexadecimal digits are expected")
    return data
