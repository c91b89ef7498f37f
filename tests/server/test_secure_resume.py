"""RULES S1, S2 and S4 at the coordinator of secure sums: killed at any moment, it ends with the same sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from privacy.secagg.fixed import Opened
from server.records import SlotState, State
from server.ring_records import RingRecords
from tests.server.round_kit import D
from tests.server.secure_kit import NAMES, SecureBench
from tests.server.test_resume import Killed, finish


def bench_of(folder: Path) -> SecureBench:
    return SecureBench(folder, rounds={"count": 2})


def check(bench: SecureBench, calm: SecureBench, state: State) -> None:
    assert state is State.FINISHED, bench.registry.study(bench.hash).reason
    assert bench.weights().tobytes() == calm.weights().tobytes()
    assert all(len(hashes) == 1 for hashes in bench.wire.requests.values()), "a slot was bound to two requests"
    assert [s.slot for s in bench.course.slots()] == [1, 2, 3, 4]
    for site in bench.sites.values():
        assert site.finished
        assert all(choice.survivors == NAMES[:4] for choice in site.choices.values())


def test_S2_killed_at_every_use_of_the_carrier(tmp_path):
    calm = bench_of(tmp_path / "calm")
    calm.run()
    calls = calm.wire.calls
    assert calls > 30
    for index in range(1, calls + 1, 2):
        bench = bench_of(tmp_path / str(index))

        def die(call: int, last: int = index) -> None:
            if call >= last:
                raise Killed

        bench.wire.before = die
        with pytest.raises(Killed):
            bench.run()
        bench.wire.before = lambda _: None
        check(bench, calm, finish(bench))


@pytest.mark.parametrize("name", ["begin", "ready", "begin_stage"])
def test_S2_killed_around_every_write_of_rings_and_stages(tmp_path, monkeypatch, name):
    calm = bench_of(tmp_path / "calm")
    calm.run()
    real = getattr(RingRecords, name)
    for moment in ("before", "after"):
        for number in range(1, 8):
            bench = bench_of(tmp_path / f"{moment}{number}")
            count = [0]

            def dying(self, *args, count=count, number=number, moment=moment):
                count[0] += 1
                if count[0] == number and moment == "before":
                    raise Killed
                result = real(self, *args)
                if count[0] == number:
                    raise Killed
                return result

            monkeypatch.setattr(RingRecords, name, dying)
            try:
                bench.run()
            except Killed:
                monkeypatch.setattr(RingRecords, name, real)
                check(bench, calm, finish(bench))
            else:
                monkeypatch.setattr(RingRecords, name, real)
                assert number > 1, "it was never called"
                break


def killed_in(bench: SecureBench, kind: str) -> None:
    """The coordinator dies when it has just asked the last site this."""
    asked = []

    def lost(site, what):
        if what == kind and len(asked) < 4:
            asked.append(site.name)
            if len(asked) == (3 if "dora" not in bench.wire.online else 4):
                raise Killed
        return ""

    bench.wire.lost = lost
    with pytest.raises(Killed):
        bench.run()
    bench.wire.lost = lambda _site, _kind: ""


def test_S4_a_smaller_set_that_was_signed_stays_the_set_although_the_missing_site_is_back(tmp_path):
    bench = bench_of(tmp_path)
    bench.vanishes("dora", "train")
    killed_in(bench, "survivors")
    bench.wire.errors = lambda _site, _kind: ""
    bench.wire.online = dict(bench.sites)
    assert finish(bench) is State.FINISHED
    assert {o.site: o.state.value for o in bench.course.outcomes(1)} == {
        "anna": "in", "bert": "in", "cleo": "in", "dora": "waiting",
    }  # fmt: skip
    assert bench.sites["anna"].choices[1].survivors == NAMES[:3]
    assert bench.course.slot(1).state is SlotState.DONE
    plan = bench.sites["anna"].plan

    opened = Opened(plan, bench.opened(1, NAMES[:3]), 3)
    np.testing.assert_array_equal(bench.weights(1), (bench.weights(0) + opened.mean(0, D)).astype(np.float32))


def test_S4_an_opening_that_was_begun_is_finished_with_the_same_stored_bytes(tmp_path):
    bench = bench_of(tmp_path)
    killed_in(bench, "unmask")
    before = {name: dict(site.stages) for name, site in bench.sites.items()}
    assert finish(bench) is State.FINISHED
    assert bench.course.slot(1).state is SlotState.DONE
    for name, site in bench.sites.items():
        assert before[name].items() <= site.stages.items()


def test_S4_an_opening_that_can_no_longer_be_finished_makes_the_round_void(tmp_path):
    bench = bench_of(tmp_path)
    killed_in(bench, "unmask")
    bench.wire.online.pop("dora")
    bench.wire.online.pop("cleo")
    back = bench.clock.time + 100
    bench.clock.watch = lambda: bench.wire.online.update(bench.sites) if bench.clock.time > back else None
    assert finish(bench) is State.FINISHED
    first, second = bench.course.slot(1), bench.course.slot(2)
    assert (first.state, second.round) == (SlotState.FAILED, 2)
    assert "all 4 that the sum was fixed on" in first.reason
    assert bench.weights(1).tobytes() == bench.weights(0).tobytes()


def test_S7_a_new_launch_sets_up_keys_under_a_new_session_and_voids_the_round_that_was_being_opened(tmp_path):
    bench = bench_of(tmp_path)
    killed_in(bench, "unmask")
    bench.registry.transition(bench.hash, State.INTERRUPTED, "the process running it ended")
    bench.registry.stop(bench.hash)
    assert bench.run() is State.FINISHED
    slots = bench.course.slots()
    assert (slots[0].state, slots[0].session) == (SlotState.ABANDONED, 1)
    assert (slots[1].round, slots[1].session) == (2, 2)
    assert bench.weights(1).tobytes() == bench.weights(0).tobytes()
