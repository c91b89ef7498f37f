"""RULES S1, S2, S3 and S7, on an agent in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from client.agent.rows import State
from models import weights
from privacy.airlock import released_bytes
from privacy.canonical import sha256
from privacy.errors import Refusal
from privacy.messages import Answer
from tests.client.agent.bed import Bed, make_bed, wait_for

ENDLESS = 1_000_000


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Bed]:
    """An open session of a study whose local steps outlast any test."""
    bed = make_bed(tmp_path / "slow", steps=ENDLESS)
    bed.start()
    bed.ready()
    yield bed
    bed.stop()


def in_thread(call: Callable[[], Answer]) -> Callable[[], Answer]:
    """Start a call; the result waits for it."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()

    def result() -> Answer:
        thread.join(60)
        return answers[0]

    return result


def begun(bed: Bed, slot: int) -> int:
    assert bed.agent is not None
    return sum(text.startswith(f"slot {slot}:") and text.endswith("begun") for _, _, text in bed.agent.store.events())


def files(bed: Bed) -> list[str]:
    return sorted(path.name for path in (bed.home.agent / "answers").iterdir())


def test_S1_slots_only_go_up(open_bed: Bed) -> None:
    assert open_bed.call("train", open_bed.vector, slot=2).status == "done"
    assert open_bed.call("train", open_bed.vector, slot=1).code == "slot-old"
    assert open_bed.call("validate", open_bed.vector, slot=4).status == "done"
    assert open_bed.call("train", open_bed.vector, slot=3).code == "slot-old"


def test_S1_the_agent_refuses_the_slot_after_T_max(open_bed: Bed) -> None:
    limit = open_bed.study.slots
    assert open_bed.call("train", open_bed.vector, slot=limit + 1).code == "slot-limit"
    open_bed.stop()
    open_bed.start()
    assert open_bed.call("validate", open_bed.vector, slot=1).status == "done", "a refused slot is not a used one"
    assert open_bed.call("validate", open_bed.vector, slot=limit).status == "done"


def test_S1_the_counter_belongs_to_the_study_and_not_to_a_session(open_bed: Bed) -> None:
    assert open_bed.call("validate", open_bed.vector, slot=5).status == "done"
    assert open_bed.call("open", session=2).status == "done"
    assert open_bed.call("validate", open_bed.vector, slot=3, session=2).code == "slot-old"
    assert open_bed.call("validate", open_bed.vector, slot=5, session=2).code == "slot-bound"
    assert open_bed.call("validate", open_bed.vector, slot=6, session=2).status == "done"


def test_S2_the_same_request_gets_the_same_bytes_for_ever(open_bed: Bed) -> None:
    document, payload = open_bed.request("train", open_bed.vector, slot=1), open_bed.vector
    assert open_bed.agent is not None
    first = open_bed.take(open_bed.agent.submit(document, payload))
    vector = open_bed.fetch(open_bed.read(first))
    assert sha256(vector) == open_bed.read(first).payload_sha256
    assert released_bytes(open_bed.agent.submit(document, payload)) == first
    open_bed.stop()
    assert released_bytes(open_bed.start().submit(document, b"")) == first, "stored: the payload is not needed"
    assert open_bed.fetch(open_bed.read(first)) == vector
    assert begun(open_bed, 1) == 1


@pytest.mark.parametrize(
    "change", [{"round": 2}, {"deadline_seconds": 601}, {"cohort": ("st-anna",)}, {"parameters": {"a": "b"}}]
)
def test_S2_a_bound_slot_refuses_every_other_request(open_bed: Bed, change: dict[str, object]) -> None:
    first = open_bed.call("validate", open_bed.vector, slot=1)
    assert open_bed.call("validate", open_bed.vector, slot=1, **change).code == "slot-bound"
    assert open_bed.call("train", open_bed.vector, slot=1).code == "slot-bound"
    assert open_bed.call("validate", bytes(len(open_bed.vector)), slot=1).code == "slot-bound"
    assert open_bed.call("validate", open_bed.vector, slot=1) == first


def test_S2_a_newer_slot_discards_older_bytes_but_never_the_tombstone(open_bed: Bed) -> None:
    first = open_bed.call("train", open_bed.vector, slot=1)
    assert files(open_bed) == [f"{open_bed.hash}-000001.f32"]
    open_bed.call("validate", open_bed.vector, slot=2)
    assert files(open_bed) == [f"{open_bed.hash}-000002.f32"]
    assert open_bed.call("train", open_bed.vector, slot=1).code == "slot-spent"
    with pytest.raises(Refusal, match="gone"):
        open_bed.fetch(first)
    open_bed.stop()
    open_bed.start()
    assert open_bed.call("train", open_bed.vector, slot=1).code == "slot-spent"


def test_S2_a_request_sent_again_waits_for_the_same_computation(tmp_path: Path) -> None:
    bed = make_bed(tmp_path / "site", steps=30)
    bed.start()
    bed.ready()
    calls = [in_thread(lambda: bed.call("train", bed.vector, slot=1)) for _ in range(3)]
    answers = [call() for call in calls]
    assert answers[0].status == "done"
    assert answers[1:] == answers[:1] * 2
    assert begun(bed, 1) == 1
    bed.stop()


def test_S2_a_newer_slot_stops_an_older_computation(slow: Bed) -> None:
    older = in_thread(lambda: slow.call("train", slow.vector, slot=1))
    wait_for(lambda: begun(slow, 1) == 1)
    newer = slow.call("validate", slow.vector, slot=2)
    assert newer.status == "done"
    assert older().code == "slot-spent"
    assert files(slow) == [f"{slow.hash}-000002.f32"]


