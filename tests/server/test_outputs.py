"""What a finished study leaves behind, made from a real registry and real statistics."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from models import additive, tasks, weights
from privacy.errors import ConsiliumError
from privacy.identity import Document, Identity
from privacy.roster import Enrolment, enrol, expiry
from privacy.study import Study, approval
from privacy.study_text import template
from privacy.terminal import run
from server.cli import app
from server.home import CoordinatorHome
from server.outputs import assemble, export, publisher
from server.records import Evaluation, StudyRecord
from server.registry import Registry

DECLARES = {"anna": False, "bruno": True, "clara": False}
"""Three sites, and whether the operator declared that one image is one patient."""
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Case:
    home: CoordinatorHome
    registry: Registry
    record: StudyRecord
    vector: np.ndarray
    weights: Path
    history: list[Evaluation]
    test: Evaluation


@pytest.fixture(scope="module")
def state() -> bytes:
    import torch

    torch.set_num_threads(1)
    return weights.initial_state(draft().spec(), 1)


def draft() -> Study:
    text = template("chest", list(DECLARES)).replace("densenet-small", "resnet-small").replace("[64, 64]", "[32, 32]")
    return Study.from_toml(text)


def evaluation(study: Study, round_: int, split: str, shift: float) -> Evaluation:
    task = tasks.get(study.spec())
    generator = np.random.default_rng(round_)
    targets = generator.integers(0, 2, 200)
    scores = generator.normal(size=(200, 2))
    scores[:, 1] += shift * targets
    sums = task.statistics(scores, targets, np.full(200, 0.5))
    vector = np.zeros(additive.size(task), np.float32)
    additive.fill(vector, sums, train_examples=200, train_loss_sum=10.0, train_steps=20)
    metrics = task.metrics(additive.task_sums(vector))
    return Evaluation(round_, split, round_ + 1, ("anna",), vector.astype(np.float64), metrics, "")


@pytest.fixture
def case(tmp_path: Path, state: bytes) -> Case:
    root = tmp_path / "home"
    assert run(app, "consilium-coordinator", ["-H", str(root), "init", "lungs", "--host", "localhost"]) == 0
    home = CoordinatorHome(root)
    registry = Registry(home)
    identity, sites = home.identity(), {name: Identity.generate() for name in DECLARES}
    _, roster = registry.roster()
    for name, site in sites.items():
        roster = enrol(roster, _enrolment(name, site), _now())
        registry.save_roster(roster.signed(identity))
    initial = registry.blobs.put(state)
    flat = registry.blobs.put(weights.state_vector(state).tobytes())
    study = draft()
    study = study.model_copy(update={"initial": study.initial.model_copy(update={"sha256": initial})})
    record = registry.add_study(study.document().signed_by(identity), initial, flat)
    for name, site in sites.items():
        yes = approval(record.hash, name, "xrays", one_image_per_patient=DECLARES[name])
        registry.add_approval(yes.signed_by(site))
    registry.note(record.hash, "round", "round 1 done", data={"round": 1, "metrics": {"train_loss": 0.5, "sites": 1.0}})
    vector = np.random.default_rng(7).normal(size=weights.Layout.of_state(state).count).astype("<f4")
    path = tmp_path / "vector"
    path.write_bytes(vector.tobytes())
    history = [evaluation(record.study, round_, "validation", float(round_)) for round_ in (0, 1, 2)]
    return Case(home, registry, record, vector, path, history, evaluation(record.study, 2, "test", 2.0))


def _now():  # type: ignore[no-untyped-def]
    from datetime import UTC, datetime

    return datetime.now(UTC)


def _enrolment(name: str, identity: Identity) -> Enrolment:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    return Enrolment(consortium="lungs", site=name, identity=identity.public, node_key=pem, not_after=expiry(_now()))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_publishing_writes_everything_a_reader_needs(case: Case) -> None:
    package = publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    folder = case.home.study(case.record.hash)
    assert package == folder / "delivery.zip"
    assert set(files(folder)) == {
        "MODEL_CARD.md",
        *(f"approvals/{name}.json" for name in DECLARES),
        "bundle/configs/inference.json",
        "bundle/configs/metadata.json",
        "bundle/configs/specification.json",
        "bundle/docs/README.md",
        "bundle/models/model.safetensors",
        "confusion.png",
        "curves.png",
        "delivery.zip",
        "metrics.csv",
        "metrics.json",
        "model.safetensors",
        "reliability.png",
        "roc.png",
        "study.json",
    }
    for name in ("curves.png", "roc.png", "confusion.png", "reliability.png"):
        assert (folder / name).read_bytes().startswith(PNG)
    Document.read(folder / "study.json", "study").verify(case.home.identity().public)
    Document.read(folder / "approvals" / "anna.json", "approval")


def test_the_model_is_the_initial_state_with_the_published_weights(case: Case) -> None:
    publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    model = case.home.study(case.record.hash) / "model.safetensors"
    assert np.array_equal(weights.state_vector(model), case.vector)
    initial = case.registry.blobs.path(case.record.initial)
    assert model.read_bytes() == weights.merge(initial, case.vector)


def test_frozen_tensors_come_from_the_initial_state(tmp_path: Path) -> None:
    arrays = {"b": np.arange(4, dtype=np.float32), "a": np.ones((2, 3), np.float32), "c": np.zeros(2, np.float32)}
    (tmp_path / "initial").write_bytes(weights._save(arrays, ["b"]))
    vector = np.arange(8, dtype="<f4") + 100
    (tmp_path / "vector").write_bytes(vector.tobytes())
    assemble(tmp_path / "initial", tmp_path / "vector", tmp_path / "model")
    found = dict(weights._tensors(tmp_path / "model"))
    assert np.array_equal(found["a"].ravel(), vector[:6])
    assert np.array_equal(found["b"], arrays["b"])
    assert np.array_equal(found["c"], vector[6:])
    assert (tmp_path / "model").read_bytes() == weights.merge(tmp_path / "initial", vector)


def test_a_vector_of_another_length_is_refused(case: Case, tmp_path: Path) -> None:
    case.weights.write_bytes(case.vector[:-1].tobytes())
    with pytest.raises(ConsiliumError, match="do not fit"):
        assemble(case.registry.blobs.path(case.record.initial), case.weights, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_figures_are_those_of_the_rounds(case: Case) -> None:
    publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    folder = case.home.study(case.record.hash)
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["published_round"] == 2
    assert figures["test"] == dict(case.test.metrics)
    assert [entry["round"] for entry in figures["rounds"]] == [0, 1, 2]
    assert figures["rounds"][1]["train"] == {"loss": 0.5, "sites": 1.0}
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["validation_auroc"]) == case.history[2].metrics["auroc"]
    assert rows[0]["train_loss"] == ""


def test_the_package_holds_four_files_and_is_the_same_every_time(case: Case) -> None:
    publish = publisher(case.home, case.registry)
    package = publish(case.record, 2, case.weights, case.history, case.test)
    first = files(package.parent)
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["model.safetensors", "MODEL_CARD.md", "metrics.json", "study.json"]
    publish(case.record, 2, case.weights, case.history, case.test)
    assert files(package.parent) == first


def test_without_a_test_the_model_is_published_and_says_so(case: Case) -> None:
    package = publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, None)
    assert json.loads((package.parent / "metrics.json").read_text())["test"] == {}
    assert not (package.parent / "roc.png").exists()
    assert "validation" in (package.parent / "MODEL_CARD.md").read_text()


def test_statistics_that_no_task_can_read_do_not_prevent_publishing(case: Case) -> None:
    broken = Evaluation(2, "test", 9, ("anna",), np.full_like(case.test.statistics, np.nan), {}, "")
    package = publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, broken)
    assert not (package.parent / "roc.png").exists()


def test_the_card_names_study_hashes_and_missing_privacy(case: Case) -> None:
    publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    folder = case.home.study(case.record.hash)
    card = (folder / "MODEL_CARD.md").read_text()
    import hashlib

    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert case.record.hash in card
    assert "no differential privacy" in card
    assert f"{case.test.metrics['auroc']:.4f}" in card


def test_the_card_names_the_sites_that_declared_one_image_to_be_one_patient_and_no_other(case: Case) -> None:
    publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    folder = case.home.study(case.record.hash)
    for path in ("MODEL_CARD.md", "bundle/docs/README.md"):
        (said,) = (line for line in (folder / path).read_text().splitlines() if "one patient" in line.lower())
        assert said.startswith("**One image is one patient at bruno**, as the operator of that hospital declared.")
        assert not {"anna", "clara"} & set(said.replace(",", " ").split())


def test_export_copies_the_folder_or_unpacks_what_the_sites_got(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="no published model yet"):
        export(case.home, case.registry, case.record, tmp_path / "out")
    package = publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    case.registry.add_model(case.record.hash, 2, case.registry.blobs.put(package), case.test.metrics)
    export(case.home, case.registry, case.record, tmp_path / "out")
    assert files(tmp_path / "out") == files(package.parent)
    with pytest.raises(ConsiliumError, match="The folder is not empty"):
        export(case.home, case.registry, case.record, tmp_path / "out")
    import shutil

    shutil.rmtree(package.parent)
    copied = export(case.home, case.registry, case.record, tmp_path / "again")
    assert {path.name for path in copied} == {"model.safetensors", "MODEL_CARD.md", "metrics.json", "study.json"}


def test_an_export_that_finds_no_room_leaves_nothing_and_names_what_it_wrote(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import shutil

    package = publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    case.registry.add_model(case.record.hash, 2, case.registry.blobs.put(package), case.test.metrics)
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if source.name == "model.safetensors":
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left") as caught:
        export(case.home, case.registry, case.record, out)
    assert caught.value.filename == str(out / "bundle" / "models" / "model.safetensors")
    assert list(out.iterdir()) == []


def test_the_commands_show_and_export_a_model(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = publisher(case.home, case.registry)(case.record, 2, case.weights, case.history, case.test)
    case.registry.add_model(case.record.hash, 2, case.registry.blobs.put(package), case.test.metrics)
    prefix = ["-H", str(case.home.root), "models"]
    assert run(app, "c", [*prefix, "list"]) == 0
    assert f"{case.test.metrics['auroc']:.3f}" in capsys.readouterr().out
    assert run(app, "c", [*prefix, "show", "chest"]) == 0
    assert "Chest X-ray triage" in capsys.readouterr().out
    assert run(app, "c", [*prefix, "export", "chest", "--out", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_publishing_needs_no_torch() -> None:
    """The ServerApp process must stay small."""
    code = "import sys, server.outputs, models.plots; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
