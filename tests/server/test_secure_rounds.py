"""The loop with secure sums, against honest, absent and lying sites: exact sums of the survivors, or nothing opened."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from models import additive, tasks
from privacy.canonical import sha256
from privacy.errors import RefusalCode
from privacy.identity import Document
from privacy.messages import Answer
from privacy.secagg.fixed import Opened
from privacy.secagg.messages import Shares
from privacy.stages import Enclosure
from privacy.study_text import S8
from server.console import status
from server.records import SlotState, State
from server.ring import MOST_RENEWALS
from tests.server.round_kit import D
from tests.server.secure_kit import NAMES, SecureBench


@pytest.fixture
def bench(tmp_path):
    return SecureBench(tmp_path)


def states(bench: SecureBench, slot: int) -> dict[str, str]:
    return {o.site: o.state.value for o in bench.course.outcomes(slot)}


def expected(bench: SecureBench, slot: int, sites: tuple[str, ...]) -> np.ndarray:
    """The model after a training slot, from the sites' own numbers: float32 [d]."""
    plan = bench.sites["anna"].plan
    start = bench.weights(bench.course.slot(slot).round - 1)
    opened = Opened(plan, bench.opened(slot, sites), len(sites))
    return (start + opened.mean(0, D)).astype(np.float32)


def test_a_study_runs_from_offer_to_delivery_and_only_sums_are_opened(bench):
    assert bench.run() is State.FINISHED, bench.registry.study(bench.hash).reason
    kinds = [(s.kind, s.round, s.state) for s in bench.course.slots()]
    assert kinds == [
        *(("train", r, SlotState.DONE) for r in (1, 2, 3)),
        ("validate", 3, SlotState.DONE),
        ("test", 3, SlotState.DONE),
    ]
    for slot in (1, 2, 3):
        np.testing.assert_array_equal(bench.weights(slot), expected(bench, slot, NAMES[:4]))
    evaluation = bench.course.evaluations("validation")[0]
    task = tasks.get(bench.study.spec())
    assert evaluation.metrics["images"] == 80
    assert len(evaluation.statistics) == additive.size(task)
    for site in bench.sites.values():
        assert [line.split("+")[0] for line in site.log[:6]] == ["offer", "open", "open", "keys", "shares", "seal"]
        assert site.log.count("keys") == 1


# ---- sites that vanish -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("kind", ["keys", "shares", "seal"])
def test_a_site_that_vanishes_in_the_set_up_is_not_in_the_ring_and_the_others_go_on(bench, kind, served):
    bench.vanishes("dora", kind, served=served)
    assert bench.run() is State.FINISHED, bench.registry.study(bench.hash).reason
    first = bench.course.slot(1)
    assert first.cohort == ("anna", "bert", "cleo")
    np.testing.assert_array_equal(bench.weights(1), expected(bench, 1, first.cohort))


def test_S7_a_site_that_comes_late_is_in_a_new_ring_under_a_new_session(bench):
    bench.vanishes("dora", "keys", back=30)
    for site in bench.sites.values():
        site.delay = 9.0
    assert bench.run() is State.FINISHED
    slots = bench.course.slots()
    assert slots[0].cohort == ("anna", "bert", "cleo")
    assert slots[-1].cohort == NAMES[:4]
    assert slots[0].session < slots[-1].session
    assert bench.sites["dora"].finished


@pytest.mark.parametrize("served", [False, True])
def test_a_site_that_vanishes_before_its_mask_is_in_is_left_out_of_the_exact_sum(bench, served):
    bench.vanishes("dora", "train", served=served, slot=2)
    assert bench.run() is State.FINISHED
    assert states(bench, 2) == {"anna": "in", "bert": "in", "cleo": "in", "dora": "lost"}
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 2, NAMES[:3]))
    assert "survivors" in bench.registry.rings(bench.hash).stages(2)
    assert bench.course.slot(3).cohort == NAMES[:3], "who is away is not waited for again"


