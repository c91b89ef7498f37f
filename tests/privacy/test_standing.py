"""What the log says of a site's own studies: a reservation that is not the approved one, and an end that is untrue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from privacy.errors import Refusal, RefusalCode
from privacy.ledger import Leaf
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.proposal import Proposal
from privacy.standing import Standing
from privacy.witness import PATIENCE, Witness, WrongEntry
from tests.privacy.ledger_kit import NAMES, NOW, SITES, STUDY, Log, abort, approved, commit, digest, reserve, step
from tests.privacy.ledger_kit import witness as fresh_witness

ANNA, OTHER = SITES["st-anna"], digest("another study")


def other_reserve(**changes: object) -> Leaf:
    """RESERVE of the study, saying something else than the sites approved."""
    return Leaf.of(reserve().entry.model_copy(update=changes))


def served(slots: int, study: str = STUDY, site: Witness | None = None) -> tuple[Witness, list[Leaf]]:
    """A site that has signed a release for each slot."""
    site, leaves = site or fresh_witness(), []
    for slot in range(1, slots + 1):
        site, leaf = site.step(ANNA, study, slot, digest("request", study, slot), digest("release", slot))
        leaves.append(leaf)
    return site, leaves


def stops(code: LedgerCode, site: Witness, proposal: Proposal) -> Witness:
    """The head is refused for this; the state that is to be kept, as it comes back from the disk."""
    with pytest.raises(WrongEntry) as caught:
        site.cosign(ANNA, proposal, NOW, approved)
    assert caught.value.code is code
    kept = Witness.decode(caught.value.state.encode())
    assert (kept.head, kept.pending) == (site.head, site.pending), "nothing of the head is taken over"
    return kept


def goes_on(site: Witness, study: str = STUDY, slot: int = 30) -> bool:
    """Whether the site would release something for the study in this slot."""
    try:
        site.check(PATIENCE + 100, study=study)
        site.step(ANNA, study, slot, digest("request"), digest("release"))
    except LedgerRefusal:
        return False
    return True


@pytest.mark.parametrize(
    "wrong",
    [{"plan": digest("a cheaper plan")}, {"epsilon_aggregate": "1"}, {"delta": "0.01"}],
    ids=lambda w: next(iter(w)),
)
def test_B7_attack_a_reservation_that_a_site_never_approved_stops_the_study_at_that_site(wrong):
    site, leaves = served(2)
    log = Log([other_reserve(**wrong), *leaves])
    kept = stops(LedgerCode.RESERVE_WRONG, site, log.proposal(site))
    assert not goes_on(kept)
    assert goes_on(kept, OTHER), "of another study it may release more, until its releases are missing too long"
    again = stops(LedgerCode.RESERVE_WRONG, kept, log.proposal(kept, entries=()))
    assert not goes_on(again), "hiding it later changes nothing"
    with pytest.raises(LedgerRefusal, match="slots: 9, not 6"):
        site.cosign(ANNA, log.proposal(site), NOW, lambda found: ["slots: 9, not 6"])


def test_B7_attack_a_study_that_the_site_does_not_know_is_not_reserved_in_its_name():
    site, leaves = served(1)
    with pytest.raises(WrongEntry) as caught:
        site.cosign(ANNA, Log([reserve(), *leaves]).proposal(site), NOW, lambda found: None)
    assert caught.value.code is LedgerCode.RESERVE_WRONG


def test_studies_of_other_sites_are_no_business_of_this_one():
    log = Log([reserve(OTHER, sites=NAMES[1:]), step("st-berta", 1, study=OTHER), abort(OTHER)])
    site = fresh_witness()
    known, _ = site.cosign(ANNA, log.proposal(site), NOW, lambda found: ["never asked"])
    assert known.standings == {}


def test_B7_attack_a_release_is_in_the_log_and_no_reservation_is_shown():
    site, leaves = served(2)
    log = Log([reserve(), *leaves])
    for hidden in (
        log.proposal(site, entries=()),
        log.proposal(site, included={h: i for h, i in log.proposal(site).included.items() if h != log.leaves[0].hash}),
        log.proposal(site, entries=(reserve(OTHER),)),
    ):
        kept = stops(LedgerCode.RESERVE_MISSING, site, hidden)
        assert not goes_on(kept)
    healed, _ = kept.cosign(ANNA, log.proposal(kept), NOW, approved)
    assert goes_on(healed)
    assert healed.pending == ()


def test_B7_attack_a_proof_of_another_place_reserves_nothing():
    site, leaves = served(1)
    log = Log([reserve(), *leaves])
    true = log.proposal(site)
    proof = true.included[log.leaves[0].hash]
    for false in (replace(proof, index=1), true.included[leaves[0].hash], replace(proof, proof=(bytes(32),))):
        stops(LedgerCode.RESERVE_MISSING, site, replace(true, included={**true.included, log.leaves[0].hash: false}))


def test_B7_attack_a_reservation_that_was_written_behind_the_release():
    site, leaves = served(1)
    stops(LedgerCode.RESERVE_MISSING, site, (log := Log([*leaves, reserve()])).proposal(site))
    assert log.tree.size == 2


def test_B7_attack_a_second_reservation_of_the_same_study():
    site, leaves = served(1)
    log = Log([reserve(), *leaves])
    site, _ = site.cosign(ANNA, log.proposal(site), NOW, approved)
    log.add(reserve())
    kept = stops(LedgerCode.RESERVED_TWICE, site, log.proposal(site))
    assert not goes_on(kept)
    kept = stops(LedgerCode.RESERVED_TWICE, kept, log.proposal(kept, entries=(log.leaves[0],)))
    assert not goes_on(kept), "the first one heals nothing"


def test_what_a_refused_head_held_is_not_believed_of_the_next_one():
    """The first head has the right RESERVE of one study and a wrong one of another: only the fault is remembered."""
    site, leaves = served(1)
    site, more = served(1, OTHER, site)
    wrong = Leaf.of(reserve(OTHER).entry.model_copy(update={"plan": digest("cheaper")}))
    kept = stops(LedgerCode.RESERVE_WRONG, site, (log := Log([reserve(), wrong, *leaves, *more])).proposal(site))
    assert kept.standing(STUDY) == Standing()
    log = Log([other_reserve(plan=digest("cheaper")), reserve(OTHER), *leaves, *more])
    kept = stops(LedgerCode.RESERVE_WRONG, kept, log.proposal(kept))
    assert not goes_on(kept)


@pytest.mark.parametrize("used", [0, 2, 41])
def test_B7_attack_an_end_that_counts_fewer_slots_than_the_site_served_or_more_than_were_reserved(used):
    site, leaves = served(3)
    site, _ = site.cosign(ANNA, (log := Log([reserve(), *leaves])).proposal(site), NOW, approved)
    log.add(commit(used))
    kept = stops(LedgerCode.SLOTS_USED, site, log.proposal(site))
    stops(LedgerCode.SLOTS_USED, kept, log.proposal(kept, entries=(log.leaves[0],)))


@pytest.mark.parametrize("end", [commit(5), abort()])
def test_B2_after_the_end_was_shown_nothing_is_ever_released_again(end):
    site, leaves = served(3)
    log = Log([reserve(), *leaves, end])
    site, _ = site.cosign(ANNA, log.proposal(site), NOW, approved)
    site = Witness.decode(site.encode())
    assert not goes_on(site)
    assert goes_on(site, OTHER)
    log.add(reserve(OTHER))
    again, _ = site.cosign(ANNA, log.proposal(site), NOW, approved)
    assert not goes_on(again)


def test_attack_a_second_end_and_a_release_behind_the_end():
    site, leaves = served(2)
    log = Log([reserve(), leaves[0], abort()])
    known, _ = site.cosign(ANNA, log.proposal(site), NOW, approved)
    log.add(commit(2))
    stops(LedgerCode.STUDY_CLOSED, known, log.proposal(known))
    behind = Log([reserve(), leaves[0], abort(), leaves[1]])
    stops(LedgerCode.STUDY_CLOSED, site, behind.proposal(site))


def test_attack_an_end_without_a_reservation_ends_nothing():
    site, leaves = served(1)
    log = Log([reserve(), *leaves, abort()])
    kept = stops(LedgerCode.RESERVE_MISSING, site, log.proposal(site, entries=(log.leaves[2],)))
    assert kept.standing(STUDY).end == ""


@pytest.mark.parametrize("row", [[-1, 0, 0, "", ""], [1, 40, 0, "over", ""], [1, 40, 0, "", "late"], [1, 40, 0, ""]])
def test_a_changed_standing_on_the_disk_is_not_read(row):
    site, leaves = served(1)
    site, _ = site.cosign(ANNA, Log([reserve(), *leaves]).proposal(site), NOW, approved)
    good = b'"standings":{"%s":[1,40,0,"",""]}' % STUDY.encode()
    assert good in site.encode()
    bad = b'"standings":{"%s":%s}' % (STUDY.encode(), str(row).replace("'", '"').replace(" ", "").encode())
    with pytest.raises(Refusal) as caught:
        Witness.decode(site.encode().replace(good, bad))
    assert caught.value.code is RefusalCode.MALFORMED


def test_a_proposal_does_not_carry_releases_as_entries():
    log = Log([reserve(), step("st-anna", 1)])
    data = log.proposal(fresh_witness(), entries=tuple(log.leaves)).encode()
    with pytest.raises(Refusal) as caught:
        Proposal.decode(data)
    assert caught.value.code is RefusalCode.MALFORMED
