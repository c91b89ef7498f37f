"""Kill -9 and a full disk, against a real agent process: nothing is lost, nothing leaves twice."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from client.agent_client import AgentDown, Local, Outward
from privacy.canonical import sha256
from privacy.errors import ConsiliumError
from privacy.journal import verify
from privacy.messages import Answer
from tests.client.agent.bed import Bed, Process, make_bed, wait_for

Start = Callable[..., Process]
HOUR = 3600.0


def submit(bed: Bed, kind: str, payload: bytes = b"", **changes: object) -> Answer:
    with Outward(bed.home.outward_socket) as door:
        data = door.submit(bed.request(kind, payload, **changes), [payload], HOUR)
    bed.received.append(data)
    return bed.read(data)


def ready(bed: Bed) -> None:
    """Offer, connect, approve and open, over both doors."""
    assert submit(bed, "offer", bed.offer_payload(), session=0).detail["state"] == "pending"
    with Local(bed.home.local_socket) as door:
        door.connect("archive", f'{{"kind":"npz","path":"{bed.home.root}/images.npz","one_image_per_patient":true}}')
        assert list(door.check("archive"))[-1].summary
        assert door.decide("tiny", "approve").approval
    assert submit(bed, "open", bed.initial).detail == {"initial": "held"}


def slot_state(bed: Bed, slot: int) -> str:
    """What the agent's records say, read beside it."""
    with sqlite3.connect(f"file:{bed.home.agent}/agent.db?mode=ro", uri=True, timeout=10) as records:
        row = records.execute("SELECT state FROM slots WHERE slot = ?", (slot,)).fetchone()
    return row[0] if row else ""


def submit_and_leave(bed: Bed, slot: int) -> None:
    """Send a training request from a connector that is gone before the answer is there."""

    def call() -> None:
        with suppress(ConsiliumError):
            door.submit(bed.request("train", bed.vector, slot=slot), [bed.vector], HOUR)

    with Outward(bed.home.outward_socket) as door:
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        wait_for(lambda: slot_state(bed, slot) == "bound")
    thread.join(60)


def test_S3_killed_between_bind_and_store_it_computes_again_under_the_same_binding(
    tmp_path: Path, processes: Start
) -> None:
    bed = make_bed(tmp_path / "site", steps=100)
    agent = processes(bed)
    ready(bed)
    submit_and_leave(bed, 1)
    agent.kill()
    assert slot_state(bed, 1) == "bound"
    assert list((bed.home.agent / "answers").iterdir()) == []
    bed.start()
    assert bed.call("train", bed.vector, slot=1, round=2).code == "slot-bound"
    assert bed.call("train", bed.vector, slot=1).status == "done"
    assert slot_state(bed, 1) == "stored"
    bed.stop()


def test_S2_killed_between_store_and_send_it_sends_the_stored_bytes(tmp_path: Path, processes: Start) -> None:
    bed = make_bed(tmp_path / "site", steps=20)
    agent = processes(bed)
    ready(bed)
    submit_and_leave(bed, 1)
    wait_for(lambda: slot_state(bed, 1) == "stored")
    stored = (bed.home.agent / "answers" / f"{bed.hash}-000001.f32").read_bytes()
    agent.kill()
    bed.start()
    answer = bed.call("train", bed.vector, slot=1)
    assert (answer.payload_sha256, bed.fetch(answer)) == (sha256(stored), stored)
    bed.stop()
    assert verify(bed.home.agent / "journal.jsonl") > 0


def test_S2_killed_in_the_middle_of_a_transfer_the_rest_is_of_the_same_bytes(tmp_path: Path, processes: Start) -> None:
    bed = make_bed(tmp_path / "site")
    agent = processes(bed)
    ready(bed)
    answer = submit(bed, "train", bed.vector, slot=1)
    half = answer.payload_bytes // 2
    with Outward(bed.home.outward_socket) as door:
        first = door.fetch(bed.hash, 1, 1, answer.request, 0, half)
        agent.kill()
        with pytest.raises(AgentDown):
            door.fetch(bed.hash, 1, 1, answer.request, half, 4)
    bed.start()
    rest = bed.fetch(answer, half, answer.payload_bytes - half)
    assert sha256(first + rest) == answer.payload_sha256
    bed.stop()


def test_what_a_crash_left_half_done_is_swept(bed: Bed) -> None:
    bed.stop()
    (bed.home.agent / "inbox" / "half.part").write_bytes(b"half received")
    for name in ("x.f32", "y.part"):
        (bed.home.agent / "answers" / name).write_bytes(b"never recorded")
    bed.start()
    assert list((bed.home.agent / "inbox").iterdir()) == []
    assert list((bed.home.agent / "answers").iterdir()) == []


def test_a_terminated_agent_ends_clean_while_it_trains(tmp_path: Path, processes: Start) -> None:
    bed = make_bed(tmp_path / "site", steps=1_000_000)
    agent = processes(bed)
    ready(bed)
    submit_and_leave(bed, 1)
    assert agent.end() == 0
    assert not bed.home.outward_socket.exists()
    assert "Traceback" not in agent.log.read_text()
    assert slot_state(bed, 1) == "bound"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_S3_on_a_full_disk_nothing_leaves_and_the_node_goes_on_when_there_is_room(
    small_disk: Path, processes: Start
) -> None:
    bed = make_bed(small_disk / "site")
    processes(bed)
    ready(bed)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    answer = submit(bed, "train", bed.vector, slot=1)
    assert answer.code == "disk-full"
    assert list((bed.home.agent / "answers").iterdir()) == []
    filler.unlink()
    answer = submit(bed, "train", bed.vector, slot=1)
    assert answer.status == "done"
    assert verify(bed.home.agent / "journal.jsonl") > 0