def test_a_straggler_is_late_and_its_mask_comes_off(bench):
    bench.sites["dora"].delay = 500.0
    assert bench.run() is State.FINISHED
    assert states(bench, 1)["dora"] == "late"
    np.testing.assert_array_equal(bench.weights(1), expected(bench, 1, NAMES[:3]))


@pytest.mark.parametrize("served", [False, True])
def test_a_site_that_vanishes_during_the_unmasking_is_in_the_sum_because_the_others_can_open_it(bench, served):
    bench.vanishes("dora", "unmask", served=served, slot=2)
    assert bench.run() is State.FINISHED
    assert states(bench, 2) == dict.fromkeys(NAMES[:4], "in")
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 2, NAMES[:4]))


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("kind", ["survivors", "unmask"])
def test_a_survivor_that_comes_back_within_the_deadline_answers_from_what_it_stored(bench, kind, served):
    bench.vanishes("dora", "train", slot=2)
    bench.vanishes("cleo", kind, served=served, slot=2, back=30)
    assert bench.run() is State.FINISHED
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 2, NAMES[:3]))
    assert [s.state for s in bench.course.slots()][:3] == [SlotState.DONE] * 3


@pytest.mark.parametrize("served", [False, True])
def test_one_drops_before_its_mask_and_a_survivor_while_they_open_and_the_sum_is_exact(tmp_path, served):
    bench = SecureBench(tmp_path, 6)
    bench.vanishes("dora", "train", slot=2)
    bench.vanishes("cleo", "unmask", served=served, slot=2)
    assert bench.run() is State.FINISHED
    survivors = tuple(name for name in bench.course.slot(2).cohort if name != "dora")
    assert {name for name, state in states(bench, 2).items() if state == "in"} == set(survivors) > {"cleo"}
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 2, survivors))
    assert bench.course.slot(3).round == 3, "nothing was tried again"


# ---- below the threshold ---------------------------------------------------------------------------------------


def test_below_the_threshold_nothing_is_opened_and_the_round_is_tried_again_in_a_new_slot(bench):
    bench.vanishes("cleo", "train", slot=2, back=100)
    bench.vanishes("dora", "train", slot=2, back=100)
    assert bench.run() is State.FINISHED
    two, three = bench.course.slot(2), bench.course.slot(3)
    assert (two.state, two.round) == (SlotState.FAILED, 2)
    assert "2 of at least 3 sites answered" in two.reason
    assert "nothing is opened" in two.reason
    assert bench.registry.rings(bench.hash).stages(2) == {}
    assert (three.state, three.round, three.attempt) == (SlotState.DONE, 2, 2)
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 3, three.cohort))


def test_too_few_agree_on_who_is_summed_and_no_share_moves(bench):
    bench.vanishes("dora", "train", slot=2)
    bench.vanishes("cleo", "survivors", slot=2, back=100)
    assert bench.run() is State.FINISHED
    two = bench.course.slot(2)
    assert "2 of at least 3 sites agreed" in two.reason
    assert set(bench.registry.rings(bench.hash).stages(2)) == {"survivors"}
    assert not any(choice.released for s in bench.sites.values() for n, choice in s.choices.items() if n == 2)
    assert (bench.course.slot(3).round, bench.course.slot(3).state) == (2, SlotState.DONE)


def test_S4_a_round_that_sites_began_to_open_is_never_tried_again_and_the_next_round_goes_on(bench):
    bench.vanishes("cleo", "unmask", slot=2, back=100)
    bench.vanishes("dora", "unmask", slot=2, back=100)
    assert bench.run() is State.FINISHED
    two, three = bench.course.slot(2), bench.course.slot(3)
    assert (two.state, two.round) == (SlotState.FAILED, 2)
    assert "2 of at least 3 sites helped to open the sum" in two.reason
    assert three.round == 3
    assert bench.weights(2).tobytes() == bench.weights(1).tobytes()
    np.testing.assert_array_equal(bench.weights(3), expected(bench, 3, three.cohort))
    assert any(e.kind == "round-void" for e in bench.registry.events(bench.hash))


