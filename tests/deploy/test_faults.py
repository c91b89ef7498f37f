"""What happens when something breaks? Every fault, in the real deployment, ends with the study finished or in words."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from client.agent_client import Outward
from client.home import SiteHome
from deploy.federation import Federation, free_port
from privacy.canonical import canonical, sha256
from privacy.identity import Document, Identity
from privacy.messages import Answer, Header
from privacy.study import Study
from server import tls
from server.home import CoordinatorHome
from server.records import Outcome, OutcomeState, SlotState, State, StudyRecord
from server.registry import Registry
from tests.deploy.lab import HOSPITAL_RETURNS, Lab, connect_images, draft, flat

pytestmark = pytest.mark.long
ROUNDS = 6


# ---- kill -9, in the middle of a round ---------------------------------------------------------------------------


def _under_way(lab: Lab, name: str, **changes: object) -> StudyRecord:
    """A study whose first round is done, with enough rounds to come."""
    record = lab.launch(name, **{"rounds": ROUNDS, **changes})
    lab.until(lambda: any(s.state is SlotState.DONE for s in lab.slots(record)), f"the first round of {name}")
    return record


def _interrupted(lab: Lab, record: StudyRecord) -> None:
    reason = lab.reaches(record, State.INTERRUPTED).reason
    assert f"consilium-coordinator study resume {record.name}" in reason
    assert reason in lab.shown(record)


def _goes_on(lab: Lab, record: StudyRecord, number: int, before: dict[str, dict[str, object]]) -> None:
    """The same slot with the same request, and the very same bytes from those who had answered."""
    slot = next(s for s in lab.slots(record) if s.slot == number)
    assert slot.state is SlotState.DONE
    assert len([s for s in lab.slots(record) if (s.kind, s.round) == (slot.kind, slot.round)]) == 1
    assert {o.state for o in lab.outcomes(record, number).values()} == {OutcomeState.IN}
    for site, left in before.items():
        after = lab.left(site, record, number)
        assert after.keys() == left.keys()
        for what, hashes in left.items():
            assert set(after[what]) == set(hashes)
            assert after[what].total() > hashes.total()


@pytest.mark.parametrize("victim", ["superlink", "serverapp", "serve"])
def test_the_coordinator_is_killed_in_the_middle_of_a_round(lab: Lab, victim: str) -> None:
    record = _under_way(lab, f"kill-{victim}")
    with lab.held("west"):
        slot = lab.mid_round(record, held="west")
        answered = {site: lab.left(site, record, slot.slot) for site in ("north", "south")}
        assert all({"answer to train", "train vector"} == left.keys() for left in answered.values())
        if victim == "serve":
            lab.federation.crash("coordinator")
            lab.federation.serve()
        else:
            lab.federation.kill("coordinator", victim)
        _interrupted(lab, record)
    lab.resume(record)
    lab.finishes(record)
    assert next(s.hash for s in lab.slots(record) if s.slot == slot.slot) == slot.hash
    _goes_on(lab, record, slot.slot, answered)


@pytest.mark.parametrize("victim", ["connector", "agent", "start"])
def test_a_hospital_is_killed_while_it_computes_and_is_in_again_by_itself(lab: Lab, victim: str) -> None:
    record = lab.launch(f"kill-{victim}", steps=150, batch=16, rounds=2, minimum=3)
    number = lab.computing(record, "south")
    if victim == "start":
        lab.federation.crash("south")
        lab.federation.start("south")
    else:
        lab.federation.kill("south", victim)
    lab.until(
        lambda: lab.outcomes(record, number)["south"].state is OutcomeState.IN, "south to be in", HOSPITAL_RETURNS
    )
    lab.finishes(record)
    _goes_on(lab, record, number, {})
    left = lab.left("south", record, number)
    assert len(left["train vector"]) == len(left["answer to train"]) == 1


# ---- time and space ----------------------------------------------------------------------------------------------


def test_a_site_slower_than_the_deadline_is_late_and_takes_part_again(lab: Lab) -> None:
    record = _under_way(lab, "slow", deadline=25)
    with lab.held("west"):
        slot = lab.mid_round(record, held="west")
        lab.until(lambda: lab.outcomes(record, slot.slot)["west"].state is OutcomeState.LATE, "west to be late")
        lab.until(lambda: lab.slots(record)[-1].slot > slot.slot, "the next round")
    lab.until(
        lambda: any(
            lab.outcomes(record, s.slot)["west"].state is OutcomeState.IN for s in lab.slots(record)[slot.slot :]
        ),
        "west to take part again",
    )
    lab.finishes(record)
    shown = lab.shown(record)
    assert f"round {slot.round} done 2 of 3" in shown
    assert "west late (no answer before the deadline)" in shown
    assert lab.delivered(record)["west"].state == "delivered"


def test_a_full_disk_is_said_on_both_sides_and_freed_space_is_enough(lab: Lab) -> None:
    home = lab.federation.site_home("west")
    if not os.path.ismount(home):
        pytest.skip("NOT TESTED: a full disk. It needs root, to give one site a small disk (tmpfs) of its own")
    record = _under_way(lab, "full", minimum=3)
    ballast = home / "ballast"
    try:
        _fill(ballast)
        lab.until(lambda: any(o.code == "disk-full" for o in _of(lab, record, "west")), "west's disk to be noticed")
        assert "The site's disk is full" in lab.shown(record)
        assert "0.00 GiB free → Free space." in lab.status("west")
    finally:
        ballast.unlink()
    lab.finishes(record)
    assert lab.delivered(record)["west"].state == "delivered"
    lab.until(lambda: "The site's disk is full" not in lab.status("west"), "west's status to be clear")


def _fill(path: Path) -> None:
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _of(lab: Lab, record: StudyRecord, site: str) -> list[Outcome]:
    return [o for slot in lab.slots(record) if (o := lab.outcomes(record, slot.slot).get(site)) is not None]


# ---- bytes from nowhere ------------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_noise = random.Random(20300131)
HOSTILE = {
    "nothing": b"",
    "noise": _noise.randbytes(1 << 16),
    "half a preface": PREFACE[:11],
    "a frame cut off": PREFACE + SETTINGS + bytes([0, 4, 0, 0, 0, 0, 0, 0, 1]) + b"x" * 100,
    "a frame of 16 MiB announced": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + b"x" * 5000,
    "a frame of 16 MiB": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(0xFFFFFF),
    "headers of noise": PREFACE + SETTINGS + bytes([0, 1, 0, 1, 4, 0, 0, 0, 1]) + _noise.randbytes(256),
    "endless headers": PREFACE
    + SETTINGS
    + bytes([0, 64, 0, 1, 0, 0, 0, 0, 1])
    + (bytes([0, 64, 0, 9, 0, 0, 0, 0, 1]) + bytes(16384)) * 40,
    "ten thousand pings": PREFACE + SETTINGS + (bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + bytes(8)) * 10_000,
    "ten thousand resets": PREFACE + SETTINGS + (bytes([0, 0, 4, 3, 0, 0, 0, 0, 1]) + bytes(4)) * 10_000,
    "HTTP/1": b"POST /consilium.agent.v1.Outward/Submit HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\nxx",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
}


def test_hostile_bytes_on_both_doors_disturb_nothing(lab: Lab) -> None:
    record = _under_way(lab, "hostile", minimum=3)
    home = SiteHome(lab.federation.site_home("south"))
    agent = lab.federation.process("south", "agent")
    assert agent is not None
    with lab.held("west"):  # so that the study is in the middle of a round all the while
        slot = lab.mid_round(record, held="west")
        for door in (home.outward_socket, home.local_socket):
            for data in HOSTILE.values():
                _throw(door, data)
            for method in (
                "Outward/Hello",
                "Outward/Submit",
                "Outward/Fetch",
                "Local/Decide",
                "Local/Import",
                "No/Such",
            ):
                for body in (b"", _noise.randbytes(300), b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05{}", bytes(20 << 20)):
                    assert _call(door, f"/consilium.agent.v1.{method}", body) is not grpc.StatusCode.UNAVAILABLE
        request = Document.decode(slot.request, "request").encode()
        with Outward(home.outward_socket) as door:
            for damaged in (request[:-7], request.replace(b"train", b"offer"), request + b" ", b"[" * 50_000):
                answer = Answer.read(Document.decode(door.submit(damaged, [], 60), "answer").body)
                assert answer.status == "refused"
    lab.finishes(record)
    assert len([s for s in lab.slots(record) if s.kind == "train"]) == ROUNDS
    assert agent.is_running()
    assert "running, release" in lab.status("south")


def _throw(door: Path, data: bytes) -> None:
    """Send bytes, read what comes for a moment, and hang up without a word."""
    with socket.socket(socket.AF_UNIX) as plug:
        plug.settimeout(0.3)
        plug.connect(str(door))
        with suppress(OSError):
            plug.sendall(data)
            plug.recv(1 << 16)


def _call(door: Path, method: str, body: bytes) -> grpc.StatusCode:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"unix:{door}", options=options) as channel:
        try:
            list(channel.unary_stream(method)(body, timeout=30))
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


# ---- who may ask, and who may answer -----------------------------------------------------------------------------


def _ask(lab: Lab, site: str, signer: Identity, kind: str, payload: bytes = b"", **changes: object) -> Answer:
    """A signed request, through the site's outward door as the connector would carry it."""
    values = {
        "kind": kind, "session": 1, "slot": 0, "round": 1, "cohort": ("north", "south", "west"),
        "payload_sha256": sha256(payload), "payload_bytes": len(payload), "deadline_seconds": 60,
    }  # fmt: skip
    document = Header(**{**values, **changes}).signed(signer)
    with Outward(SiteHome(lab.federation.site_home(site)).outward_socket) as door:
        return Answer.read(Document.decode(door.submit(document.encode(), [payload], 60), "answer").body)


