"""What a site believes of its studies in the common log: what was reserved, and the end that frees the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from privacy.checkpoint import Note
from privacy.errors import ConsiliumError
from privacy.identity import Identity
from privacy.ledger import Abort, Commit, Leaf
from privacy.proposal import Proposal
from tests.client.agent.bed import SITE, Bed
from tests.client.agent.log_kit import Log, witness
from tests.client.agent.private_kit import charges, die_at, paper, rows


@pytest.fixture
def bed(granted_bed: Bed) -> Bed:
    return granted_bed


@pytest.fixture
def log(bed: Bed) -> Log:
    """One slot was served and is in the log."""
    made = Log(bed)
    made.take(bed.call("train", bed.vector, slot=1).detail["steps"])
    return made


def told(bed: Bed) -> str:
    """What the operator reads, newest first."""
    assert bed.agent is not None
    return "\n".join(text for _, _, text in bed.agent.store.events(20))


def abort(bed: Bed) -> Leaf:
    return Leaf.of(Abort(study=bed.hash, reason="stopped"))


def spent(bed: Bed) -> tuple[str, int]:
    """The state of the plan, and the releases of training that patients' histories hold."""
    ((state, held),) = rows(
        bed, "SELECT p.state, c.held FROM plans p JOIN parts c ON c.plan = p.id WHERE c.role = 'train'"
    )
    return state, held


def shown(bed: Bed, proposal: Proposal) -> str:
    """Put a head before the site; "" when it cosigned it, else the code."""
    answer = bed.call("witness", proposal.encode())
    return "" if "cosignature" in answer.detail else answer.code or "another start"


# ---- what was reserved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": "00" * 32}, "the digest of the plan"),
        ({"slots": 7}, "slots: 7, not"),
        ({"epsilon_aggregate": "0.25"}, "ε against who sees aggregates: 0.25, not"),
        ({"delta": "0.00001"}, "δ: 0.00001, not"),
        ({"grants": {SITE: "11" * 32}}, "the grant of this site's officer"),
        ({"grants": {"st-bona": "11" * 32}}, "the grant of this site's officer"),
    ],
    ids=["plan", "slots", "epsilon", "delta", "a grant nobody wrote", "no grant of this site"],
)
def test_B7_attack_a_reservation_that_this_site_did_not_approve_is_refused_and_its_next_release_stops(
    bed: Bed, changes: dict[str, Any], words: str
) -> None:
    log = Log(bed, **changes)
    log.take(bed.call("train", bed.vector, slot=1).detail["steps"])
    assert shown(bed, log.proposal(0)) == "ledger"
    assert words in told(bed), "the operator reads what is wrong"
    assert bed.call("train", bed.vector, slot=2, round=2).code == "ledger"
    bed.stop()
    bed.start()
    assert bed.call("train", bed.vector, slot=2, round=2).code == "ledger", "after another start too"
    assert len(charges(bed)) == 1, "nothing was charged for what was refused"


def test_B7_attack_a_coordinator_that_shows_no_reservation_gets_no_further_release(bed: Bed, log: Log) -> None:
    assert shown(bed, replace(log.proposal(0), entries=())) == "ledger"
    assert bed.call("train", bed.vector, slot=2, round=2).code == "ledger"
    assert shown(bed, log.proposal(0)) == ""
    assert bed.call("train", bed.vector, slot=2, round=2).status == "done"


def test_B6_a_reservation_on_a_grant_that_was_revoked_since_is_still_the_sites_own(bed: Bed, log: Log) -> None:
    assert bed.agent is not None
    officer = Identity.generate()
    bed.agent.purse.trust(officer.public, replace=True)
    bed.agent.purse.revoke(bed.hash)
    bed.agent.purse.take(paper(officer, bed))
    assert shown(bed, log.proposal(0)) == ""


def test_B7_a_release_that_the_log_does_not_hold_is_handed_in_with_the_cosignature(bed: Bed) -> None:
    log = Log(bed)
    line = bed.call("train", bed.vector, slot=1).detail["steps"]
    assert bed.call("witness", log.proposal(0).encode()).detail["steps"] == line
    assert bed.call("witness", log.proposal(0).encode(), deadline_seconds=9).detail == {"size": "1", "steps": line}
    log.take(line)
    assert "steps" not in bed.call("witness", log.proposal(1).encode()).detail


# ---- the end -------------------------------------------------------------------------------------------------


def test_B2_an_abort_in_the_log_gives_back_what_no_slot_used_and_the_study_never_runs_again(bed: Bed, log: Log) -> None:
    steps = bed.study.rounds.local_steps
    assert spent(bed) == ("reserved", bed.study.rounds.count * steps)
    log.add(abort(bed))
    assert shown(bed, log.proposal(0)) == ""
    assert spent(bed) == ("aborted", steps), "what was used stays charged"
    assert "the coordinator has aborted it" in told(bed)
    for slot, session in ((1, 1), (2, 1), (2, 2)):
        assert bed.call("train", bed.vector, slot=slot, session=session, round=2).code == "session-closed"
    assert bed.call("open", bed.initial, session=2).code == "session-closed"
    assert bed.agent is not None
    bed.agent.purse.verify_whole(bed.agent.desk.key)
    officer = Identity.generate()
    bed.agent.purse.trust(officer.public, replace=True)
    with pytest.raises(ConsiliumError, match="closed in this site's ledger"):
        bed.agent.purse.take(paper(officer, bed))


