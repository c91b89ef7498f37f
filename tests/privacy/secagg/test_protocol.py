"""A slot from end to end: two exchanges when nobody drops, three when somebody does, and always the exact sum."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.errors import ConsiliumError
from privacy.identity import Document
from privacy.secagg import site
from privacy.secagg.ring import Ring, accept_shares
from privacy.secagg.states import Keyed, Ready, Shared
from tests.privacy.secagg.secagg_kit import HEADER, OTHER, World, plan, refused, summed

WORLDS: dict[tuple[int, int], World] = {}


def world(sites: int = 4, colluding: int = 1) -> World:
    """Set-up is the slow part and harms no slot, so worlds are kept."""
    return WORLDS.setdefault((sites, colluding), World(plan(sites, colluding=colluding), slots=3))


@pytest.mark.parametrize("sites", [3, 4, 5, 10])
def test_the_sum_of_all_is_exact(sites):
    one = World(plan(sites))
    vectors = one.vectors()
    opened = one.opened(one.masked(vectors=vectors))
    assert np.array_equal(opened.words, summed(vectors, one.ring.sites))
    assert opened.sites == sites


def test_fifty_sites_with_a_session_of_ten_slots():
    one = World(plan(50, size=5), slots=10)
    vectors = one.vectors()
    lost = one.ring.sites[::7]
    total = one.masked(slot=10, lost=lost, vectors=vectors)
    assert np.array_equal(one.opened(total).words, summed(vectors, total.present))


def test_a_vector_of_statistics_only_is_summed_in_the_same_way():
    one = world()
    vectors = one.vectors(update=False)
    opened = one.opened(one.masked(slot=2, header=OTHER, vectors=vectors))
    assert np.array_equal(opened.words, summed(vectors, one.ring.sites))
    assert opened.size == 0


def test_what_leaves_a_site_is_not_what_it_computed():
    one = world()
    vectors = one.vectors()
    for name in one.ring.sites:
        _, masked = one[name].mask(1, HEADER, one.ring.sites, vectors[name])
        assert (masked == vectors[name]).mean() < 0.3


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whoever_drops_wherever_the_sum_is_exact_or_nothing_opens(data):
    """Sites vanish before keys, after keys, after shares, before masks and while opening; s. docs/protocol.md."""
    sites, colluding = data.draw(st.sampled_from([(4, 1), (5, 1), (6, 1), (7, 2)]))
    everyone = plan(sites).sites
    few = st.sets(st.sampled_from(everyone), max_size=2)
    absent, silent = data.draw(few), data.draw(few)
    lost, gone = data.draw(few), data.draw(few)
    one_plan = plan(sites, size=4, colluding=colluding)
    if sites - len(absent | silent) < one_plan.minimum:
        assert refused(lambda: World(one_plan, 1, absent, silent)) == "ring"
        return
    one = World(one_plan, 1, absent, silent)
    vectors = one.vectors()
    total = one.masked(lost=lost, vectors=vectors)
    if len(total.present) < one_plan.minimum:
        assert refused(total.close) == "too-few"
        return
    stay = set(total.present) - gone
    if len(stay) < one_plan.threshold:
        assert refused(lambda: one.opened(total, gone)) == "too-few"
        return
    assert np.array_equal(one.opened(total, gone).words, summed(vectors, total.present))


def test_a_site_that_dropped_in_one_slot_is_summed_in_the_next():
    one = World(plan(5))
    late = one.ring.sites[2]
    one.opened(one.masked(slot=1, lost=[late]))
    vectors = one.vectors(1)
    opened = one.opened(one.masked(slot=2, header=OTHER, vectors=vectors))
    assert np.array_equal(opened.words, summed(vectors, one.ring.sites))


def test_with_nobody_dropped_as_many_openings_as_the_threshold_are_enough():
    one = World(plan(5))
    vectors = one.vectors()
    assert np.array_equal(
        one.opened(one.masked(vectors=vectors), gone=[one.ring.sites[0]]).words, summed(vectors, one.ring.sites)
    )


def test_a_survivor_that_goes_away_after_it_signed_left_its_seeds_behind():
    one = World(plan(6))
    dropped, gone, *_ = one.ring.sites
    vectors = one.vectors()
    total = one.masked(lost=[dropped], vectors=vectors)
    assert np.array_equal(one.opened(total, gone=[gone]).words, summed(vectors, one.ring.sites[1:]))


def test_one_that_left_no_readable_deposit_must_open_itself():
    one = World(plan(6))
    dropped, gone, *others = one.ring.sites
    vectors = one.vectors()
    total = one.masked(lost=[dropped], vectors=vectors)
    survivors = total.close()
    signed = {name: one[name].survive(1, HEADER, one.ring.sites, survivors) for name in survivors}
    openings = {name: one[name].open(1, HEADER, one.ring.sites, survivors, signed) for name in survivors}
    spoilt = Document(signed[gone].kind, {**signed[gone].body, "deposit": "00" * 48}).signed_by(one[gone].identity)
    few = {name: openings[name] for name in others}
    for agreed in (
        {},
        {name: signed[name] for name in others},
        {**signed, gone: spoilt},
        {**signed, gone: signed[others[0]]},
    ):
        assert refused(lambda a=agreed: total.open(few, a)) == "too-few"
    assert np.array_equal(total.open(openings, {})[0].words, summed(vectors, survivors))


def test_an_opening_that_comes_late_opens_what_was_too_few():
    one = World(plan(5))
    vectors = one.vectors()
    total = one.masked(vectors=vectors)
    assert refused(lambda: one.opened(total, gone=one.ring.sites[:2])) == "too-few"
    one["site-00"].restart()
    opened = one.opened(total)
    assert np.array_equal(opened.words, summed(vectors, one.ring.sites))
    assert one.opened(total).words is opened.words


def test_every_state_survives_as_bytes():
    one = World(plan(4))
    for hospital in one.hospitals.values():
        assert Keyed.from_bytes(hospital.keyed.to_bytes()) == hospital.keyed
        assert Shared.from_bytes(hospital.shared.to_bytes()) == hospital.shared
        assert Ready.from_bytes(hospital.ready.to_bytes()) == hospital.ready
        again = Shared.from_bytes(hospital.shared.to_bytes())
        assert site.receive(again, one.ring.shares, one.ring.bundles(hospital.name)) == hospital.ready
    assert Ring.from_bytes(one.ring.to_bytes()) == one.ring
    assert refused(lambda: Ready.from_bytes(one["site-00"].keyed.to_bytes())) == "out-of-order"


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"state": "ready", "place": {}}'])
def test_a_damaged_record_says_so_and_opens_nothing(data):
    with pytest.raises(ConsiliumError, match="damaged"):
        Ready.from_bytes(data)


def test_after_a_slot_is_closed_its_seeds_are_gone():
    one = World(plan(4))
    ready = one["site-00"].ready.without(1)
    vector = one.vectors()["site-00"]
    assert refused(lambda: site.mask(ready, 1, HEADER, one.ring.sites, vector)) == "slot-spent"
    site.mask(ready, 2, HEADER, one.ring.sites, vector)
    assert one["site-00"].ready.seeds[:32] not in ready.to_bytes()


def test_a_ready_site_no_longer_holds_its_private_keys():
    one = World(plan(4))
    hospital = one["site-00"]
    value = vars(hospital.ready)
    assert "secrets" not in value
    assert "keyed" not in value


def test_a_site_whose_messages_are_bad_is_left_out_and_named():
    one = World(plan(5))
    parcels = {name: dict(sent) for name, sent in one.parcels.items()}
    parcels["site-03"]["site-01"] = bytes(len(parcels["site-03"]["site-01"]))
    ring, bad = accept_shares(one.place, one.keys, one.shares, parcels)
    assert ring.sites == ("site-00", "site-01", "site-02", "site-04")
    assert {name: refusal.code.value for name, refusal in bad.items()} == {"site-03": "peer-shares"}


def test_a_wrong_share_is_told_apart_and_the_others_open_the_sum():
    one = World(plan(5))
    vectors = one.vectors()
    total = one.masked(vectors=vectors)
    survivors = total.close()
    openings = {n: one[n].open(1, HEADER, survivors, survivors, total.submissions) for n in survivors}
    liar = openings["site-01"]
    shares = {**liar.body["shares"], "site-03": "00" * 33}
    openings["site-01"] = type(liar)(liar.kind, {**liar.body, "shares": shares}).signed_by(one["site-01"].identity)
    opened, bad = total.open(openings)
    assert {name: refusal.code.value for name, refusal in bad.items()} == {"site-01": "opening"}
    assert np.array_equal(opened.words, summed(vectors, survivors))
