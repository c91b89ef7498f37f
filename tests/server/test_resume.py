"""RULES S1 and S2 at the coordinator: killed at any moment, it goes on with the same bytes to the same model."""

from __future__ import annotations

import pytest

from server.blobs import BlobWriter
from server.course import Course
from server.records import State
from tests.server.round_kit import Bench


class Killed(BaseException):
    """kill -9, as far as one process can do it to itself: nothing after it reaches the registry or the carrier."""


def finish(bench: Bench) -> State:
    """What the supervisor and a person do after a death: note it, resume."""
    record = bench.registry.study(bench.hash)
    if record.state in {State.REQUESTED, State.WAITING, State.RUNNING}:
        bench.registry.transition(bench.hash, State.INTERRUPTED, "the process running it ended")
    bench.registry.resume(bench.hash)
    return bench.loop().run()


def bench_of(folder, strategy="fedadam"):
    rates = {"server_learning_rate": 0.1} if strategy == "fedadam" else {}
    return Bench(folder, 2, rounds={"count": 2}, aggregation={"strategy": strategy, "ema": "0.5", **rates})


def same_sites(bench: Bench, other: Bench) -> None:
    for name, site in bench.sites.items():
        assert site.number == other.sites[name].number


def test_s2_killed_at_every_use_of_the_carrier(tmp_path):
    calm = bench_of(tmp_path / "calm")
    calm.run()
    calls = calm.wire.calls
    assert calls > 20
    for index in range(1, calls + 1):
        bench = bench_of(tmp_path / str(index))
        same_sites(bench, calm)

        def die(call: int, last: int = index) -> None:
            if call >= last:
                raise Killed

        bench.wire.before = die
        with pytest.raises(Killed):
            bench.run()
        bench.wire.before = lambda _: None
        state = finish(bench) if bench.registry.study(bench.hash).state is not State.FINISHED else State.FINISHED
        check(bench, calm, state)


WRITES = ["open_slot", "outcome", "commit_round", "commit_evaluation", "prune", "delivery"]


@pytest.mark.parametrize("name", WRITES)
def test_s2_killed_right_after_every_write_of_the_course(tmp_path, monkeypatch, name):
    calm = bench_of(tmp_path / "calm")
    calm.run()
    real = getattr(Course, name)
    for number in range(1, 30):
        bench = bench_of(tmp_path / f"{number}")
        count = [0]

        def dying(self, *args, count=count, number=number):
            count[0] += 1
            if count[0] > number:
                raise Killed
            result = real(self, *args)
            if count[0] == number:
                raise Killed
            return result

        monkeypatch.setattr(Course, name, dying)
        try:
            bench.run()
        except Killed:
            monkeypatch.setattr(Course, name, real)
            check(bench, calm, finish(bench))
        else:
            monkeypatch.setattr(Course, name, real)
            assert number > 2, "it was never called twice"
            break
    else:
        pytest.fail("the loop never got through")


@pytest.mark.parametrize("step", ["write", "commit"])
def test_s2_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch, step):
    calm = bench_of(tmp_path / "calm")
    calm.run()
    for number in range(1, 20):
        bench = bench_of(tmp_path / str(number))
        count = [0]
        real = getattr(BlobWriter, step)

        def dying(self, *args, count=count, number=number, real=real):
            count[0] += 1
            if count[0] >= number:
                raise Killed
            return real(self, *args)

        monkeypatch.setattr(BlobWriter, step, dying)
        try:
            bench.run()
        except Killed:
            monkeypatch.setattr(BlobWriter, step, real)
            check(bench, calm, finish(bench))
        else:
            monkeypatch.setattr(BlobWriter, step, real)
            assert number > 4
            break
    else:
        pytest.fail("the loop never got through")


def test_s2_killed_between_publishing_and_noting_it(tmp_path):
    calm, bench = bench_of(tmp_path / "calm"), bench_of(tmp_path / "killed")
    calm.run()
    real = bench.publish

    def dying(*args):
        real(*args)
        bench.publish = real
        raise Killed

    bench.publish = dying
    with pytest.raises(Killed):
        bench.run()
    check(bench, calm, finish(bench))


def check(bench: Bench, calm: Bench, state: State) -> None:
    assert state is State.FINISHED
    assert bench.weights().tobytes() == calm.weights().tobytes()
    averages = [b.registry.blobs.path(b.course.checkpoints()[-1].memory[-1]).read_bytes() for b in (bench, calm)]
    assert averages[0] == averages[1] != calm.weights().tobytes()
    assert all(len(hashes) == 1 for hashes in bench.wire.requests.values()), "a slot was bound to two requests"
    slots = bench.course.slots()
    assert [s.slot for s in slots] == list(range(1, len(slots) + 1))
    assert len(slots) == len(calm.course.slots())
    assert {s.session for s in slots} == {1}
    assert all(site.finished for site in bench.sites.values())
    assert bench.registry.models()[0].package == calm.registry.models()[0].package
