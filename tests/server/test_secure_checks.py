"""What can be told of a hostile update from the sum alone, and how a round is taken back."""

from __future__ import annotations

import numpy as np
import pytest

from models import additive, tasks
from privacy.errors import ConsiliumError
from server.records import Evaluation, SlotState, State
from server.secure import KEPT_BACK, suspicion
from tests.server.round_kit import D
from tests.server.secure_kit import SecureBench
from tests.server.test_secure_rounds import expected


def far_out(words: np.ndarray) -> np.ndarray:
    """The largest update that the grid can carry, whatever the norm bound says."""
    changed = words.copy()
    if len(words) > D:
        changed[:D] = (2**31 - 1) // 4
    return changed


def test_a_sum_beyond_what_honest_sites_can_send_is_not_applied_and_pauses_the_study(tmp_path):
    bench = SecureBench(tmp_path, secagg={"norm_bound": "0.5", "examples_bound": 100})
    bench.sites["cleo"].shift = far_out
    assert bench.run() is State.PAUSED
    reason = bench.registry.study(bench.hash).reason
    assert "round 1 was left out: the sum of the updates has norm" in reason
    assert "one of them runs something else" in reason
    assert bench.course.slot(1).state is SlotState.FAILED
    assert bench.weights(1).tobytes() == bench.weights(0).tobytes()
    bench.sites["cleo"].shift = lambda words: words
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED
    np.testing.assert_array_equal(bench.weights(2), expected(bench, 2, tuple(bench.sites)))


def test_honest_updates_at_the_bound_are_within_it(tmp_path):
    bench = SecureBench(tmp_path, secagg={"norm_bound": "0.01", "examples_bound": 100})
    assert bench.run() is State.FINISHED, bench.registry.study(bench.hash).reason
    step = np.linalg.norm(bench.weights(1).astype(float) - bench.weights(0))
    assert 0 < step <= 0.01001


def worse(bench: SecureBench, from_slot: int) -> None:
    """Every site measures a loss ten times as high from a slot on."""
    task = tasks.get(bench.study.spec())
    names = [name for name, size in additive.layout(task) for _ in range(size)]
    at = names.index("loss") - len(names)

    def shift(words: np.ndarray) -> np.ndarray:
        changed = words.copy()
        if len(bench.course.slots()) >= from_slot:
            changed[at] = changed[at] * 10
        return changed

    for site in bench.sites.values():
        site.shift = shift


def test_a_model_much_worse_than_the_one_before_pauses_and_a_person_may_go_back(tmp_path):
    bench = SecureBench(tmp_path, rounds={"count": 6})
    worse(bench, 4)
    assert bench.run() is State.PAUSED
    reason = bench.registry.study(bench.hash).reason
    assert "the model of round 3 is much worse than that of round 2" in reason
    assert "study resume chest --back-to 2" in reason
    before = {c.round: c.weights for c in bench.course.checkpoints()}
    bench.registry.back_to(bench.hash, 2)
    assert bench.course.checkpoints()[-1].weights == before[2]
    for site in bench.sites.values():
        site.shift = lambda words: words
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED
    rounds = [s.round for s in bench.course.slots() if s.kind == "train"]
    assert rounds == [1, 2, 3, 4, 5, 6], "round numbers go on: an opened round is never asked again"
    assert bench.course.slot(5).payload == before[2]


def test_a_person_may_also_go_on_as_it_is(tmp_path):
    bench = SecureBench(tmp_path, rounds={"count": 6})
    worse(bench, 4)
    assert bench.run() is State.PAUSED
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED


def test_the_models_of_the_last_rounds_are_kept_to_go_back_to_and_older_ones_are_named_as_gone(tmp_path):
    bench = SecureBench(tmp_path, rounds={"count": 8})
    worse(bench, 7)
    assert bench.run() is State.PAUSED
    assert [c.round for c in bench.course.checkpoints() if c.weights] == [0, 4, 5, 6, 7]
    assert KEPT_BACK == 4
    for round_ in (2, 7, 9):
        with pytest.raises(ConsiliumError, match="no such round to go back to") as caught:
            bench.registry.back_to(bench.hash, round_)
        assert "0, 4, 5, 6" in caught.value.remedy


def test_going_back_gives_up_a_slot_that_is_open(tmp_path):
    bench = SecureBench(tmp_path)
    for site in bench.sites.values():
        site.delay = 5.0

    def watch():
        if len(bench.course.slots()) == 2 and bench.registry.study(bench.hash).state is State.RUNNING:
            bench.clock.watch = lambda: None
            bench.registry.pause(bench.hash)

    bench.clock.watch = watch
    assert bench.run() is State.PAUSED
    assert bench.course.slot(2).state is SlotState.OPEN
    bench.registry.back_to(bench.hash, 0)
    assert bench.course.slot(2).reason == "rolled back to round 0"
    bench.registry.resume(bench.hash)
    assert bench.loop().run() is State.FINISHED
    with pytest.raises(ConsiliumError, match="cannot be taken back now"):
        bench.registry.back_to(bench.hash, 0)


def evaluation(round_: int, **metrics: float) -> Evaluation:
    return Evaluation(round_, "validation", 1, (), np.zeros(1), metrics, "")


def test_suspicion_needs_two_losses_and_a_large_step():
    def of(*losses: float) -> str:
        return suspicion({r: evaluation(r, loss=loss) for r, loss in enumerate(losses)}, len(losses) - 1)

    assert of(0.7) == of(0.7, 0.6) == of(0.7, 1.5) == of(0.01, 0.3) == ""
    assert "loss 3" in of(0.7, 0.6, 3.0)
    assert suspicion({0: evaluation(0), 1: evaluation(1, loss=9.0)}, 1) == ""