def _plain(document: Document) -> dict[str, object]:
    signatures = [{"key": s.key, "value": s.value} for s in document.signatures]
    return {"kind": document.kind, "body": document.body, "signatures": signatures}


def test_an_unknown_and_a_changed_study_are_refused_while_the_approved_one_runs(lab: Lab) -> None:
    record = _under_way(lab, "approved")
    coordinator, roster = lab.home.identity(), lab.registry.roster()[0]
    changed = Study.from_body({**record.document.body, "rounds": {**record.document.body["rounds"], "local_steps": 9}})
    payload = canonical({"study": _plain(changed.document().signed_by(coordinator)), "roster": _plain(roster)})
    weights = lab.registry.blobs.path(record.weights).read_bytes()
    with lab.held("west"):
        slot = lab.mid_round(record, held="west").slot
        ask = lambda *a, **b: _ask(lab, "north", coordinator, *a, **b)  # noqa: E731
        assert ask("train", weights, study="5a" * 32, slot=slot).code == "unknown-study"
        assert ask("offer", payload, study=record.hash, session=0).code == "malformed"
        assert ask("offer", payload, study=changed.hash, session=0).detail["state"] == "pending"
        assert ask("train", weights, study=changed.hash, slot=1).code == "not-approved"
        assert ask("train", weights, study=record.hash, slot=slot, deadline_seconds=61).code == "slot-bound"
        stranger = _ask(lab, "north", Identity.generate(), "train", weights, study=record.hash, slot=slot)
        assert stranger.code == "bad-signature"
    assert "not approved" in lab.status("north") or "not-approved" in lab.status("north")
    lab.finishes(record)


