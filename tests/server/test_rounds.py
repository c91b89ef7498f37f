"""The loop against honest, slow, absent and lying sites."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privacy.canonical import sha256
from privacy.errors import RefusalCode
from privacy.identity import Identity
from privacy.messages import Answer, Request
from privacy.study import approval
from server.records import OutcomeState, SlotState, State
from tests.server.round_kit import INITIAL, Bench


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def states(bench: Bench, slot: int) -> dict[str, str]:
    return {o.site: o.state.value for o in bench.course.outcomes(slot)}


def codes(bench: Bench, slot: int) -> dict[str, str]:
    return {o.site: o.code for o in bench.course.outcomes(slot) if o.code}


def test_a_study_of_honest_sites_runs_from_offer_to_delivery(bench):
    assert bench.run() is State.FINISHED
    kinds = [(s.kind, s.round, s.state) for s in bench.course.slots()]
    assert kinds == [
        *(("train", r, SlotState.DONE) for r in (1, 2, 3)),
        ("validate", 3, SlotState.DONE),
        ("test", 3, SlotState.DONE),
    ]
    assert all(site.finished for site in bench.sites.values())
    assert sorted(bench.course.evaluations("validation")) == [0, 1, 2, 3]
    ((round_, history, test),) = bench.published
    assert round_ == 3
    assert [e.round for e in history] == [0, 1, 2, 3]
    assert 0 <= test.metrics["auroc"] <= 1
    assert test.metrics["images"] == 60
    assert {d.state for d in bench.course.deliveries()} == {"delivered"}
    (model,) = bench.registry.models()
    assert (model.round, model.metrics) == (3, dict(test.metrics))


def test_each_round_is_the_weighted_mean_of_the_updates(tmp_path):
    bench = Bench(tmp_path, rounds={"count": 1})
    for number, site in enumerate(bench.sites.values()):
        site.examples = 10 + 5 * number
    start = bench.weights()
    bench.run()
    deltas = [np.frombuffer(site.bound[1][2], "<f4")[: len(start)] for site in bench.sites.values()]
    expected = start + np.average(np.array(deltas, np.float64), axis=0, weights=[10, 15, 20])
    np.testing.assert_allclose(bench.weights(1), expected, rtol=1e-6)


def test_initial_weights_travel_once_to_each_site(bench):
    bench.run()
    for site in bench.sites.values():
        assert site.log.count(f"open+{len(INITIAL)}") == 1
        assert site.initial == INITIAL


def test_a_site_that_holds_the_initial_weights_is_not_sent_them(bench):
    bench.sites["anna"].initial = INITIAL
    bench.run()
    assert f"open+{len(INITIAL)}" not in bench.sites["anna"].log


def test_the_process_waits_for_approvals_and_says_for_whose(bench):
    bench.sites["bert"].decision = bench.sites["cleo"].decision = "pending"
    seen = []

    def watch():
        record = bench.registry.study(bench.hash)
        seen.append((record.state, record.reason))
        if bench.clock.time > 5:
            bench.sites["bert"].decision = "approved"
            bench.sites["cleo"].decision = "declined"

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert (State.WAITING, "bert has not decided, cleo has not decided") in seen
    assert "cleo" not in bench.course.slots()[0].cohort


def test_too_few_approvals_pause_the_study_with_the_names(bench):
    bench.sites["bert"].decision = bench.sites["cleo"].decision = "declined"
    assert bench.run() is State.PAUSED
    assert "bert declined, cleo declined" in bench.registry.study(bench.hash).reason
    assert bench.course.slots() == []


@pytest.mark.parametrize("wrong", ["signer", "undeclared", "in words"])
def test_an_approval_that_is_forged_or_not_whole_is_not_believed(bench, wrong):
    cleo = bench.sites["cleo"]
    good = approval(bench.hash, "cleo", "images")
    bodies = {
        "undeclared": {name: value for name, value in good.body.items() if name != "one_image_per_patient"},
        "in words": {**good.body, "one_image_per_patient": "no"},
    }
    signer = Identity.generate() if wrong == "signer" else cleo.identity
    yes = replace(good, body=bodies.get(wrong, good.body)).signed_by(signer).encode().hex()

    def forge(request: Request, document: bytes, payload: bytes):
        if request.header.kind != "offer":
            return document, payload
        return cleo.say(request, {"state": "approved", "approval": yes}), payload

    cleo.tamper = forge
    bench.run()
    assert {a.site: a.state for a in bench.registry.approvals(bench.hash)}["cleo"] == ""
    assert all("cleo" not in slot.cohort for slot in bench.course.slots())


def test_a_straggler_is_late_and_ends_nothing(bench):
    bench.sites["cleo"].delay = 500.0
    assert bench.run() is State.FINISHED
    assert states(bench, 1) == {"anna": "in", "bert": "in", "cleo": "late"}
    assert bench.clock.time < 7 * 60 + 60


def test_an_absent_site_is_lost_and_does_not_hold_the_round_up(bench):
    calls = []

    def watch():
        if bench.course.slots() and "cleo" in bench.wire.online:
            del bench.wire.online["cleo"]
        calls.append(bench.clock.time)

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert states(bench, 2)["cleo"] == "lost"
    assert calls[-1] < 60 + 60
    assert {d.site: d.state for d in bench.course.deliveries()}["cleo"] == "waiting"
    assert "cleo" in bench.registry.study(bench.hash).reason


def test_a_site_that_comes_back_within_the_deadline_is_asked_the_same_request(tmp_path):
    bench = Bench(tmp_path, aggregation={"minimum_sites": 3})
    away: list[float] = []

    def watch():
        if len(bench.course.slots()) == 2 and not away:
            away.append(bench.clock.time)
            del bench.wire.online["cleo"]
        if away and bench.clock.time > away[0] + 20:
            bench.wire.online["cleo"] = bench.sites["cleo"]

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert states(bench, 2) == dict.fromkeys(bench.sites, "in")
    assert all(len(hashes) == 1 for hashes in bench.wire.requests.values())


def test_a_lost_message_is_sent_again(tmp_path):
    bench = Bench(tmp_path, aggregation={"minimum_sites": 3})
    failures = iter(["node unavailable"] * 3)
    bench.wire.errors = lambda site, kind: next(failures, "") if (site.name, kind) == ("anna", "train") else ""
    assert bench.run() is State.FINISHED
    assert len(bench.course.slots()) == 5


def test_a_site_whose_agent_lost_its_session_is_opened_again(bench):
    def forget(request: Request) -> RefusalCode | None:
        if request.header.slot == 2 and bench.sites["anna"].session:
            bench.sites["anna"].refuse = lambda _: None
            bench.sites["anna"].session = 0
        return None

    bench.sites["anna"].refuse = forget
    assert bench.run() is State.FINISHED
    assert states(bench, 2)["anna"] == "in"


@pytest.mark.parametrize("code", [RefusalCode.NO_DATA, RefusalCode.DISK_FULL, RefusalCode.INTERNAL])
def test_a_passing_refusal_is_shown_and_ends_nothing(bench, code):
    bench.sites["cleo"].refuse = lambda request: code if request.header.slot else None
    assert bench.run() is State.FINISHED
    assert states(bench, 1)["cleo"] == "refused"
    assert codes(bench, 1) == {"cleo": code.value}
    assert bench.clock.time < 60


def test_a_disk_that_is_freed_within_the_deadline_saves_the_slot(tmp_path):
    bench = Bench(tmp_path, aggregation={"minimum_sites": 3})
    cleo = bench.sites["cleo"]
    cleo.refuse = lambda r: RefusalCode.DISK_FULL if r.header.slot and bench.clock.time < 12 else None
    assert bench.run() is State.FINISHED
    assert len(bench.course.slots()) == 5


def test_a_busy_site_is_asked_again(bench):
    busy = iter([RefusalCode.BUSY, RefusalCode.BUSY])
    bench.sites["cleo"].refuse = lambda request: next(busy, None) if request.header.slot else None
    bench.run()
    assert states(bench, 1)["cleo"] == "in"


def test_a_site_that_withdraws_is_out_and_may_come_back(tmp_path):
    bench = Bench(tmp_path, rounds={"count": 12})
    cleo = bench.sites["cleo"]
    cleo.delay = bench.sites["anna"].delay = 8.0

    def withdraw(request: Request) -> None:
        if request.header.slot == 2:
            cleo.decision, cleo.refuse = "withdrawn", lambda _: None

    def watch():
        if len(bench.course.slots()) == 5:
            cleo.decision = "approved"

    cleo.refuse, bench.clock.watch = withdraw, watch
    assert bench.run() is State.FINISHED
    assert codes(bench, 2)["cleo"] == "withdrawn"
    cohorts = [slot.cohort for slot in bench.course.slots()]
    assert "cleo" not in cohorts[2]
    assert "cleo" in cohorts[-1]


# ---- lying sites ---------------------------------------------------------------------------------------------


def replay(store: list):
    def tamper(request: Request, document: bytes, payload: bytes):
        if request.header.kind != "train":
            return document, payload
        store.append((document, payload))
        return store[0]

    return tamper


def changed(liar, **changes):
    """Sign another statement than the true one."""

    def tamper(request: Request, document: bytes, payload: bytes):
        if request.header.slot == 0:
            return document, payload
        answer = Answer.verified(document, liar.identity.public)
        return answer.model_copy(update=changes).signed(liar.identity).encode(), payload

    return tamper


def rewritten(site, change):
    """Send other numbers, properly hashed and signed."""

    def tamper(request: Request, document: bytes, payload: bytes):
        if request.header.slot == 0:
            return document, payload
        data = change(payload)
        answer = Answer.verified(document, site.identity.public)
        new = {"payload_sha256": sha256(data), "payload_bytes": len(data)}
        return answer.model_copy(update=new).signed(site.identity).encode(), data

    return tamper


def foreign(site):
    other = Identity.generate()

    def tamper(request: Request, document: bytes, payload: bytes):
        if request.header.slot == 0:
            return document, payload
        return Answer.verified(document, site.identity.public).signed(other).encode(), payload

    return tamper


NAN = np.array([np.nan], "<f4").tobytes()
LIES = {
    "another key": (foreign, "bad-signature"),
    "not an answer": (lambda _: lambda r, d, p: (b"{}", p) if r.header.slot else (d, p), "malformed"),
    "another site's name": (lambda s: changed(s, site="bert"), "malformed"),
    "another slot": (lambda s: changed(s, slot=99), "malformed"),
    "another session": (lambda s: changed(s, session=9), "malformed"),
    "another study": (lambda s: changed(s, study="1" * 64), "malformed"),
    "another request": (lambda s: changed(s, request="1" * 64), "malformed"),
    "an old answer": (lambda _: replay([]), "malformed"),
    "nan": (lambda s: rewritten(s, lambda p: NAN + p[4:]), "non-finite"),
    "too short": (lambda s: rewritten(s, lambda p: p[:-4]), "model-shape"),
    "too long": (lambda s: rewritten(s, lambda p: p + p[:4]), "model-shape"),
    "other bytes": (lambda _: lambda r, d, p: (d, p[4:] + p[:4]) if r.header.slot else (d, p), "model-hash"),
    "fewer bytes": (lambda _: lambda r, d, p: (d, p[:-8]) if r.header.slot else (d, p), "model-shape"),
    "fewer statistics": (lambda s: changed(s, statistics=5), "model-shape"),
    "a made-up reason": (lambda s: changed(s, status="refused", code="<b>because</b>"), "<b>because</b>"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_site_harms_itself_only(tmp_path, lie):
    honest, bench = Bench(tmp_path / "honest", 3), Bench(tmp_path / "lied to", 3)
    make, code = LIES[lie]
    cleo = bench.sites["cleo"]
    cleo.tamper = make(cleo)
    honest.sites["cleo"].refuse = lambda r: RefusalCode.NON_FINITE if r.header.slot > (lie == "an old answer") else None
    assert bench.run() is State.FINISHED
    assert honest.run() is State.FINISHED
    slot = 2 if lie == "an old answer" else 1
    assert codes(bench, slot)["cleo"] == code
    assert "<" not in next(o.reason for o in bench.course.outcomes(slot) if o.site == "cleo")
    assert bench.weights(3).tobytes() == honest.weights(3).tobytes()


def test_a_site_that_keeps_denying_its_session_is_left_out(bench):
    bench.sites["cleo"].refuse = lambda r: RefusalCode.SESSION_UNKNOWN if r.header.slot else None
    assert bench.run() is State.FINISHED
    assert states(bench, 1)["cleo"] == "refused"
    assert len(bench.sites["cleo"].log) < 60


def test_huge_finite_updates_end_as_divergence_not_as_a_broken_model(tmp_path):
    bench = Bench(tmp_path, aggregation={"server_learning_rate": 2})
    huge = np.full(50, 3e38, "<f4").tobytes()
    for site in bench.sites.values():
        site.tamper = rewritten(site, lambda p: huge + p[200:])
    assert bench.run() is State.FAILED
    assert "diverged in round 1" in bench.registry.study(bench.hash).reason
    assert [c.round for c in bench.course.checkpoints()] == [0]


# ---- minimum, reserve, sessions ------------------------------------------------------------------------------


def test_too_few_answers_repeat_the_round_in_the_next_slot(tmp_path):
    bench = Bench(tmp_path, aggregation={"minimum_sites": 3})
    bench.sites["cleo"].refuse = lambda r: RefusalCode.NON_FINITE if r.header.slot == 2 else None
    assert bench.run() is State.FINISHED
    train = [(s.slot, s.round, s.attempt, s.state) for s in bench.course.slots() if s.kind == "train"]
    assert train == [(1, 1, 1, "done"), (2, 2, 1, "failed"), (3, 2, 2, "done"), (4, 3, 1, "done")]
    assert "2 of at least 3 sites answered (cleo refused" in bench.course.slot(2).reason


def test_a_site_still_at_work_when_too_few_are_left_is_not_called_late(tmp_path):
    bench = Bench(tmp_path, aggregation={"minimum_sites": 3})
    bench.sites["anna"].delay = 20.0
    bench.sites["cleo"].refuse = lambda r: RefusalCode.NON_FINITE if r.header.slot == 2 else None
    assert bench.run() is State.FINISHED
    (anna,) = [o for o in bench.course.outcomes(2) if o.site == "anna"]
    assert (anna.state, anna.code) == (OutcomeState.LOST, "")
    assert anna.reason == "not waited for, since too few others were left"
    assert "deadline" not in bench.course.slot(2).reason


def test_a_used_up_reserve_pauses_with_the_reason_and_stays_within_the_plan(tmp_path):
    bench = Bench(tmp_path, aggregation={"minimum_sites": 3})
    bench.sites["cleo"].refuse = lambda r: RefusalCode.NON_FINITE if r.header.slot >= 2 else None
    assert bench.run() is State.PAUSED
    record = bench.registry.study(bench.hash)
    assert record.reason.startswith("the reserve of 2 repeated rounds is used up after round 1")
    assert len(bench.course.slots()) == bench.study.slots - 2
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.PAUSED
    assert len(bench.course.slots()) == bench.study.slots - 2


def test_waiting_for_sites_uses_up_no_slot(bench):
    bench.wire.online = {"anna": bench.sites["anna"]}
    for site in bench.sites:
        bench.registry.set_approval(bench.hash, site, "approved")
    reasons = set()

    def watch():
        reasons.add(bench.registry.study(bench.hash).reason)
        if bench.clock.time > 300:
            bench.wire.online = dict(bench.sites)

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert len(bench.course.slots()) == 5
    assert any("waiting for sites to connect: bert, cleo" in reason for reason in reasons)


def test_a_revoked_site_is_asked_nothing_more(bench):
    done = []

    def watch():
        if len(bench.course.slots()) == 2 and not done:
            done.append(len(bench.sites["cleo"].log))
            bench.registry.save_roster(bench.roster(2, revoked=["cleo"]).signed(bench.identity))

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert "cleo" not in bench.course.slots()[-1].cohort
    assert not bench.sites["cleo"].finished


def test_pause_and_resume_keep_slot_session_and_request(bench):
    def watch():
        if bench.course.slots() and bench.registry.study(bench.hash).state is State.RUNNING:
            bench.clock.watch = lambda: None
            bench.registry.pause(bench.hash)

    bench.clock.watch = watch
    for site in bench.sites.values():
        site.delay = 30.0
    assert bench.run() is State.PAUSED
    assert bench.clock.time < 30
    (slot,) = bench.course.slots()
    assert slot.state is SlotState.OPEN
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED
    assert bench.course.slot(1).request == slot.request
    assert {s.session for s in bench.course.slots()} == {1}


def test_a_new_launch_is_a_new_session_and_gives_up_the_open_slot(bench):
    def watch():
        if bench.course.slots():
            bench.clock.watch = lambda: None
            bench.registry.stop(bench.hash)

    bench.clock.watch = watch
    for site in bench.sites.values():
        site.delay = 5.0
    assert bench.run() is State.STOPPED
    assert bench.run() is State.FINISHED
    first, *later = bench.course.slots()
    assert (first.session, first.state) == (1, SlotState.ABANDONED)
    assert {s.session for s in later} == {2}
    assert [s.slot for s in later] == [2, 3, 4, 5, 6]


def test_a_second_coordinator_is_noticed_and_the_next_session_takes_over(bench):
    for site in bench.sites.values():
        site.session = 3
    assert bench.run() is State.PAUSED
    assert "newer session" in bench.registry.study(bench.hash).reason
    assert bench.course.slots()[0].state is SlotState.FAILED
    for _ in range(2):
        bench.registry.resume(bench.hash)
        state = bench.loop().run()
    assert state is State.FINISHED
    assert bench.course.slots()[-1].session == 3


def test_a_finished_study_delivers_again_to_who_was_away(bench):
    def watch():
        if any(s.kind == "test" for s in bench.course.slots()):
            bench.wire.online.pop("cleo", None)

    bench.clock.watch = watch
    assert bench.run() is State.FINISHED
    assert not bench.sites["cleo"].finished
    bench.clock.watch = lambda: None
    bench.wire.online = dict(bench.sites)
    slots = len(bench.course.slots())
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED
    assert bench.sites["cleo"].finished
    assert bench.registry.study(bench.hash).reason == ""
    assert len(bench.course.slots()) == slots
    assert len(bench.published) == 1


def test_best_validation_publishes_the_best_round_and_prunes_the_others(tmp_path):
    bench = Bench(tmp_path, rounds={"count": 6}, publish={"choose": "best-validation"})
    assert bench.run() is State.FINISHED
    scores = {r: e.metrics["auroc"] for r, e in bench.course.evaluations("validation").items() if r > 0}
    best = max(scores, key=lambda r: (scores[r], -r))
    assert bench.published[0][0] == best
    assert bench.course.slots()[-1].payload == bench.course.checkpoints()[best].weights
    kept = [c.round for c in bench.course.checkpoints() if c.weights]
    assert set(kept) == {0, best, max(kept)}
    assert 6 in kept


def test_training_without_images_is_no_round(bench):
    for site in bench.sites.values():
        site.examples = 0
    assert bench.run() is State.PAUSED
    assert bench.course.slot(1).reason == "no site has training images"


def test_progress_is_told_as_it_happens(bench):
    bench.run()
    events = bench.registry.events(bench.hash)
    kinds = [e.kind for e in events]
    assert kinds.index("slot") < kinds.index("outcome") < kinds.index("round")
    (first,) = [e for e in events if e.kind == "round" and e.data["round"] == 1]
    assert first.data["metrics"]["train_examples"] == 30
    assert first.data["metrics"]["train_loss"] == pytest.approx(0.5)
    arrived = [e for e in events if e.kind == "outcome" and e.data["slot"] == 1]
    assert {e.site for e in arrived} == set(bench.sites)
    assert all(e.data["state"] == OutcomeState.IN for e in arrived)
