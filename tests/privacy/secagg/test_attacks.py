"""A coordinator or a site that lies, one lie at a time. Each ends in a typed refusal or in noise; names hold the RULE.

Everything a modified coordinator could do to a site goes through the seven functions of `privacy.secagg.site`; these
tests call them as it would.
"""

import itertools

import numpy as np
import pytest

from privacy.canonical import sha256
from privacy.errors import RefusalCode
from privacy.identity import Document, Identity
from privacy.messages import Header, Request
from privacy.secagg import masks, shamir, site
from privacy.secagg.fixed import decode
from privacy.secagg.keys import about_deposit, deposit_key, self_mask_key, unseal
from privacy.secagg.messages import Keys, Opening, Parcel, Shares, Survivors, binding
from privacy.secagg.ring import accept_keys
from tests.privacy.secagg.secagg_kit import HEADER, OTHER, World, plan, refused, summed

ALL = tuple(plan(5).sites)
VICTIM, DROPPED = ALL[0], ALL[4]
FOUR = ALL[:4]


@pytest.fixture(scope="module")
def world() -> World:
    """Five sites, w = n_min = 4; tests that store a choice use copies of it."""
    return World(plan(5), slots=3)


@pytest.fixture
def fresh(world: World) -> World:
    for hospital in world.hospitals.values():
        hospital.choices = {}
    return world


def resigned(document: Document, identity: Identity, **changes: object) -> Document:
    return Document(document.kind, {**document.body, **changes}).signed_by(identity)


def proof_of(world: World, survivors: tuple[str, ...], slot: int = 1, header: str = HEADER) -> dict[str, Document]:
    return {name: world[name].survive(slot, header, ALL, survivors) for name in survivors}


# ---- both shares of one site ----------------------------------------------------------------------------------


def test_S4_a_site_named_alive_and_dead_is_alive_or_dead_but_never_both(fresh):
    """Overlapping lists. There is one set, and both lists follow from it; a second set is refused."""
    total = fresh.masked(lost=[DROPPED])
    proof = proof_of(fresh, FOUR)
    opening = fresh[VICTIM].open(1, HEADER, ALL, FOUR, proof)
    assert set(opening.body["shares"]) == set(FOUR)
    assert set(opening.body["seeds"]) == {DROPPED}
    for other in itertools.combinations(ALL, 4):
        if VICTIM in other and other != FOUR:
            assert refused(lambda o=other: fresh[VICTIM].survive(1, HEADER, ALL, o)) == "choice-bound"
            assert refused(lambda o=other: fresh[VICTIM].open(1, HEADER, ALL, o, proof)) == "choice-bound"
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, ALL, total.submissions)) == "choice-bound"
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, (*FOUR, FOUR[0]), proof)) == "survivors"


def test_S4_the_two_shares_of_a_site_asked_across_a_restart(fresh):
    """kill -9 between the choice and the opening changes nothing: the choice was stored first."""
    total = fresh.masked()
    fresh[VICTIM].survive(1, HEADER, ALL, FOUR)
    fresh[VICTIM].restart()
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, ALL, total.submissions)) == "choice-bound"
    assert refused(lambda: fresh[VICTIM].survive(1, HEADER, ALL, (VICTIM, *ALL[2:]))) == "choice-bound"
    other = fresh[ALL[1]]
    first = other.open(1, HEADER, ALL, ALL, total.submissions)
    other.restart()
    assert refused(lambda: other.survive(1, HEADER, ALL, FOUR)) == "choice-bound"
    assert other.open(1, HEADER, ALL, ALL, total.submissions) == first


@pytest.mark.parametrize(("sites", "colluding"), [(3, 1), (4, 1), (4, 2), (5, 1), (6, 1), (6, 2), (7, 3), (8, 2)])
def test_S4_no_way_to_split_the_sites_opens_two_sets(sites, colluding):
    """Counted out: honest sites choose one set each, colluding ones sign and release for every set.

    The cohort opens a site k when w hold its self-mask share; a smaller set without k gives k's pairwise seeds away
    when w sign it. Never both, for any division of the honest sites among the two.
    """
    one = plan(sites, colluding=colluding)
    honest = sites - colluding
    for for_cohort in range(honest + 1):
        for for_smaller in range(honest - for_cohort + 1):
            self_mask_known = for_cohort + colluding >= one.threshold
            seeds_given = for_smaller + colluding >= one.threshold
            assert not (self_mask_known and seeds_given)
    loose = one.threshold - 1  # one less, and there is a division that opens both
    assert any(a + colluding >= loose and honest - a + colluding >= loose for a in range(honest + 1))


