"""The ledger on disk: never two writers, nothing lost, nothing changed unseen; on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from privacy.checkpoint import Note, witnesses_of
from privacy.errors import ConsiliumError, Refusal
from privacy.ledger import Leaf
from privacy.ledger_check import verify_file
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import consistent, included
from privacy.proposal import Proposal
from server.ledger import SHOWN, SHOWN_STUDIES, Ledger
from server.ledger_tables import cosignatures, heads, leaves
from tests.privacy.ledger_kit import (
    CONSORTIUM,
    COORDINATOR,
    NAMES,
    NOW,
    ROSTER,
    SITES,
    STUDY,
    abort,
    approved,
    commit,
    course,
    digest,
    identity,
    reserve,
    step,
    witness,
)
from tests.server import postgres_kit

WITNESSES = witnesses_of(ROSTER)


@pytest.fixture(scope="session")
def postgres():
    if postgres_kit.programs() is None:
        pytest.skip("PostgreSQL IS NOT INSTALLED: the ledger is NOT tested on it (apt-get install postgresql)")
    with postgres_kit.running() as socket:
        yield socket


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    address = postgres_kit.url(request.getfixturevalue("postgres"))
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as db:  # an empty database for each test
        db.exec_driver_sql("DROP SCHEMA public CASCADE")
        db.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return address


@pytest.fixture
def open_(url):
    """Opens the ledger again and again; all are closed at the end."""
    opened = []

    def call() -> Ledger:
        opened.append(Ledger(url, CONSORTIUM, lambda: datetime.fromtimestamp(NOW, UTC)))
        return opened[-1]

    yield call
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_):
    return open_()


def change(ledger: Ledger, statement) -> None:
    """What somebody with the database's password could do."""
    with ledger._db.write() as db:
        db.execute(statement)


def sign(ledger: Ledger, sites=NAMES) -> Note:
    """A new head, and the cosignatures of sites that see it for the first time."""
    size = ledger.checkpoint(COORDINATOR).checkpoint.size
    for name in sites:
        line = witness(name).cosign(SITES[name], ledger.proposal(name, 0), NOW, approved)[1]
        ledger.add_cosignature(size, name, line, SITES[name].public)
    return ledger.note()


def test_what_was_appended_is_read_back_in_order_after_another_opening(ledger, open_):
    entries = course(5)
    assert ledger.append(entries[:1]) == range(1)
    assert ledger.append(entries[1:]) == range(1, 26)
    again = open_()
    assert list(again.read()) == entries
    assert list(again.read(3, 7)) == entries[3:7]
    assert again.size == 26
    assert again.account(STUDY) == ledger.account(STUDY)
    assert again.account(STUDY).slots_used == 5
    assert again.account(digest("none")) is None
    assert [again.find(leaf.hash) for leaf in entries[:3]] == [0, 1, 2]
    assert again.find(bytes(32)) is None


def test_a_batch_is_written_whole_or_not_at_all(ledger, open_):
    ledger.append([reserve()])
    with pytest.raises(LedgerRefusal) as caught:
        ledger.append([step("st-anna", 1), step("st-anna", 3)])
    assert caught.value.code is LedgerCode.COUNTER
    assert (ledger.size, open_().size) == (1, 1)
    ledger.append([step("st-anna", 1), step("st-anna", 2)])
    assert ledger.append([]) == range(3, 3)


def test_a_release_handed_in_twice_stands_once(ledger):
    ledger.append([reserve()])
    leaf = step("st-anna", 1)
    assert [ledger.take(leaf.data, {SITES["st-anna"].public}) for _ in range(2)] == [1, 1]
    assert ledger.size == 2


