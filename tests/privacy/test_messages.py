"""Requests and answers: what they bind, what they refuse, and the golden and bad vectors of both."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.messages import Answer, Header, Request, decode_vector, encode_vector, refused

VECTORS = Path(__file__).parent.parent / "vectors" / "messages"
HEX = "0123456789abcdef" * 4


def header(**changes) -> Header:
    values = {
        "kind": "train",
        "study": HEX,
        "session": 1,
        "slot": 3,
        "round": 2,
        "cohort": ("st-anna", "st-berta"),
        "payload_sha256": HEX,
        "payload_bytes": 400,
        "deadline_seconds": 60,
        "parameters": {},
    }
    return Header(**{**values, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "validate"},
        {"study": HEX[::-1]},
        {"session": 2},
        {"slot": 4},
        {"round": 3},
        {"cohort": ("st-anna",)},
        {"payload_sha256": HEX[::-1]},
        {"payload_bytes": 404},
        {"deadline_seconds": 61},
        {"parameters": {"a": "b"}},
    ],
)
def test_S5_the_request_hash_covers_every_byte_the_coordinator_supplies(change):
    coordinator = Identity.generate()
    one = Request.decode(header().signed(coordinator).encode(), coordinator.public)
    other = Request.decode(header(**change).signed(coordinator).encode(), coordinator.public)
    assert one.hash != other.hash
    assert one.header == header()


@pytest.mark.parametrize(
    "change",
    [
        {"cohort": ("st-berta", "st-anna")},
        {"cohort": ("st-anna", "st-anna")},
        {"slot": 0},
        {"kind": "open"},
        {"slot": -1},
        {"deadline_seconds": 0},
        {"payload_bytes": 1 << 40},
        {"kind": "run"},
    ],
)
def test_a_header_that_contradicts_itself_is_malformed(change):
    body = {**header().body(), **{k: list(v) if isinstance(v, tuple) else v for k, v in change.items()}}
    coordinator = Identity.generate()
    with pytest.raises(Refusal) as caught:
        Request.decode(Document("request", body).signed_by(coordinator).encode(), coordinator.public)
    assert caught.value.code is RefusalCode.MALFORMED


def test_a_request_of_another_coordinator_is_refused():
    with pytest.raises(Refusal) as caught:
        Request.decode(header().signed(Identity.generate()).encode(), Identity.generate().public)
    assert caught.value.code is RefusalCode.BAD_SIGNATURE


def test_an_answer_is_believed_only_under_the_sites_own_key():
    site = Identity.generate()
    answer = refused(header(), HEX, "st-anna", RefusalCode.LATE)
    data = answer.signed(site).encode()
    assert Answer.verified(data, site.public) == answer
    with pytest.raises(Refusal):
        Answer.verified(data, Identity.generate().public)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_a_vector_survives_the_wire_exactly(values):
    vector = encode_vector(np.array(values, dtype=np.float32), np.zeros(2))
    assert np.array_equal(decode_vector(vector.tobytes(), len(values) + 2), vector)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_passes_in_neither_direction(bad):
    values = np.array([1.0, bad, 2.0], dtype="<f4")
    for call in (lambda: encode_vector(values), lambda: decode_vector(values.tobytes(), 3)):
        with pytest.raises(Refusal) as caught:
            call()
        assert caught.value.code is RefusalCode.NON_FINITE


def test_a_float64_too_large_for_the_wire_is_refused_not_sent_as_infinity():
    with pytest.raises(Refusal), np.errstate(over="ignore"):
        encode_vector(np.array([1e300]))


@pytest.mark.parametrize("length", [0, 11, 13, 16])
def test_a_vector_of_another_length_is_refused(length):
    with pytest.raises(Refusal) as caught:
        decode_vector(bytes(length), 3)
    assert caught.value.code is RefusalCode.MODEL_SHAPE


GOLDEN = json.loads((VECTORS / "golden.json").read_text())
BAD = json.loads((VECTORS / "bad.json").read_text())


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda v: v["name"])
def test_golden_messages_are_read_by_every_release(vector):
    data = vector["bytes"].encode()
    if vector["kind"] == "request":
        request = Request.decode(data, vector["signer"])
        assert request.hash == vector["hash"]
        assert request.document.encode() == data
    else:
        answer = Answer.verified(data, vector["signer"])
        assert Document("answer", answer.body()).digest == vector["hash"]


@pytest.mark.parametrize("vector", BAD, ids=lambda v: v["name"])
def test_bad_messages_are_refused_with_the_named_code(vector):
    data = vector["bytes"].encode()
    with pytest.raises(Refusal) as caught:
        if vector["kind"] == "request":
            Request.decode(data, vector["signer"])
        else:
            Answer.verified(data, vector["signer"])
    assert caught.value.code.value == vector["code"]