def test_the_last_round_that_comes_to_nothing_leaves_the_model_of_the_round_before(bench):
    bench.vanishes("cleo", "unmask", slot=3, back=100)
    bench.vanishes("dora", "unmask", slot=3, back=100)
    assert bench.run() is State.FINISHED
    assert bench.weights(3).tobytes() == bench.weights(2).tobytes()
    assert bench.published[0][0] == 3


def test_an_evaluation_that_cannot_be_opened_is_left_out(bench):
    bench.vanishes("cleo", "unmask", slot=5, back=100)
    bench.vanishes("dora", "unmask", slot=5, back=100)
    assert bench.run() is State.FINISHED
    assert bench.course.slot(5).kind == "test"
    assert bench.course.evaluations("test") == {}


# ---- what the coordinator cannot know --------------------------------------------------------------------------


def test_no_number_of_a_single_site_stands_anywhere_at_the_coordinator(bench):
    for number, site in enumerate(bench.sites.values()):
        site.examples = 11 + 2 * number
    assert bench.run() is State.FINISHED
    for event in bench.registry.events(bench.hash):
        if event.site:
            assert set(event.data) <= {"slot", "state", "code", "bytes", "seconds"}
    for slot in bench.course.slots():
        assert len({o.bytes for o in bench.course.outcomes(slot.slot)}) == 1
    (first,) = [e for e in bench.registry.events(bench.hash) if e.kind == "round" and e.data["round"] == 1]
    assert first.data["metrics"]["train_examples"] == 11 + 13 + 15 + 17
    plan = bench.sites["anna"].plan
    stored = b"".join(path.read_bytes() for path in bench.home.root.rglob("*") if path.is_file())
    for site in bench.sites.values():
        for words in site.plain.values():
            assert words[: plan.size][:16].tobytes() not in stored


def test_S8_the_status_says_what_secure_sums_without_noise_do_not_prevent(bench):
    bench.run()
    console = Console(width=400, record=True)
    console.print(status(bench.registry, bench.hash))
    text = console.export_text()
    assert S8 in text
    assert "sees each hospital's update" not in text


# ---- sites that lie --------------------------------------------------------------------------------------------


def test_a_site_whose_parcels_do_not_open_is_left_out_by_those_it_sent_them_to(bench, monkeypatch):
    dora = bench.sites["dora"]
    honest = dora._shares

    def dishonest(request, payload):
        detail, data = honest(request, payload)
        parcels = dict(Enclosure.decode(data, 1 << 24, {}, parcels=True).parcels)
        for name in NAMES[:3]:
            parcels[name] = parcels[name][:-1] + bytes([parcels[name][-1] ^ 1])
        document = Document.decode(detail["shares"].encode(), Shares.KIND)
        body = {**document.body, "parcels": {name: sha256(parcel) for name, parcel in sorted(parcels.items())}}
        signed = Document(Shares.KIND, body).signed_by(dora.identity)
        return {"shares": signed.encode().decode()}, Enclosure(parcels=parcels).encode()

    monkeypatch.setattr(dora, "_shares", dishonest)
    assert bench.run() is State.FINISHED, bench.registry.study(bench.hash).reason
    assert bench.course.slot(1).cohort == NAMES[:3]
    texts = [e.text for e in bench.registry.events(bench.hash) if e.kind == "blamed"]
    assert texts == ["dora is left out of secure sums: 3 sites cannot use what it sent them"]
    np.testing.assert_array_equal(bench.weights(1), expected(bench, 1, NAMES[:3]))