def test_S3_nothing_leaves_before_it_is_stored(slow: Bed) -> None:
    assert slow.agent is not None
    work = in_thread(lambda: slow.call("train", slow.vector, slot=1))
    wait_for(lambda: begun(slow, 1) == 1)
    row = slow.agent.store.slot(slow.hash, 1)
    assert row is not None
    assert row.state == "bound"
    with pytest.raises(Refusal, match="gone"):
        slow.agent.fetch(slow.hash, 1, 1, row.request, 0, 4)
    slow.agent.stop()
    assert work().code == "busy"


def test_S3_a_late_answer_leaves_nothing_and_the_binding_stays(slow: Bed) -> None:
    assert slow.agent is not None
    assert slow.call("train", slow.vector, slot=1, deadline_seconds=1).code == "late"
    row = slow.agent.store.slot(slow.hash, 1)
    assert row is not None
    assert (row.state, files(slow)) == ("bound", [])
    assert slow.call("train", slow.vector, slot=1, deadline_seconds=1).code == "late", "computed again, same binding"
    assert slow.call("train", slow.vector, slot=1, deadline_seconds=2).code == "slot-bound"


@pytest.mark.parametrize("lost", [False, True])
def test_S3_records_restored_from_a_backup_never_reuse_a_slot(open_bed: Bed, lost: bool) -> None:
    assert open_bed.call("train", open_bed.vector, slot=1).status == "done"
    open_bed.stop()
    records = open_bed.home.agent / "agent.db"
    backup = records.read_bytes()
    open_bed.start()
    for slot in (2, 3):
        assert open_bed.call("validate", open_bed.vector, slot=slot).status == "done"
    open_bed.stop()
    for path in open_bed.home.agent.glob("agent.db*"):
        path.unlink()
    if not lost:
        records.write_bytes(backup)
    open_bed.start()
    if lost:
        open_bed.ready()
    assert open_bed.call("train", open_bed.vector, slot=1).code in {"slot-old", "slot-spent"}
    for slot in (2, 3):
        assert open_bed.call("validate", open_bed.vector, slot=slot, round=2).code == "slot-old"
    assert open_bed.call("validate", open_bed.vector, slot=4).status == "done"


def test_S7_a_new_session_kills_what_the_old_one_left(open_bed: Bed) -> None:
    first = open_bed.call("train", open_bed.vector, slot=1)
    assert open_bed.call("open", session=2).detail == {"initial": "held"}
    assert files(open_bed) == []
    for _ in range(2):
        assert open_bed.call("train", open_bed.vector, slot=1).code == "session-closed"
        assert open_bed.call("open", session=1).code == "session-closed"
        with pytest.raises(Refusal, match="newer session"):
            open_bed.fetch(first)
        open_bed.stop()
        open_bed.start()


def test_S7_a_new_session_stops_a_computation_of_the_old_one(slow: Bed) -> None:
    older = in_thread(lambda: slow.call("train", slow.vector, slot=1))
    wait_for(lambda: begun(slow, 1) == 1)
    assert slow.call("open", session=2).status == "done"
    assert older().code in {"session-closed", "slot-spent"}
    assert files(slow) == []


def test_S7_a_session_that_was_never_opened_is_unknown(open_bed: Bed) -> None:
    assert open_bed.call("train", open_bed.vector, slot=1, session=2).code == "session-unknown"
    assert open_bed.call("deliver", open_bed.parcel(), session=2).code == "session-unknown"
    assert open_bed.call("open", session=1).status == "done", "the same session again changes nothing"


def test_S7_withdrawing_kills_the_open_slots(open_bed: Bed) -> None:
    assert open_bed.agent is not None
    answer = open_bed.call("train", open_bed.vector, slot=1)
    open_bed.agent.decide(open_bed.hash, State.WITHDRAWN)
    assert files(open_bed) == []
    assert open_bed.call("train", open_bed.vector, slot=1).code == "withdrawn"
    with pytest.raises(Refusal, match="withdrew"):
        open_bed.fetch(answer)
    open_bed.agent.decide(open_bed.hash, State.APPROVED, "archive")
    assert open_bed.call("train", open_bed.vector, slot=1).code == "slot-spent"
    assert open_bed.call("train", open_bed.vector, slot=2).status == "done"


def test_the_update_is_trained_minus_received_and_statistics_follow(open_bed: Bed) -> None:
    answer = open_bed.call("train", open_bed.vector, slot=1)
    vector = np.frombuffer(open_bed.fetch(answer), dtype="<f4")
    count = weights.trainable_count(open_bed.study.spec())
    assert len(vector) == count + answer.statistics
    assert 0 < np.abs(vector[:count]).max() < 0.5
    examples, loss_sum, steps = vector[count : count + 3]
    assert open_bed.agent is not None
    source = open_bed.agent.store.sources()[0]
    trained_on = open_bed.agent.desk.cohort(open_bed.study, source).indices("train")
    assert (examples, steps) == (len(trained_on), 3)
    assert 0 < loss_sum < 10


def test_a_test_result_and_the_model_stay_at_the_site(open_bed: Bed) -> None:
    assert open_bed.agent is not None
    assert open_bed.call("test", open_bed.vector, slot=1).status == "done"
    assert open_bed.call("deliver", open_bed.parcel(MODEL_CARD__md=b"# Card")).status == "done"
    folder = open_bed.home.agent / "models" / open_bed.hash
    assert (folder / "model.safetensors").read_bytes() == open_bed.initial
    assert '"auroc"' in (folder / "site-test.json").read_text()
    row = open_bed.agent.store.study(open_bed.hash)
    assert row is not None
    assert row.state is State.FINISHED
    assert open_bed.call("train", open_bed.vector, slot=2).code == "session-closed"
    assert open_bed.call("deliver", open_bed.parcel()).status == "done", "delivered again, as after a lost answer"
