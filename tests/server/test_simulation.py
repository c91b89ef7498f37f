"""A simulated consortium: the same bits in every run, honest baselines, and errors in words."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.errors import ConsiliumError
from privacy.study import Study
from privacy.terminal import run
from server import arms
from server.cli import app
from server.simulation import POOLED, Simulation, metrics, names
from tests import study_kit
from tests.server.private_kit import images
from tests.study_kit import Sections

SITES = ("north", "south", "west")


SECURE: Sections = {"aggregation": {"minimum_sites": 3}, "secagg": {"mode": "on"}}
ADAPTIVE: Sections = {"aggregation": {"strategy": "fedadam", "server_learning_rate": 0.01}}
TINY: Sections = {
    "input": {"augmentation": [{"name": "random_flip"}]},
    "optimiser": {"learning_rate": 0.02, "batch_size": 8},
    "rounds": {"count": 3, "local_steps": 2, "seed": 11},
}


def draft(**sections: Mapping[str, Any]) -> Study:
    return study_kit.study("tiny", SITES, **TINY, **sections)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("set"), 120)


@pytest.fixture(scope="module")
def simulation(data: Path):
    with Simulation(data, SITES, pooled=True, threads=1) as made:
        yield made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


FOUR = ("east", *SITES)
REPEATED: dict[str, Sections] = {
    "fedyogi": {"aggregation": {"strategy": "fedyogi", "server_learning_rate": 0.01}},
    "scaffold": {"aggregation": {"strategy": "scaffold"}, "local": {"norms": "local", "personal": "ditto"}},
    "secure": SECURE,
    "batch": {"network": {"norm": "batch"}, "aggregation": {"strategy": "fedprox", "proximal_mu": 0.01}},
    "batch-scaffold": {"network": {"norm": "batch"}, "aggregation": {"strategy": "scaffold"}},
    "batch-secure": {"network": {"norm": "batch"}, "local": {"norms": "local"}, **SECURE},
}


def found(simulation: Simulation, name: str) -> tuple[object, ...]:
    """Everything that a study leaves and that may be equal."""
    finished = simulation.run(arms.together(draft(study={"name": name}, **REPEATED[name]), FOUR))
    assert finished.test is not None
    history = simulation.registry.course(finished.record.hash).evaluations("validation")
    figures = [(number, dict(one.metrics)) for number, one in sorted(history.items())]
    return digest(finished.model), dict(finished.test.metrics), figures, finished.record.hash


@pytest.fixture(scope="module")
def twice(data: Path) -> list[dict[str, tuple[object, ...]]]:
    """What each study leaves in two simulations, which run them in opposite orders."""
    runs = []
    for order in (list(REPEATED), list(reversed(REPEATED))):
        with Simulation(data, FOUR, threads=1) as fresh:
            runs.append({name: found(fresh, name) for name in order})
    return runs


@pytest.mark.parametrize("name", REPEATED)
def test_two_simulations_are_equal_bit_for_bit_whatever_ran_before(
    twice: list[dict[str, tuple[object, ...]]], name: str
) -> None:
    """With secure sums too: masks are drawn anew in every run, and what is opened is the exact sum on the grid."""
    one, other = twice
    assert one[name] == other[name]


def test_without_a_seed_they_are_not(simulation: Simulation) -> None:
    plan = arms.together(draft().model_copy(update={"rounds": draft().rounds.model_copy(update={"seed": 0})}), SITES)
    again = arms.together(plan.model_copy(update={"study": plan.study.model_copy(update={"name": "again"})}), SITES)
    assert digest(simulation.run(plan).model) != digest(simulation.run(again).model)


def test_everything_in_one_place_is_what_all_have_and_takes_the_steps_of_all(simulation: Simulation) -> None:
    plan = arms.pooled(draft(), POOLED, len(SITES))
    assert (plan.sites, plan.rounds.local_steps, plan.aggregation.minimum_sites) == ((POOLED,), 6, 1)
    finished = simulation.run(plan)
    spread = simulation.measure(finished, SITES)
    assert finished.test is not None
    assert metrics(plan, spread) == pytest.approx(dict(finished.test.metrics), rel=1e-5)
    assert sum(simulation.images.values()) == 240
    assert "one patient" not in (finished.folder / "MODEL_CARD.md").read_text()


def test_a_hospital_alone_sees_no_other_and_a_hospital_left_out_is_not_asked(simulation: Simulation) -> None:
    alone = simulation.run(arms.alone(draft(), SITES, "south"))
    assert alone.test is not None
    assert alone.test.sites == ("south",)
    rest = simulation.run(arms.without(draft(), SITES, "south"))
    assert rest.record.study.sites == ("north", "west")
    assert rest.test is not None
    assert rest.test.sites == ("north", "west")
    own = metrics(rest.record.study, simulation.measure(rest, ["south"]))
    assert own["images"] == alone.test.metrics["images"]


def test_equal_compute_means_the_rule_of_the_server_only_acts_where_there_is_something_to_combine() -> None:
    study = draft(**ADAPTIVE)
    assert arms.together(study, SITES).aggregation.strategy == "fedadam"
    for plan in (arms.alone(study, SITES, "west"), arms.pooled(study, POOLED, 3)):
        assert (plan.aggregation.strategy, plan.aggregation.server_learning_rate) == ("fedavg", "1")
    with pytest.raises(ConsiliumError, match="cannot be left out"):
        arms.without(study, SITES, "east")


def test_the_arms_of_a_study_with_secure_sums_are_studies_that_can_stand() -> None:
    study = draft(**SECURE)
    four = ("east", *SITES)
    assert arms.alone(study, four, "east").secagg.mode == "off"
    assert arms.pooled(study, POOLED, 4).secagg.mode == "off"
    assert arms.together(study, four).secagg.threshold == 3
    assert arms.without(study, four, "east").secagg.mode == "on"
    with pytest.raises(ConsiliumError, match="cannot be run at these hospitals"):
        arms.without(study, SITES, "west")


def test_the_studys_names_are_kept_where_they_are_enough() -> None:
    assert names(draft(), 3) == SITES
    assert names(draft(), 4) == ("site-001", "site-002", "site-003", "site-004")


def test_hospitals_that_are_gone_are_missed_in_words(data: Path) -> None:
    with Simulation(data, SITES, threads=1) as fresh:
        fresh.hospitals._child.kill()
        with pytest.raises(ConsiliumError, match="ended before their work was done"):
            fresh.run(arms.together(draft(), SITES))


# ---- the commands --------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    return run(app, "consilium-coordinator", arguments)


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(study_kit.draft("tiny", SITES, **TINY))
    return path


def test_baseline_all_leaves_one_table_one_plot_and_every_arm(
    study_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert call("baseline", "all", str(study_file), "--data", str(data), "--out", str(target), "--threads", "1") == 0
    said = capsys.readouterr().out
    assert "north alone" in said
    assert (target / "comparison.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((target / "comparison.json").read_text())
    models = [row["model"] for row in found["results"] if row["images_of"] == "all hospitals"]
    assert models == ["together", "north alone", "south alone", "west alone", "pooled"]
    images = {row["metrics"]["images"] for row in found["results"] if row["images_of"] == "all hospitals"}
    assert len(images) == 1, "every model is measured on the same images"
    with (target / "comparison.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5 * 4
    for folder in ("together", "north-alone", "pooled"):
        assert {"model.safetensors", "MODEL_CARD.md", "metrics.csv"} <= {p.name for p in (target / folder).iterdir()}


def test_simulate_with_another_number_of_sites_and_one_left_out(
    study_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    options = ("--sites", "4", "--leave-out", "site-002", "--data", str(data), "--out", str(target), "--threads", "1")
    assert call("simulate", str(study_file), *options) == 0
    assert "site-002" in capsys.readouterr().out
    assert call("simulate", str(study_file), "--data", str(data), "--out", str(target)) == 1
    assert "not empty" in capsys.readouterr().err


def test_every_arm_starts_from_the_weights_that_are_given(
    study_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights with batch norms, too; what does not fit is named before anything runs."""
    from safetensors.numpy import load
    from safetensors.torch import save_file

    from models import networks
    from models.architectures import Shape

    shape = Shape(1, draft().input.size, 2)
    elsewhere = networks.NETWORKS[draft().network.name].make(shape, "batch", {"width": 1})
    save_file(elsewhere.state_dict(), tmp_path / "elsewhere.safetensors")
    still: Sections = {"network": {"norm": "frozen"}, "transfer": {"train": "head"}}
    study_file.write_text(study_kit.draft("tiny", SITES, **TINY, **still))
    options = ("--data", str(data), "--threads", "1", "--initial", str(tmp_path / "elsewhere.safetensors"))
    assert call("baseline", "local", str(study_file), *options, "--out", str(tmp_path / "alone")) == 0
    assert call("simulate", str(study_file), *options, "--out", str(tmp_path / "all")) == 0
    given = elsewhere.state_dict()
    name = next(name for name, value in given.items() if value.ndim == 4)
    for arm in ("alone/north-alone", "all/together"):
        model = load((tmp_path / arm / "model.safetensors").read_bytes())
        np.testing.assert_array_equal(model[name], given[name].numpy())
    study_file.write_text(study_kit.draft("tiny", SITES, **TINY))
    assert call("simulate", str(study_file), *options, "--out", str(tmp_path / "group")) == 1
    assert 'norm = "frozen"' in capsys.readouterr().err