def test_one_site_alone_cannot_have_another_left_out(bench):
    def accuse(request):
        return RefusalCode.PEER_SHARES if request.header.kind == "seal" else None

    def slander(request, document, payload):
        if request.header.kind != "seal":
            return document, payload
        answer = Answer.verified(document, bench.sites["dora"].identity.public)
        told = answer.model_copy(update={"detail": {"about": "anna"}})
        return told.signed(bench.sites["dora"].identity).encode(), payload

    bench.sites["dora"].refuse, bench.sites["dora"].tamper = accuse, slander
    assert bench.run() is State.FINISHED
    assert bench.course.slot(1).cohort == NAMES[:3]


@pytest.mark.parametrize("lie", ["opening", "survivors"])
def test_a_site_that_says_something_else_harms_itself_only(tmp_path, lie):
    bench = SecureBench(tmp_path, 5)
    if lie == "survivors":
        bench.vanishes("emil", "train")
    bert = bench.sites["bert"]

    def other(request, document, payload):
        if request.header.kind != {"opening": "unmask", "survivors": "survivors"}[lie]:
            return document, payload
        answer = Answer.verified(document, bert.identity.public)
        told = Document.decode(answer.detail[lie].encode(), f"secagg-{lie}")
        changed = Document(told.kind, {**told.body, "header": "0" * 64}).signed_by(bert.identity)
        new = answer.model_copy(update={"detail": {lie: changed.encode().decode()}})
        return new.signed(bert.identity).encode(), payload

    bert.tamper = other
    bench.run()
    first = bench.course.slot(1)
    if lie == "opening":
        assert first.state is SlotState.DONE
        np.testing.assert_array_equal(bench.weights(1), expected(bench, 1, NAMES[:5]))
    else:
        assert first.state is SlotState.FAILED, "four must agree, and one of the four lies"
        assert "3 of at least 4 sites agreed" in first.reason


# ---- the life of a ring ----------------------------------------------------------------------------------------


def test_S7_one_set_of_keys_serves_no_more_slots_than_the_study_says(tmp_path):
    bench = SecureBench(tmp_path, secagg={"session_slots": 2})
    assert bench.run() is State.FINISHED
    assert [s.session for s in bench.course.slots()] == [1, 1, 2, 2, 3]
    assert bench.sites["anna"].log.count("keys") == 3


def test_a_site_that_lost_its_keys_is_in_the_next_ring(bench):
    def lose(request):
        if request.header.slot == 2 and request.header.kind == "train":
            bench.sites["cleo"].ready = None
            bench.sites["cleo"].refuse = lambda _: None

    bench.sites["cleo"].refuse = lose
    assert bench.run() is State.FINISHED
    assert {o.site: o.code for o in bench.course.outcomes(2) if o.code} == {"cleo": "out-of-order"}
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 2, ("anna", "bert", "dora")))
    third = bench.course.slot(3)
    assert (third.session, third.cohort) == (2, NAMES[:4])


def test_a_site_that_always_says_so_does_not_keep_the_others_busy_with_keys(tmp_path):
    bench = SecureBench(tmp_path, rounds={"count": 8})
    bench.sites["cleo"].refuse = lambda r: RefusalCode.OUT_OF_ORDER if r.header.kind == "train" else None
    assert bench.run() is State.FINISHED
    assert bench.sites["anna"].log.count("keys") == 1 + MOST_RENEWALS


def test_too_few_keys_use_up_no_slot_and_the_reason_names_who_did_not_come_through(bench):
    for name in ("cleo", "dora"):
        bench.sites[name].refuse = lambda r: RefusalCode.INTERNAL if r.header.kind == "shares" else None
    seen = set()

    def watch():
        seen.add(bench.registry.study(bench.hash).reason)
        if bench.clock.time > 200:
            for site in bench.sites.values():
                site.refuse = lambda _: None

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert len(bench.course.slots()) == 5
    assert any("no keys for secure sums" in reason and "cleo refused" in reason for reason in seen)
    assert bench.registry.study(bench.hash).reason == ""
