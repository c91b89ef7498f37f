"""The golden and bad messages: what any implementation must derive from the same keys, and must refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from privacy.identity import Document
from privacy.secagg import site
from privacy.secagg.coordinator import SecureSum
from privacy.secagg.keys import Secrets
from privacy.secagg.messages import Keys, Opening, Shares, Survivors
from privacy.secagg.ring import accept_keys, accept_shares
from privacy.secagg.states import Place, Shared
from tests.privacy.secagg.secagg_kit import refused
from tests.vectors.make_secagg import IDENTITIES

VECTORS = Path(__file__).parents[2] / "vectors" / "secagg"
GOLDEN = json.loads((VECTORS / "golden.json").read_text())
BAD = json.loads((VECTORS / "bad.json").read_text())
READERS = {message.KIND: message for message in (Keys, Shares, Survivors, Opening)}
PLACE = Place.from_body(GOLDEN["place"])
PLAN = PLACE.plan
BYTES = {row["name"]: row["bytes"].encode() for row in GOLDEN["messages"]}


def document(name: str, kind: str) -> Document:
    return Document.decode(BYTES[name], kind)


def ring():
    keys = {name: document(f"keys of {name}", "secagg-keys") for name in PLAN.sites}
    shares = {name: document(f"shares of {name}", "secagg-shares") for name in PLAN.sites}
    parcels = {name: {to: bytes.fromhex(data) for to, data in sent.items()} for name, sent in GOLDEN["parcels"].items()}
    good, bad = accept_keys(PLACE, keys)
    assert not bad
    found, bad = accept_shares(PLACE, good, shares, parcels)
    assert not bad
    return found


def ready(name: str):
    found = ring()
    return site.receive(Shared.from_bytes(GOLDEN["shared"][name].encode()), found.shares, found.bundles(name))


def test_public_keys_follow_from_the_private_bytes():
    for name, private in GOLDEN["private"].items():
        x25519, kem = Secrets(bytes.fromhex(private["x25519"]), bytes.fromhex(private["kem"])).public
        body = document(f"keys of {name}", "secagg-keys").body
        assert (body["x25519"], body["kem"]) == (x25519.hex(), kem.hex())


def test_both_sites_of_a_pair_derive_the_secret_in_the_file():
    assert ring().transcript == GOLDEN["transcript"]
    for name in PLAN.sites:
        state = ready(name)
        assert {peer: secret.hex() for peer, secret in state.pairs.items()} == GOLDEN["pairs"][name]
        for peer, secret in GOLDEN["pairs"][name].items():
            assert GOLDEN["pairs"][peer][name] == secret


@pytest.mark.parametrize("slot", GOLDEN["slots"], ids=lambda slot: f"slot {slot['slot']}")
def test_masked_vectors_openings_and_sums_are_those_in_the_file(slot):
    number, header, cohort = slot["slot"], slot["header"], tuple(slot["cohort"])
    survivors = tuple(slot["survivors"])
    total = SecureSum(ring(), number, header, cohort, len(slot["sum"]))
    for name in cohort:
        vector = np.array(slot["vectors"][name], np.uint32)
        site.mask(ready(name), number, header, cohort, vector)
        assert vector.tolist() == slot["masked"][name]
        if name in survivors:
            total.add(name, document(f"slot {number}: answer of {name}", "answer"), vector)
    assert total.close() == survivors
    proof = total.submissions
    if survivors != cohort:
        proof = {n: document(f"slot {number}: survivors by {n}", "secagg-survivors") for n in survivors}
        for name in survivors:
            _, signed = site.survive(ready(name), number, header, cohort, survivors, {}, IDENTITIES[name])
            assert signed == proof[name]
    openings = {}
    for name in survivors:
        _, openings[name] = site.open_(ready(name), number, header, cohort, survivors, proof, {}, IDENTITIES[name])
        assert openings[name].encode() == BYTES[f"slot {number}: opening of {name}"]
    assert total.open(openings)[0].words.tolist() == slot["sum"]
    expected = np.sum([slot["vectors"][name] for name in survivors], axis=0) % 2**32
    assert slot["sum"] == expected.tolist()


@pytest.mark.parametrize("row", GOLDEN["messages"], ids=lambda row: row["name"])
def test_golden_messages_are_read_by_every_release(row):
    found = Document.decode(row["bytes"].encode(), row["kind"])
    assert found.digest == row["hash"]
    assert found.encode() == row["bytes"].encode()
    if row["kind"] in READERS:
        assert READERS[row["kind"]].verified(found, row["signer"]).model_dump(mode="json") == found.body


@pytest.mark.parametrize("row", BAD, ids=lambda row: row["name"])
def test_bad_messages_are_refused_with_the_named_code(row):
    def read() -> None:
        READERS[row["kind"]].verified(Document.decode(row["bytes"].encode(), row["kind"]), row["signer"])

    assert refused(read) == row["code"]
