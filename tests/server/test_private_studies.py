"""A study with noise from its offer to its delivery, with real agents in one process: what is opened, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models import tasks
from privacy.checkpoint import needed, witnesses_of
from privacy.grants import Claims
from privacy.ledger import Commit, Reserve, Step
from privacy.ledger_check import verify_file
from server.simulation import Finished, Simulation
from tests.server.private_kit import SITES, draft, images


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory):
    with Simulation(images(tmp_path_factory.mktemp("set"), 90), SITES, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def shared(simulation: Simulation) -> Finished:
    return simulation.run(draft("shared", "shared", 3))


def test_a_study_with_shared_noise_ends_with_a_model_and_a_noised_test(
    simulation: Simulation, shared: Finished
) -> None:
    course = simulation.registry.course(shared.record.hash)
    assert [slot.kind for slot in course.slots()] == ["train"] * 3 + ["validate", "test"]
    assert set(course.evaluations("validation")) == {3}, "no round but the last is looked at: each look is charged"
    assert shared.test is not None
    assert 0 < shared.test.metrics["images"] < 60, "patients, noised"
    assert shared.model.exists()


def test_no_figure_of_a_training_step_counts_images_or_patients(simulation: Simulation, shared: Finished) -> None:
    rounds = [event for event in simulation.registry.events(shared.record.hash) if event.kind == "round"]
    for event in rounds:
        assert "train_examples" not in event.data["metrics"]
        assert event.data["metrics"]["train_loss"] >= 0


def test_B7_the_log_holds_the_plan_every_release_and_the_end_and_its_head_is_cosigned(
    simulation: Simulation, shared: Finished
) -> None:
    claims = Claims.of(shared.record.study)
    with simulation.registry.ledger() as ledger:
        entries = [leaf.entry for leaf in ledger.read() if leaf.entry.study == shared.record.hash]
        _, roster = simulation.registry.roster()
        note = ledger.valid_note(simulation.identity.public, witnesses_of(roster), 1)
    assert isinstance(entries[0], Reserve)
    assert entries[0].slots == shared.record.study.slots
    assert float(entries[0].epsilon_aggregate) == float(claims.epsilon)
    assert set(entries[0].grants) == set(SITES)
    steps = [entry for entry in entries if isinstance(entry, Step)]
    assert sorted((step.site, step.slot, step.counter) for step in steps) == sorted(
        (site, slot, slot) for site in SITES for slot in range(1, 6)
    )
    assert entries[-1] == Commit(study=shared.record.hash, slots_used=5)
    assert note is not None
    assert len(note.cosigners(witnesses_of(roster))) >= needed(3, 1)


def test_B7_the_head_is_cosigned_across_the_sessions_of_keys_of_a_long_study(simulation: Simulation) -> None:
    done = simulation.run(draft("sessions", "shared", 3, sums={"mode": "on", "session_slots": 2}))
    slots = simulation.registry.course(done.record.hash).slots()
    assert len({slot.session for slot in slots}) > 1
    with simulation.registry.ledger() as ledger:
        _, roster = simulation.registry.roster()
        note = ledger.valid_note(simulation.identity.public, witnesses_of(roster), 1)
        assert note is not None
        assert note.checkpoint.size == ledger.size, "the end of the study is under a head that the sites cosigned"


def test_an_officer_verifies_the_exported_log_without_trusting_anybody(
    simulation: Simulation, shared: Finished, tmp_path: Path
) -> None:
    _, roster = simulation.registry.roster()
    path = tmp_path / "ledger.jsonl"
    with simulation.registry.ledger() as ledger:
        ledger.export(path)
    report = verify_file(path, [roster], 1)
    assert report.error is None, report.error
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"slot":2', b'"slot":3', 1))
    assert verify_file(path, [roster], 1).error is not None


def test_N8_the_opened_noise_is_that_of_all_sites_shares(simulation: Simulation, tmp_path: Path) -> None:
    """With next to no learning, what moves the model is the noise of three shares of σ / √(n_min − c)."""
    study = draft("noisy", "shared", 1, noise="200")
    done = simulation.run(study)
    course = simulation.registry.course(done.record.hash)
    before, after = (
        np.frombuffer(simulation.registry.blobs.path(point.weights).read_bytes(), "<f4")
        for point in course.checkpoints()
    )
    moved = float((after - before).std())
    expected = 0.5 / 30 * 200 * 1 * (3 / 2) ** 0.5
    assert moved == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("secagg", ["on", "off"])
def test_a_study_with_per_site_noise_ends_and_both_tiers_are_equal(simulation: Simulation, secagg: str) -> None:
    study = draft(f"own-{secagg}", "per-site", 2, steps=2, sums={"mode": secagg})
    claims = Claims.of(study)
    assert claims.epsilon == claims.cap
    done = simulation.run(study)
    assert done.test is not None
    assert set(simulation.registry.course(done.record.hash).evaluations("validation")) == {2}


def test_the_sums_of_an_evaluation_are_those_of_the_patients_within_their_noise(
    simulation: Simulation, shared: Finished
) -> None:
    exact = sum(simulation.measure(shared, SITES).values())
    task = tasks.get(shared.record.study.spec())
    patients = task.metrics(exact)["images"] / 2
    assert shared.test is not None
    noise = 0.3 * 3 * (3 / 2) ** 0.5 * 2  # of the four cells of the confusion, which add up to the patients
    assert abs(shared.test.metrics["images"] - patients) < 6 * noise


def test_the_card_says_what_is_promised_and_gives_no_interval_that_noise_makes_untrue(
    simulation: Simulation, shared: Finished, tmp_path: Path
) -> None:
    simulation.export(shared, tmp_path / "out")
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    claims = Claims.of(shared.record.study)
    assert f"ε {claims.epsilon:f} at δ 0.001" in text
    assert f"ε {claims.cap:f} if secure aggregation" in text
    assert "group privacy" in text
    assert "sums over patients with noise" in text
    assert "no differential privacy" not in text
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["test_intervals"] == {}
