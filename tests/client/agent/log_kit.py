"""The consortium's log as a bed's coordinator keeps it, honest unless a test changes it."""

from __future__ import annotations

from typing import Any

from privacy.checkpoint import Checkpoint, Note, origin
from privacy.ledger import Leaf, Step
from privacy.merkle import Tree
from privacy.proposal import Inclusion, Proposal
from privacy.reservation import reserve
from privacy.witness import Witness
from tests.client.agent.bed import SITE, Bed


class Log:
    """Leaves, their tree, and what the coordinator puts before the bed's site."""

    def __init__(self, bed: Bed, **changes: Any) -> None:
        """Begin with RESERVE of the bed's study; `changes`: what it says otherwise than the study does."""
        assert bed.agent is not None
        self.bed, self.tree, self.leaves = bed, Tree(), list[Leaf]()
        right = reserve(bed.study, {SITE: next(iter(bed.agent.purse.digests(bed.hash)))})
        self.add(Leaf.of(right.model_copy(update=changes)))

    def add(self, leaf: Leaf) -> None:
        self.leaves.append(leaf)
        self.tree.append(leaf.hash)

    def take(self, lines: str) -> None:
        """Releases as an answer brings them; what is there already stays once."""
        for line in lines.splitlines():
            leaf = Leaf.read(line.encode())
            if leaf.hash not in {known.hash for known in self.leaves}:
                self.add(leaf)

    def proposal(self, since: int, last: Note | None = None) -> Proposal:
        """The newest head, with a proof of every leaf."""
        size = self.tree.size
        head = Checkpoint(origin("trio"), size, self.tree.root())
        shown = {leaf.hash: Inclusion(at, self.tree.inclusion(at, size)) for at, leaf in enumerate(self.leaves)}
        own = tuple(leaf for leaf in self.leaves if not isinstance(leaf.entry, Step))
        note, proof = Note(head).signed_by(self.bed.coordinator), self.tree.consistency(since, size)
        return Proposal(note, since, proof, shown, last, own)


def witness(bed: Bed) -> Witness:
    """What the bed's site remembers of the log."""
    assert bed.agent is not None
    return Witness.decode(bed.agent.store.witness())
