"""A consortium with its log in memory, for tests of the ledger: identities, a roster, entries, heads, witnesses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.checkpoint import Checkpoint, Note, origin
from privacy.identity import Identity
from privacy.ledger import Abort, Commit, Leaf, Reserve, Step
from privacy.merkle import Tree
from privacy.proposal import Inclusion, Proposal
from privacy.roster import Roster, RosterSite
from privacy.witness import Witness

NAMES = ("st-anna", "st-berta", "st-clara", "st-doris", "st-emma")
CONSORTIUM, NOW = "alpine", 1_893_456_000  # 2030-01-01T00:00:00Z
LOG = origin(CONSORTIUM)


def identity(name: str) -> Identity:
    """The same identity for the same name, in every run."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"test {name}".encode()).digest()))


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


COORDINATOR = identity("coordinator")
SITES = {name: identity(name) for name in NAMES}


def roster(version: int = 5, revoked: tuple[str, ...] = (), **keys: str) -> Roster:
    """The consortium's sites; `keys` replaces identities (hyphens written as underscores)."""
    pem = ec.derive_private_key(7, ec.SECP384R1()).public_key()
    node = pem.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    sites = tuple(
        RosterSite(
            name=name,
            identity=keys.get(name.replace("-", "_"), own.public),
            node_key=node,
            not_after="2031-01-01T00:00:00Z",
            revoked=name in revoked,
        )
        for name, own in SITES.items()
    )
    return Roster(consortium=CONSORTIUM, version=version, coordinator=COORDINATOR.public, sites=sites)


ROSTER = roster()
STUDY = digest("study")


def reserve(study: str = STUDY, slots: int = 40, sites: Iterable[str] = NAMES) -> Leaf:
    return Leaf.of(
        Reserve(
            study=study,
            plan=digest("plan", study),
            slots=slots,
            grants={site: digest("grant", site) for site in sites},
            epsilon_aggregate="2",
            epsilon_broken="7.75",
            delta="0.000001",
        )
    )


def step(site: str, slot: int, counter: int | None = None, study: str = STUDY, by: Identity | None = None) -> Leaf:
    entry = Step(
        study=study,
        site=site,
        slot=slot,
        counter=slot if counter is None else counter,
        request=digest("request", study, slot),
        release=digest("release", study, slot, site),
    )
    return Leaf.signed(entry, by or SITES[site])


def commit(slots: int, study: str = STUDY) -> Leaf:
    return Leaf.of(Commit(study=study, slots_used=slots))


def abort(study: str = STUDY, reason: str = "stopped") -> Leaf:
    return Leaf.of(Abort(study=study, reason=reason))


def course(slots: int, sites: Iterable[str] = NAMES, study: str = STUDY) -> list[Leaf]:
    """RESERVE and every site's STEP for each slot."""
    return [reserve(study), *(step(s, slot, study=study) for slot in range(1, slots + 1) for s in sites)]


def approved(found: Reserve) -> list[str]:
    """What a RESERVE says otherwise than the study that every site approved."""
    due = reserve(found.study, found.slots, found.grants).entry
    return [] if found == due else ["it is not what was approved"]


class Log:
    """A log in memory: leaves, tree, heads."""

    def __init__(self, leaves: Iterable[Leaf] = ()) -> None:
        self.leaves: list[Leaf] = []
        self.tree = Tree()
        self.add(*leaves)

    def add(self, *leaves: Leaf) -> None:
        self.leaves += leaves
        self.tree.extend(leaf.hash for leaf in leaves)

    def note(self, size: int | None = None, by: Identity = COORDINATOR) -> Note:
        size = self.tree.size if size is None else size
        return Note(Checkpoint(LOG, size, self.tree.root(size))).signed_by(by)

    def proposal(self, witness: Witness, size: int | None = None, **changes: object) -> Proposal:
        """The head of `size` for one site, with proofs of all its releases and of what the coordinator wrote."""
        note = self.note(size)
        size = note.checkpoint.size
        since = min(witness.size, size)
        shown = {
            leaf.hash: Inclusion(at, self.tree.inclusion(at, size))
            for at, leaf in enumerate(self.leaves[:size])
            if getattr(leaf.entry, "site", witness.site) == witness.site
        }
        own = tuple(leaf for leaf in self.leaves[:size] if not isinstance(leaf.entry, Step))
        values = {
            "note": note,
            "since": since,
            "consistency": self.tree.consistency(since, size),
            "included": shown,
            "entries": own,
        }
        return Proposal(**{**values, **changes})


def witness(site: str = "st-anna") -> Witness:
    return Witness(site, CONSORTIUM, COORDINATOR.public)


def cosigned(log: Log, sites: Iterable[str] = NAMES, size: int | None = None) -> Note:
    """The log's newest head, cosigned by sites that see it for the first time."""
    note = log.note(size)
    for site in sites:
        fresh = witness(site)
        note = note.adding(fresh.cosign(SITES[site], log.proposal(fresh, size), NOW, approved)[1])
    return note
