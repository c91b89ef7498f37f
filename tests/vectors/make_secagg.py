"""Writes golden and bad messages of the secure sum, so that another implementation can be checked against them.

Run it only when the protocol number changes: `python -m tests.vectors.make_secagg`. Identities, keys, seeds, Shamir
coefficients and updates come from the fixed generator below, which serves nothing else. ML-KEM's encapsulation draws
its own randomness (FIPS 203 keeps it inside), so ciphertexts, and what is derived from them, differ from run to run; a
reader starts from the private keys and the ciphertexts that stand in the file, and everything else follows.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.identity import Document, Identity, Signature
from privacy.messages import Answer
from privacy.secagg import site
from privacy.secagg.coordinator import SecureSum
from privacy.secagg.fixed import encode
from privacy.secagg.plan import Plan
from privacy.secagg.ring import accept_keys, accept_shares, place_of

HERE = Path(__file__).parent / "secagg"
SITES = ("st-anna", "st-berta", "st-clara", "st-doris")
HEADER = "a1" * 32
PLAN = Plan(
    study="5" * 64, sites=SITES, colluding=1, threshold=3, minimum=3, slots=9, session_slots=2, size=6, statistics=2,
    update_bound="1", norm_bound="100", examples_bound=1000, by_examples=True, stochastic=False,
)  # fmt: skip


class Generator:
    """SHAKE-256 of a name and a counter; for these vectors only."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(f"consilium test vectors/{self.name}/{self.count}".encode()).digest(size)


IDENTITIES = {
    name: Identity(Ed25519PrivateKey.from_private_bytes(Generator(f"identity of {name}")(32))) for name in SITES
}
ROSTER = {name: identity.public for name, identity in IDENTITIES.items()}


def row(name: str, document: Document, signer: str) -> dict:
    return {
        "name": name, "kind": document.kind, "signer": ROSTER[signer], "hash": document.digest,
        "bytes": document.encode().decode(),
    }  # fmt: skip


def golden() -> dict:
    place = place_of(PLAN, 1, 4, 5, ROSTER)
    random = {name: Generator(name) for name in SITES}
    keyed, documents = {}, {}
    for name in SITES:
        keyed[name], documents[name] = site.begin(PLAN, 1, 4, 5, name, IDENTITIES[name], ROSTER, random[name])
    keys, _ = accept_keys(place, documents)
    shared, shares, parcels = {}, {}, {}
    for name in SITES:
        shared[name], shares[name], parcels[name] = site.share(keyed[name], keys, IDENTITIES[name], random[name])
    ring, _ = accept_shares(place, keys, shares, parcels)
    ready = {name: site.receive(shared[name], ring.shares, ring.bundles(name)) for name in SITES}
    messages = [row(f"keys of {name}", keys[name], name) for name in SITES]
    messages += [row(f"shares of {name}", shares[name], name) for name in SITES]
    slots = []
    for slot, lost in ((4, ()), (5, ("st-berta",))):
        total = SecureSum(ring, slot, HEADER, SITES, 8)
        vectors, masked = {}, {}
        for at, name in enumerate(SITES):
            update = np.linspace(-0.5, 0.5, 6, dtype=np.float32) * (at + 1)
            vectors[name] = encode(PLAN, update, np.array([100 * (at + 1), 0.5], np.float32))
            masked[name] = vectors[name].copy()
            site.mask(ready[name], slot, HEADER, SITES, masked[name])
            if name not in lost:
                answer = Answer(
                    study=PLAN.study, session=1, slot=slot, site=name, request=HEADER, status="done",
                    payload_sha256=hashlib.sha256(masked[name].astype("<u4").tobytes()).hexdigest(),
                    payload_bytes=32, statistics=2,
                ).signed(IDENTITIES[name])  # fmt: skip
                total.add(name, answer, masked[name])
                messages.append(row(f"slot {slot}: answer of {name}", answer, name))
        survivors = total.close()
        proof = dict(total.submissions)
        if lost:
            proof = {
                name: site.survive(ready[name], slot, HEADER, SITES, survivors, {}, IDENTITIES[name])[1]
                for name in survivors
            }
            messages += [row(f"slot {slot}: survivors by {name}", proof[name], name) for name in survivors]
        openings = {
            name: site.open_(ready[name], slot, HEADER, SITES, survivors, proof, {}, IDENTITIES[name])[1]
            for name in survivors
        }
        messages += [row(f"slot {slot}: opening of {name}", openings[name], name) for name in survivors]
        opened, _ = total.open(openings)
        slots.append({
            "slot": slot, "header": HEADER, "cohort": list(SITES), "survivors": list(survivors),
            "vectors": {name: vectors[name].tolist() for name in SITES},
            "masked": {name: masked[name].tolist() for name in SITES},
            "sum": opened.words.tolist(),
        })  # fmt: skip
    return {
        "place": place.body(),
        "private": {
            name: {"x25519": keyed[name].secrets.x25519.hex(), "kem": keyed[name].secrets.kem.hex()} for name in SITES
        },
        "shared": {name: shared[name].to_bytes().decode() for name in SITES},
        "parcels": {name: {to: data.hex() for to, data in sent.items()} for name, sent in parcels.items()},
        "transcript": ring.transcript,
        "pairs": {name: {peer: secret.hex() for peer, secret in ready[name].pairs.items()} for name in SITES},
        "messages": messages,
        "slots": slots,
    }