def test_S4_a_coordinator_that_tells_half_the_sites_one_set_and_half_another_opens_neither(fresh):
    """All five answered; two get the full proof and open, three are told that the victim dropped."""
    total = fresh.masked()
    without = ALL[1:]
    opened = {name: fresh[name].open(1, HEADER, ALL, ALL, total.submissions) for name in ALL[:2]}
    signed = {name: fresh[name].survive(1, HEADER, ALL, without) for name in ALL[2:]}
    assert refused(lambda: fresh[ALL[2]].open(1, HEADER, ALL, without, signed)) == "too-few"
    assert refused(lambda: fresh[ALL[1]].survive(1, HEADER, ALL, without)) == "choice-bound"
    total.close()
    assert refused(lambda: total.open(opened)) == "too-few"


# ---- weaker parameters at run time ------------------------------------------------------------------------------


def test_S4_too_small_a_ring_cohort_or_survivor_set_is_refused_whatever_the_coordinator_says(fresh):
    few = {name: fresh.keys[name] for name in ALL[:3]}
    hospital = fresh[VICTIM]
    assert refused(lambda: site.share(hospital.keyed, few, hospital.identity)) == "ring"
    small = {name: fresh.shares[name] for name in ALL[:3]}
    assert refused(lambda: site.receive(hospital.shared, small, fresh.ring.bundles(VICTIM))) == "ring"
    vector = fresh.vectors()[VICTIM]
    for cohort in (ALL[:3], (VICTIM,), ALL[1:], tuple(reversed(ALL)), (*ALL, ALL[4]), (*FOUR, "invented")):
        assert refused(lambda c=cohort: hospital.mask(1, HEADER, c, vector)) == "cohort"
    for survivors in (ALL[:3], (VICTIM,), ALL[1:], tuple(reversed(FOUR)), (*ALL[:3], "invented")):
        assert refused(lambda s=survivors: hospital.survive(1, HEADER, ALL, s)) == "survivors"


def test_S4_fewer_signatures_than_the_threshold_release_nothing(fresh):
    proof = proof_of(fresh, FOUR)
    three = dict(list(proof.items())[1:])
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, FOUR, three)) == "too-few"
    assert not any(choice.released for choice in fresh[VICTIM].choices.values())


def test_S4_one_signature_under_many_names_counts_once(fresh):
    """A coordinator repeats the signature of its one friend."""
    friend = fresh[FOUR[1]].survive(1, HEADER, ALL, FOUR)
    assert refused(
        lambda: fresh[VICTIM].open(1, HEADER, ALL, FOUR, dict.fromkeys(FOUR, friend))
    ) == "bad-signature"  # fmt: skip
    lie = {name: resigned(friend, fresh[FOUR[1]].identity, site=name) for name in FOUR}
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, FOUR, lie)) == "bad-signature"


def test_S4_signatures_of_sites_that_are_not_in_the_set_do_not_count(fresh):
    proof = proof_of(fresh, FOUR)
    identity = fresh[DROPPED].identity
    outsider = resigned(proof[FOUR[1]], identity, site=DROPPED)
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, FOUR, {**proof, DROPPED: outsider})) == "survivors"


# ---- invented and swapped keys ------------------------------------------------------------------------------------


def test_S6_an_invented_neighbour_is_refused(fresh):
    """The coordinator adds a site of its own to the ring."""
    sham, hospital = Identity.generate(), fresh[VICTIM]
    invented = resigned(fresh.keys[ALL[1]], sham, site="sham")
    assert refused(lambda: site.share(hospital.keyed, {**fresh.keys, "sham": invented}, hospital.identity)) == "ring"
    good, bad = accept_keys(fresh.place, {**fresh.keys, "sham": invented})
    assert "sham" not in good
    assert bad["sham"].code is RefusalCode.NOT_IN_STUDY


