"""The coordinator's memory: durable, checked, and clear about what cannot be."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest

from privacy.errors import ConsiliumError, Refusal
from privacy.files import write_atomically
from privacy.identity import Document, Identity
from privacy.study import approval
from server import tables
from server.blobs import Blobs
from server.home import CoordinatorConfig, CoordinatorHome
from server.records import LIVE, TRANSITIONS, SlotRecord, SlotState, State
from server.registry import Registry
from tests.server.round_kit import INITIAL, Bench


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def to(bench: Bench, *states: State) -> None:
    for state in states:
        bench.registry.transition(bench.hash, state)


def put(bench: Bench, state: State) -> None:
    """Put the study into a state without asking how it came there."""
    with bench.registry._db.write() as db:
        db.execute(tables.studies.update().values(state=state, request=""))


def test_only_the_moves_of_the_table_are_made(bench):
    for old in State:
        for new in State:
            put(bench, old)
            if new in TRANSITIONS[old] or (new is old and old in LIVE):
                assert bench.registry.transition(bench.hash, new, "why").state is new
            else:
                with pytest.raises(ConsiliumError, match=f"chest is {old.value}"):
                    bench.registry.transition(bench.hash, new)
                assert bench.registry.study(bench.hash).state is old


@pytest.mark.parametrize(
    ("verb", "good", "state"),
    [
        ("launch", {State.SIGNED, State.STOPPED, State.FAILED}, State.REQUESTED),
        ("resume", {State.PAUSED, State.INTERRUPTED, State.FINISHED}, State.REQUESTED),
        ("pause", {State.REQUESTED}, State.PAUSED),
        ("stop", {State.SIGNED, State.REQUESTED, State.PAUSED, State.INTERRUPTED, State.FAILED}, State.STOPPED),
    ],
)
def test_what_a_person_may_ask_in_which_state(bench, verb, good, state):
    for old in State:
        put(bench, old)
        ask = getattr(bench.registry, verb)
        if old in good:
            assert ask("chest").state is state
        elif verb in {"pause", "stop"} and old in LIVE:
            assert (ask("chest").state, bench.registry.requested(bench.hash)) == (old, verb)
        else:
            with pytest.raises(ConsiliumError) as caught:
                ask("chest")
            assert "consilium-coordinator" in caught.value.remedy


def test_a_request_does_not_outlive_the_run(bench):
    to(bench, State.REQUESTED, State.RUNNING)
    bench.registry.pause(bench.hash)
    to(bench, State.PAUSED)
    assert bench.registry.requested(bench.hash) == ""


def test_s7_launch_counts_sessions_up_and_resume_keeps_them(bench):
    sessions = []
    for steps in (["launch"], ["resume"], ["launch"]):
        for step in steps:
            getattr(bench.registry, step)(bench.hash)
        sessions.append(bench.registry.study(bench.hash).session)
        to(bench, State.RUNNING, State.INTERRUPTED if len(sessions) == 1 else State.STOPPED)
    assert sessions == [1, 1, 2]


def test_everything_is_there_again_in_another_process(bench):
    to(bench, State.REQUESTED)
    bench.registry.set_approval(bench.hash, "anna", "approved", b"yes")
    other = Registry(bench.home)
    assert other.study("chest") == bench.registry.study(bench.hash)
    assert other.approvals(bench.hash) == bench.registry.approvals(bench.hash)
    assert other.roster() == bench.registry.roster()
    assert [e.text for e in other.events(bench.hash)] == [e.text for e in bench.registry.events(bench.hash)]


def test_sqlite_is_durable_and_closed_to_others(bench):
    with Registry(bench.home)._db.read() as db:  # the bench's own does without fsync
        settings = [db.exec_driver_sql(f"PRAGMA {n}").scalar() for n in ("journal_mode", "synchronous", "foreign_keys")]
    assert settings == ["wal", 2, 1]
    assert stat.S_IMODE(bench.home.database.stat().st_mode) == 0o600


def test_two_processes_that_write_at_once_lose_nothing(bench):
    registries = [bench.registry, Registry(bench.home)]
    threads = [
        threading.Thread(target=lambda r=r, n=n: [r.note(bench.hash, "test", f"{n}-{i}") for i in range(20)])
        for n, r in enumerate(registries)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [e.text for e in bench.registry.events(bench.hash) if e.kind == "test"]
    assert sorted(texts) == sorted(f"{n}-{i}" for n in range(2) for i in range(20))


def test_a_change_that_fails_half_way_has_not_happened(bench):
    with pytest.raises(RuntimeError), bench.registry._db.write() as db:
        db.execute(tables.studies.update().values(state="failed"))
        raise RuntimeError
    assert bench.registry.study(bench.hash).state is State.SIGNED


def test_a_registry_of_another_release_is_refused(bench):
    with bench.registry._db.write() as db:
        db.execute(tables.meta.update().values(value="2"))
    with pytest.raises(ConsiliumError, match="another release"):
        Registry(bench.home)


@pytest.mark.parametrize("url", ["nonsense", "mystery://host/db", "sqlite:////nowhere/at/all.db"])
def test_a_registry_that_cannot_be_opened_says_what_to_do(tmp_path, url):
    home = CoordinatorHome(tmp_path)
    with pytest.raises(ConsiliumError, match=r"coordinator\.toml"):
        Registry(home, url)


def test_a_password_is_not_shown(tmp_path):
    with pytest.raises(ConsiliumError) as caught:
        Registry(CoordinatorHome(tmp_path), "postgresql+nodriver://user:hidden@host/db")
    assert "hidden" not in str(caught.value)


# ---- sites ---------------------------------------------------------------------------------------------------


def test_the_roster_goes_up_by_one_and_opens_the_door(bench):
    document = bench.roster(2, revoked=["bert"]).signed(bench.identity)
    bench.registry.save_roster(document)
    assert bench.registry.roster()[1].version == 2
    nodes = json.loads(bench.home.nodes_file.read_text())
    assert sorted(nodes) == ["anna", "cleo"]
    assert nodes["anna"] == bench.keys["anna"]
    for version in (2, 4):
        with pytest.raises(ConsiliumError, match="by somebody else"):
            bench.registry.save_roster(bench.roster(version).signed(bench.identity))
    with pytest.raises(Refusal):
        bench.registry.save_roster(bench.roster(3).signed(Identity.generate()))


def test_an_expired_site_leaves_the_door_at_the_next_refresh(bench):
    later = Registry(bench.home, now=lambda: datetime(2100, 1, 1, tzinfo=UTC))
    assert later.refresh_nodes() == {}
    assert json.loads(bench.home.nodes_file.read_text()) == {}


def test_without_sites_the_roster_says_how_to_get_some(tmp_path):
    home = CoordinatorHome(tmp_path)
    home.make_folders()
    home.write_config(CoordinatorConfig(name="consortium"))
    Identity.create(home.identity_key)
    with pytest.raises(ConsiliumError, match="sites add"):
        Registry(home).roster()


# ---- studies -------------------------------------------------------------------------------------------------


def test_a_study_is_found_by_name_and_hash(bench):
    for name in ("chest", bench.hash, bench.hash[:8]):
        assert bench.registry.study(name).hash == bench.hash
    for name in ("lung", bench.hash[:5], "%", "______"):
        with pytest.raises(ConsiliumError, match="chest"):
            bench.registry.study(name)


def test_a_study_must_be_signed_and_whole(bench):
    blobs, weights = bench.registry.blobs, bench.registry.study("chest").weights
    document = bench.study.document()
    with pytest.raises(Refusal):
        bench.registry.add_study(document.signed_by(Identity.generate()), blobs.put(INITIAL), weights)
    signed = document.signed_by(bench.identity)
    with pytest.raises(ConsiliumError, match="initial weights"):
        bench.registry.add_study(signed, weights, weights)
    with pytest.raises(ConsiliumError, match="missing"):
        bench.registry.add_study(signed, blobs.put(INITIAL), "0" * 64)
    assert bench.registry.add_study(signed, blobs.put(INITIAL), weights).hash == bench.hash
    assert len(bench.registry.studies()) == 1


def test_a_name_is_used_again_only_when_nothing_goes_on_under_it(bench):
    body = bench.study.body()
    body["study"]["title"] = "Another"
    other = type(bench.study).from_body(body).document().signed_by(bench.identity)
    record = bench.registry.study("chest")
    to(bench, State.REQUESTED)
    with pytest.raises(ConsiliumError, match="going on"):
        bench.registry.add_study(other, record.initial, record.weights)
    to(bench, State.STOPPED)
    later = Registry(bench.home, now=lambda: datetime.now(UTC) + timedelta(minutes=1))
    later.add_study(other, record.initial, record.weights)
    assert bench.registry.study("chest").study.study.title == "Another"


def test_an_approval_file_must_be_the_sites_own(bench):
    anna = bench.sites["anna"].identity
    good = approval(bench.hash, "anna", "images").signed_by(anna)
    assert bench.registry.add_approval(good).state == "approved"
    for bad in (
        approval(bench.hash, "bert", "images").signed_by(anna),
        approval(bench.hash, "nobody", "images").signed_by(anna),
        approval("0" * 64, "anna", "images").signed_by(anna),
        Document("approval", {"study": bench.hash, "site": "anna", "data": "images"}).signed_by(anna),
    ):
        with pytest.raises(ConsiliumError):
            bench.registry.add_approval(bad)
    assert [a.state for a in bench.registry.approvals(bench.hash)] == ["approved", "", ""]


def slot(bench: Bench, number: int) -> SlotRecord:
    weights = bench.registry.study("chest").weights
    return SlotRecord(
        number, 1, 1, "train", 1, b"request", "0" * 64, weights, ("anna", "bert"), SlotState.OPEN, "", "", ""
    )


def test_s2_a_slot_is_opened_once_and_in_order(bench):
    bench.course.open_slot(slot(bench, 1))
    for number in (1, 2, 3):
        with pytest.raises(ConsiliumError, match="Another process"):
            bench.course.open_slot(slot(bench, number))
    bench.course.close_slot(1, SlotState.FAILED, "nobody came")
    with pytest.raises(ConsiliumError, match="Another process"):
        bench.course.close_slot(1, SlotState.DONE)
    with pytest.raises(ConsiliumError, match="Another process"):
        bench.course.open_slot(slot(bench, 3))
    bench.course.open_slot(slot(bench, 2))
    assert [s.state for s in bench.course.slots()] == [SlotState.FAILED, SlotState.OPEN]


# ---- files ---------------------------------------------------------------------------------------------------


def test_a_blob_is_whole_or_not_there(tmp_path):
    blobs = Blobs(tmp_path)

    def half():
        yield b"half of it"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        blobs.put(half())
    assert list(tmp_path.iterdir()) == []
    name = blobs.put([b"ab", b"", b"c"])
    assert blobs.path(name).read_bytes() == b"abc"
    assert name == blobs.put(b"abc") == blobs.put(blobs.path(name))
    for missing in ("0" * 64, "../secret", ""):
        with pytest.raises(ConsiliumError, match="backup"):
            blobs.path(missing)


def test_a_sweep_takes_only_what_the_dead_left(tmp_path):
    blobs = Blobs(tmp_path)
    (tmp_path / ".4194305-0.part").write_bytes(b"left by a process number that cannot be")
    with blobs.writer() as writer:
        writer.write(b"in the making")
        assert blobs.sweep() == 1
        name = writer.commit()
    assert blobs.path(name).read_bytes() == b"in the making"


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(ConsiliumError, match="disk is full"), open("/dev/full", "wb", buffering=0) as full:
        writer = Blobs(tmp_path).writer()
        writer._file.close()
        writer._file = full
        writer.write(b"x")


def test_settings_are_checked_and_written_whole(tmp_path):
    home = CoordinatorHome(tmp_path / "here")
    with pytest.raises(ConsiliumError, match="no coordinator here"):
        home.config()
    home.make_folders()
    config = CoordinatorConfig(name="consortium", host="fl.example.org")
    home.write_config(config)
    assert home.config() == config
    assert config.superlink == "fl.example.org:8443"
    assert stat.S_IMODE(home.run.stat().st_mode) == 0o700
    for text, match in (("name = 'A B'", "name in"), ("port = ", "cannot be read"), ("name='ab'\nport=0", "port in")):
        write_atomically(home.config_file, text.encode())
        with pytest.raises(ConsiliumError, match=match):
            home.config()