def test_a_site_revoked_in_the_middle_of_a_round_is_out_and_the_others_finish(lab: Lab) -> None:
    federation = lab.federation
    federation.enrol("east")
    try:
        federation.start("east")
        connect_images(federation, "east", 9)
        record = _under_way(lab, "revoked", sites=("east", "north", "south"))
        with lab.held("east"):
            slot = lab.mid_round(record, held="east")
            federation.coordinator("sites", "revoke", "east", "--yes")
            lab.until(lambda: not lab.connected("east"), "east to be turned away")
            lab.finishes(record)
        out = lab.outcomes(record, slot.slot)["east"]
        assert out.state is OutcomeState.LOST
        assert "enrolment was revoked" in out.reason
        assert out.reason in lab.shown(record)
        assert "The SuperLink does not accept this site" in lab.status("east")
        assert "east" not in lab.slots(record)[-1].cohort
    finally:
        federation.end("east")


def test_an_expired_certificate_is_named_at_the_site_and_a_renewed_one_is_enough(lab: Lab) -> None:
    record = _under_way(lab, "expired", minimum=3)
    with lab.held("west"):
        slot = lab.mid_round(record, held="west")
        end = datetime.now(UTC) + timedelta(seconds=10)
        tls.create_server(lab.home.tls, ["127.0.0.1"], days=1, now=end - timedelta(days=1))
        lab.until(lambda: datetime.now(UTC) > end, "the certificate to expire")
        lab.federation.kill("north", "connector")
        lab.until(lambda: "certificate has expired" in lab.status("north"), "north to say why it is not connected")
        assert "the coordinator must renew it" in lab.status("north")
        renewed = flat(lab.federation.coordinator("certificate", "--renew"))
        assert "is valid until" in renewed
        lab.until(lambda: lab.connected("north"), "north to be in again", HOSPITAL_RETURNS)
    lab.finishes(record)
    assert {o.state for o in lab.outcomes(record, slot.slot).values()} == {OutcomeState.IN}


