"""The consortium's ledger: which entry may follow which, what a site cosigns, and what an officer finds in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.checkpoint import Checkpoint, Note, cosigned_at, valid_head, witnesses_of
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.ledger import Account, Leaf, Step, admit_all
from privacy.ledger_check import first_line, verify_file, verify_ledger
from privacy.ledger_codes import LEDGER_REFUSALS, LedgerCode, LedgerRefusal
from privacy.merkle import Tree, leaf_hash
from privacy.proposal import Proposal
from privacy.roster import Roster
from privacy.witness import PATIENCE, Witness
from tests.privacy.ledger_kit import (
    COORDINATOR,
    LOG,
    NAMES,
    NOW,
    ROSTER,
    SITES,
    STUDY,
    Log,
    abort,
    approved,
    commit,
    cosigned,
    course,
    digest,
    identity,
    reserve,
    roster,
    step,
    witness,
)

VECTORS = Path(__file__).parent.parent / "vectors" / "ledger"
ANNA = SITES["st-anna"]


def vectors(name: str) -> list[dict]:
    return json.loads((VECTORS / f"{name}.json").read_text())


def books(*leaves: Leaf) -> dict[str, Account]:
    return admit_all({}, (leaf.entry for leaf in leaves))


def refused(code: LedgerCode, *leaves: Leaf) -> None:
    with pytest.raises(LedgerRefusal) as caught:
        books(*leaves)
    assert caught.value.code is code


def bytes_of(leaves) -> list[bytes]:
    return [leaf.data for leaf in leaves]


def sign_on(site: Witness, slots: range, study: str = STUDY) -> tuple[Witness, list[Leaf]]:
    leaves = []
    for slot in slots:
        site, leaf = site.step(SITES[site.site], study, slot, digest("request", study, slot), digest("r", slot))
        leaves.append(leaf)
    return site, leaves


# ---- entries -------------------------------------------------------------------------------------------------


def test_every_code_has_words_that_end_in_a_remedy():
    assert set(LEDGER_REFUSALS) == set(LedgerCode)
    for what, remedy in LEDGER_REFUSALS.values():
        assert not what.endswith(".")
        assert remedy.endswith(".")


@pytest.mark.parametrize("vector", vectors("leaves"), ids=lambda v: v["name"])
def test_golden_leaves_are_read_by_every_release(vector):
    leaf = Leaf.read(vector["bytes"].encode())
    leaf.verify({ANNA.public})
    assert (leaf.entry.KIND, leaf.hash.hex()) == (vector["kind"], vector["hash"])
    assert leaf.hash == leaf_hash(leaf.data)


@pytest.mark.parametrize("vector", vectors("bad_leaves"), ids=lambda v: v["name"])
def test_bad_leaves_are_refused_with_the_named_code(vector):
    with pytest.raises(Refusal) as caught:
        Leaf.read(vector["bytes"].encode()).verify({vector["key"]})
    assert caught.value.code.value == vector["code"]


@given(st.binary(max_size=200))
def test_random_bytes_are_no_leaf(data):
    with pytest.raises(Refusal):
        Leaf.read(data)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_leaves_a_release_valid(position, change):
    data = bytearray(step("st-anna", 3).data)
    data[position % len(data)] ^= change
    with pytest.raises(Refusal):
        Leaf.read(bytes(data)).verify({ANNA.public})


def test_a_release_is_believed_under_its_own_sites_keys_only():
    leaf = step("st-anna", 1)
    leaf.verify({identity("older key").public, ANNA.public})
    for keys, code in [({SITES["st-berta"].public}, RefusalCode.BAD_SIGNATURE), (set(), RefusalCode.NOT_IN_STUDY)]:
        with pytest.raises(Refusal) as caught:
            leaf.verify(keys)
        assert caught.value.code is code


def test_an_account_counts_slots_and_closes():
    account = books(*course(3), commit(3))[STUDY]
    assert (account.slots_used, account.open, account.steps["st-anna"]) == (3, False, (3, 3))


def test_a_study_is_reserved_before_and_once_and_closed_for_good():
    refused(LedgerCode.NOT_RESERVED, step("st-anna", 1))
    refused(LedgerCode.NOT_RESERVED, commit(0))
    refused(LedgerCode.RESERVED_TWICE, reserve(), reserve())
    for end in (commit(0), abort()):
        for late in (step("st-anna", 1), commit(0), abort()):
            refused(LedgerCode.STUDY_CLOSED, reserve(), end, late)
        refused(LedgerCode.RESERVED_TWICE, reserve(), end, reserve())


def test_B7_a_sites_own_counter_has_no_gap():
    refused(LedgerCode.COUNTER, reserve(), step("st-anna", 2, counter=2))
    refused(LedgerCode.COUNTER, reserve(), step("st-anna", 1), step("st-anna", 3))
    refused(LedgerCode.COUNTER, reserve(), step("st-anna", 1), step("st-anna", 1))
    books(reserve(), step("st-anna", 4, counter=1), step("st-anna", 9, counter=2), step("st-berta", 9, counter=1))


def test_slots_only_go_up_and_end_with_the_plan():
    refused(LedgerCode.SLOT_OLD, reserve(), step("st-anna", 5, 1), step("st-anna", 5, 2))
    refused(LedgerCode.SLOT_LIMIT, reserve(slots=4), step("st-anna", 5, 1))
    refused(LedgerCode.NOT_GRANTED, reserve(sites=["st-berta"]), step("st-anna", 1))
    refused(LedgerCode.SLOTS_USED, *course(3), commit(2))
    refused(LedgerCode.SLOTS_USED, reserve(slots=4), commit(5))
    assert books(*course(3), commit(7))[STUDY].final.slots_used == 7


def test_a_batch_is_admitted_whole_or_not_at_all():
    before = books(reserve())
    with pytest.raises(LedgerRefusal):
        admit_all(before, [step("st-anna", 1).entry, step("st-anna", 3).entry])
    assert before == books(reserve())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.integers(0, 3)), max_size=25))
def test_whatever_is_admitted_has_gapless_counters_and_rising_slots(moves):
    """Random releases, some of them wrong: what passes obeys the rules, what fails changes nothing."""
    account, passed = books(reserve()), []
    for site, counter, slot in moves:
        last = account[STUDY].steps.get(site, (0, 0))
        entry = step(site, max(1, last[1] + slot), max(1, last[0] + counter)).entry
        right = entry.counter == last[0] + 1 and last[1] < entry.slot <= 40
        try:
            account = {**account, **admit_all(account, [entry])}
            passed.append(entry)
            assert right
        except LedgerRefusal:
            assert not right
    for site in NAMES:
        mine = [entry for entry in passed if entry.site == site]
        assert [entry.counter for entry in mine] == list(range(1, len(mine) + 1))
        assert sorted({entry.slot for entry in mine}) == [entry.slot for entry in mine]


# ---- witnesses -----------------------------------------------------------------------------------------------


def test_a_site_cosigns_what_continues_and_holds_its_releases():
    log, site = Log([reserve()]), witness()
    for slot in range(1, 8):
        site, (leaf,) = sign_on(site, range(slot, slot + 1))
        log.add(leaf, step("st-berta", slot))
        site, line = site.cosign(ANNA, log.proposal(site), NOW + slot, approved)
        assert cosigned_at(log.note().checkpoint, line, ANNA.public) == NOW + slot
        assert (site.size, site.root, site.pending) == (log.tree.size, log.tree.root(), ())
    again, line = site.cosign(ANNA, log.proposal(site), NOW, approved)
    assert again == site


def test_heads_of_honest_sites_are_valid_together():
    log = Log(course(4))
    head, times = valid_head(cosigned(log, NAMES[:4]), LOG, COORDINATOR.public, witnesses_of(ROSTER), 1)
    assert (head.size, len(times)) == (21, 4)


def stops(code: LedgerCode, site: Witness, proposal: Proposal, by=ANNA) -> LedgerRefusal:
    with pytest.raises(LedgerRefusal) as caught:
        site.cosign(by, proposal, NOW, approved)
    assert caught.value.code is code
    return caught.value


def test_attack_rollback_an_older_head_is_refused():
    log = Log(course(4))
    site, _ = witness().cosign(ANNA, log.proposal(witness()), NOW, approved)
    for size in range(log.tree.size):
        stops(LedgerCode.OLDER_HEAD, site, log.proposal(site, size))


def test_attack_a_log_cut_off_and_grown_anew_is_a_split_view():
    log = Log(course(4))
    site, _ = witness().cosign(ANNA, log.proposal(witness()), NOW, approved)
    other = Log([*log.leaves[:-3], step("st-clara", 9, 4), abort(), reserve(digest("more")), abort(digest("more"))])
    other.add(reserve(digest("again")))
    for size in range(site.size, other.tree.size + 1):
        stops(LedgerCode.SPLIT_VIEW, site, other.proposal(site, size))


def test_attack_two_trees_for_two_sites_and_neither_head_becomes_valid():
    """Three of five sites are shown one tree, two the other, and one colluding site cosigns both."""
    shared = course(3)
    one, two = Log([*shared, commit(3)]), Log([*shared, abort()])
    left, right = cosigned(one, NAMES[:3]), cosigned(two, NAMES[2:])
    for note in (left, right):
        with pytest.raises(LedgerRefusal) as caught:
            valid_head(note, LOG, COORDINATOR.public, witnesses_of(ROSTER), 1)
        assert caught.value.code is LedgerCode.TOO_FEW_WITNESSES
    seen = {}
    for name, log in zip(NAMES[:4], (one, one, one, two), strict=True):
        seen[name], _ = witness(name).cosign(SITES[name], log.proposal(witness(name)), NOW, approved)
    one.add(reserve(digest("next")))
    two.add(reserve(digest("next")))
    for name, log in (("st-anna", two), ("st-doris", one)):
        stops(LedgerCode.SPLIT_VIEW, seen[name], log.proposal(seen[name]), SITES[name])


@pytest.mark.parametrize("changed", [0, 5, 20])
def test_attack_a_changed_historic_entry_is_seen_by_every_site(changed):
    log = Log(course(4))
    sites = {n: witness(n).cosign(SITES[n], log.proposal(witness(n)), NOW, approved)[0] for n in NAMES}
    leaves = [*log.leaves, reserve(digest("more"))]
    leaves[changed] = Leaf(leaves[changed].entry, leaves[changed].data.replace(b"1", b"2", 1))
    for name, site in sites.items():
        stops(LedgerCode.SPLIT_VIEW, site, Log(leaves).proposal(site), SITES[name])


def test_attack_a_dropped_release_stops_its_site_after_the_patience_and_no_sooner():
    site, leaves = sign_on(witness(), range(1, 2))
    log = Log([reserve()])
    for slot in range(2, PATIENCE + 2):
        site, _ = sign_on(site, range(slot, slot + 1))
        site, _ = site.cosign(ANNA, log.proposal(site), NOW, approved)
    site, _ = sign_on(site, range(PATIENCE + 2, PATIENCE + 3))
    stops(LedgerCode.STEP_MISSING, site, log.proposal(site))
    log.add(*leaves)  # the rest is within the patience
    assert len(site.cosign(ANNA, log.proposal(site), NOW, approved)[0].pending) == PATIENCE + 1


def test_attack_a_coordinator_that_shows_no_heads_at_all_stops_the_site_too():
    site, _ = sign_on(witness(), range(1, 2))
    site.check(study=STUDY, slot=1 + PATIENCE)
    with pytest.raises(LedgerRefusal) as caught:
        site.check(study=STUDY, slot=2 + PATIENCE)
    assert caught.value.code is LedgerCode.STEP_MISSING


def test_a_release_missing_in_a_finished_study_stops_the_site_in_the_next_one():
    site, _ = sign_on(witness(), range(1, 2))
    later = digest("later")
    site, _ = sign_on(site, range(1, 1 + PATIENCE), later)
    site.check()
    site, _ = sign_on(site, range(1 + PATIENCE, 2 + PATIENCE), later)
    with pytest.raises(LedgerRefusal):
        site.check()
    log = Log([reserve(), abort(), reserve(later)])
    free, _ = site.cosign(ANNA, log.proposal(site), NOW, approved, patience=5)
    assert {leaf.entry.study for _, leaf in free.pending} == {later}, "it can never come into a closed study"
    free.check(patience=4)


def test_attack_a_proof_of_another_leaf_place_or_tree_shows_nothing():
    site, leaves = sign_on(witness(), range(1, 3 + PATIENCE))
    log, without = Log([reserve(), *leaves]), Log(course(6, NAMES[1:]))
    true = log.proposal(site)
    proof = true.included[leaves[0].hash]
    for shown in (
        {},
        {leaves[0].hash: replace(proof, index=proof.index + 1)},
        {leaves[0].hash: true.included[leaves[1].hash]},
        {leaves[1].hash: proof},
    ):
        stops(LedgerCode.STEP_MISSING, site, replace(true, included=shown))
    stops(LedgerCode.STEP_MISSING, site, without.proposal(site, included=true.included))


def test_attack_a_head_of_another_log_or_signer_is_refused():
    log, site = Log(course(2)), witness()
    far = Note(Checkpoint("consilium/v1/ledger/other", 11, log.tree.root())).signed_by(COORDINATOR)
    stops(LedgerCode.OTHER_LOG, site, log.proposal(site, note=far))
    with pytest.raises(Refusal) as caught:
        site.cosign(ANNA, log.proposal(site, note=log.note(by=identity("stranger"))), NOW, approved)
    assert caught.value.code is RefusalCode.BAD_SIGNATURE


def test_a_proof_from_another_start_is_no_attack_but_is_named():
    log = Log(course(2))
    site, _ = witness().cosign(ANNA, log.proposal(witness(), 5), NOW, approved)
    stops(LedgerCode.OTHER_START, site, log.proposal(site, since=3, consistency=log.tree.consistency(3)))


def test_S3_a_site_restored_from_an_old_copy_learns_it_from_its_own_cosignature():
    log = Log(course(2))
    old, _ = witness().cosign(ANNA, log.proposal(witness(), 5), NOW, approved)
    new, line = old.cosign(ANNA, log.proposal(old), NOW, approved)
    mine = log.note().adding(line)
    stops(LedgerCode.STATE_LOST, old, log.proposal(old, note=mine))
    stops(LedgerCode.STATE_LOST, old, log.proposal(old, last=mine))
    new.cosign(ANNA, log.proposal(new, last=mine), NOW, approved)
    forged = log.note().adding(replace(line, value=bytes(72)))
    with pytest.raises(Refusal):
        old.cosign(ANNA, log.proposal(old, last=forged), NOW, approved)


def test_a_refused_head_leaves_the_state_as_it_was_so_that_the_right_one_still_passes():
    log = Log(course(2))
    site, _ = witness().cosign(ANNA, log.proposal(witness()), NOW, approved)
    before = site.encode()
    stops(LedgerCode.OLDER_HEAD, site, log.proposal(site, 3))
    assert site.encode() == before
    log.add(commit(2))
    site.cosign(ANNA, log.proposal(site), NOW, approved)


def test_a_site_never_signs_two_releases_for_one_slot():
    site, _ = sign_on(witness(), range(1, 4))
    for slot in (1, 3):
        with pytest.raises(LedgerRefusal) as caught:
            sign_on(site, range(slot, slot + 1))
        assert caught.value.code is LedgerCode.SLOT_OLD


def test_what_a_site_remembers_survives_its_disk_and_a_changed_byte_does_not():
    log = Log(course(2, NAMES[1:]))
    site, leaves = sign_on(witness(), range(1, 3))
    log.add(leaves[0])
    site, _ = site.cosign(ANNA, log.proposal(site), NOW, approved)
    data = site.encode()
    assert Witness.decode(data) == site
    assert Witness.decode(witness().encode()) == witness()
    assert [leaf.data for _, leaf in Witness.decode(data).pending] == [leaves[1].data]
    for wrong in (
        b"",
        data[:-1],
        data.replace(b'"signed":2', b'"signed":-2'),
        data.replace(b'"witness":1', b'"witness":2'),
    ):
        with pytest.raises(Refusal) as caught:
            Witness.decode(wrong)
        assert caught.value.code is RefusalCode.MALFORMED
    with pytest.raises(Refusal) as caught:
        Witness.decode(data.replace(f"\\n{site.size}\\n".encode(), f"\\n{site.size - 1}\\n".encode()))
    assert caught.value.code is RefusalCode.BAD_SIGNATURE


def test_a_proposal_survives_the_wire_and_is_small():
    log = Log(course(300))
    site, _ = sign_on(witness(), range(1, 2))
    proposal = log.proposal(site, included=dict(list(log.proposal(site).included.items())[-3:]))
    data = replace(proposal, last=cosigned(log, NAMES[:1])).encode()
    assert Proposal.decode(data) == replace(proposal, last=cosigned(log, NAMES[:1]))
    assert len(data) < 8000


@pytest.mark.parametrize(
    "change",
    [
        (b'"since":0', b'"since":-1'),
        (b'"since":0', b'"since":true'),
        (b'"proposal":1', b'"proposal":2'),
        (b'"index":', b'"indices":'),
        (b'"proof":"', b'"proof":"0'),
        (b'"consistency":""', b'"consistency":"AA"'),
        (b'"included":{', b'"included":{"zz":1,'),
        (b'"last":""', b'"last":3'),
        (b'"last":""', b'"least":""'),
    ],
)
def test_a_malformed_proposal_is_refused(change):
    data = Log(course(1)).proposal(witness()).encode()
    assert change[0] in data
    with pytest.raises(Refusal) as caught:
        Proposal.decode(data.replace(*change, 1))
    assert caught.value.code is RefusalCode.MALFORMED


@pytest.mark.parametrize("vector", vectors("proposals"), ids=lambda v: v["name"])
def test_golden_proposals_are_cosigned_by_every_release(vector):
    site, proposal = Witness.decode(vector["state"].encode()), Proposal.decode(vector["bytes"].encode())
    assert (site.encode(), proposal.encode()) == (vector["state"].encode(), vector["bytes"].encode())
    known, line = site.cosign(ANNA, proposal, NOW, approved)
    assert (known.size, known.standing(STUDY).end, line.line) == (vector["size"], vector["end"], vector["cosignature"])
    assert known.pending == ()


@pytest.mark.parametrize("vector", vectors("bad_proposals"), ids=lambda v: v["name"])
def test_bad_proposals_are_refused_with_the_named_code(vector):
    site = Witness.decode(vector["state"].encode())
    with pytest.raises((Refusal, LedgerRefusal)) as caught:
        site.cosign(ANNA, Proposal.decode(vector["bytes"].encode()), NOW, approved)
    assert caught.value.code.value == vector["code"]


# ---- the officer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", vectors("ledgers"), ids=lambda v: v["name"])
def test_golden_ledgers_are_believed_by_every_release(vector, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(vector["text"].encode())
    report = verify_file(path, [Roster.model_validate_json(json.dumps(vector["roster"]))], vector["colluding"])
    assert report.error is None
    assert any("every release is signed" in fact for fact in report.facts)


@pytest.mark.parametrize("vector", vectors("bad_ledgers"), ids=lambda v: v["name"])
def test_bad_ledgers_are_not_believed_and_the_words_say_why(vector, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(vector["text"].encode())
    report = verify_file(path, [Roster.model_validate_json(json.dumps(vector["roster"]))], vector["colluding"])
    assert vector["words"].lower() in str(report.error).lower()
    assert report.facts == []


def test_the_report_says_what_was_spent_and_what_it_cannot_know():
    log = Log([*course(3), commit(4)])
    report = verify_ledger(bytes_of(log.leaves), cosigned(log, NAMES[:4]).encode(), [ROSTER], 1)
    assert report.error is None
    text = "\n".join(report.facts)
    assert "4 of 5 sites cosigned it, 4 are needed against 1 that collude" in text
    assert "1 RESERVE, 15 STEP, 1 COMMIT" in text
    assert "ε 2 against who sees aggregates, 7.75 if secure aggregation were broken, δ 0.000001" in text
    assert "3 of 40 slots signed; it is committed with 4 slots" in text
    assert "st-anna 3" in text
    doubts = "\n".join(report.doubts)
    assert "why these sites have not cosigned this head: st-emma" in doubts
    assert "what each officer granted" in doubts


def test_entries_behind_the_head_are_a_doubt_and_still_checked():
    log = Log(course(3))
    note = cosigned(log, size=11).encode()
    report = verify_ledger(bytes_of(log.leaves), note, [ROSTER], 1)
    assert any(doubt.startswith("the last 5 entries") for doubt in report.doubts)
    worse = [*bytes_of(log.leaves), step("st-anna", 9, 9).data]
    assert "Entry 17" in str(verify_ledger(worse, note, [ROSTER], 1).error)


def test_sites_that_were_sent_different_requests_are_told_to_the_officer():
    entry = step("st-berta", 1).entry
    other = Leaf.signed(entry.model_copy(update={"request": digest("another request")}), SITES["st-berta"])
    log = Log([reserve(), step("st-anna", 1), other])
    report = verify_ledger(bytes_of(log.leaves), cosigned(log).encode(), [ROSTER], 1)
    assert report.error is None
    assert any("slot 1" in doubt and "different requests" in doubt for doubt in report.doubts)


def test_a_release_signed_before_a_site_changed_its_key_stands_when_the_older_roster_is_given():
    new = identity("st-anna, renewed")
    log = Log([reserve(), step("st-anna", 1), step("st-anna", 2, by=new)])
    note = cosigned(log, NAMES[1:]).encode()
    later = roster(6, st_anna=new.public)
    assert verify_ledger(bytes_of(log.leaves), note, [ROSTER, later], 1).error is None
    assert "Entry 2" in str(verify_ledger(bytes_of(log.leaves), note, [later], 1).error)


def test_rosters_of_two_consortia_are_not_mixed():
    other = ROSTER.model_copy(update={"consortium": "other", "version": 1})
    log = Log(course(1))
    report = verify_ledger(bytes_of(log.leaves), cosigned(log).encode(), [ROSTER, other], 1)
    assert isinstance(report.error, ConsiliumError)


def test_a_file_that_is_not_there_is_an_error_with_a_remedy(tmp_path):
    assert "cannot be read" in str(verify_file(tmp_path / "none", [ROSTER], 1).error)


LEDGER = Log([*course(2), commit(2)])
FILE = first_line(cosigned(LEDGER), 12) + b"".join(data + b"\n" for data in bytes_of(LEDGER.leaves))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_no_changed_byte_of_a_file_is_passed_over(tmp_path_factory, position, change):
    """Every byte of an exported ledger counts, but those that name a cosigner that is not needed."""
    data = bytearray(FILE)
    data[position] ^= change
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    path.write_bytes(bytes(data))
    whole = verify_ledger(bytes_of(LEDGER.leaves), cosigned(LEDGER).encode(), [ROSTER], 1)
    report = verify_file(path, [ROSTER], 1)
    assert report.error is not None or (position < FILE.index(b"\n") and len(report.doubts) > len(whole.doubts))


def test_the_tree_is_the_one_of_the_golden_proofs():
    tree = Tree(leaf_hash(bytes([i])) for i in range(21))
    for vector in vectors("trees"):
        size = vector["size"]
        assert tree.root(size).hex() == vector["root"]
        assert [[h.hex() for h in tree.inclusion(i, size)] for i in range(size)] == vector["inclusion"]
        assert [[h.hex() for h in tree.consistency(o, size)] for o in range(size + 1)] == vector["consistency"]


def test_a_step_is_data_only():
    assert set(Step.model_fields) == {"ledger", "study", "site", "slot", "counter", "request", "release"}