CHANGES: dict[str, list[tuple[str, dict]]] = {
    "secagg-keys": [
        ("short-kem", {"kem": "00" * 1183}),
        ("long-kem", {"kem": "00" * 1185}),
        ("upper-case-key", {"x25519": "AB" * 32}),
        ("session-as-text", {"session": "1"}),
        ("session-as-truth", {"session": True}),
        ("slot-too-large", {"last_slot": 2**31}),
        ("site-is-a-path", {"site": "../st-anna"}),
        ("threshold-of-its-own", {"threshold": 1}),
    ],
    "secagg-shares": [
        ("parcels-as-list", {"parcels": ["00" * 32]}),
        ("parcel-not-a-hash", {"parcels": {"st-anna": "00"}}),
        ("parcel-for-no-name", {"parcels": {"St Anna": "00" * 32}}),
        ("more-than-fifty", {"parcels": {f"site-{at:02}": "00" * 32 for at in range(51)}}),
        ("keys-missing", {"keys": None}),
    ],
    "secagg-survivors": [
        ("nobody", {"survivors": []}),
        ("not-names", {"survivors": [1, 2, 3]}),
        ("as-text", {"survivors": "st-anna"}),
        ("more-than-fifty", {"survivors": [f"site-{at:02}" for at in range(51)]}),
        ("no-deposit", {"deposit": ""}),
        ("a-deposit-of-half-a-seed", {"deposit": "00" * 40}),
        ("header-upper-case", {"header": "A1" * 32}),
    ],
    "secagg-opening": [
        ("share-short", {"shares": {"st-anna": "00" * 32}}),
        ("share-long", {"shares": {"st-anna": "00" * 34}}),
        ("share-not-hex", {"shares": {"st-anna": "zz" * 33}}),
        ("seed-long", {"seeds": {"st-anna": "00" * 33}}),
        ("shares-as-list", {"shares": []}),
        ("slot-negative", {"slot": -1}),
    ],
}


def bad(messages: list[dict]) -> list[dict]:
    """Every one is signed by the site itself, but for those that say otherwise."""
    rows = []
    signer = IDENTITIES["st-anna"]

    def add(name: str, kind: str, data: str, code: str) -> None:
        rows.append({"name": name, "kind": kind, "signer": signer.public, "code": code, "bytes": data})

    for kind, changes in CHANGES.items():
        good = next(item for item in messages if item["kind"] == kind and item["signer"] == signer.public)
        text = good["bytes"]
        body = json.loads(text)["body"]
        for name, change in changes:
            document = Document(kind, {**body, **change}).signed_by(signer)
            add(f"{kind}-{name}", kind, document.encode().decode(), "malformed")
        protocol = {key: value for key, value in body.items() if key != "protocol"}
        for name, other in (("protocol-2", {**body, "protocol": 2}), ("protocol-left-out", protocol)):
            add(f"{kind}-{name}", kind, Document(kind, other).signed_by(signer).encode().decode(), "malformed")
        add(f"{kind}-truncated", kind, text[:-1], "malformed")
        add(f"{kind}-spaced", kind, text.replace(":", ": ", 1), "malformed")
        add(f"{kind}-another-kind", kind, text.replace(f'"kind":"{kind}"', '"kind":"answer"'), "malformed")
        forged = Document(kind, body).signed_by(IDENTITIES["st-berta"])
        as_study = Document(kind, body, (Signature(signer.public, signer.sign("study", body).value),))
        for name, document in (("unsigned", Document(kind, body)), ("of-another-key", forged), ("as-study", as_study)):
            add(f"{kind}-{name}", kind, document.encode().decode(), "bad-signature")
        add(f"{kind}-changed", kind, text.replace('"session":1', '"session":2'), "bad-signature")
    return rows


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    made = golden()
    for name, value in (("golden", made), ("bad", bad(made["messages"]))):
        (HERE / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