def test_S6_swapped_public_keys_are_refused(fresh):
    """In another's name, signed by whoever: only the identity pinned in the roster counts."""
    hospital, target = fresh[VICTIM], ALL[1]
    own = site.begin(fresh.plan, 1, 1, 3, VICTIM, hospital.identity, fresh.roster)[1]
    good = fresh.keys[target]
    for swapped in (
        resigned(good, Identity.generate(), x25519=own.body["x25519"], kem=own.body["kem"]),
        Document(good.kind, {**good.body, "x25519": own.body["x25519"]}, good.signatures),
        Document(good.kind, good.body),
    ):
        keys = {**fresh.keys, target: swapped}
        assert refused(lambda k=keys: site.share(hospital.keyed, k, hospital.identity)) == "bad-signature"
    assert refused(
        lambda: site.share(hospital.keyed, {**fresh.keys, target: fresh.keys[ALL[2]]}, hospital.identity)
    ) == "bad-signature"  # fmt: skip
    assert refused(lambda: site.share(hospital.keyed, {**fresh.keys, VICTIM: own}, hospital.identity)) == "out-of-order"


def test_S6_a_peers_key_of_small_order_is_refused(fresh):
    hospital, peer = fresh[VICTIM], fresh[ALL[1]]
    zero = resigned(fresh.keys[peer.name], peer.identity, x25519="00" * 32)
    assert refused(
        lambda: site.share(hospital.keyed, {**fresh.keys, peer.name: zero}, hospital.identity)
    ) == "peer-keys"  # fmt: skip


def test_S6_a_parcel_of_another_sender_recipient_or_session_does_not_open(fresh):
    hospital, sender, third = fresh[VICTIM], fresh[ALL[1]], ALL[2]
    bundles = fresh.ring.bundles(VICTIM)
    for wrong in (fresh.parcels[sender.name][third], fresh.parcels[third][VICTIM], b"", bundles[sender.name] + b"\0"):
        given = {**bundles, sender.name: wrong}
        assert refused(lambda g=given: site.receive(hospital.shared, fresh.ring.shares, g)) == "peer-shares"
    # even when the sender signs that it meant this one
    for wrong in (fresh.parcels[sender.name][third], fresh.parcels[third][VICTIM]):
        document = fresh.ring.shares[sender.name]
        parcels = {**document.body["parcels"], VICTIM: sha256(wrong)}
        lying = {**fresh.ring.shares, sender.name: resigned(document, sender.identity, parcels=parcels)}
        given = {**bundles, sender.name: wrong}
        assert refused(lambda s=lying, g=given: site.receive(hospital.shared, s, g)) == "peer-shares"


def test_S6_directions_and_uses_have_different_keys(fresh):
    """What one site sealed for another, sent back to it, does not open."""
    hospital, peer = fresh[VICTIM], fresh[ALL[1]]
    reflected = fresh.parcels[VICTIM][peer.name]
    document = fresh.ring.shares[peer.name]
    parcels = {**document.body["parcels"], VICTIM: sha256(reflected)}
    lying = {**fresh.ring.shares, peer.name: resigned(document, peer.identity, parcels=parcels)}
    given = {**fresh.ring.bundles(VICTIM), peer.name: reflected}
    assert refused(lambda: site.receive(hospital.shared, lying, given)) == "peer-shares"


# ---- different requests to different sites ------------------------------------------------------------------------


def noise(words: np.ndarray) -> bool:
    """Whether 20 numbers look like nothing: far from the small grid numbers of a real sum."""
    return bool(np.abs(words.view(np.int32).astype(np.int64)).max() > 1 << 28)


@pytest.mark.parametrize("what", ["model", "cohort"])
def test_S5_different_models_or_cohorts_to_different_sites_end_in_noise(world, what):
    """Pasquini et al. 2022: the victim gets a model, all others another one, so that only its update remains.

    The coordinator even learns every self-mask seed here; the pairwise masks alone keep the sum shut.
    """
    vectors = {name: np.zeros_like(vector) for name, vector in world.vectors().items()}
    cohort = ALL if what == "model" else ALL[:4]
    group = ALL if what == "model" else FOUR
    total = np.zeros_like(vectors[VICTIM])
    for name in group:
        lied = name == VICTIM
        header = OTHER if lied else HEADER
        asked = cohort if lied else ALL
        _, masked = world[name].mask(1, header, asked, vectors[name])
        bound = binding(world.plan.study, 1, world.ring.transcript, 1, header, asked)
        masks.apply(masked, [], [self_mask_key(world[name].ready.seeds[:32], bound)])
        total += masked
    assert noise(total)


