"""One site as a witness of the common log: what it signs, what it cosigns, and what it does with old records."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from client.agent.logbook import PATIENCE, Logbook
from privacy.checkpoint import NoteSignature
from privacy.ledger import Leaf, Reserve
from privacy.proposal import Proposal
from tests.client.agent.bed import SITE, Bed
from tests.client.agent.log_kit import Log, witness
from tests.client.agent.private_kit import granted, private_bed, rows


@pytest.fixture
def bed(granted_bed: Bed) -> Bed:
    return granted_bed


def logbook(bed: Bed) -> Logbook:
    assert bed.agent is not None
    return bed.agent._logbook


def test_B7_a_head_that_holds_the_sites_releases_is_cosigned_and_they_are_waited_for_no_longer(bed: Bed) -> None:
    log = Log(bed)
    log.take(bed.call("train", bed.vector, slot=1).detail["steps"])
    assert len(witness(bed).pending) == 1
    answer = bed.call("witness", log.proposal(0).encode())
    assert "cosignature" in answer.detail
    assert (witness(bed).pending, witness(bed).size) == ((), 2)
    assert bed.call("witness", log.proposal(0).encode(), deadline_seconds=599).detail == {"size": "2"}


def test_B7_a_head_that_goes_back_or_splits_is_refused(bed: Bed) -> None:
    log = Log(bed)
    log.take(bed.call("train", bed.vector, slot=1).detail["steps"])
    bed.call("witness", log.proposal(0).encode())
    other = Log(bed)
    assert bed.call("witness", other.proposal(0).encode()).code == "ledger", "older than what was cosigned"
    other.add(log.leaves[0])
    assert bed.call("witness", Proposal(other.proposal(0).note, 2).encode()).code == "ledger", "another tree"


def test_B7_a_site_whose_releases_are_not_written_down_stops(tmp_path: Path) -> None:
    bed = private_bed(tmp_path / "site")
    granted(bed)
    try:
        bed.call("train", bed.vector, slot=1)
        state = witness(bed)
        assert bed.agent is not None
        waiting = replace(state, signed=state.signed + PATIENCE + 1)  # as after so many releases of other studies
        bed.agent.store.keep_witness(waiting.encode())
        assert bed.call("train", bed.vector, slot=2, round=2).code == "ledger"
        assert rows(bed, "SELECT count(*) FROM charges") == [(1,)], "nothing was charged for it"
    finally:
        bed.stop()


def test_B7_a_release_and_a_cosignature_at_the_same_moment_lose_neither(bed: Bed) -> None:
    """The state is read, changed and made durable by one at a time."""
    assert bed.agent is not None
    book, store, log = logbook(bed), bed.agent.store, Log(bed)
    failures: list[BaseException] = []

    def release() -> None:
        try:
            for slot in range(1, 16):
                with book.turn:
                    state, _ = book.released(bed.hash, slot, "22" * 32, f"{slot:064x}")
                    store.keep_witness(state)
        except BaseException as error:
            failures.append(error)

    def cosign() -> None:
        try:
            for number in range(15):
                log.add(Leaf.of(Reserve(
                    study=f"{number:064x}", plan="00" * 32, slots=1, grants={SITE: "11" * 32}, epsilon_aggregate="1",
                    epsilon_broken="1", delta="0.1",
                )))  # fmt: skip
                size = witness(bed).size if store.witness() else 0
                assert "cosignature" in book.cosign(bed.hash, log.proposal(size).encode())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for work in (release, cosign)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    state = witness(bed)
    assert state.counters[bed.hash] == (15, 15)
    assert [leaf.entry.counter for _, leaf in state.pending] == list(range(1, 16))  # type: ignore[union-attr]
    assert state.size == log.tree.size


def test_S3_records_older_than_its_own_cosignature_cost_a_site_its_keys_and_shut_its_purse(bed: Bed) -> None:
    log = Log(bed)
    log.take(bed.call("train", bed.vector, slot=1).detail["steps"])
    before = bed.agent.store.witness() if bed.agent else b""
    proposal = log.proposal(0)
    line = bed.call("witness", proposal.encode()).detail["cosignature"]
    cosigned = proposal.note.adding(NoteSignature.read(line))
    assert bed.agent is not None
    bed.agent.store.keep_witness(before)  # as after a restored backup
    log.take(bed.call("train", bed.vector, slot=2, round=2).detail["steps"])
    answer = bed.call("witness", log.proposal(0, cosigned).encode())
    assert answer.code == "ledger"
    assert rows(bed, "SELECT count(*) FROM slots WHERE state != 'spent'") == [(0,)]
    assert rows(bed, "SELECT count(*) FROM rings") == [(0,)]
    assert bed.call("train", bed.vector, slot=3, round=3).code in {"ledger", "grant-spent"}
    assert bed.agent.purse.trouble() != ""
    assert witness(bed).size == 2, "it goes on from the head that it had cosigned"
