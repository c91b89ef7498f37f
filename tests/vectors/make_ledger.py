"""Writes golden and bad leaves, notes and ledgers with fixed keys, so that another implementation can be checked.

Run it only when the ledger's version changes: `python -m tests.vectors.make_ledger`. The private keys are hashes of the
names in `tests/privacy/ledger_kit.py` and serve nothing else.

    leaves.json / bad_leaves.json    one entry each, with its hash; or the code of the refusal
    notes.json / bad_notes.json      a head with its cosignatures, and what it needs; or the code of the refusal
    trees.json                       roots and proofs over the leaves 00, 01, 02, …
    ledgers.json / bad_ledgers.json  whole exported files under one roster; or words of the error
    proposals.json / bad_proposals.json
                                     the payload of a request of kind "witness", and what st-anna answers who has signed
                                     slots 1 and 2; or the code of the refusal
"""

import base64
import json
from dataclasses import replace
from pathlib import Path

from privacy.canonical import canonical
from privacy.checkpoint import COSIGNATURE, Checkpoint, Note, NoteSignature, cosign, key_id, witness_name, witnesses_of
from privacy.identity import Document
from privacy.ledger import Leaf
from privacy.ledger_check import first_line
from privacy.merkle import Tree, leaf_hash
from privacy.witness import Witness
from tests.privacy.ledger_kit import (
    COORDINATOR,
    LOG,
    NAMES,
    NOW,
    ROSTER,
    SITES,
    STUDY,
    Log,
    abort,
    approved,
    commit,
    cosigned,
    course,
    digest,
    identity,
    reserve,
    step,
    witness,
)

HERE = Path(__file__).parent / "ledger"
OTHER = digest("another study")


def leaves() -> list[dict]:
    cases = [("reserve", reserve()), ("step", step("st-anna", 3)), ("commit", commit(12)), ("abort", abort())]
    return [{"name": n, "kind": x.entry.KIND, "hash": x.hash.hex(), "bytes": x.data.decode()} for n, x in cases]