def test_S5_a_site_that_set_up_with_other_messages_has_other_masks(fresh):
    """The coordinator leaves one site out of the set-up that it shows to some: no mask of theirs cancels."""
    hospital = fresh[VICTIM]
    shares = {name: document for name, document in fresh.ring.shares.items() if name != DROPPED}
    split = site.receive(hospital.shared, shares, fresh.ring.bundles(VICTIM))
    assert split.transcript != fresh.ring.transcript
    one, other = np.zeros(23, np.uint32), np.zeros(23, np.uint32)
    site.mask(split, 1, HEADER, FOUR, one)
    site.mask(hospital.ready, 1, HEADER, FOUR, other)
    assert (one != other).mean() > 0.9


def test_S5_submissions_for_another_request_prove_nothing(fresh):
    total = fresh.masked()
    _, vector = fresh[DROPPED].mask(1, OTHER, ALL, fresh.vectors()[DROPPED])
    other = fresh[DROPPED].answer(1, OTHER, vector)
    proof = {**total.submissions, DROPPED: other}
    assert refused(lambda: fresh[VICTIM].open(1, HEADER, ALL, ALL, proof)) == "out-of-order"


# ---- replays, order, differences -----------------------------------------------------------------------------------


def test_S2_stages_replayed_from_another_session_slot_or_request_are_refused(fresh):
    hospital, peer = fresh[VICTIM], fresh[ALL[1]]
    old = site.begin(fresh.plan, 2, 1, 3, peer.name, peer.identity, fresh.roster)[1]
    assert refused(
        lambda: site.share(hospital.keyed, {**fresh.keys, peer.name: old}, hospital.identity)
    ) == "out-of-order"  # fmt: skip
    shares = resigned(fresh.ring.shares[peer.name], peer.identity, session=2)
    assert refused(
        lambda: site.receive(
            hospital.shared, {**fresh.ring.shares, peer.name: shares}, fresh.ring.bundles(VICTIM)
        )
    ) == "out-of-order"  # fmt: skip
    for slot, header in ((2, HEADER), (1, OTHER)):
        proof = proof_of(fresh, FOUR, slot, header)
        assert refused(lambda p=proof: fresh[VICTIM].open(1, HEADER, ALL, FOUR, p)) in {"out-of-order", "choice-bound"}
        for one in fresh.hospitals.values():
            one.choices = {}


def test_S2_stages_out_of_order_are_refused(fresh):
    hospital = fresh[VICTIM]
    answers = fresh.masked().submissions
    signed = proof_of(fresh, FOUR)
    fresh[VICTIM].choices = {}
    for wrong in (fresh.keys, fresh.shares, signed):
        assert refused(lambda w=wrong: hospital.open(1, HEADER, ALL, ALL, {n: w.get(n, w[VICTIM]) for n in ALL})) == (
            "malformed"
        )
    assert refused(lambda: hospital.open(1, HEADER, ALL, FOUR, {n: answers[n] for n in FOUR})) == "malformed"
    assert refused(lambda: site.share(hospital.keyed, fresh.shares, hospital.identity)) == "out-of-order"
    assert refused(lambda: site.receive(hospital.shared, fresh.keys, {})) == "out-of-order"
    assert refused(lambda: hospital.survive(1, HEADER, ALL, ALL)) == "survivors"


def test_S1_slots_outside_the_session_or_beyond_the_study_are_refused(fresh):
    hospital, vector = fresh[VICTIM], fresh.vectors()[VICTIM]
    for slot in (0, 4, -1, 10**6):
        assert refused(lambda s=slot: hospital.mask(s, HEADER, ALL, vector)) == "slot-session"
        assert refused(lambda s=slot: hospital.survive(s, HEADER, ALL, FOUR)) == "slot-session"
        assert refused(lambda s=slot: hospital.open(s, HEADER, ALL, ALL, {})) == "slot-session"

    def begin(first: int, last: int) -> str:
        return refused(lambda: site.begin(fresh.plan, 1, first, last, VICTIM, hospital.identity, fresh.roster))

    assert begin(1, fresh.plan.slots + 1) == "slot-limit"
    assert begin(0, 3) == begin(3, 2) == "slot-session"
    short = plan(5, session_slots=2)
    assert refused(lambda: site.begin(short, 1, 1, 3, VICTIM, hospital.identity, fresh.roster)) == "slot-session"