# ---- two coordinators --------------------------------------------------------------------------------------------


@contextmanager
def _dialling(lab: Lab, port: int) -> Iterator[None]:
    """All sites dial another port for as long as the block."""
    homes = [SiteHome(lab.federation.site_home(site)) for site in lab.federation.sites]

    def turn(to: int) -> None:
        for home in homes:
            home.write_config(home.config().model_copy(update={"superlink": f"127.0.0.1:{to}"}))
        for site in lab.federation.sites:
            lab.federation.kill(site, "connector")

    turn(port)
    try:
        yield
    finally:
        turn(lab.federation.port)


@contextmanager
def _second(lab: Lab, prepare: Callable[[Federation], None]) -> Iterator[Lab]:
    """Another coordinator on this machine, on a port of its own, without sites."""
    root = lab.federation.root / "second"
    other = Federation(root, (), port=free_port(), env=lab.federation.env)
    root.mkdir()
    with other:
        prepare(other)
        other.serve()
        second = Lab(other)
        try:
            yield second
        finally:
            second.registry.close()
    shutil.rmtree(root)


def test_a_copy_of_the_coordinator_launches_the_same_study(lab: Lab) -> None:
    record = _under_way(lab, "twice", reserve=12)

    def copy(other: Federation) -> None:
        with Registry(lab.home) as registry:
            assert registry.study(record.hash).session == 1
        shutil.copytree(lab.home.root, other.coordinator_home, ignore=shutil.ignore_patterns("run", "log"))
        home = CoordinatorHome(other.coordinator_home)
        home.write_config(home.config().model_copy(update={"port": other.port}))

    with ExitStack() as hold:
        hold.enter_context(lab.held("west"))
        slot = lab.mid_round(record, held="west")
        with _second(lab, copy) as second:
            second.reaches(record, State.INTERRUPTED)
            second.federation.coordinator("study", "stop", record.name, "--yes")
            second.federation.coordinator("study", "launch", record.name)
            with _dialling(lab, second.federation.port):
                hold.close()
                lab.until(lambda: second.slots(record)[-1].session == 2, "the copy to begin a round in its own session")
                with lab.held("west"):
                    second.mid_round(record, held="west")
                    second.federation.coordinator("study", "stop", record.name, "--yes")
                    second.reaches(record, State.STOPPED)
    found = lab.reaches(record, State.PAUSED)
    assert "another coordinator has opened a newer session of this study" in found.reason
    shown = lab.shown(record)
    assert found.reason in shown
    assert "A newer session of this study has replaced this one" in shown
    lab.resume(record)
    lab.finishes(record)
    assert lab.slots(record)[-1].slot > slot.slot
    for site in ("north", "south", "west"):
        assert len(lab.agent(site, "SELECT 1 FROM studies WHERE hash = ? AND state = 'finished'", record.hash)) == 1


