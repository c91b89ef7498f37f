"""The index and the pool: read once, remembered, gone on with after a break, and not brought down by one file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from client.imaging import Columns, Source, load, pool
from client.imaging.files import inside, opened, walk
from client.imaging.index import digest, examined
from client.imaging.records import Reason, Unusable

SPEC = {"channels": 1, "size": [6, 8]}


def _length(path: Path) -> dict[str, int]:
    text = path.read_text()
    if text == "bad":
        raise Unusable(Reason.DAMAGED)
    if text == "die":
        os._exit(9)
    return {"length": len(text)}


def _twice(number: int) -> int:
    if number < 0:
        os._exit(9)
    return 2 * number


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / f"{number}.txt").write_text("x" * number)
    (tmp_path / "f" / "3.txt").write_text("bad")
    return tmp_path / "f"


def _examine(folder, store, processes=0, log=None):
    def examine(path):
        if log is not None:
            log.append(path.name)
        return _length(path)

    ticks = []
    work = _length if processes else examine
    entries = examined(folder, sorted(walk(folder)), work, store, "text", lambda: ticks.append(1), processes)
    assert len(ticks) == len(entries)
    return entries


def test_what_is_unchanged_is_not_read_again(folder, tmp_path):
    store, log = tmp_path / "index.sqlite", []
    first = _examine(folder, store, log=log)
    assert len(log) == 10
    assert first[3].reason is Reason.DAMAGED
    assert first[4].facts == {"length": 4}
    log.clear()
    assert _examine(folder, store, log=log) == first
    assert log == []
    (folder / "5.txt").write_text("new content")
    (folder / "6.txt").unlink()
    (folder / "new.txt").write_text("n")
    os.utime(folder / "7.txt", ns=(1, 1))
    second = _examine(folder, store, log=log)
    assert sorted(log) == ["5.txt", "7.txt", "new.txt"]
    assert len(second) == 10
    assert digest(second, None) != digest(first, None)


def test_touching_or_copying_a_folder_changes_nothing_that_counts(folder, tmp_path):
    before = digest(_examine(folder, None), None)
    shutil.copytree(folder, tmp_path / "g")
    os.utime(folder / "1.txt", ns=(1, 1))
    assert digest(_examine(folder, None), None) == before == digest(_examine(tmp_path / "g", None), None)


def test_a_check_that_was_broken_off_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("client.imaging.index._SAVE_EVERY", 1)
    store, log = tmp_path / "index.sqlite", []

    def tick():
        if len(log) == 6:
            raise KeyboardInterrupt

    def examine(path):
        log.append(path.name)
        return _length(path)

    with pytest.raises(KeyboardInterrupt):
        examined(folder, sorted(walk(folder)), examine, store, "text", tick, 0)
    log.clear()
    assert len(_examine(folder, store, log=log)) == 10
    assert len(log) == 4


@pytest.mark.parametrize("damage", [b"not a database", b""])
def test_a_damaged_or_foreign_index_is_made_anew(folder, tmp_path, damage):
    store = tmp_path / "index.sqlite"
    first = _examine(folder, store)
    store.write_bytes(damage)
    assert _examine(folder, store) == first
    assert stat.S_IMODE(store.stat().st_mode) & 0o077 == 0
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE made SET kind = 'other'")
    assert _examine(folder, store) == first


def test_names_that_are_no_text_are_kept(folder, tmp_path):
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("xx")
    first = _examine(folder, tmp_path / "index.sqlite")
    log = []
    assert _examine(folder, tmp_path / "index.sqlite", log=log) == first
    assert log == []


def test_two_processes_find_what_one_finds(folder):
    assert _examine(folder, None, processes=2) == _examine(folder, None)


def test_a_file_that_kills_its_process_is_given_up_by_name_and_the_rest_goes_on(folder):
    (folder / "4.txt").write_text("die")
    entries = _examine(folder, None, processes=2)
    assert [entry.reason for entry in entries] == [None] * 3 + [Reason.DAMAGED, Reason.CRASH] + [None] * 5


def test_the_pool_keeps_the_order_and_survives_several_crashes():
    items = [*range(7), -1, *range(7, 15), -2, -3, *range(15, 20)]
    found = list(pool.each(_twice, items, lambda item: item, 2, 3))
    assert found == [2 * item if item >= 0 else item for item in items]


def test_where_no_process_can_be_started_the_work_is_done_here(monkeypatch):
    monkeypatch.setattr(pool, "_works", lambda executor: False)
    assert list(pool.each(_twice, range(5), lambda item: item, 2, 3)) == [0, 2, 4, 6, 8]


def test_few_files_are_not_worth_a_process():
    assert pool.processes_for(10) == 0
    assert pool.processes_for(10, 2) == 2


@pytest.mark.parametrize("path", ["../f/1.txt", "/etc/hostname", "a/../../f/1.txt", "gone.txt", "out", "..", "a\0b"])
def test_a_table_cannot_name_files_outside(folder, path):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "out").symlink_to(folder / "1.txt")
    with pytest.raises(Unusable) as caught:
        inside(inner, path)
    assert caught.value.reason in {Reason.SYMLINK, Reason.NO_FILE}


def test_only_regular_files_inside_are_opened(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "near").symlink_to(folder / "1.txt")
    reasons = {}
    for path in ("pipe", "loop", "link", "gone"):
        with pytest.raises(Unusable) as caught:
            opened(folder, path)
        reasons[path] = caught.value.reason
    assert reasons == {
        "pipe": Reason.NOT_REGULAR,
        "loop": Reason.NOT_REGULAR,
        "link": Reason.SYMLINK,
        "gone": Reason.NOT_REGULAR,
    }
    assert opened(folder, "near").st_size == 1


def test_ten_thousand_files_of_rubbish_are_counted_in_seconds(tmp_path, dataset, save, table, key):
    save(dataset(), "images/good.dcm")
    rng = np.random.default_rng(0)
    for number in range(10_000):
        folder = tmp_path / "images" / str(number % 50)
        folder.mkdir(exist_ok=True)
        head = b"\0" * 128 + b"DICM" if number % 4 == 0 else b""
        (folder / f"{number}.dcm").write_bytes(head + rng.bytes(200))
    source = Source(
        kind="dicom",
        path=tmp_path / "images",
        labels=table([("good.dcm", "p", "a")]),
        columns=Columns(patient="patient"),
    )
    start = time.monotonic()
    cohort = load(source, SPEC, ("a", "b"), {}, key, tmp_path / "cache")
    first = time.monotonic() - start
    assert len(cohort) == 1
    assert len(cohort.quarantine) == 10_000
    assert {item.reason for item in cohort.quarantine} <= {
        Reason.NOT_DICOM, Reason.DAMAGED, Reason.TRUNCATED, Reason.NO_PIXELS, Reason.CODEC, Reason.BOMB
    }  # fmt: skip
    start = time.monotonic()
    load(source, SPEC, ("a", "b"), {}, key, tmp_path / "cache")
    again = time.monotonic() - start
    assert first < 60
    assert again < 10


def test_processes_give_the_same_cohort(tmp_path, dataset, save, table, key):
    rows = []
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 4096, (12, 16)).astype(np.uint16)
        save(dataset(pixels, PatientID=f"P{number}"), f"images/{number}.dcm")
        rows.append((f"{number}.dcm", f"p{number}", "a"))
    (tmp_path / "images" / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM")
    columns = Columns(patient="patient")
    source = Source(kind="dicom", path=tmp_path / "images", labels=table(rows), columns=columns)
    one, two = (load(source, SPEC, ("a", "b"), {}, key, None, processes=count) for count in (0, 2))
    assert np.array_equal(one.images, two.images)
    assert (one.patients, one.quarantine, one.origins) == (two.patients, two.quarantine, two.origins)


def test_two_checks_at_once_do_not_wait_for_each_other(folder, tmp_path):
    store = tmp_path / "index.sqlite"
    first = _examine(folder, store)
    (folder / "new.txt").write_text("n")
    with sqlite3.connect(store) as writing:
        writing.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        assert len(_examine(folder, store)) == len(first) + 1
        assert time.monotonic() - start < 10
    assert _examine(folder, store)[:10] == first
