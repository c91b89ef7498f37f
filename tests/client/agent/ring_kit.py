"""A real agent in a ring of four: the other three sites, and an honest coordinator's part, played by the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from privacy.canonical import sha256
from privacy.identity import Document, Identity
from privacy.messages import Answer, Request
from privacy.secagg import site as protocol
from privacy.secagg.coordinator import SecureSum
from privacy.secagg.messages import Choice, Keys, Opening, Shares, Survivors
from privacy.secagg.plan import Plan
from privacy.secagg.ring import Ring, accept_shares, place_of
from privacy.secagg.states import Keyed, Ready, Shared
from privacy.stages import FIRST, LAST, TRANSCRIPT, Enclosure
from tests.client.agent.bed import SITE, Bed, make_bed
from tests.study_kit import Sections, merged

PEERS = ("st-bona", "st-cleo", "st-dora")
ALL = (SITE, *PEERS)
ROOM = 1 << 24


@dataclass
class Peer:
    """Another site: it masks zeros, so that the opened sum is what the agent sent."""

    name: str
    identity: Identity = field(default_factory=Identity.generate)
    keyed: Keyed | None = None
    shared: Shared | None = None
    ready: Ready | None = None
    choices: dict[int, Choice] = field(default_factory=dict)

    def submission(self, request: Request, words: np.ndarray, statistics: int) -> Document:
        """Masks `words` in place and signs for them."""
        header = request.header
        assert self.ready is not None
        protocol.mask(self.ready, header.slot, request.hash, header.cohort, words)
        answer = Answer(
            study=header.study, session=header.session, slot=header.slot, site=self.name, request=request.hash,
            status="done", payload_sha256=sha256(words.tobytes()), payload_bytes=words.nbytes, statistics=statistics,
        )  # fmt: skip
        return answer.signed(self.identity)

    def survivors(self, request: Request, chosen: Iterable[str]) -> Document:
        header = request.header
        assert self.ready is not None
        choice, document = protocol.survive(
            self.ready, header.slot, request.hash, header.cohort, tuple(chosen), self.choices, self.identity
        )
        self.choices[header.slot] = choice
        return document

    def opening(self, request: Request, chosen: Iterable[str], proof: dict[str, Document]) -> Document:
        header = request.header
        assert self.ready is not None
        choice, document = protocol.open_(
            self.ready, header.slot, request.hash, header.cohort, tuple(chosen), proof, self.choices, self.identity
        )
        self.choices[header.slot] = choice
        return document


@dataclass
class RingBed:
    """A bed whose study has secure sums, its three peers, and what was exchanged."""

    bed: Bed
    peers: dict[str, Peer]
    plan: Plan
    ring: Ring | None = None

    @property
    def identities(self) -> dict[str, str]:
        return {SITE: self.bed.identity.public, **{name: peer.identity.public for name, peer in self.peers.items()}}

    # ---- requests ------------------------------------------------------------------------------------------------

    def ask(self, kind: str, payload: bytes = b"", **changes: Any) -> Answer:
        return self.bed.call(kind, payload, **{"cohort": ALL, "round": 0, **changes})

    def documents(self, name: str, found: dict[str, Document], parcels: dict[str, bytes] | None = None) -> bytes:
        return Enclosure({name: found}, parcels or {}).encode()

    # ---- set-up --------------------------------------------------------------------------------------------------

    def keys(self, session: int = 1, first: int = 1, last: int = 8) -> dict[str, Document]:
        """Everybody's keys, the agent's as it answered."""
        answer = self.ask("keys", session=session, parameters={FIRST: str(first), LAST: str(last)})
        assert answer.status == "done", answer.code
        found = {SITE: Document.decode(answer.detail["keys"].encode(), Keys.KIND)}
        for name, peer in self.peers.items():
            peer.keyed, found[name] = protocol.begin(
                self.plan, session, first, last, name, peer.identity, self.identities
            )
        return found

    def shares(
        self, keys: dict[str, Document], session: int = 1
    ) -> tuple[dict[str, Document], dict[str, dict[str, bytes]]]:
        answer = self.ask("shares", self.documents("keys", keys), session=session)
        assert answer.status == "done", answer.code
        payload = self.bed.fetch(answer)
        assert sha256(payload) == answer.payload_sha256
        found = {SITE: Document.decode(answer.detail["shares"].encode(), Shares.KIND)}
        parcels = {SITE: dict(Enclosure.decode(payload, ROOM, {}, parcels=True).parcels)}
        for name, peer in self.peers.items():
            assert peer.keyed is not None
            peer.shared, found[name], parcels[name] = protocol.share(peer.keyed, keys, peer.identity)
        return found, parcels

    def set_up(self, session: int = 1, first: int = 1, last: int = 8) -> Ring:
        keys = self.keys(session, first, last)
        shares, parcels = self.shares(keys, session)
        place = place_of(self.plan, session, first, last, self.identities)
        self.ring, bad = accept_shares(place, keys, shares, parcels)
        assert bad == {}
        for name, peer in self.peers.items():
            assert peer.shared is not None
            peer.ready = protocol.receive(peer.shared, shares, self.ring.bundles(name))
        answer = self.ask("seal", self.seal_payload(), session=session)
        assert answer.detail == {TRANSCRIPT: self.ring.transcript}, answer.code
        return self.ring

    def seal_payload(self) -> bytes:
        assert self.ring is not None
        return self.documents("shares", dict(self.ring.shares), self.ring.bundles(SITE))

    # ---- a slot --------------------------------------------------------------------------------------------------

    def train(self, slot: int, **changes: Any) -> tuple[Request, Answer]:
        """Ask the agent to train under masks."""
        assert self.ring is not None
        values: dict[str, Any] = {
            "cohort": ALL, "round": slot, "parameters": {TRANSCRIPT: self.ring.transcript}, "slot": slot, **changes,
        }  # fmt: skip
        document = self.bed.request("train", self.bed.vector, **values)
        assert self.bed.agent is not None
        answer = self.bed.read(self.bed.take(self.bed.agent.submit(document, self.bed.vector)))
        return Request.decode(document, self.bed.coordinator.public), answer

    def signed(self, answer: Answer) -> Document:
        return answer.signed(self.bed.identity)

    def total(self, request: Request, answer: Answer, names: Iterable[str] = PEERS) -> SecureSum:
        """The sum of the agent's vector and the peers' zeros."""
        assert self.ring is not None
        numbers = answer.payload_bytes // 4
        total = SecureSum(self.ring, request.header.slot, request.hash, request.header.cohort, numbers)
        total.add(SITE, self.signed(answer), np.frombuffer(self.bed.fetch(answer), "<u4"))
        for name in names:
            words = np.zeros(numbers, np.uint32)
            document = self.peers[name].submission(request, words, answer.statistics)
            total.add(name, document, words)
        return total

    def stage(
        self, kind: str, request: Request, cohort: Iterable[str], proof: dict[str, Document] | None = None, **more: Any
    ) -> Answer:
        header = request.header
        payload = self.documents("proof", proof) if proof else b""
        values = {"slot": header.slot, "round": header.round, "session": header.session, "cohort": tuple(cohort)}
        return self.bed.call(kind, payload, **{**values, **more})

    def opening(self, answer: Answer) -> Document:
        return Document.decode(answer.detail["opening"].encode(), Opening.KIND)

    def survivors(self, answer: Answer) -> Document:
        return Document.decode(answer.detail["survivors"].encode(), Survivors.KIND)

    def again(self) -> None:
        """The agent ends and starts again on the same records."""
        self.bed.stop()
        self.bed.start()


def ready(bed: Bed) -> None:
    """All the way to an open session."""
    bed.start()
    bed.ready()


def make_ring(
    folder: Path, prepare: Callable[[Bed], object] = ready, sections: Sections | None = None, **options: Any
) -> RingBed:
    """A started agent that approves a study with secure sums and has its first session open, as `prepare` does it."""
    peers = {name: Peer(name) for name in PEERS}
    bed = make_bed(
        folder,
        others={name: peer.identity for name, peer in peers.items()},
        **merged({"aggregation": {"minimum_sites": 3}, "secagg": {"mode": "on"}}, sections or {}),
        **options,
    )
    prepare(bed)
    assert bed.agent is not None
    sizes = bed.agent.desk.sizes(bed.study)
    return RingBed(bed, peers, Plan.of(bed.study, sizes.trainable, sizes.statistics))