def test_attack_a_forged_or_foreign_release_is_not_written(ledger):
    ledger.append([reserve()])
    keys = {SITES["st-anna"].public}
    for data in (step("st-anna", 1, by=identity("stranger")).data, step("st-anna", 1).data[:-1], b"{}"):
        with pytest.raises(Refusal):
            ledger.take(data, keys)
    for leaf in (step("st-anna", 2), commit(0), reserve(digest("other")), abort()):
        with pytest.raises(LedgerRefusal):
            ledger.take(leaf.data, keys)
    assert ledger.size == 1


def test_the_same_size_is_signed_once_and_an_empty_log_too(ledger, open_):
    empty = ledger.checkpoint(COORDINATOR)
    assert empty.checkpoint.size == 0
    ledger.append(course(2))
    note = ledger.checkpoint(COORDINATOR)
    assert ledger.checkpoint(COORDINATOR) == note == open_().checkpoint(COORDINATOR) == open_().note()
    assert note.verify(COORDINATOR.public).size == 11
    assert ledger.note(0) == empty
    with pytest.raises(ConsiliumError, match="no head yet"):
        ledger.note(3)


def test_proofs_lead_to_the_signed_heads_and_are_under_a_kilobyte(ledger):
    ledger.append(course(3))
    old = ledger.checkpoint(COORDINATOR).checkpoint
    ledger.append([commit(3), *course(4, study=digest("second"))])
    new = ledger.checkpoint(COORDINATOR).checkpoint
    proof = ledger.consistency(old.size, new.size)
    assert consistent(old.size, old.root, new.size, new.root, proof)
    for place, leaf in enumerate(ledger.read()):
        shown = ledger.inclusion(place, new.size)
        assert included(leaf.hash, shown.index, new.size, shown.proof, new.root)
        assert 32 * len(shown.proof) < 1000


def test_sites_cosign_round_after_round_and_the_head_becomes_valid(ledger, open_):
    sites = {name: witness(name) for name in NAMES}
    ledger.append([reserve()])
    for slot in range(1, 5):
        for name in NAMES:
            sites[name], leaf = sites[name].step(SITES[name], STUDY, slot, digest("q", slot), digest("r", slot, name))
            ledger.take(leaf.data, {SITES[name].public})
        size = ledger.checkpoint(COORDINATOR).checkpoint.size
        for count, name in enumerate(NAMES):
            valid = ledger.valid_note(COORDINATOR.public, WITNESSES, 1)
            assert (valid is not None and valid.checkpoint.size == size) == (count >= 4)
            sites[name], line = sites[name].cosign(SITES[name], ledger.proposal(name, sites[name].size), NOW, approved)
            ledger.add_cosignature(size, name, line, SITES[name].public)
            assert sites[name].pending == ()
    assert open_().valid_note(COORDINATOR.public, WITNESSES, 1) == ledger.note()
    assert ledger.valid_note(COORDINATOR.public, {k: identity(k).public for k in WITNESSES}, 1) is None


def test_a_wrong_cosignature_is_not_kept(ledger):
    ledger.append(course(1))
    size = ledger.checkpoint(COORDINATOR).checkpoint.size
    line = witness("st-anna").cosign(SITES["st-anna"], ledger.proposal("st-anna", 0), NOW, approved)[1]
    with pytest.raises(Refusal):
        ledger.add_cosignature(size, "st-anna", line, SITES["st-berta"].public)
    with pytest.raises(LedgerRefusal):
        ledger.add_cosignature(size, "st-berta", line, SITES["st-anna"].public)
    assert len(ledger.note().signatures) == 1


def test_S3_a_site_that_forgot_learns_it_from_the_coordinators_records(ledger):
    ledger.append(course(1))
    sign(ledger, ["st-anna"])
    with pytest.raises(LedgerRefusal) as caught:
        witness("st-anna").cosign(SITES["st-anna"], ledger.proposal("st-anna", 0), NOW, approved)
    assert caught.value.code is LedgerCode.STATE_LOST


