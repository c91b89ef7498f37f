"""Heads of the log as signed text: what they bind, what they refuse, and how many cosignatures make one valid."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.checkpoint import (
    COSIGNATURE,
    LATEST,
    Checkpoint,
    Note,
    NoteSignature,
    cosign,
    cosigned_at,
    key_id,
    needed,
    valid_head,
    witness_name,
    witnesses_of,
)
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Signature
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import EMPTY
from tests.privacy.ledger_kit import COORDINATOR, LOG, NAMES, NOW, ROSTER, SITES, Log, course, identity, roster

VECTORS = Path(__file__).parent.parent / "vectors" / "ledger"
HEAD = Checkpoint(LOG, 7, bytes(range(32)))
NOTE = Note(HEAD).signed_by(COORDINATOR)
WITNESSES = witnesses_of(ROSTER)


def cosigned(sites, head: Checkpoint = HEAD) -> Note:
    lines = (cosign(head, witness_name(LOG, site), SITES[site], NOW) for site in sites)
    return Note(head).signed_by(COORDINATOR).adding(*lines)


def test_a_checkpoint_is_three_lines_and_a_note_is_text_that_people_read():
    assert HEAD.text == "consilium/v1/ledger/alpine\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
    text, signatures = NOTE.encode().decode().split("\n\n")
    assert text + "\n" == HEAD.text
    assert signatures.startswith(f"— {LOG} ")


def test_the_key_id_of_a_published_note_key():
    """The key that Go's documentation of signed notes gives as its example."""
    name, key, data = "PeterNeumann", "c74f20a3", "ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    blob = base64.b64decode(data)
    assert key_id(name, blob[1:].hex(), blob[:1]).hex() == key


@given(st.integers(1, 2**53), st.binary(min_size=32, max_size=32))
def test_a_checkpoint_reads_back(size, root):
    head = Checkpoint(LOG, size, root)
    assert Checkpoint.read(head.text) == head or root == EMPTY
    note = Note(head).signed_by(COORDINATOR)
    assert Note.decode(note.encode()) == note or root == EMPTY
    assert note.verify(COORDINATOR.public) == head


def test_an_empty_log_has_a_head_too():
    head = Checkpoint(LOG, 0, EMPTY)
    assert Checkpoint.read(head.text) == head


@pytest.mark.parametrize(
    "changed",
    [
        Checkpoint("consilium/v1/ledger/other", 7, HEAD.root),
        Checkpoint(LOG, 8, HEAD.root),
        Checkpoint(LOG, 7, bytes(32)),
    ],
)
def test_a_signature_binds_origin_size_and_root(changed):
    for forged in (Note(changed, NOTE.signatures), Note(changed, cosigned(["st-anna"]).signatures)):
        with pytest.raises(Refusal) as caught:
            forged.verify(COORDINATOR.public)
        assert caught.value.code is RefusalCode.BAD_SIGNATURE
        line = cosigned(["st-anna"]).signatures[1]
        with pytest.raises(Refusal):
            cosigned_at(changed, line, SITES["st-anna"].public)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_of_a_note_is_found(position, change):
    note = cosigned(NAMES[:2])
    data = bytearray(note.encode())
    data[position % len(data)] ^= change
    with pytest.raises((Refusal, LedgerRefusal)):
        valid_head(Note.decode(bytes(data)), LOG, COORDINATOR.public, dict(itertools.islice(WITNESSES.items(), 2)), 1)


def test_a_cosignature_binds_its_time():
    line = cosign(HEAD, "w", SITES["st-anna"], NOW)
    assert cosigned_at(HEAD, line, SITES["st-anna"].public) == NOW
    later = NoteSignature(line.name, line.key, (NOW + 1).to_bytes(8, "big") + line.value[8:])
    with pytest.raises(Refusal) as caught:
        cosigned_at(HEAD, later, SITES["st-anna"].public)
    assert caught.value.code is RefusalCode.BAD_SIGNATURE
    for wrong in (-1, LATEST + 1):
        with pytest.raises(ValueError, match="1970"):
            cosign(HEAD, "w", SITES["st-anna"], wrong)


def test_a_cosignature_is_no_signature_of_the_log_and_the_other_way_round():
    log = COORDINATOR
    line = cosign(HEAD, LOG, log, NOW)
    with pytest.raises(Refusal):
        Note(HEAD, (line,)).verify(log.public)
    assert NOTE.cosigners({LOG: log.public}) == {}
    as_cosignature = NoteSignature(LOG, key_id(LOG, log.public, COSIGNATURE), bytes(8) + NOTE.signatures[0].value)
    with pytest.raises(Refusal):
        Note(HEAD, (as_cosignature,)).cosigners({LOG: log.public})


def test_a_note_never_passes_for_a_document():
    with pytest.raises(ValueError, match="NUL"):
        COORDINATOR.sign_text("consilium/v1/sign/roster\0{}")
    value = COORDINATOR.sign_text('{"a":1}').hex()
    document = Document("roster", {"a": 1}, (Signature(COORDINATOR.public, value),))
    with pytest.raises(Refusal):
        document.verify(COORDINATOR.public)


