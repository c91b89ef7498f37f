"""Fixed point: what is decoded is the weighted mean of the clipped updates, up to the grid error the module states."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import ConsiliumError
from privacy.secagg.fixed import BLOCK, decode, encode
from privacy.secagg.plan import Plan
from tests.privacy.secagg.secagg_kit import plan, refused, study

SITES = 5
finite = st.floats(-3, 3, width=32)


def clipped(update: np.ndarray, one: Plan) -> np.ndarray:
    """The rule, written the slow way: norm to C, then every number to L."""
    wide = update.astype(np.float64)
    norm = np.linalg.norm(wide)
    wide = wide * min(1.0, float(one.norm_bound) / norm) if norm > 0 else wide
    return np.clip(wide, -float(one.update_bound), float(one.update_bound))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("weights", ["examples", "equal"])
@given(st.lists(st.lists(finite, min_size=6, max_size=6), min_size=4, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_the_decoded_mean_is_within_the_stated_grid_error(rounding, weights, updates, data):
    one = plan(SITES, size=6, statistics=2, weights=weights, rounding=rounding, norm_bound="4", examples_bound=1000)
    counts = [data.draw(st.integers(1, 1500)) for _ in updates]
    arrays = [np.array(update, np.float32) for update in updates]
    vectors = [encode(one, a, np.array([n, n / 4], np.float32)) for a, n in zip(arrays, counts, strict=True)]
    opened = decode(one, np.sum(vectors, axis=0, dtype=np.uint32), len(vectors))
    factors = [min(n, 1000) / 1000 if weights == "examples" else 1.0 for n in counts]
    expected = sum(a * clipped(u, one) for a, u in zip(factors, arrays, strict=True)) / sum(factors)
    step = one.grid / 2 if rounding == "nearest" else one.grid
    norm_error = 4 * 1e-6  # the norm is summed in float32
    bound = len(vectors) * (step + 2.0**-50) / sum(factors) + norm_error
    assert np.abs(opened.mean(0, 6) - expected).max() <= bound
    assert opened.statistics.tolist() == pytest.approx(
        [sum(min(n, 1000) for n in counts), sum(counts) / 4], abs=len(counts) / 512
    )


def test_the_mean_is_read_in_blocks_and_never_past_the_update():
    one = plan(SITES, size=2 * BLOCK + 7, statistics=3)
    update = np.linspace(-0.5, 0.5, one.size, dtype=np.float32)
    opened = decode(one, encode(one, update, np.array([500, 1, 2], np.float32)), 1)
    whole = np.concatenate([opened.mean(start, start + BLOCK) for start in range(0, one.size, BLOCK)])
    assert len(whole) == one.size
    assert np.abs(whole - clipped(update, one)).max() < one.grid / 2 / opened.weight + 1e-9
    assert opened.norm() == pytest.approx(np.linalg.norm(clipped(update, one)) * opened.weight, rel=1e-4)


@pytest.mark.parametrize("sites", [3, 5, 50])
def test_the_largest_sum_of_all_sites_does_not_wrap(sites):
    one = plan(sites, size=4, statistics=2, weights="equal", norm_bound="1e9")
    for sign in (1, -1):
        extreme = encode(one, np.full(4, sign * 3e38, np.float32), np.array([1e30, sign * 1e30], np.float32))
        total = np.sum([extreme] * sites, axis=0, dtype=np.uint32)
        opened = decode(one, total, sites)
        assert np.allclose(opened.mean(0, 4), sign * float(one.update_bound))
        assert opened.statistics[0] == sites * one.examples_bound
        assert np.sign(opened.statistics[1]) == sign


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, BLOCK + 1])
def test_a_number_that_is_not_finite_never_leaves_the_source(bad, where):
    one = plan(SITES, size=BLOCK + 2, statistics=3)
    update = np.zeros(one.size, np.float32)
    numbers = np.ones(3, np.float32)
    update[where] = bad
    assert refused(lambda: encode(one, update, numbers)) == "non-finite"
    numbers[1] = bad
    assert refused(lambda: encode(one, None, numbers)) == "non-finite"


def test_a_finite_update_whose_square_overflows_is_scaled_and_not_refused():
    one = plan(SITES, size=4, statistics=3, weights="equal", norm_bound="2", update_bound="2")
    update = np.array([3e38, 0, 0, 0], np.float32)
    opened = decode(one, encode(one, update, np.ones(3, np.float32)), 1)
    assert opened.mean(0, 4) == pytest.approx([2, 0, 0, 0], abs=1e-6)


def test_an_update_above_the_norm_bound_is_scaled_down_whole():
    one = plan(SITES, size=4, statistics=3, weights="equal", norm_bound="0.5")
    opened = decode(one, encode(one, np.full(4, 0.9, np.float32), np.ones(3, np.float32)), 1)
    assert np.linalg.norm(opened.mean(0, 4)) == pytest.approx(0.5, rel=1e-5)


def test_a_site_without_images_weighs_nothing_and_cannot_weigh_equally():
    nothing = np.zeros(3, np.float32)
    one = plan(SITES, size=4)
    words = encode(one, np.ones(4, np.float32), nothing)
    assert not words.any()
    with pytest.raises(ValueError, match="weight"):
        decode(one, words, 1).mean(0, 4)
    equal = plan(SITES, size=4, weights="equal")
    assert refused(lambda: encode(equal, np.ones(4, np.float32), nothing)) == "no-data"


def test_stochastic_rounding_is_right_on_average():
    one = plan(SITES, size=200_000, statistics=1, weights="equal", rounding="stochastic", norm_bound="1e6")
    update = np.full(one.size, 0.3 * one.grid, np.float32)
    steps = encode(one, update, np.ones(1, np.float32))[:-1].view(np.int32)
    assert set(steps.tolist()) == {0, 1}
    assert steps.mean() == pytest.approx(0.3, abs=0.01)


def test_another_length_is_refused():
    one = plan(SITES, size=4, statistics=3)
    for update, numbers in ((np.zeros(3, np.float32), 3), (np.zeros(4, np.float32), 2), (np.zeros((2, 2), "f4"), 3)):
        assert refused(lambda u=update, m=numbers: encode(one, u, np.zeros(m, np.float32))) == "model-shape"
    assert refused(lambda: decode(one, np.zeros(6, np.uint32), 1)) == "model-shape"


def test_a_study_without_secure_sums_has_no_plan():
    off = study(5).model_copy(update={"secagg": type(study(5).secagg)()})
    with pytest.raises(ConsiliumError, match="no secure aggregation"):
        Plan.of(off, 4, 3)
    with pytest.raises(ConsiliumError, match="update and statistics"):
        Plan.of(study(5), 0, 3)