def test_a_stranger_in_the_coordinators_place_gets_nobody(lab: Lab) -> None:
    record = _under_way(lab, "stranger", minimum=3)

    def found_one(other: Federation) -> None:
        other.coordinator("init", "alps", "--host", "127.0.0.1", "--port", str(other.port))
        with Registry(CoordinatorHome(other.coordinator_home)) as registry:
            roster = lab.registry.roster()[1].model_copy(
                update={"coordinator": CoordinatorHome(other.coordinator_home).identity().public, "version": 1}
            )
            registry.save_roster(roster.signed(CoordinatorHome(other.coordinator_home).identity()))

    with _second(lab, found_one) as stranger:
        theirs = stranger.sign("stranger")
        stranger.registry.launch("stranger")
        with _dialling(lab, stranger.federation.port):
            why = "The certificate was not issued by the consortium's authority"
            for site in ("north", "south", "west"):
                lab.until(lambda site=site: why in lab.status(site), f"{site} to say why it is not connected")
            assert {line.state for line in stranger.registry.approvals(theirs.hash)} == {""}
    lab.finishes(record)
    assert not lab.agent("north", "SELECT 1 FROM studies WHERE hash = ?", theirs.hash)


# ---- what a person asks ------------------------------------------------------------------------------------------


def test_pause_resume_stop_and_launch(lab: Lab) -> None:
    coordinator = lab.federation.coordinator
    record = _under_way(lab, "steered")
    with lab.held("west"):
        slot = lab.mid_round(record, held="west")
        coordinator("study", "pause", record.name)
        lab.reaches(record, State.PAUSED)
        shown = lab.shown(record)
        assert f"Go on: consilium-coordinator study resume {record.name}" in shown
        answered = {site: lab.left(site, record, slot.slot) for site in ("north", "south")}
    lab.resume(record)
    lab.until(lambda: lab.slots(record)[-1].slot > slot.slot, "the next round")
    _goes_on(lab, record, slot.slot, answered)
    with lab.held("west"):
        slot = lab.mid_round(record, held="west", after=slot.round)
        coordinator("study", "stop", record.name, "--yes")
        lab.reaches(record, State.STOPPED)
    refused = coordinator("study", "resume", record.name, check=False)
    assert refused.returncode == 1
    assert "consilium-coordinator study launch" in refused.stderr
    coordinator("study", "launch", record.name)
    lab.finishes(record)
    slots = lab.slots(record)
    assert slots[slot.slot - 1].state is SlotState.ABANDONED
    assert {s.session for s in slots[slot.slot :]} == {2}
    assert [s.round for s in slots if s.kind == "train" and s.state is SlotState.DONE] == list(range(1, ROUNDS + 1))


def test_approval_by_file_a_decline_and_a_withdrawal(lab: Lab, tmp_path: Path) -> None:
    federation = lab.federation
    toml, signed, approval = (
        tmp_path / "by-hand.toml",
        tmp_path / "by-hand.study.json",
        tmp_path / "north.approval.json",
    )
    toml.write_text(draft("by-hand", rounds=40, minimum=1), encoding="utf-8")
    federation.coordinator("study", "sign", str(toml), "--out", str(signed))
    record = lab.registry.study("by-hand")
    review = flat(federation.site("north", "study", "review", "--file", str(signed)))
    assert record.hash in review
    assert "NO differential privacy" in review
    federation.site("north", "study", "approve", "--file", str(signed), "--data", "archive", "--out", str(approval))
    accepted = flat(federation.coordinator("study", "accept", str(approval)))
    assert "north approves by-hand" in accepted
    changed = tmp_path / "changed.study.json"
    changed.write_bytes(signed.read_bytes().replace(b'"local_steps":1', b'"local_steps":2'))
    refused = federation.site("north", "study", "approve", "--file", str(changed), check=False)
    assert refused.returncode == 1
    assert "A signature does not match" in " ".join(refused.stderr.split())

    federation.coordinator("study", "launch", "by-hand")
    for site, decision in (("west", "decline"), ("south", "approve")):
        lab.until(lambda site=site: lab.asked(record, site), f"the study to reach {site}")
        federation.site(site, "study", decision, "by-hand")
    lab.until(lambda: any(s.state is SlotState.DONE for s in lab.slots(record)), "the first round")
    assert all(s.cohort == ("north", "south") for s in lab.slots(record))
    shown = lab.shown(record)
    assert "west declined" in shown
    federation.site("south", "study", "withdraw", "by-hand")
    lab.finishes(record)
    shown = lab.shown(record)
    assert "south withdrawn" in shown
    assert lab.slots(record)[-1].cohort == ("north",)
    assert set(lab.delivered(record)) == {"north"}