def test_S1_two_slots_share_no_mask(fresh):
    """A difference of the same vector in two slots, or under two requests, is noise, not zero."""
    vector = fresh.vectors()[VICTIM]
    masked = [fresh[VICTIM].mask(s, h, ALL, vector)[1] for s, h in ((1, HEADER), (1, OTHER), (2, HEADER))]
    for one, other in itertools.combinations(masked, 2):
        assert noise(one - other)


def test_S4_the_same_round_asked_again_with_another_cohort_is_refused_once_it_was_opened(fresh):
    """Differencing: slot 1 opened the sum of all; slot 2 tries the same round without the victim."""
    fresh.opened(fresh.masked())
    hospital = fresh[ALL[1]]
    attempts = {1: "train/7", 2: "train/7"}
    assert refused(lambda: site.check_attempt(attempts, hospital.choices, 2, "train/7")) == "round-opened"
    site.check_attempt(attempts, hospital.choices, 1, "train/7")
    site.check_attempt({1: "train/7"}, hospital.choices, 2, "train/8")


def test_S4_an_attempt_that_was_signed_and_never_opened_may_be_tried_again(fresh):
    fresh[VICTIM].survive(1, HEADER, ALL, FOUR)
    site.check_attempt({1: "train/7"}, fresh[VICTIM].choices, 2, "train/7")


def test_S8_without_noise_two_rounds_with_cohorts_one_apart_still_tell_the_difference(fresh):
    """Not defended, and said so everywhere: two allowed sums of the same numbers differ by one site's."""
    vectors = fresh.vectors()
    with_all = fresh.opened(fresh.masked(slot=1, vectors=vectors))
    without = fresh.opened(fresh.masked(slot=2, header=OTHER, cohort=FOUR, vectors=vectors))
    assert np.array_equal(with_all.words - without.words, vectors[DROPPED])


# ---- what a curious coordinator holds ------------------------------------------------------------------------------


def test_S4_a_vector_that_came_late_stays_shut_for_ever(fresh):
    """The dropped site's vector arrives after all: its pairwise seeds are known now, its self mask is not."""
    vectors = fresh.vectors()
    total = fresh.masked(lost=[DROPPED], vectors=vectors)
    fresh.opened(total)
    document, late = fresh[DROPPED].mask(1, HEADER, ALL, vectors[DROPPED])
    assert refused(lambda: total.add(DROPPED, document, late)) == "late"
    seeds = {n: fresh[n].choices[1] and fresh[n].open(1, HEADER, ALL, FOUR, proof_of(fresh, FOUR)).body["seeds"]
             for n in FOUR}  # fmt: skip
    known = late.copy()
    for name in FOUR:
        seed = bytes.fromhex(seeds[name][DROPPED])
        masks.apply(known, [seed] if name < DROPPED else [], [] if name < DROPPED else [seed])
    assert noise(known - vectors[DROPPED])


def test_S4_colluding_sites_below_the_threshold_cannot_put_a_seed_together(fresh):
    position = fresh.plan.position
    held = {position(name): fresh[name].ready.held[VICTIM][:33] for name in ALL}
    seed = fresh[VICTIM].ready.seeds[:32]
    assert shamir.combine(dict(list(held.items())[: fresh.plan.threshold])) == seed
    assert shamir.combine(dict(list(held.items())[: fresh.plan.threshold - 1])) != seed


# ---- lying sites ---------------------------------------------------------------------------------------------------