def bad_leaves() -> list[dict]:
    good, plan = step("st-anna", 3), reserve()
    text, body, terms = good.data.decode(), good.entry.document().body, plan.entry.document().body
    end = commit(12).entry.document().body
    by = SITES["st-anna"]

    def again(**changes) -> str:
        return Document("ledger-step", {**body, **changes}).signed_by(by).encode().decode()

    def planned(**changes) -> str:
        return Document("ledger-reserve", {**terms, **changes}).encode().decode()

    def ended(kind: str = "ledger-commit", **changes) -> str:
        return Document(kind, {**end, **changes}).encode().decode()

    def without(name: str) -> str:
        return Document("ledger-step", {k: v for k, v in body.items() if k != name}).signed_by(by).encode().decode()

    kind = '"kind":"ledger-step"'
    by_berta = Document("ledger-step", body).signed_by(SITES["st-berta"]).encode().decode()
    empty = canonical({"kind": "ledger-commit", "body": {}, "signatures": []}).decode()
    nested = empty.replace("{}", '{"a":' * 99 + "1" + "}" * 99)
    twice = Document("ledger-step", body).signed_by(by).signed_by(SITES["st-berta"]).encode().decode()
    aborted = {"ledger": 1, "study": STUDY, "reason": "because"}
    cases = [
        ("empty", "", "malformed"),
        ("not-json", "step", "malformed"),
        ("truncated", text[:-1], "malformed"),
        ("trailing-newline", text + "\n", "malformed"),
        ("pretty-printed", json.dumps(json.loads(text), indent=1), "malformed"),
        ("duplicate-key", text.replace(kind, f"{kind},{kind}"), "malformed"),
        ("float", text.replace('"slot":3', '"slot":3.0'), "malformed"),
        ("another-kind", text.replace("ledger-step", "step"), "malformed"),
        ("kind-of-another-entry", text.replace("ledger-step", "ledger-commit"), "malformed"),
        ("step-without-signature", good.entry.document().encode().decode(), "malformed"),
        ("step-signed-twice", twice, "malformed"),
        ("reserve-signed", plan.entry.document().signed_by(COORDINATOR).encode().decode(), "malformed"),
        ("step-changed-after-signing", text.replace('"slot":3', '"slot":4'), "bad-signature"),
        ("step-of-another-site", by_berta, "bad-signature"),
        ("version-2", again(ledger=2), "malformed"),
        ("version-missing", without("ledger"), "malformed"),
        ("request-missing", without("request"), "malformed"),
        ("unknown-field", again(patients=3), "malformed"),
        ("slot-zero", again(slot=0), "malformed"),
        ("slot-as-text", again(slot="3"), "malformed"),
        ("slot-as-truth", again(slot=True), "malformed"),
        ("counter-zero", again(counter=0), "malformed"),
        ("site-name-is-a-path", again(site="../st-anna"), "malformed"),
        ("request-upper-case", again(request="A" * 64), "malformed"),
        ("reserve-without-grants", planned(grants={}), "malformed"),
        ("reserve-grant-not-a-hash", planned(grants={"st-anna": "yes"}), "malformed"),
        ("reserve-epsilon-zero", planned(epsilon_aggregate="0"), "malformed"),
        ("reserve-epsilon-spelt-otherwise", planned(epsilon_aggregate="2.0"), "malformed"),
        ("reserve-epsilon-exponent", planned(epsilon_aggregate="2e0"), "malformed"),
        ("reserve-epsilon-negative", planned(epsilon_aggregate="-2"), "malformed"),
        ("reserve-epsilon-infinite", planned(epsilon_broken="inf"), "malformed"),
        ("reserve-tiers-swapped", planned(epsilon_aggregate="8", epsilon_broken="2"), "malformed"),
        ("reserve-delta-one", planned(delta="1"), "malformed"),
        ("reserve-sixty-grants", planned(grants={f"site-{i}": digest(i) for i in range(60)}), "malformed"),
        ("too-large", planned(plan="a" * 20_000), "too-large"),
        ("commit-negative", ended(slots_used=-1), "malformed"),
        ("abort-reason-unknown", Document("ledger-abort", aborted).encode().decode(), "malformed"),
        ("nested", nested, "malformed"),
    ]
    return [{"name": name, "code": code, "key": by.public, "bytes": data} for name, data, code in cases]


def vector(name: str, note: str, **more) -> dict:
    needs = {"origin": LOG, "key": COORDINATOR.public, "witnesses": witnesses_of(ROSTER), "colluding": 1}
    return {"name": name, "note": note, **needs, **more}


def notes() -> list[dict]:
    log, rows = Log(course(2)), []
    empty = Note(Checkpoint(LOG, 0, Tree().root())).signed_by(COORDINATOR)
    empty = empty.adding(*(cosign(empty.checkpoint, witness_name(LOG, s), SITES[s], NOW) for s in NAMES))
    four = cosigned(log, NAMES[:4])
    stranger = cosign(four.checkpoint, "elsewhere.example/w1", identity("stranger"), NOW)
    for name, note, c in [
        ("empty-log", empty, 1),
        ("four-of-five", four, 2),
        ("and-a-stranger", four.adding(stranger), 1),
    ]:
        head, times = note.checkpoint, note.cosigners(witnesses_of(ROSTER))
        rows.append(
            vector(name, note.encode().decode(), colluding=c, size=head.size, root=head.root.hex(), times=times)
        )
    return rows


