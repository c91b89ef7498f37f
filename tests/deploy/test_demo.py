"""The demo as a newcomer meets it: one command, three hospitals, pictures, and nothing left running."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))
PICTURES = {
    f"{name}.png" for name in ("curves", "curves-narrow", "roc", "confusion", "comparison", "comparison-narrow")
}
FILES = PICTURES | {"index.html", "MODEL_CARD.md", "model.safetensors", "metrics.csv", "metrics.json", "study.json"}


def start(out: Path, *arguments: str) -> subprocess.Popen:
    listening = ["env", "--default-signal=HUP"]  # else it would do as `nohup make test-long` says and not listen
    return subprocess.Popen(
        [*listening, sys.executable, "-m", "deploy.demo", "--out", str(out), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_running(out: Path) -> list[list[str]]:
    """Every process of this machine whose command line names the demo's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any(str(out) in word for word in line):
            found.append(line)
    return found


def run(out: Path, *arguments: str) -> dict:
    """One demo to its end: what it measured. Fails when anything is missing or still running."""
    demo = start(out, *arguments)
    said, _ = demo.communicate(timeout=900)
    assert demo.returncode == 0, said
    assert left_running(out) == []
    result = out / "result"
    assert {path.name for path in result.iterdir()} >= FILES
    page = (result / "index.html").read_text()
    assert "This study has <b>no differential privacy</b>" in page
    assert "WITHOUT NOISE" in page, "RULES S8"
    for picture in PICTURES:
        assert (result / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in page
    return json.loads((result / "comparison.json").read_text())


def real(name: str) -> list[str]:
    """The real set as arguments, or, said aloud, the drawn chests."""
    path = DATA / name
    if path.exists():
        return ["--data", str(path)]
    warnings.warn(f"LOUD: {path} is absent, so the drawn chests stand in for it", stacklevel=2)
    return []


def aurocs(figures: dict) -> tuple[float, list[float]]:
    return figures["together"]["auroc"], [metrics["auroc"] for metrics in figures["alone"].values()]


@pytest.mark.long
def test_three_hospitals_learn_together_what_none_learns_alone(tmp_path):
    together, alone = aurocs(run(tmp_path))
    assert together > max(alone)
    logs = "".join(path.read_text() for path in (tmp_path / "run").glob("*/log/*.log"))
    assert "Traceback" not in logs


@pytest.mark.long
def test_pneumoniamnist_reaches_the_published_figure(tmp_path):
    """ResNet-18 at 28 px: AUROC .944 (Yang 2023, doi:10.1038/s41597-022-01721-8). The set's own split."""
    arguments = real("medmnist/pneumoniamnist_reconstructed.npz")
    together, _ = aurocs(run(tmp_path, *arguments))
    assert together >= (0.944 if arguments else 0.85)


@pytest.mark.long
def test_chest_x_rays_by_patient_beat_every_hospital_alone(tmp_path):
    """Three hospitals that see different mixtures of findings; the study's seed makes the run repeatable."""
    together, alone = aurocs(run(tmp_path, *real("chest_xray_pneumonia")))
    assert together > max(alone)


@pytest.mark.parametrize(
    ("how", "presses"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGINT, 3, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.long),
    ],
    ids=["ctrl-c", "an impatient ctrl-c", "a closed terminal"],
)
def test_ending_it_in_the_middle_leaves_nothing_behind(tmp_path, how, presses):
    demo = start(tmp_path)
    try:
        for _ in range(1200):
            if list(tmp_path.glob("run/*/run/local/agent.sock")):
                break
            assert demo.poll() is None, demo.stdout.read()
            time.sleep(0.1)
        assert left_running(tmp_path), "the federation is up, so that there is something to end"
        port = next(
            line
            for line in (tmp_path / "run" / "coordinator" / "coordinator.toml").read_text().splitlines()
            if line.startswith("port")
        )
        for _ in range(presses):
            demo.send_signal(how)
            time.sleep(0.5)
        assert demo.wait(timeout=300) == 128 + how
    finally:
        demo.kill()
        demo.stdout.close()
    assert left_running(tmp_path) == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(port.split("=")[1])))


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "empty.npz"])
def test_a_set_that_cannot_be_dealt_out_is_named_with_its_remedy(tmp_path, name):
    (tmp_path / "notes.txt").write_text("not images")
    (tmp_path / "empty.npz").write_bytes(b"PK")
    demo = start(tmp_path / "out", "--data", str(tmp_path / name))
    said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert name in said.replace("\n", "")
    assert "→" in said
    assert "Traceback" not in said
