"""A site with shared noise, in a ring: killed or without room anywhere between the charge and the handing over.

What leaves is masked besides, so what may never happen is that two different vectors of one slot leave: their
difference would be two draws of the noise without the mask.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.store import Store
from privacy import airlock
from privacy.canonical import sha256
from privacy.journal import verify
from privacy.ledger import Leaf, Step
from privacy.mechanisms import training
from privacy.messages import Answer, Request
from privacy.secagg.coordinator import Opened
from privacy.stages import TRANSCRIPT
from tests.client.agent.bed import SITE, Bed
from tests.client.agent.private_kit import charges, die_at, granted, journal, private_bed, shared_ring
from tests.client.agent.ring_kit import ALL, RingBed

POINTS = [
    "before client.agent.purse Purse charge",
    "after client.agent.purse Purse charge",
    "after privacy.airlock Airlock noise",
    "before client.agent.secure Secure hide",
    "after client.agent.secure Secure hide",
    "before privacy.airlock Airlock keep",
    "after privacy.airlock Airlock keep",
    "before client.agent.store Store keep_answer",
    "after client.agent.store Store keep_answer",
]
FETCHING = ["before privacy.airlock Airlock fetch", "after privacy.airlock Airlock fetch"]
USUAL = {
    "before client.agent.secure Secure hide", "after privacy.airlock Airlock keep",
    "after client.agent.store Store keep_answer", "after privacy.airlock Airlock fetch",
}  # fmt: skip


def asked(ring: RingBed, slot: int) -> bytes:
    """The request to train in a slot, signed; the same bytes each time."""
    assert ring.ring is not None
    named = {TRANSCRIPT: ring.ring.transcript}
    return ring.bed.request("train", ring.bed.vector, slot=slot, round=slot, cohort=ALL, parameters=named)


def answered(bed: Bed, document: bytes) -> Answer:
    """What the agent in this process answers to it."""
    assert bed.agent is not None
    return bed.read(bed.take(bed.agent.submit(document, bed.vector)))


def vectors(bed: Bed) -> set[tuple[int, str]]:
    """(slot, SHA-256) of every vector that has left."""
    return {(line["slot"], line["sha256"]) for line in journal(bed) if line["what"] == "train vector"}


def opened(ring: RingBed, document: bytes, answer: Answer) -> Opened:
    """The sum of the agent's part and the others' zeros, taken through all stages."""
    request = Request.decode(document, ring.bed.coordinator.public)
    total = ring.total(request, answer)
    total.close()
    proof = dict(total.submissions)
    own = ring.opening(ring.stage("unmask", request, ALL, proof))
    others = {name: peer.opening(request, ALL, proof) for name, peer in ring.peers.items()}
    found, bad = total.open({SITE: own, **others})
    assert bad == {}
    return found


def counters(answer: Answer) -> list[int]:
    found = [Leaf.read(line.encode()).entry for line in answer.detail["steps"].splitlines()]
    return [entry.counter for entry in found if isinstance(entry, Step)]


@pytest.mark.parametrize(
    "where", [point if point in USUAL else pytest.param(point, marks=pytest.mark.long) for point in POINTS + FETCHING]
)
def test_S3_killed_between_charge_and_hand_over_under_masks(tmp_path: Path, where: str) -> None:
    ring = shared_ring(tmp_path / "site")
    bed, document = ring.bed, asked(ring, 1)
    bed.stop()
    before = len(journal(bed))
    die_at(bed, where, document, bed.vector)
    if where in POINTS:
        assert [line for line in journal(bed)[before:] if line["slot"]] == [], "nothing of the slot has left"
    assert len(charges(bed)) <= 1
    agent = bed.start()
    try:
        assert agent.purse.trouble() == ""
        answer = answered(bed, document)
        assert answer.status == "done", answer.code
        assert sha256(bed.fetch(answer)) == answer.payload_sha256
        assert vectors(bed) == {(1, answer.payload_sha256)}, "one vector of a slot leaves, however often"
        assert [(row[0], row[3], row[5]) for row in charges(bed)] == [(1, 1, 1)], "one charge for one release"
        assert counters(answer) == [1]
        found, mechanism = opened(ring, document, answer), training(bed.study, ring.plan.size)
        spread = np.std(found.words[: found.size].view(np.int32))
        assert spread == pytest.approx(float(mechanism.deviation), rel=0.1), "noise once, and no mask"
        assert answered(ring.bed, asked(ring, 2)).status == "done"
        assert [row[5] for row in charges(bed)] == [1, 2]
    finally:
        bed.stop()
    assert verify(bed.home.agent / "journal.jsonl") > 0


# ---- a full disk ---------------------------------------------------------------------------------------------


def no_room_for_vectors(bed: Bed, patch: pytest.MonkeyPatch) -> None:
    """The disk is full when the noised vector is written."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(airlock, "open", Full, raising=False)


def no_room_for_records(bed: Bed, patch: pytest.MonkeyPatch) -> None:
    """The disk is full when the answer is recorded, after the vector was kept: the records have no page more."""
    real = Store.keep_answer

    def full(self: Store, study: str, slot: int, request: str, answer: bytes, *rest: Any) -> None:
        self._db.execute(f"PRAGMA max_page_count={self._db.execute('PRAGMA page_count').fetchone()[0]}")
        try:
            real(self, study, slot, request, answer.ljust(1 << 20), *rest)
        finally:
            self._db.execute("PRAGMA max_page_count=4294967294")

    patch.setattr(Store, "keep_answer", full)


@pytest.mark.parametrize("full", [no_room_for_vectors, no_room_for_records])
@pytest.mark.parametrize("mode", ["shared", "per-site"])
def test_S3_without_room_for_what_was_charged_nothing_leaves_and_it_is_charged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, full: Callable[[Bed, pytest.MonkeyPatch], None]
) -> None:
    if mode == "shared":
        ring = shared_ring(tmp_path / "site")
        bed, document = ring.bed, asked(ring, 1)
    else:
        bed = private_bed(tmp_path / "site")
        granted(bed)
        document = bed.request("train", bed.vector, slot=1)
    assert bed.agent is not None
    before = len(journal(bed))
    with monkeypatch.context() as patch:
        full(bed, patch)
        assert answered(bed, document).code == "disk-full"
        assert list((bed.home.agent / "answers").iterdir()) == []
        assert [row[5] for row in charges(bed)] == [1], "the charge was durable before"
        assert [line["what"] for line in journal(bed)[before:]] == ["refusal"]
    answer = answered(bed, document)
    assert answer.status == "done", answer.code
    bed.fetch(answer)
    assert vectors(bed) == {(1, answer.payload_sha256)}
    assert counters(answer) == [row[5] for row in charges(bed)] == [1]
    assert bed.agent.purse.trouble() == ""
    bed.stop()
