"""The process that runs a study, over a real SuperLink and real Flower nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from server.app import sole_runner
from server.records import SlotState, State
from tests.server.link_kit import LinkProcess, Site, until
from tests.server.round_kit import Bench, D

STATE = save({"weight": np.linspace(-1, 1, D).astype(np.float32)}, {"frozen": "[]"})
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(bench: Bench) -> subprocess.Popen:
    command = [sys.executable, "-m", "server.app", str(bench.home.root), bench.hash]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture
def link(tmp_path):
    process = LinkProcess(tmp_path / "link", ["anna", "bert", "cleo"])
    process.start()
    yield process
    process.stop()


@pytest.fixture
def bench(link, tmp_path):
    root = tmp_path / "home"
    root.mkdir()
    (root / "run").symlink_to(link.home / "run")
    return Bench(root, keys=link.keys, initial=STATE, rounds={"count": 2, "deadline_seconds": 60})


@pytest.fixture
def nodes(bench, link):
    """Real nodes that serve with the kit's honest sites."""
    until(lambda: json.loads(bench.home.nodes_file.read_text()) == link.keys, "the roster is written")

    def serve(site):
        return lambda incoming, payload: site.serve(incoming.document, payload)

    threads = [Site(link, name, serve(site)) for name, site in bench.sites.items()]
    yield threads
    for thread in threads:
        thread.close()


def test_a_study_over_real_flower(bench, nodes):
    bench.registry.launch(bench.hash)
    code, err = ended(start(bench))
    assert code == 0, err
    record = bench.registry.study(bench.hash)
    assert (record.state, record.reason) == (State.FINISHED, "")
    assert [s.kind for s in bench.course.slots()] == ["train", "train", "validate", "test"]
    assert {o.state for o in bench.course.outcomes(1)} == {"in"}
    assert all(site.finished for site in bench.sites.values())
    assert (bench.home.study(bench.hash) / "MODEL_CARD.md").exists()
    assert all(node.error is None for node in nodes)


def test_kill_9_mid_round_then_resume_sends_the_same_request(bench, nodes):
    seen: list[bytes] = []
    for site in bench.sites.values():
        site.refuse = lambda request: None if request.header.slot != 2 else seen.append(request.document.encode())
    cleo = bench.sites["cleo"]
    serve, hold = cleo.serve, [True]

    def slow(document: bytes, payload: bytes):
        if bench.course.slots() and bench.course.slots()[-1].slot == 2 and hold:
            hold.clear()
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        return serve(document, payload)

    cleo.serve = slow
    bench.registry.launch(bench.hash)
    process = start(bench)
    assert ended(process)[0] == -signal.SIGKILL
    assert bench.course.slots()[-1].state is SlotState.OPEN
    bench.registry.transition(bench.hash, State.INTERRUPTED, "killed")
    bench.registry.resume(bench.hash)
    code, err = ended(start(bench))
    assert code == 0, err
    assert bench.registry.study(bench.hash).state is State.FINISHED
    assert set(seen) == {bench.course.slot(2).request}
    assert len(bench.course.slots()) == 4


def test_a_superlink_that_restarts_interrupts_with_the_remedy_and_resume_goes_on(bench, link):
    bench.registry.launch(bench.hash)
    process = start(bench)
    until(lambda: bench.registry.study(bench.hash).state is State.WAITING, "the study waits for sites")
    link.kill()
    code, err = ended(process)
    assert code == 1
    assert err.count("\n") == 1
    assert "Traceback" not in err
    record = bench.registry.study(bench.hash)
    assert record.state is State.INTERRUPTED
    assert "resume with consilium-coordinator study resume chest" in record.reason


def test_an_end_that_was_asked_for_leaves_the_study_ready_to_resume(bench):
    bench.registry.launch(bench.hash)
    process = start(bench)
    until(lambda: bench.registry.study(bench.hash).state is State.WAITING, "the study waits for sites")
    process.terminate()
    code, err = ended(process)
    assert code == 1
    assert "study resume chest" in err
    assert bench.registry.study(bench.hash).state is State.INTERRUPTED


def test_a_study_nobody_asked_for_does_not_run(tmp_path):
    bench = Bench(tmp_path)
    code, err = ended(start(bench))
    assert code == 1
    assert err == (
        "Nobody asked for this study to run: chest is signed. "
        "`consilium-coordinator study launch` or `study resume` asks for it.\n"
    )


def test_without_a_superlink_the_study_is_interrupted(tmp_path):
    bench = Bench(tmp_path)
    bench.registry.launch(bench.hash)
    code, err = ended(start(bench))
    assert code == 1
    assert "Traceback" not in err
    assert bench.registry.study(bench.hash).state is State.INTERRUPTED


def test_one_process_per_study(tmp_path):
    bench = Bench(tmp_path)
    bench.registry.launch(bench.hash)
    with sole_runner(bench.home, bench.hash) as sole:
        assert sole
        code, err = ended(start(bench))
    assert code == 3
    assert "Another process runs this study" in err
    assert bench.registry.study(bench.hash).state is State.REQUESTED


def test_no_learning_library_is_loaded():
    script = (
        "import sys, server.app, server.outputs, models.tasks as tasks\n"
        "tasks.get({'task': {'kind': 'classification', 'classes': ['a', 'b']}})\n"
        "print([name for name in ('torch', 'monai', 'tensorflow', 'jax') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