@pytest.mark.parametrize("missing", ["signature", "proof", "place", "consistency"])
def test_B2_attack_an_abort_that_is_not_proven_gives_nothing_back(bed: Bed, log: Log, missing: str) -> None:
    assert shown(bed, log.proposal(0)) == ""
    before, end = spent(bed), abort(bed)
    log.add(end)
    true = log.proposal(2)
    false = {
        "signature": replace(true, note=Note(true.note.checkpoint).signed_by(Identity.generate())),
        "proof": replace(true, included={h: i for h, i in true.included.items() if h != end.hash}),
        "place": replace(true, included={**true.included, end.hash: replace(true.included[end.hash], index=0)}),
        "consistency": replace(true, consistency=(bytes(32),)),
    }[missing]
    shown(bed, false)
    assert spent(bed) == before
    assert bed.call("train", bed.vector, slot=2, round=2).status == "done", "and the study goes on"


def test_B2_attack_after_an_abort_the_coordinator_says_that_there_was_none(bed: Bed, log: Log) -> None:
    """It shows another log, an end of another kind, a new session: what was given back is never spent a second time."""
    without = list(log.leaves)
    log.add(abort(bed))
    assert shown(bed, log.proposal(0)) == ""
    after, other = spent(bed), Log(bed)
    for leaf in [*without[1:], Leaf.of(Commit(study=bed.hash, slots_used=6))]:
        other.add(leaf)
    for proposal in (other.proposal(0), other.proposal(3), replace(log.proposal(3), entries=())):
        assert shown(bed, proposal) == "session-closed"
        assert bed.call("offer", bed.offer_payload(), session=0).detail["state"] == "finished"
        assert bed.call("open", bed.initial, session=3).code == "session-closed"
        assert bed.call("train", bed.vector, slot=3, session=3, round=3).code == "session-closed"
    assert spent(bed) == after
    assert witness(bed).standing(bed.hash).end == "aborted"


@pytest.mark.parametrize(
    "where",
    [
        "before client.agent.store Store keep_witness",
        "after client.agent.store Store keep_witness",
        "before client.agent.store Store finish",
        "after client.agent.store Store finish",
        "before client.agent.purse Purse settle",
        "after client.agent.purse Purse settle",
    ],
)
def test_B2_S3_kill_9_between_an_abort_and_what_it_gives_back(bed: Bed, log: Log, where: str) -> None:
    log.add(abort(bed))
    payload, steps = log.proposal(0).encode(), bed.study.rounds.local_steps
    document = bed.request("witness", payload)
    bed.stop()
    die_at(bed, where, document, payload)
    states = {"before keep_witness": "reserved", "after settle": "aborted"}
    when, *_, method = where.split()
    assert spent(bed)[0] == states.get(f"{when} {method}", "reserved"), "nothing is given back before it is closed"
    bed.start()
    if where.startswith("before") and method == "keep_witness":
        assert spent(bed) == ("reserved", bed.study.rounds.count * steps)
        assert shown(bed, log.proposal(0)) == ""
    assert spent(bed) == ("aborted", steps)
    assert bed.call("train", bed.vector, slot=2, round=2).code == "session-closed"
    assert bed.agent is not None
    assert bed.agent.purse.trouble() == ""


def test_B2_S3_after_a_kill_nothing_is_released_although_nothing_was_given_back_yet(bed: Bed, log: Log) -> None:
    """The first thing on the disk is that the study is over: a release would be refused before it is charged."""
    log.add(abort(bed))
    assert bed.agent is not None
    known, _ = witness(bed).cosign(bed.identity, log.proposal(0), 0, lambda found: [])
    bed.agent.store.keep_witness(known.encode())  # and the process is killed here
    assert spent(bed)[0] == "reserved"
    assert bed.call("train", bed.vector, slot=2, round=2).code == "ledger"
    assert len(charges(bed)) == 1


def test_B2_a_commit_in_the_log_settles_a_study_whose_model_is_still_to_come(bed: Bed, log: Log) -> None:
    log.add(Leaf.of(Commit(study=bed.hash, slots_used=1)))
    assert shown(bed, log.proposal(0)) == ""
    assert spent(bed) == ("committed", bed.study.rounds.local_steps)
    assert bed.call("train", bed.vector, slot=2, round=2).code == "ledger"
    assert bed.call("open", bed.initial, session=2).status == "done", "so that a model can come in a new session"
    assert bed.call("train", bed.vector, slot=2, session=2, round=2).code == "ledger"
    assert bed.call("deliver", bed.parcel(), session=2, round=1).status == "done"


def test_a_release_that_the_closed_log_can_never_hold_is_told_to_the_operator_and_waited_for_no_longer(
    bed: Bed,
) -> None:
    log = Log(bed)
    bed.call("train", bed.vector, slot=1)
    log.add(abort(bed))
    assert shown(bed, log.proposal(0)) == ""
    assert witness(bed).pending == ()
    assert "slot 1: the log was closed without this site's release of it" in told(bed)