def test_a_lying_site_is_refused_by_the_coordinator_and_changes_nothing(fresh):
    vectors = fresh.vectors()
    total = fresh.masked(lost=[DROPPED], vectors=vectors)
    liar = fresh[DROPPED]
    document, masked = liar.mask(1, HEADER, ALL, vectors[DROPPED])
    for answer, vector, code in [
        (document, masked[:-1].copy(), "model-shape"),
        (document, np.append(masked, masked[:1]), "model-shape"),
        (liar.answer(1, HEADER, masked[:-1].copy()), masked, "model-shape"),
        (document, masked + np.uint32(1), "model-hash"),
        (liar.answer(2, HEADER, masked), masked, "out-of-order"),
        (liar.answer(1, OTHER, masked), masked, "out-of-order"),
        (liar.answer(1, HEADER, masked, session=2), masked, "out-of-order"),
        (liar.answer(1, HEADER, masked, status="refused"), masked, "out-of-order"),
        (liar.answer(1, HEADER, masked, site=VICTIM), masked, "out-of-order"),
        (liar.answer(1, HEADER, masked, statistics=1), masked, "model-shape"),
        (resigned(document, Identity.generate()), masked, "bad-signature"),
        (Document("answer", {**document.body, "slot": "1"}).signed_by(liar.identity), masked, "malformed"),
        (Document("other", document.body).signed_by(liar.identity), masked, "malformed"),
    ]:
        assert refused(lambda a=answer, v=vector: total.add(DROPPED, a, v)) == code
    assert refused(lambda: total.add(VICTIM, total.submissions[VICTIM], vectors[VICTIM])) == "cohort"
    assert np.array_equal(fresh.opened(total).words, summed(vectors, FOUR))


def test_a_lying_dealer_is_named_by_the_receiver(fresh):
    """A parcel that opens and holds other shares than its digests promise."""
    dealer, hospital = fresh[ALL[1]], fresh[VICTIM]
    parcel = Parcel.decode(fresh.parcels[dealer.name][VICTIM], fresh.slots, own=False)
    lie = Parcel(parcel.ciphertext, bytes(len(parcel.digests)), parcel.sealed).encode()
    document = fresh.ring.shares[dealer.name]
    signed = resigned(document, dealer.identity, parcels={**document.body["parcels"], VICTIM: sha256(lie)})
    with pytest.raises(Exception, match=dealer.name) as caught:
        site.receive(
            hospital.shared,
            {**fresh.ring.shares, dealer.name: signed},
            {**fresh.ring.bundles(VICTIM), dealer.name: lie},
        )
    assert getattr(caught.value, "code", None) is RefusalCode.PEER_SHARES


def test_S4_deposits_over_other_sets_cut_nobody_off(fresh):
    """Some sites open the cohort; another was made to sign a smaller set, and its deposit opens with its self mask.

    Whatever the coordinator does with all that it holds, no sum but that of all five comes off.
    """
    vectors = fresh.vectors()
    masked = {name: fresh[name].mask(1, HEADER, ALL, vectors[name]) for name in ALL}
    submissions = {name: document for name, (document, _) in masked.items()}
    signed = fresh[VICTIM].survive(1, HEADER, ALL, FOUR)
    openings = [fresh[name].open(1, HEADER, ALL, ALL, submissions) for name in ALL[1:]]
    bound = binding(fresh.plan.study, 1, fresh.ring.transcript, 1, HEADER, ALL)
    places = {name: fresh.plan.position(name) for name in ALL[1:]}
    selves = {
        dealer: shamir.combine({places[o.body["site"]]: bytes.fromhex(o.body["shares"][dealer]) for o in openings})
        for dealer in ALL
    }
    key = deposit_key(selves[VICTIM], bound, FOUR)
    pair = unseal(key, bytes.fromhex(signed.body["deposit"]), about_deposit(fresh.place.context, VICTIM))
    assert len(pair) == 32, "one seed: with the site that it took for dropped"
    for size in range(1, 5):
        for group in itertools.combinations(ALL, size):
            total = np.sum([masked[name][1] for name in group], axis=0, dtype=np.uint32)
            masks.apply(total, [], [self_mask_key(selves[name], bound) for name in group])
            crossing = {VICTIM, DROPPED} & set(group)
            if crossing == {VICTIM}:  # it added this mask, the other one subtracted it
                masks.apply(total, [], [pair])
            elif crossing == {DROPPED}:
                masks.apply(total, [pair])
            assert not np.array_equal(total, summed(vectors, group)), group
    whole = np.sum([masked[name][1] for name in ALL], axis=0, dtype=np.uint32)
    masks.apply(whole, [], [self_mask_key(selves[name], bound) for name in ALL])
    assert np.array_equal(whole, summed(vectors, ALL))