def bad_notes() -> list[dict]:
    log = Log(course(2))
    note = cosigned(log, NAMES[:4])
    text, head = note.encode().decode(), note.checkpoint
    body, _, tail = text.partition("\n\n")
    lines, root = tail[:-1].split("\n"), body.split("\n")[2]
    name = witness_name(LOG, "st-anna")
    short = NoteSignature(name, key_id(name, SITES["st-anna"].public, COSIGNATURE), b"short")
    key = base64.b64encode(note.signatures[0].key).decode()
    stranger = Note(head, note.signatures[1:]).signed_by(identity("stranger")).encode().decode()
    far = Note(Checkpoint("consilium/v1/ledger/other", head.size, head.root)).signed_by(COORDINATOR)
    other = Log([*course(1), step("st-anna", 5, 2)]).note(head.size - 5)
    astray = note.adding(cosign(other.checkpoint, name, SITES["st-anna"], NOW)).encode().decode()
    cases = [
        ("empty", "", "malformed"),
        ("no-signature", body + "\n\n", "malformed"),
        ("no-empty-line", body + "\n" + tail, "malformed"),
        ("last-newline-missing", text[:-1], "malformed"),
        ("carriage-returns", text.replace("\n", "\r\n"), "malformed"),
        ("not-utf-8", text.replace("—", "\udcff", 1), "malformed"),
        ("hyphen-for-dash", text.replace("—", "-", 1), "malformed"),
        ("two-spaces", text.replace("— ", "—  ", 1), "malformed"),
        ("extension-line", text.replace("\n\n", "\nmore\n\n", 1), "malformed"),
        ("two-lines-only", text.replace(f"{head.size}\n", "", 1), "malformed"),
        ("origin-empty", text.replace(LOG, "", 1), "malformed"),
        ("origin-with-space", text.replace("alpine", "al pine", 1), "malformed"),
        ("origin-with-plus", text.replace("alpine", "al+pine", 1), "malformed"),
        ("size-with-zero-in-front", text.replace(f"\n{head.size}\n", f"\n0{head.size}\n", 1), "malformed"),
        ("size-with-sign", text.replace(f"\n{head.size}\n", f"\n+{head.size}\n", 1), "malformed"),
        ("size-in-arabic-digits", text.replace(f"\n{head.size}\n", "\n١١\n", 1), "malformed"),
        ("size-beyond-reason", text.replace(f"\n{head.size}\n", f"\n{10**20}\n", 1), "malformed"),
        ("root-short", text.replace(root, base64.b64encode(head.root[:31]).decode(), 1), "malformed"),
        ("root-url-alphabet", text.replace(root, "_" * 42 + "8=", 1), "malformed"),
        ("root-without-padding", text.replace(root, root.rstrip("="), 1), "malformed"),
        ("root-of-an-empty-log", text.replace(f"\n{head.size}\n", "\n0\n", 1), "malformed"),
        ("signature-twice", f"{text}{lines[1]}\n", "malformed"),
        ("signature-not-base64", text.replace(lines[1], f"— {name} !!!!"), "malformed"),
        ("signature-without-value", text.replace(lines[0], f"— {LOG} {key}"), "malformed"),
        ("two-hundred-signatures", f"{body}\n\n" + "".join(f"— w{i} {key}AAAA\n" for i in range(200)), "too-large"),
        ("too-long", f"{body}\n\n" + f"— w {'A' * 70_000}\n", "too-large"),
        ("log-signature-missing", f"{body}\n\n" + "\n".join(lines[1:]) + "\n", "bad-signature"),
        ("log-signature-of-another", stranger, "bad-signature"),
        ("size-changed", text.replace(f"\n{head.size}\n", f"\n{head.size + 1}\n", 1), "bad-signature"),
        ("root-changed", text.replace(root, base64.b64encode(bytes(32)).decode(), 1), "bad-signature"),
        ("cosignature-of-another-head", astray, "bad-signature"),
        ("cosignature-short", note.adding(short).encode().decode(), "bad-signature"),
        ("another-log", far.encode().decode(), "other-log"),
        ("three-of-five", cosigned(log, NAMES[:3]).encode().decode(), "too-few-witnesses"),
    ]
    assert len({data for _, data, _ in cases}) == len(cases)
    colluding = {"three-of-five": 2}
    return [vector(name, data, code=code, colluding=colluding.get(name, 1)) for name, data, code in cases]


