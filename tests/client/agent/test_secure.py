"""The agent in secure sums: every stage answered once, choices that outlive a restart, keys that die with a session."""

from __future__ import annotations

import base64
import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from client.agent.inspection import preflight
from client.agent.rows import TABLES
from client.agent.store import Store
from client.imaging import Membership
from models.weights import state_vector
from privacy.identity import Document, Identity, fingerprint
from privacy.journal import read, verify
from privacy.messages import Request
from privacy.secagg.messages import Survivors
from privacy.secagg.ring import accept_shares, place_of
from privacy.secagg.states import Ready
from privacy.stages import FIRST, LAST, TRANSCRIPT
from tests.client.agent.bed import SITE, make_bed
from tests.client.agent.ring_kit import ALL, PEERS, RingBed, make_ring


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[RingBed]:
    made = make_ring(tmp_path / "site")
    yield made
    made.bed.stop()


def rows(ring: RingBed, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(f"file:{ring.bed.home.agent}/agent.db?mode=ro", uri=True, timeout=10) as records:
        return records.execute(query).fetchall()


def test_what_leaves_is_masked_and_the_opened_sum_is_what_was_computed(ring: RingBed) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    assert answer.status == "done", answer.code
    assert answer.payload_bytes == 4 * (ring.plan.size + ring.plan.statistics)
    words = np.frombuffer(ring.bed.fetch(answer), "<u4")
    assert abs(np.mean(words / 2**32) - 0.5) < 0.01, "uniform, as under a mask"
    total = ring.total(request, answer)
    total.close()
    proof = dict(total.submissions)
    opened = ring.stage("unmask", request, ALL, proof)
    assert opened.status == "done", opened.code
    documents = {SITE: ring.opening(opened)}
    documents |= {name: peer.opening(request, ALL, proof) for name, peer in ring.peers.items()}
    found, bad = total.open(documents)
    assert bad == {}
    agent = ring.bed.agent
    images = agent.desk.cohort(ring.bed.study, agent.store.sources()[0]).indices(Membership.TRAIN)
    assert found.statistics[0] == len(images)
    assert found.weight == len(images) / ring.bed.study.secagg.examples_bound
    update = found.mean(0, ring.plan.size)
    assert 0 < np.abs(update).max() < 1
    assert len(update) == len(state_vector(ring.bed.initial))


def test_validation_and_test_are_masked_too_and_the_sites_own_test_result_stays_with_it(ring: RingBed) -> None:
    ring.set_up()
    for slot, kind in ((1, "validate"), (2, "test")):
        answer = ring.ask(kind, ring.bed.vector, slot=slot, round=1, parameters={TRANSCRIPT: ring.ring.transcript})
        assert answer.payload_bytes == 4 * ring.plan.statistics
        assert abs(np.mean(np.frombuffer(ring.bed.fetch(answer), "<u4") / 2**32) - 0.5) < 0.1
    assert '"images"' in ring.bed.agent.store.study(ring.bed.hash).result


def test_everything_that_left_is_named_in_the_journal(ring: RingBed) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    ring.stage("unmask", request, ALL, proof)
    named = [entry["what"] for entry in read(ring.bed.home.agent / "journal.jsonl") if entry["study"]]
    assert named[-7:] == [
        "answer to keys", "answer to shares", "shares payload", "answer to seal",
        "answer to train", "train vector", "answer to unmask of train 1",
    ]  # fmt: skip
    assert verify(ring.bed.home.agent / "journal.jsonl") > 0


# ---- the same question, another question -----------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
def test_S2_every_stage_gives_the_same_bytes_again_and_refuses_another_question(ring: RingBed, restart: bool) -> None:
    keys = ring.keys()
    again = lambda: ring.again() if restart else None  # noqa: E731
    again()
    range_ = {FIRST: "1", LAST: "8"}
    assert ring.ask("keys", parameters=range_).detail["keys"].encode() == keys[SITE].encode()
    assert ring.ask("keys", parameters={FIRST: "1", LAST: "7"}).code == "slot-bound"
    assert ring.ask("keys", parameters=range_, cohort=(SITE, "st-bona", "st-cleo")).code == "slot-bound"
    shares, _ = ring.shares(keys)
    again()
    first = ring.ask("shares", ring.documents("keys", keys))
    assert first.detail["shares"].encode() == shares[SITE].encode()
    assert ring.bed.fetch(first) == ring.bed.fetch(first)
    fewer = {name: keys[name] for name in ALL[:3]}
    assert ring.ask("shares", ring.documents("keys", fewer)).code == "slot-bound"


def test_S3_another_stage_before_its_time_is_refused_and_leaves_no_trace(ring: RingBed) -> None:
    for kind in ("shares", "seal"):
        assert ring.ask(kind, b"{}").status == "refused"
    keys = ring.keys()
    assert ring.ask("seal", ring.documents("shares", {}, {SITE: b"x"})).code in {"malformed", "out-of-order"}
    ring.shares(keys)
    assert [row[0] for row in rows(ring, "SELECT stage FROM stages ORDER BY stage")] == ["keys", "shares"]


def test_S5_a_slot_without_the_rings_transcript_or_cohort_is_refused_and_not_bound(ring: RingBed) -> None:
    ring.set_up()
    assert ring.train(1, parameters={})[1].code == "out-of-order"
    assert ring.train(1, parameters={TRANSCRIPT: "0" * 64})[1].code == "out-of-order"
    assert ring.train(1, parameters={TRANSCRIPT: ring.ring.transcript, "threshold": "1"})[1].code == "out-of-order"
    assert ring.train(1, cohort=(SITE, "st-bona"))[1].code == "cohort"
    assert ring.train(1, cohort=(SITE, "st-bona", "st-zita"))[1].code == "not-in-study"
    assert rows(ring, "SELECT * FROM slots") == []
    assert ring.train(1)[1].status == "done"


def test_without_keys_nothing_is_computed(ring: RingBed) -> None:
    answer = ring.ask("train", ring.bed.vector, slot=1, round=1, parameters={TRANSCRIPT: "0" * 64})
    assert answer.code == "out-of-order"


def test_a_study_without_secure_sums_refuses_their_messages(tmp_path: Path) -> None:
    bed = make_bed(tmp_path / "site")
    bed.start()
    bed.ready()
    try:
        assert bed.call("keys", parameters={FIRST: "1", LAST: "8"}).code == "malformed"
    finally:
        bed.stop()


# ---- S4: one choice, across restarts ---------------------------------------------------------------------------


def dropped(ring: RingBed, slot: int = 1) -> tuple[Request, dict, tuple[str, ...]]:
    """A slot in which st-dora dropped: the request, the signed answers of the others, their names."""
    request, answer = ring.train(slot)
    total = ring.total(request, answer, PEERS[:2])
    return request, dict(total.submissions), (SITE, *PEERS[:2])


@pytest.mark.parametrize("restart", [False, True])
def test_S4_a_site_that_opened_for_all_signs_and_opens_no_smaller_set(ring: RingBed, restart: bool) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    first = ring.stage("unmask", request, ALL, proof)
    assert first.status == "done"
    if restart:
        ring.again()
    fewer = (SITE, *PEERS[:2])
    assert ring.stage("survivors", request, fewer).code == "choice-bound"
    signed = {name: ring.peers[name].survivors(request, fewer) for name in PEERS[:2]}
    assert ring.stage("unmask", request, fewer, signed).code == "slot-bound"
    assert ring.stage("unmask", request, ALL, proof) == first


@pytest.mark.parametrize("restart", [False, True])
def test_S4_a_site_that_signed_a_smaller_set_opens_neither_all_nor_another(ring: RingBed, restart: bool) -> None:
    ring.set_up()
    request, proof, fewer = dropped(ring)
    first = ring.stage("survivors", request, fewer)
    assert first.status == "done", first.code
    if restart:
        ring.again()
    words = np.zeros(ring.plan.size + ring.plan.statistics, np.uint32)
    everybody = {**proof, "st-dora": ring.peers["st-dora"].submission(request, words, ring.plan.statistics)}
    assert ring.stage("unmask", request, ALL, everybody).code == "choice-bound"
    assert ring.stage("survivors", request, (SITE, "st-bona", "st-dora")).code == "slot-bound"
    assert ring.stage("survivors", request, fewer) == first
    signed = {SITE: ring.survivors(first), **{n: ring.peers[n].survivors(request, fewer) for n in PEERS[:2]}}
    opened = ring.stage("unmask", request, fewer, signed)
    assert opened.status == "done", opened.code
    body = ring.opening(opened).body
    assert set(body["shares"]) == set(fewer)
    assert set(body["seeds"]) == {"st-dora"}


def test_S4_of_two_questions_at_the_same_moment_one_is_answered(ring: RingBed) -> None:
    ring.set_up()
    for slot in (1, 2, 3):
        request, answer = ring.train(slot)
        proof = dict(ring.total(request, answer).submissions)
        asks = [
            lambda r=request, p=proof: ring.stage("unmask", r, ALL, p),
            lambda r=request: ring.stage("survivors", r, (SITE, *PEERS[:2])),
        ]
        with ThreadPoolExecutor(2) as pool:
            told = [future.result() for future in [pool.submit(ask) for ask in asks]]
        assert sorted(a.code or a.status for a in told) == ["choice-bound", "done"]


def test_S4_too_few_or_foreign_signatures_move_no_share(ring: RingBed) -> None:
    ring.set_up()
    request, proof, fewer = dropped(ring)
    mine = ring.survivors(ring.stage("survivors", request, fewer))
    bona, cleo = (ring.peers[name].survivors(request, fewer) for name in PEERS[:2])
    forged = Survivors(
        study=ring.bed.hash, session=1, site="st-cleo", slot=1, header=request.hash, survivors=fewer, deposit="00" * 48
    ).signed(Identity.generate())
    for signed, code in (
        ({SITE: mine, "st-bona": bona}, "too-few"),
        ({SITE: mine, "st-bona": bona, "st-cleo": forged}, "bad-signature"),
        ({SITE: mine, "st-bona": bona, "st-cleo": bona}, "bad-signature"),
        ({SITE: mine, "st-bona": bona, "st-dora": cleo}, "survivors"),
    ):
        assert ring.stage("unmask", request, fewer, signed).code == code
    assert ring.stage("unmask", request, ALL, proof).code in {"too-few", "choice-bound"}
    assert rows(ring, "SELECT opened FROM choices") == [(0,)]


def test_S4_no_other_attempt_at_a_round_that_was_opened(ring: RingBed) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    ring.stage("unmask", request, ALL, dict(ring.total(request, answer).submissions))
    assert ring.train(2, round=1)[1].code == "round-opened"
    ring.again()
    assert ring.train(2, round=1)[1].code == "round-opened"
    assert ring.train(2, round=2)[1].status == "done"


def test_S2_an_older_slot_is_not_opened_any_more(ring: RingBed) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    assert ring.train(2)[1].status == "done"
    assert ring.stage("unmask", request, ALL, proof).code == "slot-spent"
    assert ring.stage("survivors", request, (SITE, *PEERS[:2])).code == "slot-spent"


def test_S4_an_opening_names_the_round_it_was_masked_for(ring: RingBed) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    assert ring.stage("unmask", request, ALL, proof, round=4).code == "out-of-order"
    assert ring.stage("unmask", request, ALL, proof, session=2).code == "session-unknown"
    assert ring.stage("unmask", request, ALL, proof).status == "done"


# ---- S6: whose keys --------------------------------------------------------------------------------------------


def test_S6_keys_of_another_identity_are_refused_even_with_a_newer_roster(ring: RingBed) -> None:
    swapped = Identity.generate()
    lines = tuple(
        line.model_copy(update={"identity": swapped.public}) if line.name == "st-cleo" else line
        for line in ring.bed.roster.sites
    )
    newer = ring.bed.roster.model_copy(update={"version": 9, "sites": lines})
    assert ring.bed.call("offer", ring.bed.offer_payload(newer), session=0).status == "done"
    keys = ring.keys()
    body = keys["st-cleo"].body
    keys["st-cleo"] = Document("secagg-keys", body).signed_by(swapped)
    assert ring.ask("shares", ring.documents("keys", keys)).code == "bad-signature"


# ---- S7, S3: the end of keys -----------------------------------------------------------------------------------


def secrets(ring: RingBed) -> list[bytes]:
    """What must not be found on the disk any more once a session is over."""
    state = ring.bed.agent.store.rings.secrets(ring.bed.hash, 1)
    assert state is not None
    return [base64.b64encode(value) for value in Ready.from_bytes(state).pairs.values()]


def test_S7_a_new_session_destroys_the_keys_and_what_could_be_sent_again(ring: RingBed) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    kept = secrets(ring)
    on_disk = lambda: b"".join(p.read_bytes() for p in ring.bed.home.agent.glob("agent.db*"))  # noqa: E731
    assert any(value in on_disk() for value in kept)
    assert ring.bed.call("open", session=2).status == "done"
    assert not any(value in on_disk() for value in kept)
    assert ring.stage("unmask", request, ALL, proof).code == "session-closed"
    assert ring.ask("keys", parameters={FIRST: "1", LAST: "8"}).code == "session-closed"
    assert rows(ring, "SELECT state FROM rings") == []
    assert {row[0] for row in rows(ring, "SELECT length(answer) FROM stages")} == {0}
    ring.set_up(session=2, first=2, last=8)
    assert ring.train(2, session=2)[1].status == "done"


def restored(ring: RingBed, saved: Path) -> None:
    """The machine's folder but for the journal comes from a backup."""
    ring.bed.stop()
    for path in ring.bed.home.agent.glob("agent.db*"):
        path.unlink()
    for path in saved.iterdir():
        shutil.copy(path, ring.bed.home.agent)
    ring.bed.start()


def save(ring: RingBed, folder: Path) -> Path:
    ring.bed.stop()
    folder.mkdir()
    for path in ring.bed.home.agent.glob("agent.db*"):
        shutil.copy(path, folder)
    ring.bed.start()
    return folder


def test_S3_records_older_than_a_choice_open_nothing(ring: RingBed, tmp_path: Path) -> None:
    ring.set_up()
    request, answer = ring.train(1)
    proof = dict(ring.total(request, answer).submissions)
    saved = save(ring, tmp_path / "saved")
    assert ring.stage("unmask", request, ALL, proof).status == "done"
    restored(ring, saved)
    fewer = (SITE, *PEERS[:2])
    assert ring.stage("survivors", request, fewer).status == "refused"
    assert ring.stage("unmask", request, ALL, proof).status == "refused"
    assert rows(ring, "SELECT state FROM rings") == []
    assert ring.train(2, round=1)[1].status == "refused"
    assert ring.bed.call("open", session=2).status == "done"
    ring.set_up(session=2, first=2, last=8)
    assert ring.train(2, session=2, round=1)[1].code == "round-opened", "the journal still knows"
    assert ring.train(2, session=2, round=2)[1].status == "done"


def test_S3_records_older_than_a_set_up_lose_its_keys(ring: RingBed, tmp_path: Path) -> None:
    saved = save(ring, tmp_path / "saved")
    ring.set_up()
    restored(ring, saved)
    assert ring.train(1)[1].code == "out-of-order"


def test_records_of_the_release_before_are_brought_up_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    old = TABLES.replace("    round INTEGER NOT NULL DEFAULT 0, cohort TEXT NOT NULL DEFAULT '',\n", "")
    with sqlite3.connect(path) as records:
        records.executescript(old + "PRAGMA user_version = 1;")
    store = Store(path)
    store.add_study("s", "tiny", b"{}")
    store.open_session("s", 1)
    assert store.bind("s", 1, 1, "r", "train", 5, round_=1, cohort=["a", "b"]).cohort == "a b"
    assert store.rings.choices("s") == []
    store.close()


def test_the_operator_sees_whose_keys_count_and_that_a_newer_roster_has_others(ring: RingBed) -> None:
    def finding() -> object:
        return next(found for found in preflight(ring.bed.agent) if found.name == "keys of tiny")

    assert finding().ok
    for name, peer in ring.peers.items():
        assert f"{name} {fingerprint(peer.identity.public)}" in finding().detail
    swapped = Identity.generate()
    lines = tuple(
        line.model_copy(update={"identity": swapped.public}) if line.name == "st-cleo" else line
        for line in ring.bed.roster.sites
    )
    newer = ring.bed.roster.model_copy(update={"version": 9, "sites": lines})
    ring.bed.call("offer", ring.bed.offer_payload(newer), session=0)
    assert not finding().ok
    assert "another key for st-cleo" in finding().remedy
    assert fingerprint(swapped.public) not in finding().detail


def test_a_refused_parcel_names_the_site_that_sent_it(ring: RingBed) -> None:
    keys = ring.keys()
    shares, parcels = ring.shares(keys)
    place = place_of(ring.plan, 1, 1, 8, ring.identities)
    made, _ = accept_shares(place, keys, shares, parcels)
    bundles = {**made.bundles(SITE), "st-cleo": b"not what was signed"}
    answer = ring.ask("seal", ring.documents("shares", shares, bundles))
    assert (answer.code, answer.detail) == ("peer-shares", {"about": "st-cleo"})
