"""Whatever a coordinator, a connector or the wire sends: a typed refusal, and nothing stored."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.agent.core import Agent
from client.agent.delivery import unpack
from client.agent.policy import OFFER_LIMIT
from client.agent.rows import State
from client.agent.voice import NOBODY
from privacy.airlock import released_bytes
from privacy.canonical import canonical, sha256
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Identity
from privacy.messages import PROTOCOL, Answer
from privacy.roster import expiry
from tests.client.agent.bed import Bed, make_bed

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
TYPED = set(RefusalCode) - {RefusalCode.INTERNAL}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """One agent with an open session, for every example of a property."""
    bed = make_bed(tmp_path_factory.mktemp("hostile") / "site")
    bed.start()
    bed.ready()
    yield bed
    bed.stop()


def trace(bed: Bed) -> tuple[Any, ...]:
    """What the agent remembers and keeps; its journal, its events and its cache of own images aside."""
    assert bed.agent is not None
    row = bed.agent.store.study(bed.hash)
    assert row is not None
    kept = sorted(
        str(path.relative_to(bed.home.agent))
        for path in bed.home.agent.rglob("*")
        if path.is_file() and not path.name.startswith(("agent.db", "journal")) and "cache" not in path.parts
    )
    return row.state, row.session, row.highest, bed.agent.store.stored(), len(bed.agent.store.studies()), kept


def refused(bed: Bed, document: bytes, payload: bytes) -> Answer:
    """The answer, which must be a typed refusal that changed nothing."""
    assert bed.agent is not None
    before = trace(bed)
    answer = bed.read(released_bytes(bed.agent.submit(document, payload)))
    assert answer.status == "refused"
    assert answer.code in TYPED
    assert (answer.payload_bytes, answer.detail) == (0, {})
    assert trace(bed) == before
    return answer


@dataclass(frozen=True)
class Damage:
    """What happens to bytes on a bad way: cut off, changed, lengthened or shortened at one place."""

    how: Literal["cut", "flip", "insert", "drop"]
    place: float
    noise: bytes

    def to(self, original: bytes) -> bytes:
        at = int(self.place * len(original))
        if self.how == "cut":
            return original[:at]
        if self.how == "flip":
            return original[:at] + bytes([original[at] ^ (self.noise[0] or 1)]) + original[at + 1 :]
        if self.how == "insert":
            return original[:at] + self.noise + original[at:]
        return original[:at] + original[at + 1 :]


DAMAGE = st.builds(
    Damage,
    how=st.sampled_from(["cut", "flip", "insert", "drop"]),
    place=st.floats(0, 1, exclude_max=True),
    noise=st.binary(min_size=1, max_size=20),
)


@QUICK
@given(damage=DAMAGE)
def test_a_damaged_document_is_refused(target: Bed, damage: Damage) -> None:
    document = damage.to(target.request("train", target.vector, slot=1))
    answer = refused(target, document, target.vector)
    assert (answer.study, answer.request) == (NOBODY, sha256(document))


@QUICK
@given(
    document=st.one_of(st.binary(max_size=300), st.dictionaries(st.text(max_size=5), st.integers(-9, 9)).map(canonical))
)
def test_noise_is_refused(target: Bed, document: bytes) -> None:
    assert refused(target, document, b"").code in {"malformed", "version"}


@QUICK
@given(payload=st.binary(max_size=3000), kind=st.sampled_from(["train", "validate", "deliver", "offer"]))
def test_a_payload_that_is_not_the_announced_one_is_refused(target: Bed, payload: bytes, kind: str) -> None:
    slot = 1 if kind in {"train", "validate"} else 0
    refused(target, target.request(kind, target.vector, slot=slot), payload)


@QUICK
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "study": st.sampled_from([NOBODY, "f" * 64]),
            "session": st.sampled_from([0, 2, 2**31 - 1]),
            "payload_sha256": st.just(NOBODY),
            "payload_bytes": st.sampled_from([0, 1, 4, 2**31, 4 << 30]),
            "cohort": st.sampled_from([(), ("st-bona",), ("st-anna", "st-zeta")]),
        },
    ).filter(bool),
    kind=st.sampled_from(["train", "validate", "test", "deliver"]),
)
def test_a_hostile_header_is_refused_even_with_a_good_signature(target: Bed, values: Any, kind: str) -> None:
    slot = 0 if kind == "deliver" else 1
    refused(target, target.request(kind, target.vector, **{"slot": slot, **values}), target.vector)


@QUICK
@given(damage=DAMAGE)
def test_a_damaged_offer_is_refused(target: Bed, damage: Damage) -> None:
    payload = damage.to(target.offer_payload())
    refused(target, target.request("offer", payload, session=0), payload)


def test_a_stranger_is_refused(target: Bed) -> None:
    stranger = Identity.generate()
    assert refused(target, target.request("train", target.vector, slot=1, signer=stranger), b"").code == "bad-signature"


def test_a_second_coordinators_study_is_refused(target: Bed, tmp_path: Path) -> None:
    other = make_bed(tmp_path / "other")
    payload = other.offer_payload()
    answer = refused(target, target.request("offer", payload, session=0, study=other.hash), payload)
    assert answer.code == "bad-signature"


def test_an_offer_under_another_hash_is_refused(target: Bed) -> None:
    payload = target.offer_payload()
    document = target.request("offer", payload, session=0, study="a" * 64)
    assert refused(target, document, payload).code == "malformed"


def test_another_protocol_version_is_named(target: Bed) -> None:
    body = json.loads(target.request("open"))["body"] | {"protocol": PROTOCOL + 1}
    document = canonical({"kind": "request", "body": body, "signatures": []})
    assert refused(target, document, b"").code == "version"


def test_a_vector_that_is_not_finite_is_refused_before_the_slot_is_bound(target: Bed) -> None:
    vector = b"\x00\x00\xc0\x7f" + target.vector[4:]
    assert refused(target, target.request("train", vector, slot=1), vector).code == "non-finite"


def test_a_vector_of_another_model_is_refused(target: Bed) -> None:
    assert refused(target, target.request("train", b"\0" * 400, slot=1), b"\0" * 400).code == "model-shape"
    longer = target.vector + b"\0" * 4
    assert refused(target, target.request("train", longer, slot=1), longer).code == "too-large"


def test_before_an_approval_no_large_payload_is_taken(bed: Bed) -> None:
    assert bed.agent is not None
    read: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            read.append(1 << 20)
            yield bytes(1 << 20)

    document = bed.request("offer", session=0, payload_bytes=OFFER_LIMIT + 1)
    assert bed.read(released_bytes(bed.agent.submit(document, endless()))).code == "too-large"
    assert read == [], "refused by the header alone"
    document = bed.request("offer", session=0, payload_bytes=OFFER_LIMIT)
    assert bed.read(released_bytes(bed.agent.submit(document, endless()))).code == "too-large"
    assert sum(read) <= OFFER_LIMIT + (1 << 20)


def test_every_decision_has_its_own_refusal(bed: Bed) -> None:
    assert bed.agent is not None
    assert bed.call("train", bed.vector, slot=1).code == "unknown-study"
    assert bed.call("offer", bed.offer_payload(), session=0).detail == {"state": "pending", "approval": ""}
    assert bed.call("train", bed.vector, slot=1).code == "not-approved"
    bed.agent.decide(bed.hash, State.DECLINED)
    assert bed.call("open", bed.initial).code == "declined"
    assert bed.call("offer", bed.offer_payload(), session=0).detail["state"] == "declined"
    bed.connect_data()
    approval = bed.agent.decide(bed.hash, State.APPROVED, "archive")
    assert bed.call("offer", bed.offer_payload(), session=0).detail == {"state": "approved", "approval": approval.hex()}
    assert bed.call("train", bed.vector, slot=1).code == "session-unknown"
    assert bed.call("open", session=0).code == "malformed"
    assert bed.call("open").detail == {"initial": "needed"}
    assert bed.call("train", bed.vector, slot=1).code == "session-unknown"
    assert bed.call("open", bed.vector).code == "model-hash"
    announced = bed.request("open", bed.initial)
    assert bed.read(released_bytes(bed.agent.submit(announced, bed.vector))).code == "model-hash"
    assert bed.call("open", bed.initial).detail == {"initial": "held"}
    assert bed.call("train", bed.vector, slot=1).status == "done"


def test_a_revoked_or_expired_site_is_refused_and_old_rosters_change_nothing(open_bed: Bed) -> None:
    assert open_bed.agent is not None
    roster = open_bed.roster
    revoked = roster.model_copy(
        update={"version": 9, "sites": tuple(s.model_copy(update={"revoked": True}) for s in roster.sites)}
    )
    open_bed.agent.import_document(revoked.signed(open_bed.coordinator).encode())
    open_bed.agent.import_document(roster.signed(open_bed.coordinator).encode())
    assert open_bed.call("train", open_bed.vector, slot=1).code == "revoked"
    past = expiry(datetime.now(UTC) - timedelta(days=10), 5)
    expired = roster.model_copy(
        update={"version": 10, "sites": tuple(s.model_copy(update={"not_after": past}) for s in roster.sites)}
    )
    open_bed.agent.import_document(expired.signed(open_bed.coordinator).encode())
    assert open_bed.call("train", open_bed.vector, slot=1).code == "revoked"


def test_images_that_vanished_are_named_and_the_slot_can_still_be_served(open_bed: Bed) -> None:
    assert open_bed.agent is not None
    images = open_bed.home.root / "images.npz"
    open_bed.stop()
    hidden = images.rename(images.with_suffix(".away"))
    open_bed.start()
    assert open_bed.call("train", open_bed.vector, slot=1).code == "no-data"
    hidden.rename(images)
    assert open_bed.call("train", open_bed.vector, slot=1).status == "done"


def test_a_defect_of_our_own_leaves_no_words(open_bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    assert open_bed.agent is not None
    open_bed.agent.desk.forget(open_bed.hash)
    open_bed.agent.desk.initial(open_bed.study).write_bytes(b"damaged on the disk")
    released = released_bytes(
        open_bed.agent.submit(open_bed.request("train", open_bed.vector, slot=1), open_bed.vector)
    )
    assert open_bed.read(released).code == "internal"
    assert b"damaged" not in released
    assert b"Traceback" not in released
    assert "computing train" in caplog.text


BOMB = bytes(64 << 20)


def zipped(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ([], "malformed"),
        ([("MODEL_CARD.md", b"only a card")], "malformed"),
        ([("model.safetensors", b"M"), ("../../evil.py", b"x")], "malformed"),
        ([("model.safetensors", b"M"), ("/etc/cron.d/evil", b"x")], "malformed"),
        ([("model.safetensors", b"M"), ("sub/metrics.json", b"x")], "malformed"),
        ([("model.safetensors", b"M"), ("evil.py", b"x")], "malformed"),
        ([("model.safetensors", b"M"), ("metrics.json", BOMB)], "too-large"),
        ([("model.safetensors", BOMB)], "too-large"),
        ([("model.safetensors", b"not a model")], "model-shape"),
    ],
)
def test_a_hostile_parcel_is_refused_whole(target: Bed, entries: list[tuple[str, bytes]], code: str) -> None:
    parcel = zipped([(name, target.initial if data == b"M" else data) for name, data in entries])
    assert refused(target, target.request("deliver", parcel), parcel).code == code


def test_a_parcel_that_is_no_zip_or_names_a_file_twice_is_refused(target: Bed) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped([("model.safetensors", target.initial)] * 2)
    for parcel in (b"PK\x03\x04 no zip", twice):
        assert refused(target, target.request("deliver", parcel), parcel).code == "malformed"


@QUICK
@given(damage=DAMAGE)
def test_a_damaged_parcel_is_a_refusal_or_the_model_itself(
    target: Bed, tmp_path_factory: pytest.TempPathFactory, damage: Damage
) -> None:
    assert target.agent is not None
    folder = tmp_path_factory.mktemp("parcel")
    parcel = damage.to(zipped([("metrics.json", b"{}" * 50), ("model.safetensors", target.initial)]))
    (folder / "parcel").write_bytes(parcel)
    code = RefusalCode.INTERNAL
    try:
        unpack(folder / "parcel", folder / "model", target.agent.desk.sizes(target.study), "{}")
    except Refusal as refusal:
        code = refusal.code
    if (folder / "model").exists():
        assert (folder / "model" / "model.safetensors").read_bytes() == target.initial
    else:
        assert code in TYPED


def test_a_second_agent_on_the_same_home_is_refused(bed: Bed) -> None:
    with pytest.raises(Exception, match="running on this site already"):
        Agent(bed.home)