def trees() -> list[dict]:
    tree = Tree(leaf_hash(bytes([i])) for i in range(21))
    return [
        {
            "size": size,
            "root": tree.root(size).hex(),
            "inclusion": [[h.hex() for h in tree.inclusion(i, size)] for i in range(size)],
            "consistency": [[h.hex() for h in tree.consistency(old, size)] for old in range(size + 1)],
        }
        for size in (1, 2, 3, 7, 8, 13, 21)
    ]


def file_of(leaves_: list[Leaf], sites=NAMES) -> str:
    """An exported file, cosigned by sites that look at nothing but the head."""
    note = Log(leaves_).note()
    note = note.adding(*(cosign(note.checkpoint, witness_name(LOG, s), SITES[s], NOW) for s in sites))
    return (first_line(note, len(leaves_)) + b"".join(leaf.data + b"\n" for leaf in leaves_)).decode()


def ledgers() -> list[dict]:
    both = [*course(2), commit(2), reserve(OTHER), abort(OTHER)]
    cases = [("open", course(3)), ("committed", [*course(2), commit(2)]), ("two-studies", both)]
    return [{"name": n, "roster": ROSTER.body(), "colluding": 1, "text": file_of(x)} for n, x in cases]


def bad_ledgers() -> list[dict]:
    plan, one, two, three = reserve(), step("st-anna", 1), step("st-anna", 2), step("st-anna", 3)
    forged = step("st-anna", 2, by=identity("stranger"))
    late = step("st-anna", 41, 2)
    good = file_of([plan, one, two])
    lines, first = good.split("\n"), file_of([plan, one, step("st-berta", 1)]).split("\n")
    cases = [
        ("step-without-reserve", file_of([one]), "No budget was reserved"),
        ("reserved-twice", file_of([plan, plan]), "reserved for this study already"),
        ("dropped-step", file_of([plan, one, three]), "count of its releases has a gap"),
        ("reordered-counter", file_of([plan, two, one]), "count of its releases has a gap"),
        ("same-step-twice", file_of([plan, one, one]), "count of its releases has a gap"),
        ("slot-goes-back", file_of([plan, step("st-anna", 5, 1), step("st-anna", 4, 2)]), "slot is not above"),
        ("slot-above-the-plan", file_of([plan, one, late]), "above what was reserved"),
        ("site-without-grant", file_of([reserve(sites=NAMES[1:]), one]), "granted this study nothing"),
        ("step-after-commit", file_of([plan, one, commit(1), two]), "nothing follows that"),
        ("commit-after-abort", file_of([plan, one, abort(), commit(1)]), "nothing follows that"),
        ("commit-of-fewer-slots", file_of([plan, one, two, commit(1)]), "does not fit the steps"),
        ("commit-of-more-slots", file_of([plan, one, commit(41)]), "does not fit the steps"),
        ("forged-signature", file_of([plan, one, forged]), "signature does not match"),
        ("changed-byte", good.replace('"delta":"0.000001"', '"delta":"0.000002"'), "not those that were signed"),
        ("entries-swapped", "\n".join([*first[:2], first[3], first[2], ""]), "not those that were signed"),
        ("last-entry-cut-off", "\n".join([*lines[:-2], ""]), "Entries are missing"),
        ("too-few-cosignatures", file_of([plan, one], NAMES[:3]), "Too few sites"),
        ("more-than-it-says", good + step("st-anna", 3).data.decode() + "\n", "not hold as many entries"),
        ("not-a-ledger", "{}\n", "not well formed"),
    ]
    colluding = {"too-few-cosignatures": 2}
    return [
        {"name": n, "roster": ROSTER.body(), "colluding": colluding.get(n, 1), "words": w, "text": x}
        for n, x, w in cases
    ]