def test_a_coordinator_restored_from_an_old_copy_learns_it_from_a_site(ledger):
    ledger.append(course(1))
    sign(ledger)
    with pytest.raises(ConsiliumError, match="restored from an old copy"):
        ledger.proposal("st-anna", 99)


def test_releases_left_out_of_a_proposal_are_proven_when_asked_for(ledger):
    entries = course(3)
    ledger.append(entries)
    ledger.checkpoint(COORDINATOR)
    ledger.append([commit(3)])
    size = ledger.checkpoint(COORDINATOR).checkpoint.size
    mine = [leaf.hash for leaf in entries if getattr(leaf.entry, "site", "") == "st-anna"]
    own = [entries[0].hash, commit(3).hash]
    assert set(ledger.proposal("st-anna", 0).included) == {*mine, *own}
    assert set(ledger.proposal("st-anna", size).included) == set()
    assert set(ledger.proposal("st-anna", size, [mine[1], bytes(32)]).included) == {mine[1], *own}


def test_a_site_is_shown_what_the_coordinator_wrote_of_its_studies(ledger):
    """Of the study in which it is asked always; of its others what is new; of studies of other sites nothing."""
    second, third = digest("second"), digest("third")
    ledger.append([*course(2), reserve(second), reserve(third, sites=NAMES[1:]), abort(third)])
    size = ledger.checkpoint(COORDINATOR).checkpoint.size
    ledger.append([abort(second)])

    def shown(since: int, study: str = "") -> list[bytes]:
        proposal = ledger.proposal("st-anna", since, study=study)
        assert all(proposal.shows(leaf) is not None for leaf in proposal.entries)
        return [leaf.data for leaf in proposal.entries]

    assert shown(0) == [reserve().data, reserve(second).data]
    assert shown(size) == []
    assert shown(size, STUDY) == [reserve().data]
    ledger.checkpoint(COORDINATOR)
    assert shown(size, STUDY) == [reserve().data, reserve(second).data, abort(second).data]
    assert shown(size + 1, third) == []


def test_a_proposal_stays_below_its_limit_with_as_many_studies_and_releases_as_it_may_show(ledger):
    sites = [f"st-{number:02d}-{'x' * 20}" for number in range(49)] + ["st-anna"]
    for number in range(SHOWN_STUDIES + 3):
        study = digest("study", number)
        ledger.append([reserve(study, sites=sites), *(step("st-anna", s, study=study) for s in range(1, 6))])
        ledger.append([abort(study)])
    ledger.checkpoint(COORDINATOR)
    proposal = ledger.proposal("st-anna", 0)
    assert len(proposal.included) == SHOWN + 2 * SHOWN_STUDIES
    assert Proposal.decode(proposal.encode()) == proposal


def test_the_officer_believes_the_exported_file_and_not_a_changed_one(ledger, tmp_path):
    ledger.append([*course(3), commit(3)])
    sign(ledger)
    ledger.append([reserve(digest("next"))])
    path = tmp_path / "ledger.jsonl"
    assert ledger.export(path) == 17
    assert verify_file(path, [ROSTER], 1).error is None
    path.write_bytes(path.read_bytes().replace(b'"delta":"0.000001"', b'"delta":"0.000002"'))
    assert verify_file(path, [ROSTER], 1).error is not None
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ConsiliumError, match="cannot be written"):
        ledger.export(tmp_path / "none" / "ledger.jsonl")


