"""Ten thousand random or mutated messages: a typed refusal or the right step, no traceback, no share given twice."""

import json
import random

import numpy as np
import pytest

from privacy.errors import Refusal
from privacy.identity import Document
from privacy.secagg import site
from privacy.secagg.messages import Keys, Opening, Parcel, Shares, Survivors
from tests.privacy.secagg.secagg_kit import HEADER, OTHER, World, plan, summed

MESSAGES = 10_000
ALL = tuple(plan(5).sites)
JUNK = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**53 - 1,
    "",
    "0",
    "site-00",
    "ab" * 32,
    "AB" * 32,
    "zz" * 32,
    [],
    ["site-00"],
    {},
    "é",
]
READERS = {"secagg-keys": Keys, "secagg-shares": Shares, "secagg-survivors": Survivors, "secagg-opening": Opening}


@pytest.fixture(scope="module")
def world() -> World:
    return World(plan(5), slots=3)


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """One small change of the bytes on the wire."""
    at = chance.randrange(len(data))
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + chance.randbytes(chance.randrange(1, 5)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + chance.randrange(1, 9) :]
    if kind == 4:
        return chance.randbytes(chance.randrange(0, 200))
    return data + chance.choice([b" ", b"\n", b"{}", b"\0"])


def mutated_body(document: Document, chance: random.Random) -> Document:
    """One field of a body changed; a site that lies would sign it."""
    body = json.loads(json.dumps(document.body))
    key = chance.choice(sorted(body))
    kind = chance.randrange(3)
    if kind == 0:
        del body[key]
    elif kind == 1:
        body[key] = chance.choice(JUNK)
    elif isinstance(body[key], dict):
        inner = chance.choice(sorted(body[key]) or ["x"])
        body[key][chance.choice([inner, "site-09"])] = chance.choice(JUNK)
    elif isinstance(body[key], list):
        body[key] = [*body[key][: chance.randrange(len(body[key]) + 1)], chance.choice(JUNK)]
    else:
        body[chance.choice(["threshold", "x", key])] = chance.choice(JUNK)
    return Document(document.kind, body)


def test_a_mutated_message_is_refused_with_a_type_wherever_it_arrives(world):
    """Half as bytes, half as bodies that a lying site signs, each handed to the step it is meant for.

    A lying site may well sign another key, parcel or payload of its own; of the other two kinds only one is right.
    """
    chance = random.Random(4)
    total = world.masked()
    four = ALL[:4]
    lying = world["site-01"]
    keys, shares = world.keys[lying.name], world.ring.shares[lying.name]
    smaller = {name: world[name].survive(2, OTHER, ALL, four) for name in four}
    total.close()
    openings = {name: world[name].open(1, HEADER, ALL, ALL, total.submissions) for name in ALL}
    target, bundles = world["site-00"], world.ring.bundles("site-00")
    calls = {
        "keys": (keys, lambda d: site.share(target.keyed, {**world.keys, lying.name: d}, target.identity)),
        "shares": (shares, lambda d: site.receive(target.shared, {**world.ring.shares, lying.name: d}, bundles)),
        "answer": (
            total.submissions[lying.name],
            lambda d: site.open_(
                target.ready, 1, HEADER, ALL, ALL, {**total.submissions, lying.name: d}, {}, target.identity
            ),
        ),
        "survivors": (
            smaller[lying.name],
            lambda d: site.open_(target.ready, 2, OTHER, ALL, four, {**smaller, lying.name: d}, {}, target.identity),
        ),
        "opening": (openings[lying.name], lambda d: total._opening(lying.name, d, ALL)),
    }
    refusals = accepted = 0
    for round_ in range(MESSAGES * 7 // 10):
        original, call = calls[chance.choice(sorted(calls))]
        try:
            if round_ % 2:
                document = Document.decode(mutated_bytes(original.encode(), chance), original.kind)
            else:
                document = mutated_body(original, chance).signed_by(lying.identity)
            call(document)
        except Refusal:
            refusals += 1
        else:
            accepted += 1
            assert document.body == original.body or original.kind not in {"secagg-survivors", "secagg-opening"}
    assert refusals > 0.9 * (refusals + accepted)


def test_parcels_of_any_bytes_are_read_whole_or_refused(world):
    chance = random.Random(5)
    data = world.parcels["site-01"]["site-00"]
    for _ in range(MESSAGES // 10):
        wrong = mutated_bytes(data, chance)
        try:
            parcel = Parcel.decode(wrong, world.slots, own=False)
        except Refusal:
            assert len(wrong) != len(data)
        else:
            assert parcel.encode() == wrong


def test_random_requests_in_any_order_never_get_both_of_a_sites_two_secrets(world):
    """Random sets, slots and headers, proofs good and bad, restarts in between; then everything released is counted."""
    chance = random.Random(6)
    given: dict[tuple[str, int, str], set[str]] = {}
    sums = {slot: world.masked(slot=slot, header=HEADER) for slot in (1, 2, 3)}
    for hospital in world.hospitals.values():
        hospital.choices = {}
    signed: dict[tuple[int, tuple[str, ...]], dict[str, Document]] = {}
    for _ in range(MESSAGES * 2 // 10):
        hospital = world[chance.choice(ALL)]
        slot = chance.choice((1, 2, 3, 3, 4))
        survivors = tuple(sorted(chance.sample(ALL, chance.choice((3, 4, 4, 5)))))
        try:
            if chance.random() < 0.4:
                document = hospital.survive(slot, HEADER, ALL, survivors)
                signed.setdefault((slot, survivors), {})[hospital.name] = document
            else:
                proof = (
                    sums[slot].submissions if survivors == ALL and slot in sums else signed.get((slot, survivors), {})
                )
                opening = hospital.open(slot, HEADER, ALL, survivors, proof)
                for name in opening.body["shares"]:
                    given.setdefault((hospital.name, slot, name), set()).add("share")
                for name in opening.body["seeds"]:
                    given.setdefault((hospital.name, slot, name), set()).add("seed")
        except Refusal:
            pass
        if chance.random() < 0.02:
            hospital.restart()
    assert given
    assert all(len(kinds) == 1 for kinds in given.values())
    for slot in (1, 2, 3):
        for name in ALL:
            shares = sum("share" in given.get((holder, slot, name), ()) for holder in ALL)
            seeds = sum("seed" in given.get((holder, slot, name), ()) for holder in ALL)
            assert not (shares + world.plan.colluding >= world.plan.threshold and seeds)


def test_the_fuzzing_left_the_sum_as_it_was(world):
    for hospital in world.hospitals.values():
        hospital.choices = {}
    vectors = world.vectors(3)
    assert np.array_equal(world.opened(world.masked(slot=3, vectors=vectors)).words, summed(vectors, ALL))


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_body_of_any_other_kind_is_malformed(kind, world):
    document = world.keys["site-00"]
    if document.kind == kind:
        return
    with pytest.raises(Refusal):
        READERS[kind].verified(document, world.roster["site-00"])