def test_images_that_cannot_be_dealt_out_are_named(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("simulate", str(study_file), "--data", str(tmp_path), "--out", str(tmp_path / "out")) == 1
    assert "dealt out" in capsys.readouterr().err


def test_images_without_what_a_study_learns_are_named_before_the_first_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said that each image counts as one patient, where the set names none."""
    path = tmp_path / "cells.toml"
    unet: Sections = {"task": {"kind": "segmentation"}, "network": {"name": "unet"}, "input": {"size": [16, 16]}}
    path.write_text(study_kit.draft("cells", SITES, **unet))
    np.savez(tmp_path / "set.npz", images=np.zeros((60, 8, 8), np.uint8), labels=np.arange(60) % 2)
    options = ("--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "out"), "--threads", "1")
    assert call("simulate", str(path), *options) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "set names no patients: each image counts as one patient." in said
    assert "no array “masks”" in said
    assert "north" in said


def test_a_hospital_without_images_stops_nobody_who_can_do_without_it(tmp_path: Path) -> None:
    for site in SITES:
        (tmp_path / site).mkdir()
        arrays = {"images": np.zeros((40, 8, 8), np.uint8), "labels": np.arange(40) % 2}
        arrays |= {"labels": np.full(40, 9)} if site == "west" else {}
        np.savez(tmp_path / site / "images.npz", **arrays)
        declared = 'kind = "npz"\npath = "images.npz"\none_image_per_patient = true\n'
        (tmp_path / site / "source.toml").write_text(declared)
    with Simulation(tmp_path, SITES, threads=1) as made:
        once: Sections = {"rounds": {"count": 1, "local_steps": 1}}
        two = study_kit.study("two", SITES, aggregation={"minimum_sites": 2}, **once)
        finished = made.run(arms.together(two, SITES))
        assert finished.test is not None
        assert finished.test.sites == ("north", "south")
        with pytest.raises(ConsiliumError, match="no usable image: west, "):
            made.run(arms.together(study_kit.study("three", SITES, aggregation={"minimum_sites": 3}, **once), SITES))


def test_the_card_names_the_hospital_that_declared_one_image_to_be_one_patient(tmp_path: Path) -> None:
    for site in SITES:
        (tmp_path / site).mkdir()
        arrays = {"images": np.random.default_rng(1).random((40, 8, 8)), "labels": np.arange(40) // 2 % 2}
        arrays |= {} if site == "south" else {"patients": np.arange(40) // 2}
        np.savez(tmp_path / site / "images.npz", **arrays)
        declared = "one_image_per_patient = true\n" if site == "south" else ""
        (tmp_path / site / "source.toml").write_text(f'kind = "npz"\npath = "images.npz"\n{declared}')
    with Simulation(tmp_path, SITES, pooled=True, threads=1) as made:
        once = study_kit.study("once", SITES, rounds={"count": 1, "local_steps": 1})
        plans = {"south": arms.together(once, SITES), POOLED: arms.pooled(once, POOLED, 3)}
        for name, plan in plans.items():
            card = (made.run(plan).folder / "MODEL_CARD.md").read_text()
            assert f"**One image is one patient at {name}**" in card


@pytest.mark.long
def test_a_hundred_hospitals_on_one_machine(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    labels = np.arange(3000) % 2
    pixels = rng.integers(0, 150, (3000, 8, 8)) + 100 * labels[:, None, None]
    np.savez(tmp_path / "images.npz", images=pixels.astype(np.uint8))
    rows = [f"{i},{labels[i]},p{i}" for i in range(3000)]
    (tmp_path / "index.csv").write_text("\n".join(["file,label,patient", *rows]))
    sites = names(draft(), 100)
    with Simulation(tmp_path, sites, threads=1) as many:
        finished = many.run(arms.together(draft(), sites))
    assert finished.test is not None
    assert len(finished.test.sites) == 100
