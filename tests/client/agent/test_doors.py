"""The two doors: what the outward one can give, what the local one tells, and who may knock."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from client.agent import agent_pb2 as pb
from client.agent import agent_pb2_grpc as stubs
from client.agent.doors import open_door, server
from client.agent.local import register
from client.agent.outward import SERVICE, Outward, serialise
from client.agent_client import Local
from privacy.airlock import Released
from privacy.errors import ConsiliumError
from privacy.journal import read
from privacy.messages import PROTOCOL
from tests.client.agent.bed import ROOT, SITE, Bed, Process, make_bed
from tests.client.agent.test_crash import ready, submit

OUTWARD = pb.DESCRIPTOR.services_by_name["Outward"]
LOCAL = pb.DESCRIPTOR.services_by_name["Local"]


@pytest.fixture
def doors(bed: Bed) -> Iterator[Bed]:
    """An agent in this process behind both its sockets."""
    assert bed.agent is not None
    outward, local = server(4, "outward"), server(4, "local")
    outward.add_generic_rpc_handlers((Outward(bed.agent),))
    register(local, bed.agent)
    open_door(outward, bed.home.outward_socket, "")
    open_door(local, bed.home.local_socket, "")
    yield bed
    bed.agent.stop()
    for door in (outward.stop(1), local.stop(1)):
        door.wait()


def channel(path: Path) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{path}", options=[("grpc.max_send_message_length", -1)])


def test_an_agent_that_is_slow_to_take_the_call_is_not_taken_for_one_that_is_down(tmp_path: Path) -> None:
    bed = make_bed(tmp_path)
    process = Process(bed)
    stopped = threading.Event()

    def wake() -> None:
        stopped.wait(30)
        time.sleep(1)
        process.process.send_signal(signal.SIGCONT)

    waker = threading.Thread(target=wake)
    waker.start()
    try:
        process.process.send_signal(signal.SIGSTOP)
        with Local(bed.home.local_socket) as local:
            stopped.set()
            assert local.hello().site == SITE
    finally:
        stopped.set()
        waker.join(30)
        process.end()


def test_every_outward_method_sends_only_what_the_airlock_released(bed: Bed) -> None:
    assert bed.agent is not None
    methods = Outward(bed.agent).methods
    assert set(methods) == {f"/{SERVICE}/{method.name}" for method in OUTWARD.methods}
    assert {method.output_type.name for method in OUTWARD.methods} == {"Released"}
    assert {handler.response_serializer for handler in methods.values()} == {serialise}
    for smuggled in (
        b"pixels",
        pb.Released(data=b"pixels"),
        bytearray(b"pixels"),
        type("Released", (), {"data": b""})(),
    ):
        with pytest.raises(TypeError, match="past the airlock"):
            serialise(smuggled)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only the airlock"):
        Released(b"pixels", object())


def test_a_handler_that_returns_anything_else_sends_nothing(bed: Bed) -> None:
    assert bed.agent is not None

    class Careless(Outward):
        def _hello(self, request: pb.HelloRequest) -> Released:
            return pb.Released(data=b"pixels")  # type: ignore[no-any-return]

    careless = server(2, "careless")
    careless.add_generic_rpc_handlers((Careless(bed.agent),))
    open_door(careless, bed.home.outward_socket, "")
    with channel(bed.home.outward_socket) as line, pytest.raises(grpc.RpcError) as caught:
        stubs.OutwardStub(line).Hello(pb.HelloRequest(protocol=PROTOCOL), timeout=20)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "pixels" not in caught.value.details()
    careless.stop(1).wait()


def test_local_methods_do_not_exist_on_the_outward_socket(doors: Bed) -> None:
    with channel(doors.home.outward_socket) as line:
        for method in LOCAL.methods:
            call = line.unary_unary(f"/{LOCAL.full_name}/{method.name}")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_outward_errors_carry_a_code_and_no_text(doors: Bed) -> None:
    with channel(doors.home.outward_socket) as line:
        door = stubs.OutwardStub(line)
        for call, code in (
            (lambda: door.Hello(pb.HelloRequest(protocol=9), timeout=20), "version"),
            (lambda: list(door.Fetch(pb.FetchRequest(study=doors.hash, length=4), timeout=20)), "unknown-study"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.details() == code
            assert not caught.value.trailing_metadata()


def test_a_message_beyond_the_limit_is_cut_off(doors: Bed) -> None:
    with channel(doors.home.outward_socket) as line, pytest.raises(grpc.RpcError) as caught:
        stubs.OutwardStub(line).Submit(iter([pb.SubmitChunk(document=bytes(5 << 20))]), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("chunks", [[], [pb.SubmitChunk()], [pb.SubmitChunk(data=b"first")]])
def test_a_submission_without_a_document_is_malformed(doors: Bed, chunks: list[pb.SubmitChunk]) -> None:
    with channel(doors.home.outward_socket) as line:
        reply = stubs.OutwardStub(line).Submit(iter(chunks), timeout=20)
    assert doors.read(reply.data).code == "malformed"


def test_two_documents_in_one_submission_are_malformed(doors: Bed) -> None:
    document = doors.request("offer", doors.offer_payload(), session=0)
    with channel(doors.home.outward_socket) as line:
        chunks = [pb.SubmitChunk(document=document), pb.SubmitChunk(document=document)]
        assert doors.read(stubs.OutwardStub(line).Submit(iter(chunks), timeout=20).data).code == "malformed"


def test_noise_on_the_sockets_does_not_stop_the_agent(doors: Bed) -> None:
    for path in (doors.home.outward_socket, doors.home.local_socket):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(path))
            line.sendall(os.urandom(4096))
    with Local(doors.home.local_socket) as door:
        assert door.hello().site == SITE


def test_folders_and_sockets_have_their_modes(doors: Bed) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    for path in (doors.home.outward_socket, doors.home.local_socket):
        assert (mode(path), mode(path.parent)) == (0o660, 0o750)
    assert mode(doors.home.agent) == 0o700
    assert mode(doors.home.agent / "agent.db") == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to a group needs root")
def test_a_door_is_given_to_its_group(tmp_path: Path) -> None:
    path = tmp_path / "run" / "agent.sock"
    door = server(1, "door")
    open_door(door, path, "daemon")
    assert {path.stat().st_gid, path.parent.stat().st_gid} == {1}
    door.stop(0).wait()
    with pytest.raises(ConsiliumError, match="no such Unix group"):
        open_door(server(1, "door"), path, "no-such-group")


def with_patients(path: Path) -> Path:
    """The same images, two for each patient."""
    with np.load(path) as arrays:
        named = dict(arrays)
    for side in [name.removesuffix("images") for name in named if name.endswith("images")]:
        named[f"{side}patients"] = np.array([f"{side}{at // 2}" for at in range(len(named[f"{side}images"]))])
    np.savez(path.with_name("named.npz"), **named)
    return path.with_name("named.npz")


def test_the_operators_way_from_review_to_approval(doors: Bed) -> None:
    with Local(doors.home.local_socket) as door:
        with pytest.raises(ConsiliumError, match="no such study"):
            door.study("tiny")
        assert door.hand_in(doors.roster.signed(doors.coordinator).encode()).kind == "roster"
        assert door.hand_in(doors.signed_study).subject == doors.hash
        for name in ("tiny", doors.hash, doors.hash[:8]):
            assert door.study(name).document == doors.signed_study
        with pytest.raises(ConsiliumError, match="No images are connected"):
            door.decide("tiny", "approve")
        with pytest.raises(ConsiliumError, match="no such image file"):
            door.connect("archive", '{"kind": "npz", "path": "/nowhere.npz", "one_image_per_patient": true}')
        source = {"kind": "npz", "path": str(doors.home.root / "images.npz"), "one_image_per_patient": True}
        door.connect("archive", json.dumps(source))
        with pytest.raises(ConsiliumError, match="is not approved here"):
            door.decide("tiny", "withdraw")
        with pytest.raises(ConsiliumError, match="no such decision"):
            door.decide("tiny", "perhaps")
        events = list(door.check("archive"))
        assert [event.done for event in events[:-1]] == sorted(event.done for event in events[:-1])
        assert json.loads(events[-1].summary)["images"] == 40
        approved = door.decide("tiny", "approve")
        assert json.loads(approved.approval)["body"] == {
            "study": doors.hash, "site": SITE, "data": "archive", "one_image_per_patient": True
        }  # fmt: skip
        with pytest.raises(ConsiliumError, match="approved with another declaration"):
            door.connect("archive", json.dumps({**source, "one_image_per_patient": False}))
        status = door.status()
        assert (status.site, status.roster_version, status.studies[0].state) == (SITE, 3, "approved")
        assert status.studies[0].slots == doors.study.slots
        assert door.decide("tiny", "withdraw").line.state == "withdrawn"
        named = with_patients(doors.home.root / "images.npz")
        door.connect("archive", json.dumps({"kind": "npz", "path": str(named)}))
        assert not json.loads(door.decide("tiny", "approve").approval)["body"]["one_image_per_patient"]
        assert {finding.name for finding in door.preflight()} >= {"device", "disk", "images: archive"}
        door.disconnect("archive")
        with pytest.raises(ConsiliumError, match="no such data source"):
            door.disconnect("archive")
        assert door.models() == []


def test_images_are_read_and_counted_before_any_study_is_known(doors: Bed) -> None:
    with Local(doors.home.local_socket) as door:
        source = {"kind": "npz", "path": str(doors.home.root / "images.npz"), "one_image_per_patient": True}
        door.connect("archive", json.dumps(source))
        summary = json.loads(list(door.check("archive"))[-1].summary)
    assert (summary["images"], summary["study"]) == (40, "")
    assert summary["split"]["train"]["classes"] == {"0": 12, "1": 12}


def test_images_are_read_for_the_study_they_can_be_meant_for(doors: Bed) -> None:
    source = json.dumps({"kind": "npz", "path": str(doors.home.root / "images.npz"), "one_image_per_patient": True})

    with Local(doors.home.local_socket) as door:

        def study(name: str, asked: str = "") -> str:
            return str(json.loads(list(door.check(name, asked))[-1].summary)["study"])

        door.hand_in(doors.signed_study)
        door.connect("archive", source)
        assert study("archive") == "tiny", "the only data, and a study that waits"
        door.connect("other", source)
        assert study("archive") == "", "which of the two is it for?"
        assert study("archive", "tiny") == "tiny"
        door.decide("tiny", "approve", "archive")
        assert [study("archive"), study("other"), study("other", doors.hash[:8])] == ["tiny", "", "tiny"]
        with pytest.raises(ConsiliumError, match="no such study"):
            study("archive", "unheard-of")


def test_a_source_of_which_nothing_is_usable_is_reported_all_the_same(doors: Bed, tmp_path: Path) -> None:
    folder = tmp_path / "prints"
    folder.mkdir()
    (folder / "001.png").write_bytes(b"")
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n1,a\n")
    source = {"kind": "images", "path": str(folder), "labels": str(table), "one_image_per_patient": True}
    with Local(doors.home.local_socket) as door:
        with pytest.raises(ConsiliumError, match="no column “dx”"):
            door.connect("archive", json.dumps({**source, "columns": {"label": "dx"}}))
        door.connect("archive", json.dumps(source))
        summary = json.loads(list(door.check("archive"))[-1].summary)
        assert json.loads(door.status().data[0].summary) == summary
    assert (summary["images"], summary["quarantined"]) == (0, 2)
    assert any("001.png" in line for line in summary["examples_left_out"])
    assert "001.png" in Path(summary["report"]).read_text(encoding="utf-8")


def test_a_study_that_is_not_for_this_site_or_not_signed_is_not_imported(doors: Bed) -> None:
    other = doors.study.model_copy(update={"sites": ("st-bona", "st-zeta")})
    with Local(doors.home.local_socket) as door:
        with pytest.raises(ConsiliumError, match="not part of the study"):
            door.hand_in(other.document().signed_by(doors.coordinator).encode())
        with pytest.raises(ConsiliumError, match="signature does not match"):
            door.hand_in(doors.study.document().signed_by(doors.identity).encode())
        with pytest.raises(ConsiliumError, match="not well formed"):
            door.hand_in(b"hello")


def test_a_second_process_on_the_same_home_says_so_and_the_first_goes_on(doors: Bed) -> None:
    command = [sys.executable, "-m", "client.agent", str(doors.home.root)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert len(second.stderr.splitlines()) == 1
    assert "running on this site already" in second.stderr
    with Local(doors.home.local_socket) as door:
        assert door.hello().site == SITE


NO_NETWORK = """
import socket, subprocess, sys
from client.agent.seal import networked, seal
assert seal()
assert not networked()
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_PACKET, socket.AF_NETLINK, socket.AF_VSOCK):
    try:
        socket.socket(family, socket.SOCK_RAW)
    except OSError as error:
        assert error.errno == 97, error
    else:
        sys.exit("a socket was opened")