@pytest.mark.parametrize("colluding", range(4))
@pytest.mark.parametrize("sites", range(3, 51))
def test_B7_two_valid_heads_always_share_an_honest_site(sites, colluding):
    """Two sets of w among n share at least 2w - n sites; one of them must be honest. And w is the least that does."""
    least = needed(sites, colluding)
    assert 2 * least - sites > colluding
    assert 2 * (least - 1) - sites <= colluding


@pytest.mark.parametrize("colluding", [0, 1, 2])
@pytest.mark.parametrize("count", range(6))
def test_B7_a_head_is_valid_with_more_than_half_of_n_plus_c_cosignatures(count, colluding):
    note = cosigned(NAMES[:count])
    if count > (len(NAMES) + colluding) / 2:
        head, times = valid_head(note, LOG, COORDINATOR.public, WITNESSES, colluding)
        assert head == HEAD
        assert times == {witness_name(LOG, site): NOW for site in NAMES[:count]}
    else:
        with pytest.raises(LedgerRefusal) as caught:
            valid_head(note, LOG, COORDINATOR.public, WITNESSES, colluding)
        assert caught.value.code is LedgerCode.TOO_FEW_WITNESSES


def test_cosignatures_of_strangers_and_of_the_same_site_twice_count_for_nothing():
    strangers = [cosign(HEAD, f"stranger-{i}", identity(f"stranger {i}"), NOW) for i in range(9)]
    under_a_name = cosign(HEAD, witness_name(LOG, "st-anna"), identity("stranger"), NOW)
    note = cosigned(["st-berta"]).adding(*strangers, under_a_name)
    later = cosign(HEAD, witness_name(LOG, "st-berta"), SITES["st-berta"], NOW + 5)
    assert note.cosigners(WITNESSES) == {witness_name(LOG, "st-berta"): NOW}
    assert note.adding(later).cosigners(WITNESSES) == {witness_name(LOG, "st-berta"): NOW + 5}
    with pytest.raises(LedgerRefusal):
        valid_head(note, LOG, COORDINATOR.public, WITNESSES, 1)


def test_a_wrong_signature_of_a_pinned_key_refuses_the_whole_note():
    name = witness_name(LOG, "st-emma")
    wrong = NoteSignature(name, key_id(name, SITES["st-emma"].public, COSIGNATURE), bytes(72))
    with pytest.raises(Refusal) as caught:
        valid_head(cosigned(NAMES[:4]).adding(wrong), LOG, COORDINATOR.public, WITNESSES, 1)
    assert caught.value.code is RefusalCode.BAD_SIGNATURE


def test_a_head_of_another_log_or_key_is_none():
    note = cosigned(NAMES)
    with pytest.raises(LedgerRefusal) as caught:
        valid_head(note, "consilium/v1/ledger/other", COORDINATOR.public, WITNESSES, 1)
    assert caught.value.code is LedgerCode.OTHER_LOG
    with pytest.raises(Refusal):
        valid_head(note, LOG, identity("stranger").public, WITNESSES, 1)
    with pytest.raises(ValueError, match="own key"):
        valid_head(note, LOG, COORDINATOR.public, {"a": SITES["st-anna"].public, "b": SITES["st-anna"].public}, 1)


def test_a_revoked_site_is_no_witness():
    assert set(witnesses_of(roster(revoked=("st-anna",)))) == {witness_name(LOG, site) for site in NAMES[1:]}


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_by_type(data):
    with pytest.raises(Refusal):
        Note.decode(data)


def test_a_note_of_fifty_sites_is_small_and_a_flood_is_refused():
    log = Log(course(1))
    lines = [cosign(log.note().checkpoint, f"site-{i}", identity(str(i)), NOW) for i in range(200)]
    assert len(Note(log.note().checkpoint).adding(*lines[:50]).encode()) < 10_000
    with pytest.raises(Refusal) as caught:
        Note.decode(log.note().adding(*lines).encode())
    assert caught.value.code is RefusalCode.TOO_LARGE


GOLDEN = json.loads((VECTORS / "notes.json").read_text())
BAD = json.loads((VECTORS / "bad_notes.json").read_text())


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda v: v["name"])
def test_golden_notes_are_read_by_every_release(vector):
    note = Note.decode(vector["note"].encode())
    head, times = valid_head(note, vector["origin"], vector["key"], vector["witnesses"], vector["colluding"])
    assert (head.size, head.root.hex(), times) == (vector["size"], vector["root"], vector["times"])
    assert note.encode() == vector["note"].encode()


@pytest.mark.parametrize("vector", BAD, ids=lambda v: v["name"])
def test_bad_notes_are_refused_with_the_named_code(vector):
    with pytest.raises((Refusal, LedgerRefusal)) as caught:
        note = Note.decode(vector["note"].encode("utf-8", "surrogateescape"))
        valid_head(note, vector["origin"], vector["key"], vector["witnesses"], vector["colluding"])
    assert caught.value.code.value == vector["code"]
