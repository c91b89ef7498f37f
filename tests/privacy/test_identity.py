"""Who says so: signatures, documents, and what they refuse."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.canonical import canonical, parse
from privacy.errors import REFUSALS, ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document, Identity, fingerprint

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
bodies = st.dictionaries(st.text(max_size=10), json_values, max_size=5)


def test_every_refusal_has_words_that_end_in_a_remedy():
    assert set(REFUSALS) == set(RefusalCode)
    for what, remedy in REFUSALS.values():
        assert what
        assert not what.endswith(".")
        assert remedy.endswith(".")


@given(bodies)
def test_canonical_bytes_read_back_and_are_the_only_spelling(body):
    data = canonical(body)
    assert parse(data, 1 << 20) == body
    with pytest.raises(Refusal):
        parse(data + b" ", 1 << 20)


@pytest.mark.parametrize("data", [b'{"a":1.5}', b'{"a":1,"a":1}', b'{"b":1,"a":2}', b"[1]", b'{"a":NaN}', b"\xff", b""])
def test_anything_but_the_canonical_form_is_malformed(data):
    with pytest.raises(Refusal) as caught:
        parse(data, 1000)
    assert caught.value.code is RefusalCode.MALFORMED


def test_a_document_nested_without_end_is_refused_not_followed():
    with pytest.raises(Refusal):
        parse(b'{"a":' * 5000 + b"1" + b"}" * 5000, 1 << 20)


def test_floats_are_refused_because_programs_print_them_differently():
    with pytest.raises(TypeError):
        canonical({"a": 0.1})


@given(bodies)
def test_a_signed_document_survives_the_wire(body):
    identity = Identity.generate()
    document = Document("study", body).signed_by(identity)
    read = Document.decode(document.encode(), "study")
    read.verify(identity.public)
    assert read == document


@given(bodies, bodies)
def test_a_signature_is_worth_nothing_on_another_body_or_kind(body, other):
    identity = Identity.generate()
    signed = Document("study", body).signed_by(identity)
    for forged in (Document("study", other, signed.signatures), Document("roster", body, signed.signatures)):
        if forged != signed:
            with pytest.raises(Refusal) as caught:
                forged.verify(identity.public)
            assert caught.value.code is RefusalCode.BAD_SIGNATURE


def test_a_stranger_who_names_our_key_does_not_pass():
    ours, stranger = Identity.generate(), Identity.generate()
    signature = stranger.sign("study", {})
    forged = Document("study", {}, (type(signature)(ours.public, signature.value),))
    with pytest.raises(Refusal):
        forged.verify(ours.public)


def test_signing_twice_keeps_one_signature_per_key_and_the_digest():
    one, two = Identity.generate(), Identity.generate()
    document = Document("study", {"a": 1}).signed_by(one).signed_by(two).signed_by(one)
    assert len(document.signatures) == 2
    assert document.digest == Document("study", {"a": 1}).digest


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_by_type(data):
    with pytest.raises(Refusal):
        Document.decode(data, "study")


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_one_changed_byte_never_verifies(position, value):
    identity = Identity.generate()
    document = Document("study", {"name": "alpha", "n": 3}).signed_by(identity)
    data = bytearray(document.encode())
    position %= len(data)
    if data[position] == value:
        return
    data[position] = value
    with pytest.raises(Refusal):
        Document.decode(bytes(data), "study").verify(identity.public)


def test_a_key_is_for_its_owner_only_and_never_overwritten(tmp_path: Path):
    path = tmp_path / "identity.key"
    identity = Identity.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).public == identity.public
    with pytest.raises(ConsiliumError, match="never overwritten"):
        Identity.create(path)
    path.write_text("not a key")
    with pytest.raises(ConsiliumError, match="cannot be read"):
        Identity.load(path)


def test_a_fingerprint_is_the_beginning_of_the_key():
    key = Identity.generate().public
    assert fingerprint(key).replace(" ", "") == key[:32]