socket.socketpair()
child = "import socket; socket.socket()"
sys.exit(0 if subprocess.run([sys.executable, "-c", child], capture_output=True).returncode == 1 else "a child could")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux")
def test_a_sealed_process_opens_no_network_socket_and_neither_do_its_children() -> None:
    done = subprocess.run([sys.executable, "-c", NO_NETWORK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def inodes(pid: int) -> set[str]:
    """The sockets that a process holds open, by inode."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def test_a_whole_study_is_served_without_a_network_and_the_journal_names_every_byte(
    tmp_path: Path, processes: Callable[..., Process]
) -> None:
    bed = make_bed(tmp_path / "site")
    isolated = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
    agent = processes(bed, *(("unshare", "--net") if isolated else ()))
    pid = agent.process.pid
    ready(bed)
    answers = [submit(bed, kind, bed.vector, slot=slot) for slot, kind in enumerate(("train", "validate", "test"), 1)]
    assert [answer.status for answer in answers] == ["done"] * 3

    assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    tables = [Path(f"/proc/{name}/net/unix").read_text() for name in (pid, "self")]
    unix = {line.split()[6] for table in tables for line in table.splitlines()[1:]}
    assert inodes(pid)
    assert inodes(pid) <= unix, "nothing but Unix sockets is open"
    with Local(bed.home.local_socket) as door:
        assert not door.status().network

    taken = sum(map(len, bed.received))
    with channel(bed.home.outward_socket) as line:
        outward = stubs.OutwardStub(line)
        taken += len(outward.Hello(pb.HelloRequest(protocol=PROTOCOL), timeout=20).data)
        last = answers[-1]
        size = last.payload_bytes - 8
        asked = pb.FetchRequest(study=bed.hash, session=1, slot=3, request=last.request, offset=8, length=size)
        taken += sum(len(piece.data) for piece in outward.Fetch(asked, timeout=20))
        taken += len(outward.Submit(iter([pb.SubmitChunk(document=b"noise")]), timeout=20).data)
    before = len(bed.received)
    assert submit(bed, "deliver", bed.parcel()).status == "done"
    taken += sum(map(len, bed.received[before:]))
    with Local(bed.home.local_socket) as door:
        assert json.loads(door.models()[0].result)["images"] > 0
        report = json.loads(list(door.compare(bed.hash))[-1].summary)
        assert report["alone"]["metrics"]["images"] == report["federated"]["metrics"]["images"] > 0
    assert agent.end() == 0
    entries = list(read(bed.home.agent / "journal.jsonl"))
    assert sum(entry["size"] for entry in entries) == taken
    assert {entry["study"] for entry in entries} == {bed.hash, ""}
