"""The airlock and its journal: nothing leaves unnamed, nothing named is lost, and a full disk lets nothing out."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.airlock import Airlock, Released, released_bytes
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.journal import Journal, read, verify

VECTOR = np.arange(1000, dtype="<f4")


@pytest.fixture
def journal(tmp_path: Path):
    journal = Journal(tmp_path / "journal.jsonl")
    yield journal
    journal.close()


@pytest.fixture
def airlock(journal, tmp_path: Path):
    return Airlock(journal, tmp_path / "answers")


def test_nobody_else_makes_released_bytes():
    with pytest.raises(TypeError):
        Released(b"secret", object())
    for value in (b"secret", "secret", bytearray(b"s"), None):
        with pytest.raises(TypeError, match="past the airlock"):
            released_bytes(value)


def test_a_subclass_cannot_slip_through():
    class Forged(Released):
        def __init__(self):
            self.data = b"secret"

    with pytest.raises(TypeError, match="past the airlock"):
        released_bytes(Forged())


def test_every_byte_is_in_the_journal_before_it_is_handed_over(airlock, tmp_path):
    out = released_bytes(airlock.release("receipt", b"hello", study="ab", slot=3))
    stored = airlock.keep("ab-3", VECTOR)
    pieces = [
        released_bytes(airlock.fetch("update", stored, start, 1000, study="ab", slot=3))
        for start in range(0, stored.size, 1000)
    ]
    entries = list(read(tmp_path / "journal.jsonl"))
    assert [entry["size"] for entry in entries] == [len(out), *map(len, pieces)]
    assert [entry["sha256"] for entry in entries] == [hashlib.sha256(p).hexdigest() for p in (out, *pieces)]
    assert {(entry["study"], entry["slot"]) for entry in entries} == {("ab", 3)}
    assert b"".join(pieces) == VECTOR.tobytes()
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == stored.sha256


@pytest.mark.parametrize(("offset", "length"), [(-1, 4), (0, 0), (0, 4001), (4000, 1), (10**12, 4)])
def test_a_range_outside_the_vector_is_refused(airlock, offset, length):
    stored = airlock.keep("v", VECTOR)
    with pytest.raises(Refusal) as caught:
        airlock.fetch("update", stored, offset, length, study="", slot=1)
    assert caught.value.code is RefusalCode.MALFORMED


def test_a_range_of_recorded_bytes_leaves_named_and_within_bounds(airlock, tmp_path):
    data = bytes(range(100))
    assert released_bytes(airlock.release_range("shares payload", data, 10, 20, "ab", 0)) == data[10:30]
    (entry,) = read(tmp_path / "journal.jsonl")
    assert (entry["what"], entry["size"], entry["sha256"]) == (
        "shares payload", 20, hashlib.sha256(data[10:30]).hexdigest(),
    )  # fmt: skip
    for offset, length in ((-1, 5), (0, 0), (90, 11)):
        with pytest.raises(Refusal) as caught:
            airlock.release_range("shares payload", data, offset, length, "ab", 0)
        assert caught.value.code is RefusalCode.MALFORMED
    with pytest.raises(Refusal) as caught:
        airlock.release_range("shares payload", b"", 0, 1, "ab", 0)
    assert caught.value.code is RefusalCode.SLOT_SPENT


def test_masked_words_are_kept_like_any_vector(airlock):
    words = np.arange(1000, dtype="<u4") * np.uint32(4_000_037)
    stored = airlock.keep("ab-4", words)
    assert (stored.size, stored.sha256) == (4000, hashlib.sha256(words.tobytes()).hexdigest())
    assert stored.path.read_bytes() == words.tobytes()


def test_bytes_that_are_gone_stay_gone(airlock):
    stored = airlock.keep("v", VECTOR)
    airlock.discard(stored)
    with pytest.raises(Refusal) as caught:
        airlock.fetch("update", stored, 0, 4, study="", slot=1)
    assert caught.value.code is RefusalCode.SLOT_SPENT


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(0, 99), max_size=3), max_size=8), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_change_of_the_journal_is_found(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    journal = Journal(path)
    for entry in entries:
        journal.append({"entry": entry})
    journal.close()
    assert verify(path) == len(entries)
    raw = bytearray(path.read_bytes())
    if not raw:
        return
    position = data.draw(st.integers(0, len(raw) - 2))
    raw[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with pytest.raises(ConsiliumError, match="was changed"):
        verify(path)


def test_a_removed_line_is_found(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    for number in range(4):
        journal.append({"n": number})
    journal.close()
    lines = (tmp_path / "j.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(ConsiliumError, match="line 2"):
        Journal(tmp_path / "j.jsonl")


def test_a_torn_last_line_is_cut_off_and_the_chain_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.append({"n": 1})
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"n":2,"prev":"')
    journal = Journal(path)
    journal.append({"n": 2})
    journal.close()
    assert [entry["n"] for entry in read(path)] == [1, 2]


WRITER = """
import os, sys
from pathlib import Path
from privacy.journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(10**6):
    journal.append({"n": number})
    os.write(1, b"%d\\n" % number)
"""


def test_kill_9_never_loses_a_line_that_was_reported(tmp_path):
    path = tmp_path / "j.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    reported = [int(writer.stdout.readline()) for _ in range(50)]
    writer.kill()
    reported += [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    writer.wait()
    writer.stdout.close()
    Journal(path).close()
    assert verify(path) >= len(reported)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB that fills up; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("LOUD: mounting is not permitted here, so the full disk was NOT tested")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_lets_nothing_out_but_the_refusal_itself(small_disk):
    journal = Journal(small_disk / "journal.jsonl")
    airlock = Airlock(journal, small_disk / "answers")
    with pytest.raises(Refusal) as caught:
        airlock.keep("big", np.zeros(1 << 20, dtype="<f4"))
    assert caught.value.code is RefusalCode.DISK_FULL
    assert not list((small_disk / "answers").iterdir()), "no torn vector stays behind"
    with open(small_disk / "filler", "wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            os.write(file.fileno(), b"\0" * 4096)
    assert airlock.release("refusal", b"disk-full").data == b"disk-full", "the reserve still lets us say so"
    with pytest.raises(Refusal) as caught:
        for _ in range(100_000):
            airlock.release("refusal", b"disk-full")
    assert caught.value.code is RefusalCode.DISK_FULL
    journal.close()
    entries = verify(small_disk / "journal.jsonl")
    (small_disk / "filler").unlink()
    journal = Journal(small_disk / "journal.jsonl")
    Airlock(journal, small_disk / "answers").release("greeting", b"again")
    journal.close()
    assert verify(small_disk / "journal.jsonl") == entries + 1


def test_a_journal_line_is_plain_json_that_anyone_can_read(airlock, tmp_path):
    airlock.release("receipt", b"x", study="ab", slot=1)
    line = json.loads((tmp_path / "journal.jsonl").read_text())
    assert set(line) == {"at", "what", "size", "study", "slot", "sha256", "seq", "prev", "hash"}
