"""Writes golden and bad wire messages with fixed keys, so that another implementation can be checked against them.

Run it only when the protocol number changes: `python tests/vectors/make_messages.py`. The private keys are the
32-byte strings below and serve nothing else.
"""

import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.canonical import canonical
from privacy.identity import Document, Identity, Signature
from privacy.messages import Answer, Header

HERE = Path(__file__).parent / "messages"
COORDINATOR = Identity(Ed25519PrivateKey.from_private_bytes(b"test vector: the coordinator key"))
SITE = Identity(Ed25519PrivateKey.from_private_bytes(b"test vector: the hospital's key "))
STUDY, PAYLOAD = "5" * 64, "7" * 64

KINDS = {
    "offer": (0, 0),
    "open": (0, 0),
    "keys": (0, 0),
    "shares": (0, 0),
    "seal": (0, 0),
    "train": (3, 2),
    "validate": (4, 3),
    "test": (5, 3),
    "survivors": (3, 2),
    "unmask": (3, 2),
    "witness": (0, 0),
    "deliver": (0, 3),
}


def request(kind: str) -> Document:
    slot, number = KINDS[kind]
    return Header(
        kind=kind,
        study=STUDY,
        session=0 if kind == "offer" else 1,
        slot=slot,
        round=number,
        cohort=("st-anna", "st-berta"),
        payload_sha256=PAYLOAD,
        payload_bytes=4000,
        deadline_seconds=600,
        parameters={},
    ).signed(COORDINATOR)


def answer(**changes) -> Document:
    values = {
        "study": STUDY,
        "session": 1,
        "slot": 3,
        "site": "st-anna",
        "request": request("train").digest,
        "status": "done",
        "payload_sha256": PAYLOAD,
        "payload_bytes": 4400,
        "statistics": 100,
    }
    return Answer(**{**values, **changes}).signed(SITE)


def golden() -> list[dict]:
    documents = [(f"request-{kind}", request(kind), COORDINATOR) for kind in KINDS]
    refusal = answer(status="refused", code="late", payload_sha256="", payload_bytes=0, statistics=0)
    documents += [("answer-done", answer(), SITE), ("answer-refused", refusal, SITE)]
    return [
        {
            "name": name,
            "kind": document.kind,
            "signer": signer.public,
            "hash": document.digest,
            "bytes": document.encode().decode(),
        }
        for name, document, signer in documents
    ]


def bad() -> list[dict]:
    good = request("train")
    text = good.encode().decode()

    def resigned(**changes) -> str:
        return Document("request", {**good.body, **changes}).signed_by(COORDINATOR).encode().decode()

    def without(key: str) -> str:
        body = {k: v for k, v in good.body.items() if k != key}
        return Document("request", body).signed_by(COORDINATOR).encode().decode()

    other_kind = Signature(COORDINATOR.public, COORDINATOR.sign("study", good.body).value)
    upper = good.signatures[0].value.upper()
    cases = [
        ("empty", "", "malformed"),
        ("not-json", "request", "malformed"),
        ("truncated", text[:-1], "malformed"),
        ("trailing-space", text + " ", "malformed"),
        ("pretty-printed", json.dumps(json.loads(text), indent=1), "malformed"),
        ("duplicate-key", text.replace('"kind":"request"', '"kind":"request","kind":"request"'), "malformed"),
        ("float", text.replace('"slot":3', '"slot":3.0'), "malformed"),
        ("another-document", text.replace('"kind":"request"', '"kind":"answer"'), "malformed"),
        ("no-signature", Document("request", good.body).encode().decode(), "bad-signature"),
        ("changed-after-signing", text.replace('"slot":3', '"slot":4'), "bad-signature"),
        ("signed-as-another-kind", Document("request", good.body, (other_kind,)).encode().decode(), "bad-signature"),
        ("signed-by-the-site", Document("request", good.body).signed_by(SITE).encode().decode(), "bad-signature"),
        ("upper-case-signature", text.replace(good.signatures[0].value, upper), "malformed"),
        ("unknown-field", resigned(command="sh"), "malformed"),
        ("missing-field", without("cohort"), "malformed"),
        ("default-left-out", without("parameters"), "malformed"),
        ("protocol-left-out", without("protocol"), "malformed"),
        ("protocol-1", resigned(protocol=1), "malformed"),
        ("slot-as-text", resigned(slot="3"), "malformed"),
        ("slot-as-truth", resigned(slot=True), "malformed"),
        ("unmask-without-slot", resigned(kind="unmask", slot=0), "malformed"),
        ("keys-with-slot", resigned(kind="keys"), "malformed"),
        ("witness-with-slot", resigned(kind="witness"), "malformed"),
        ("witness-spelt-otherwise", resigned(kind="Witness", slot=0), "malformed"),
        ("witness-carries-the-proposal", resigned(kind="witness", slot=0, proposal="{}"), "malformed"),
        ("slot-negative", resigned(slot=-3), "malformed"),
        ("slot-zero", resigned(slot=0), "malformed"),
        ("cohort-unsorted", resigned(cohort=["st-berta", "st-anna"]), "malformed"),
        ("cohort-twice", resigned(cohort=["st-anna", "st-anna"]), "malformed"),
        ("site-name-is-a-path", resigned(cohort=["../st-anna"]), "malformed"),
        ("study-upper-case", resigned(study="A" * 64), "malformed"),
        ("payload-beyond-limit", resigned(payload_bytes=1 << 40), "malformed"),
    ]
    rows = [
        {"name": f"request-{name}", "kind": "request", "signer": COORDINATOR.public, "code": code, "bytes": data}
        for name, data, code in cases
    ]
    body = answer().body
    for name, change, code in [
        ("status-unknown", {"status": "maybe"}, "malformed"),
        ("statistics-negative", {"statistics": -1}, "malformed"),
        ("detail-not-text", {"detail": {"a": 1}}, "malformed"),
    ]:
        data = Document("answer", {**body, **change}).signed_by(SITE).encode().decode()
        rows.append({"name": f"answer-{name}", "kind": "answer", "signer": SITE.public, "code": code, "bytes": data})
    for key in ("code", "payload_bytes", "detail"):
        short = {name: value for name, value in body.items() if name != key}
        data = Document("answer", short).signed_by(SITE).encode().decode()
        row = {"name": f"answer-{key.replace('_', '-')}-left-out", "kind": "answer", "signer": SITE.public}
        rows.append({**row, "code": "malformed", "bytes": data})
    forged = Document("answer", body).signed_by(COORDINATOR).encode().decode()
    empty = canonical({"kind": "answer", "body": {}, "signatures": []}).decode()
    nested = empty.replace("{}", '{"a":' * 99 + "1" + "}" * 99)
    for name, data, code in [("of-another-key", forged, "bad-signature"), ("nested", nested, "malformed")]:
        rows.append({"name": f"answer-{name}", "kind": "answer", "signer": SITE.public, "code": code, "bytes": data})
    return rows


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, rows in (("golden", golden()), ("bad", bad())):
        (HERE / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