def test_two_writers_take_turns_and_each_sees_the_others_entries(open_):
    one, two = open_(), open_()
    one.append([reserve()])
    failures: list[BaseException] = []

    def write(ledger: Ledger, name: str) -> None:
        try:
            for slot in range(1, 21):
                ledger.append([step(name, slot)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in zip((one, two, one), NAMES, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert one.checkpoint(COORDINATOR) == two.checkpoint(COORDINATOR) == open_().note()
    assert one.size == 61


def test_attack_a_changed_stored_entry_is_found_on_reading_and_on_opening(ledger, open_):
    ledger.append(course(2))
    other = Leaf.of(reserve().entry.model_copy(update={"slots": 41}))
    for values in ({"data": other.data}, {"data": other.data, "hash": other.hash}):
        change(ledger, leaves.update().where(leaves.c.place == 0).values(**values))
        with pytest.raises(ConsiliumError, match="entry 1"):
            list(ledger.read())
    ledger.checkpoint(COORDINATOR)
    with pytest.raises(ConsiliumError, match="not those its head was signed over"):
        open_()
    change(ledger, leaves.update().where(leaves.c.place == 0).values(data=b"{}"))
    with pytest.raises(ConsiliumError, match="changed or removed"):
        open_()


@pytest.mark.parametrize(("place", "words"), [(4, "changed or removed"), (10, "not those its head")])
def test_attack_a_removed_stored_entry_is_found(ledger, open_, place, words):
    ledger.append(course(2))
    ledger.checkpoint(COORDINATOR)
    change(ledger, leaves.delete().where(leaves.c.place == place))
    with pytest.raises(ConsiliumError, match=words):
        open_()
    if place == 10:
        with pytest.raises(ConsiliumError, match="taken away"):
            ledger.append([step("st-anna", 3)])


def test_attack_a_head_put_into_the_database_is_not_believed(ledger, open_):
    ledger.append(course(1))
    ledger.checkpoint(COORDINATOR)
    forged = Note(ledger.note().checkpoint.__class__(ledger.origin, 6, bytes(32))).signed_by(COORDINATOR)
    change(ledger, heads.update().values(note=forged.encode()))
    with pytest.raises(ConsiliumError, match="not those its head"):
        open_()
    change(ledger, heads.delete())
    assert open_().size == 6


WRITER = """
import sys
from server.ledger import SHOWN, SHOWN_STUDIES, Ledger
from tests.privacy.ledger_kit import CONSORTIUM, COORDINATOR, reserve, step
ledger = Ledger(sys.argv[1], CONSORTIUM)
ledger.append([reserve(slots=100000)])
slot = 0
while True:
    slot += 1
    ledger.append([step("st-anna", slot), step("st-berta", slot)])
    print(ledger.size, flush=True)
    if slot % 7 == 0:
        ledger.checkpoint(COORDINATOR)
"""


@pytest.mark.parametrize("lines", [1, 6, 7, 23])
def test_kill_9_between_entry_and_head_leaves_a_log_that_opens_and_verifies(url, open_, tmp_path, lines):
    child = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
    said = 0
    try:
        for _ in range(lines):
            said = int(child.stdout.readline())
    finally:
        os.kill(child.pid, signal.SIGKILL)
        said = max([said, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
        child.stdout.close()
        child.wait()
    ledger = open_()
    assert ledger.size >= said >= 2 * lines + 1
    assert ledger.size % 2 == 1  # a batch is there whole or not at all
    account = ledger.account(STUDY)
    ledger.append([step("st-anna", account.slots_used + 1)])
    sign(ledger)
    path = tmp_path / "ledger.jsonl"
    ledger.export(path)
    assert verify_file(path, [ROSTER], 1).error is None


def test_a_database_that_cannot_be_reached_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ConsiliumError, match="cannot be opened"):
        Ledger(f"sqlite:///{tmp_path}/none/ledger.db", CONSORTIUM)


def test_the_ledger_of_another_consortium_is_not_taken_for_ones_own(ledger, url):
    ledger.append(course(1))
    ledger.checkpoint(COORDINATOR)
    with pytest.raises(ConsiliumError, match="of consilium/v1/ledger/alpine"), contextlib.closing(Ledger(url, "other")):
        pass


def test_no_table_holds_anything_but_the_log():
    names = {column.name for table in (leaves, heads, cosignatures) for column in table.columns}
    assert names == {"place", "hash", "study", "site", "data", "size", "note", "at", "line"}