def test_S4_a_deposit_stays_shut_without_the_self_mask(fresh):
    total = fresh.masked(lost=[DROPPED])
    proof = proof_of(fresh, FOUR)
    few = [fresh[name].open(1, HEADER, ALL, FOUR, proof) for name in FOUR[1:]]
    assert total.present == FOUR
    bound = binding(fresh.plan.study, 1, fresh.ring.transcript, 1, HEADER, ALL)
    guess = shamir.combine({fresh.plan.position(o.body["site"]): bytes.fromhex(o.body["shares"][VICTIM]) for o in few})
    sealed, about = bytes.fromhex(proof[VICTIM].body["deposit"]), about_deposit(fresh.place.context, VICTIM)
    assert refused(lambda: unseal(deposit_key(guess, bound, FOUR), sealed, about)) == "peer-shares"


def test_a_site_cannot_sign_for_another(fresh):
    body = {"study": fresh.plan.study, "session": 1, "site": VICTIM, "slot": 1, "header": HEADER, "survivors": FOUR}
    body["deposit"] = "00" * 48
    forged = Survivors(**body).signed(fresh[ALL[1]].identity)
    proof = {**proof_of(fresh, FOUR), VICTIM: forged}
    assert refused(lambda: fresh[ALL[2]].open(1, HEADER, ALL, FOUR, proof)) == "bad-signature"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"threshold": 1}, "malformed"),
        ({"kem": "00" * 1183}, "malformed"),
        ({"kem": "00" * 1185}, "malformed"),
        ({"x25519": "AB" * 32}, "malformed"),
        ({"session": "1"}, "malformed"),
        ({"session": True}, "malformed"),
        ({"last_slot": 2**31}, "malformed"),
        ({"protocol": 2}, "malformed"),
        ({"site": "../x"}, "malformed"),
        ({"last_slot": 2}, "out-of-order"),
        ({"study": "0" * 64}, "out-of-order"),
    ],
)
def test_one_sites_malformed_keys_are_refused_though_it_signed_them(fresh, change, code):
    hospital, peer = fresh[VICTIM], fresh[ALL[1]]
    document = resigned(fresh.keys[peer.name], peer.identity, **change)
    keys = {**fresh.keys, peer.name: document}
    assert refused(lambda: site.share(hospital.keyed, keys, hospital.identity)) == code
    good, bad = accept_keys(fresh.place, keys)
    assert peer.name not in good
    assert bad[peer.name].code.value == code


def test_a_coordinator_that_signs_nothing_or_strips_signatures_gets_nothing(fresh):
    """Its own request must be signed by the pinned key, and what it hands on by each site."""
    header = Header(
        kind="train", study=fresh.plan.study, session=1, slot=1, round=1, cohort=ALL, payload_sha256=HEADER,
        payload_bytes=4, deadline_seconds=60,
    )  # fmt: skip
    unsigned = Document("request", header.body()).encode()
    assert refused(lambda: Request.decode(unsigned, Identity.generate().public)) == "bad-signature"

    def bare(documents: dict[str, Document]) -> dict[str, Document]:
        return {n: d if n == VICTIM else Document(d.kind, d.body) for n, d in documents.items()}

    hospital, answers = fresh[VICTIM], fresh.masked().submissions
    assert refused(lambda: site.share(hospital.keyed, bare(fresh.keys), hospital.identity)) == "bad-signature"
    shares = bare(dict(fresh.ring.shares))
    assert refused(lambda: site.receive(hospital.shared, shares, fresh.ring.bundles(VICTIM))) == "bad-signature"
    assert refused(lambda: hospital.open(1, HEADER, ALL, ALL, bare(answers))) == "bad-signature"
    proof = bare(proof_of(fresh, FOUR))
    assert refused(lambda: hospital.open(1, HEADER, ALL, FOUR, proof)) == "bad-signature"


def test_messages_carry_no_parameter_that_could_weaken_the_protocol():
    """Threshold, ring size, grid and bounds are in the signed study and nowhere else."""
    for message in (Keys, Shares, Survivors, Opening):
        assert not {"threshold", "minimum", "colluding", "levels", "norm_bound"} & set(message.model_fields)


def test_the_opened_sum_shows_when_a_site_lied_about_its_bound(fresh):
    """A vector beyond the norm bound lifts the sum's norm above what honest sites can reach."""
    vectors = fresh.vectors()
    honest = fresh.opened(fresh.masked(vectors=vectors))
    bound = honest.weight * float(fresh.plan.norm_bound)
    assert honest.norm() <= bound
    big = plan(5, norm_bound="0.001")
    assert decode(big, honest.words, 5).norm() > honest.weight * 0.001
