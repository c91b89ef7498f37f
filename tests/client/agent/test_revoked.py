"""RULES B6: once a grant is revoked nothing more leaves, wherever the work stood; what was charged stays charged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.core import Agent
from client.agent.logbook import Logbook
from client.agent.purse import Purse
from client.agent.rings import Rings
from client.agent.secure import Secure
from client.agent.store import Store
from privacy.airlock import Airlock
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Identity
from privacy.mechanisms import Mechanism
from privacy.secagg.coordinator import SecureSum
from tests.client.agent.bed import ROOT, SITE, Bed, wait_for
from tests.client.agent.private_kit import charges, journal, paper, rows, shared_ring
from tests.client.agent.ring_kit import ALL, PEERS, RingBed


@pytest.fixture
def bed(granted_bed: Bed) -> Bed:
    return granted_bed


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[RingBed]:
    """Shared noise under masks, with keys."""
    made = shared_ring(tmp_path / "site")
    yield made
    made.bed.stop()


def revoke(bed: Bed) -> None:
    assert bed.agent is not None
    bed.agent.gate.revoke(bed.hash)


def revoking(monkeypatch: pytest.MonkeyPatch, bed: Bed, owner: type, method: str) -> None:
    """The operator revokes just after a method has returned, once."""
    real: Callable[..., Any] = getattr(owner, method)

    def changed(*arguments: Any, **more: Any) -> Any:
        found = real(*arguments, **more)
        monkeypatch.setattr(owner, method, real)
        revoke(bed)
        return found

    monkeypatch.setattr(owner, method, changed)


def left(bed: Bed) -> list[str]:
    """What left under any slot, refusals aside."""
    return [line["what"] for line in journal(bed) if line["slot"] and line["what"] != "refusal"]


def nothing_is_kept(bed: Bed) -> None:
    """Neither stored bytes nor keys; the slots are tombstones."""
    assert rows(bed, "SELECT count(*) FROM slots WHERE state != 'spent' OR answer != x''") == [(0,)]
    assert rows(bed, "SELECT count(*) FROM rings") == [(0,)]
    assert rows(bed, "SELECT count(*) FROM stages WHERE answer != x'' OR payload != x''") == [(0,)]
    wait_for(lambda: not list((bed.home.agent / "answers").iterdir()))


# ---- while it computes, and between two steps of handing over ----------------------------------------------------

COMPUTING = [
    (Purse, "charge"), (Mechanism, "release"), (Secure, "hide"), (Airlock, "keep"), (Logbook, "released"),
    (Store, "keep_answer"), (Agent, "_serve"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "method"), COMPUTING, ids=[method for _, method in COMPUTING])
def test_B6_a_grant_revoked_while_the_site_computes_lets_nothing_leave(
    ring: RingBed, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    bed = ring.bed
    revoking(monkeypatch, bed, owner, method)
    assert ring.train(1)[1].code == "grant-revoked"
    assert [row[0] for row in charges(bed)] == [1], "what was charged stays charged"
    assert left(bed) == []
    nothing_is_kept(bed)
    for again in range(2):
        assert ring.train(1)[1].code == "grant-revoked"
        assert ring.train(2)[1].code == "grant-revoked", "no keys are asked for anew, at the others' cost"
        assert bed.call("open", bed.initial, session=2).code == "grant-revoked"
        if not again:
            ring.again()
    assert [row[0] for row in charges(bed)] == [1]
    assert left(bed) == []


def test_B6_with_noise_of_its_own_a_round_ends_between_two_steps(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    revoking(monkeypatch, bed, Mechanism, "release")
    assert bed.call("train", bed.vector, slot=1).code == "grant-revoked"
    assert left(bed) == []
    nothing_is_kept(bed)


def test_B6_of_an_answer_that_was_given_no_byte_more_is_fetched(bed: Bed) -> None:
    answer = bed.call("train", bed.vector, slot=1)
    assert answer.status == "done"
    bed.fetch(answer, 0, 100)
    revoke(bed)
    before = journal(bed)
    for offset in (0, 100):
        with pytest.raises(Refusal) as refused:
            bed.fetch(answer, offset, 100)
        assert refused.value.code is RefusalCode.GRANT_REVOKED
    assert bed.call("train", bed.vector, slot=1).code == "grant-revoked"
    assert [line["what"] for line in journal(bed)[len(before) :]] == ["refusal"]
    nothing_is_kept(bed)


# ---- secure sums -------------------------------------------------------------------------------------------------


def test_B6_a_masked_vector_that_left_may_be_summed_but_without_a_share_of_this_site(ring: RingBed) -> None:
    request, answer = ring.train(1)
    total = ring.total(request, answer)
    total.close()
    proof = dict(total.submissions)
    revoke(ring.bed)
    before = left(ring.bed)
    assert ring.stage("unmask", request, ALL, proof).code == "grant-revoked"
    assert ring.stage("survivors", request, (SITE, *PEERS[:2])).code == "grant-revoked"
    assert left(ring.bed) == before
    _, bad = total.open({name: peer.opening(request, ALL, proof) for name, peer in ring.peers.items()})
    assert bad == {}, "the others go on"


def test_B6_a_share_that_was_made_and_not_sent_stays(ring: RingBed, monkeypatch: pytest.MonkeyPatch) -> None:
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    before = left(ring.bed)
    revoking(monkeypatch, ring.bed, Rings, "keep")
    for _ in range(2):
        assert ring.stage("unmask", request, ALL, proof).code == "grant-revoked"
    assert left(ring.bed) == before
    nothing_is_kept(ring.bed)


def test_B6_a_vector_that_did_not_leave_is_dropped_and_the_others_open_without_it(ring: RingBed) -> None:
    request, answer = ring.train(1)
    revoke(ring.bed)
    with pytest.raises(Refusal):
        ring.bed.fetch(answer)
    fewer, numbers = PEERS, answer.payload_bytes // 4
    assert ring.ring is not None
    total = SecureSum(ring.ring, 1, request.hash, request.header.cohort, numbers)
    for name, peer in ring.peers.items():
        words = np.zeros(numbers, np.uint32)
        total.add(name, peer.submission(request, words, answer.statistics), words)
    total.close()
    signed = {name: peer.survivors(request, fewer) for name, peer in ring.peers.items()}
    openings = {name: peer.opening(request, fewer, signed) for name, peer in ring.peers.items()}
    _, bad = total.open(openings, signed)
    assert bad == {}


# ---- after it ----------------------------------------------------------------------------------------------------


def test_B6_after_a_new_grant_the_study_goes_on_in_a_new_session_until_that_is_revoked_too(ring: RingBed) -> None:
    bed = ring.bed
    ring.train(1)
    revoke(bed)
    assert bed.agent is not None
    with pytest.raises(ConsiliumError, match="no grant that could be revoked"):
        revoke(bed)
    officer = Identity.generate()
    bed.agent.purse.trust(officer.public, replace=True)
    bed.agent.purse.take(paper(officer, bed))
    assert ring.train(1)[1].code == "slot-spent", "what was stored before stays dead"
    assert bed.call("open", bed.initial, session=2).status == "done"
    ring.set_up(session=2, first=2)
    request, answer = ring.train(2, session=2, round=1)
    assert answer.status == "done", answer.code
    ring.total(request, answer)
    assert [row[0] for row in charges(bed)] == [1, 2]
    revoke(bed)
    assert ring.train(3, session=2, round=2)[1].code == "grant-revoked"
    assert [row[0] for row in charges(bed)] == [1, 2]
    nothing_is_kept(bed)


# ---- kill -9 in the middle of revoking ---------------------------------------------------------------------------

_SCRIPT = """
import os, signal, sys
from pathlib import Path
from client.agent.core import Agent
from client.agent.papers import Papers
from client.agent.purse import Purse
from client.agent.rings import Rings
from client.home import SiteHome

home, study, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
kind, method = where.split()
real = getattr(globals()[kind], method)

def deadly(*arguments, **more):
    real(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)

agent = Agent(SiteHome(home))
setattr(globals()[kind], method, deadly)
agent.gate.revoke(study)
"""


@pytest.mark.parametrize("where", ["Papers revoke", "Rings destroy", "Purse revoke"])
def test_B6_S3_killed_in_the_middle_of_revoking_it_is_all_done_or_not_at_all(ring: RingBed, where: str) -> None:
    bed = ring.bed
    _, answer = ring.train(1)
    bed.stop()
    command = [sys.executable, "-c", _SCRIPT, str(bed.home.root), bed.hash, where]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    bed.start()
    if where != "Purse revoke":
        assert len(bed.fetch(answer)) == answer.payload_bytes, "the operator was not told that it is revoked"
        revoke(bed)
    before = left(bed)
    with pytest.raises(Refusal):
        bed.fetch(answer)
    assert ring.train(1)[1].code == "grant-revoked"
    assert left(bed) == before
    nothing_is_kept(bed)
