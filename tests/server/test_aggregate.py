"""Adding up: equal to the weighted mean, and untouched by anything that is refused."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refusal, RefusalCode
from privacy.messages import Answer
from server import aggregate as module
from server import optimizers
from server.aggregate import Aggregate, advance
from server.blobs import Blobs

M = 3


def payload(delta: np.ndarray, examples: float, rest: tuple[float, float] = (1.0, 2.0)) -> bytes:
    return np.concatenate([delta, [examples, *rest]]).astype("<f4").tobytes()


def answer(data: bytes, **changes) -> Answer:
    values = {
        "study": "0" * 64, "session": 1, "slot": 1, "site": "anna", "request": "1" * 64, "status": "done",
        "payload_sha256": hashlib.sha256(data).hexdigest(), "payload_bytes": len(data), "statistics": M,
    }  # fmt: skip
    return Answer.model_validate(values | changes)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


updates = st.lists(
    st.tuples(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), st.integers(0, 100_000), st.integers(1, 40)
    ),
    min_size=1,
    max_size=6,
).filter(lambda sites: any(examples for _, examples, _ in sites))


@settings(max_examples=60, deadline=None)
@given(updates, st.booleans())
def test_the_sum_is_numpys_weighted_mean_in_any_order(sites, by_examples):
    totals = []
    for order in (sites, sites[::-1]):
        total = Aggregate(5, M, by_examples=by_examples)
        for delta, examples, piece in order:
            data = payload(np.array(delta), examples)
            total.add(answer(data), cut(data, piece))
        totals.append(total)
    weights = [float(e) if by_examples else float(e > 0) for _, e, _ in sites]
    expected = np.average(np.array([delta for delta, _, _ in sites], np.float64), axis=0, weights=weights)
    for total in totals:
        np.testing.assert_allclose(total.mean(0, 5), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(total.statistics, [sum(e for _, e, _ in sites), len(sites), 2.0 * len(sites)])


@pytest.mark.parametrize("sites", [3, 7, 40])
def test_the_order_of_arrival_leaves_no_trace(sites):
    """The next model is float32. In plain float64 sums most of these means would differ in their last bit at least."""
    rng, size = np.random.default_rng(sites), 1000

    def update() -> np.ndarray:
        return rng.normal(size=size) * 10.0 ** rng.integers(-6, 3, size)

    arrivals = [payload(update(), int(rng.integers(1, 2**24)), (0.1, rng.random())) for _ in range(sites)]
    means, statistics = [], set()
    for _ in range(12):
        total = Aggregate(size, M)
        for at in rng.permutation(sites):
            total.add(answer(arrivals[at]), [arrivals[at]])
        means.append(total.mean(0, size))
        statistics.add(total.statistics.tobytes())
    assert len({mean.astype(np.float32).tobytes() for mean in means}) == 1
    assert len(statistics) == 1
    assert np.ptp(means, axis=0).astype(bool).sum() <= 2, "even as float64"


def test_in_every_order_what_cancels_does_not_swallow_what_remains():
    for terms in itertools.permutations((2.0**40, 1.0, -(2.0**40), 2.0**-20)):
        total = Aggregate(1, M)
        for value in terms:
            data = payload(np.array([value]), 1.0)
            total.add(answer(data), [data])
        assert total.mean(0, 1)[0] == (1 + 2.0**-20) / 4


def test_what_a_rule_sends_travels_behind_the_model_and_its_answer_comes_back_behind_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    blobs, rule, total = Blobs(tmp_path), optimizers.Scaffold(1.0, sites=4), Aggregate(6, M)
    start = blobs.put(np.array([1, 2, 3], "<f4").tobytes())
    first = module.payload(blobs, rule, start, ())
    assert np.frombuffer(blobs.path(first).read_bytes(), "<f4").tolist() == [1, 2, 3, 0, 0, 0]
    for examples in (1.0, 3.0):
        data = payload(np.array([4, 8, 12, -1, -2, -3]) * examples / 2, examples)
        total.add(answer(data), [data])
    weights, memory = advance(blobs, rule, total, start, ())
    mean = np.array([4, 8, 12]) * (1 * 0.5 + 3 * 1.5) / 4
    np.testing.assert_allclose(np.frombuffer(blobs.path(weights).read_bytes(), "<f4"), np.array([1, 2, 3]) + mean)
    control = -mean / 4 * 2 / 4
    np.testing.assert_allclose(np.frombuffer(blobs.path(memory[0]).read_bytes(), "<f4"), control)
    second = module.payload(blobs, rule, weights, memory)
    assert blobs.path(second).read_bytes() == blobs.path(weights).read_bytes() + blobs.path(memory[0]).read_bytes()
    assert module.payload(blobs, optimizers.Averaging(), start, ()) == start


def bad(name: str) -> tuple[Answer, list[bytes], RefusalCode]:
    good = payload(np.ones(5), 3.0)
    nan = payload(np.array([1, np.nan, 0, 0, 0]), 3.0)
    infinite = payload(np.ones(5), 3.0, (np.inf, 0.0))
    negative, many, half = (payload(np.ones(5), e) for e in (-1.0, 2.0**25, 0.5))
    return {
        "announces less": (answer(good, payload_bytes=len(good) - 4), [good], RefusalCode.MODEL_SHAPE),
        "announces other statistics": (answer(good, statistics=M - 1), [good], RefusalCode.MODEL_SHAPE),
        "sends less": (answer(good), [good[:-4]], RefusalCode.MODEL_SHAPE),
        "sends more": (answer(good), [good, b"more"], RefusalCode.MODEL_SHAPE),
        "sends nothing": (answer(good), [], RefusalCode.MODEL_SHAPE),
        "sends other bytes": (answer(good), [good[:-1] + b"\x01"], RefusalCode.MODEL_HASH),
        "not a number": (answer(nan), [nan], RefusalCode.NON_FINITE),
        "infinite statistics": (answer(infinite), [infinite], RefusalCode.NON_FINITE),
        "negative examples": (answer(negative), [negative], RefusalCode.MALFORMED),
        "too many examples": (answer(many), [many], RefusalCode.MALFORMED),
        "half an example": (answer(half), [half], RefusalCode.MALFORMED),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "announces less", "announces other statistics", "sends less", "sends more", "sends nothing",
        "sends other bytes", "not a number", "infinite statistics", "negative examples", "too many examples",
        "half an example",
    ],
)  # fmt: skip
def test_a_refused_answer_changes_nothing(name):
    total, first = Aggregate(5, M), payload(np.arange(5.0), 7.0)
    total.add(answer(first), [first])
    before = (total.mean(0, 5).tobytes(), total.statistics.tobytes(), total.weight)
    statement, chunks, code = bad(name)
    with pytest.raises(Refusal) as caught:
        total.add(statement, chunks)
    assert caught.value.code is code
    assert (total.mean(0, 5).tobytes(), total.statistics.tobytes(), total.weight) == before


def test_a_carrier_that_breaks_off_changes_nothing():
    total = Aggregate(5, M)
    data = payload(np.ones(5), 1.0)

    def broken():
        yield data[:8]
        raise ValueError("a piece does not have the hash it is named by")

    with pytest.raises(Refusal) as caught:
        total.add(answer(data), broken())
    assert caught.value.code is RefusalCode.MALFORMED
    assert total.weight == 0


def test_a_reset_forgets_everything_and_a_mean_of_nothing_is_an_error():
    total, data = Aggregate(5, M), payload(np.ones(5), 1.0)
    total.add(answer(data), [data])
    total.reset()
    assert total.statistics.tolist() == [0.0] * M
    with pytest.raises(ValueError, match="nothing was added"):
        total.mean(0, 5)


def test_the_step_goes_from_blob_to_blob_and_refuses_to_diverge(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    blobs, total = Blobs(tmp_path), Aggregate(5, M)
    data = payload(np.array([1.0, 2, 3, 4, 5]), 4.0)
    total.add(answer(data), [data])
    start = blobs.put(np.zeros(5, "<f4").tobytes())
    rule = optimizers.Adaptive(0.1, 0.9, 0.99, 0.01)
    once, memory = advance(blobs, rule, total, start, ())
    twice, _ = advance(blobs, rule, total, once, memory)
    expected = np.zeros(5, np.float32)
    state = rule.fresh(expected)
    for name in (once, twice):
        rule.step(expected, np.array([[1.0, 2, 3, 4, 5]]), state)
        assert blobs.path(name).read_bytes() == expected.tobytes()
    kept = set(tmp_path.iterdir())
    with pytest.raises(Refusal) as caught:
        advance(blobs, optimizers.Averaging(1e39), total, start, ())
    assert caught.value.code is RefusalCode.NON_FINITE
    assert set(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("sites", [2, 9])
def test_memory_is_four_models_and_blocks_at_any_number_of_sites(tmp_path, sites):
    size = 2_000_000
    blobs, data = Blobs(tmp_path), payload(np.ones(size, np.float32), 5.0)
    start = blobs.put(np.zeros(size, "<f4").tobytes())
    statement = answer(data)
    tracemalloc.start()
    try:
        total = Aggregate(size, M)
        for _ in range(sites):
            total.add(statement, (data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)))
        advance(blobs, optimizers.Adaptive(0.1, 0.9, 0.99, 0.01), total, start, ())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4 * size + 64 * module.BLOCK + (4 << 20)