def anna() -> Witness:
    """st-anna once she has signed a release for slots 1 and 2, and cosigned nothing yet."""
    site = witness("st-anna")
    for leaf in (step("st-anna", 1), step("st-anna", 2)):
        site, signed = site.step(SITES["st-anna"], STUDY, leaf.entry.slot, leaf.entry.request, leaf.entry.release)
        assert signed.data == leaf.data
    return site


def proposals() -> list[dict]:
    site, rows = anna(), []
    own = [step("st-anna", 1), step("st-anna", 2)]
    both = Log([reserve(), *own, commit(2), reserve(OTHER)])
    for name, log in [("two-releases", Log([reserve(), *own])), ("and-the-end", both)]:
        proposal = log.proposal(site)
        known, line = site.cosign(SITES["st-anna"], proposal, NOW, approved)
        said = {"size": known.size, "end": known.standing(STUDY).end, "cosignature": line.line}
        rows.append({"name": name, "state": site.encode().decode(), "bytes": proposal.encode().decode(), **said})
    return rows


def bad_proposals() -> list[dict]:
    site = anna()
    own = [step("st-anna", 1), step("st-anna", 2)]
    log = Log([reserve(), *own, commit(2)])
    good = log.proposal(site)
    text = good.encode().decode()
    plan, last = log.leaves[0], log.leaves[3]
    cheaper = Leaf.of(plan.entry.model_copy(update={"plan": digest("cheaper")}))
    misplaced = {**good.included, plan.hash: replace(good.included[plan.hash], index=1)}
    hidden = {h: i for h, i in good.included.items() if h != plan.hash}

    def shown(*leaves_: Leaf, **changes) -> str:
        return Log(leaves_).proposal(site, **changes).encode().decode()

    def again(**changes) -> str:
        return canonical({**json.loads(text), **changes}).decode()

    cases = [
        ("empty", "", "malformed"),
        ("truncated", text[:-1], "malformed"),
        ("version-2", again(proposal=2), "malformed"),
        ("unknown-field", again(patients=3), "malformed"),
        ("entries-missing", text.replace('"entries"', '"leaves"'), "malformed"),
        ("entries-not-a-list", again(entries=3), "malformed"),
        ("entry-not-a-leaf", again(entries=["{}"]), "malformed"),
        ("entry-is-a-release", again(entries=[own[0].data.decode()]), "malformed"),
        ("since-as-truth", again(since=True), "malformed"),
        ("proof-not-hashes", again(consistency="00"), "malformed"),
        ("note-not-signed", again(note=good.note.encode().decode().replace("\n4\n", "\n5\n", 1)), "bad-signature"),
        ("note-of-a-stranger", again(note=log.note(by=identity("stranger")).encode().decode()), "bad-signature"),
        ("another-start", again(since=2), "other-start"),
        ("reserve-not-shown", shown(*log.leaves, entries=(last,)), "reserve-missing"),
        ("reserve-not-proven", shown(*log.leaves, included=hidden), "reserve-missing"),
        ("reserve-in-another-place", shown(*log.leaves, included=misplaced), "reserve-missing"),
        ("reserve-behind-the-release", shown(*own, reserve()), "reserve-missing"),
        ("reserve-of-another-plan", shown(cheaper, *own), "reserve-wrong"),
        ("reserved-twice", shown(reserve(), *own, cheaper), "reserved-twice"),
        ("commit-of-fewer-slots", shown(reserve(), *own, commit(1)), "slots-used"),
        ("commit-of-more-slots", shown(reserve(), *own, commit(41)), "slots-used"),
        ("release-behind-the-end", shown(reserve(), own[0], abort(), own[1]), "study-closed"),
    ]
    state = site.encode().decode()
    return [{"name": name, "code": code, "state": state, "bytes": data} for name, data, code in cases]


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for make in (leaves, bad_leaves, notes, bad_notes, trees, ledgers, bad_ledgers, proposals, bad_proposals):
        text = json.dumps(make(), indent=1)
        (HERE / f"{make.__name__}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
