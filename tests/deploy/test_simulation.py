"""The simulation is the deployment without its network: the same seeds give the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.agent_client import Local
from client.home import SiteHome
from server.commands.signing import sign_study
from server.simulation import Simulation
from tests import study_kit
from tests.deploy.lab import SITES, Lab
from tests.study_kit import Sections

TINY: Sections = {
    "input": {"size": [28, 28], "augmentation": [{"name": "random_affine"}]},
    "optimiser": {"learning_rate": 0.01, "batch_size": 4, "schedule": "cosine"},
    "rounds": {"count": 3, "local_steps": 2, "seed": 2026},
    "publish": {"choose": "best-validation"},
}
STRATEGIES: dict[str, Sections] = {
    "adaptive": {"aggregation": {"strategy": "fedadam", "server_learning_rate": 0.01}},
    "scaffold": {"aggregation": {"strategy": "scaffold"}, "local": {"norms": "local", "personal": "ditto"}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each site, whose images bring their own split: it must not hang on the sites' secret keys."""
    root = tmp_path_factory.mktemp("same")
    for number, site in enumerate(SITES):
        folder = root / site
        folder.mkdir()
        dice, arrays = np.random.default_rng(number), {}
        for part, count in (("train", 20 + number), ("val", 8), ("test", 8)):
            labels = np.arange(count) % 2
            pixels = dice.integers(0, 120, (count, 28, 28)) + 100 * labels[:, None, None]
            arrays |= {f"{part}_images": pixels.astype(np.uint8), f"{part}_labels": labels}
        np.savez(folder / "images.npz", **arrays)
        (folder / "source.toml").write_text('kind = "npz"\npath = "images.npz"\none_image_per_patient = true\n')
    return root


@pytest.fixture(scope="module")
def simulation(data: Path) -> Iterator[Simulation]:
    with Simulation(data, SITES, threads=1) as made:
        yield made


def figures(registry, record) -> dict:
    """Everything that may be equal: the weights' hash, and the sums of every evaluation, bit for bit."""
    course = registry.course(record.hash)
    found = {
        (split, number): one.statistics.tobytes()
        for split in ("validation", "test")
        for number, one in course.evaluations(split).items()
    }
    return {"weights": course.checkpoints()[-1].weights, **found}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_simulation_repeats_the_deployment_bit_for_bit(
    lab: Lab, simulation: Simulation, data: Path, strategy: str
) -> None:
    study = study_kit.study(f"same-{strategy}", SITES, **TINY, **STRATEGIES[strategy])
    record = sign_study(lab.registry, lab.home.identity(), study, None)
    lab.registry.launch(record.hash)
    for site in SITES:
        file = str(data / site / "images.npz")
        lab.federation.site(site, "data", "connect", "split", file, "--one-image-per-patient")
        lab.until(lambda site=site: lab.asked(record, site), f"the study to reach {site}")
        with Local(SiteHome(lab.federation.site_home(site)).local_socket) as door:
            door.decide(record.hash, "approve", "split")
    lab.finishes(record)
    finished = simulation.run(study)
    assert finished.record.hash == record.hash
    assert figures(simulation.registry, finished.record) == figures(lab.registry, record)
    model = lab.home.study(record.hash) / "model.safetensors"
    assert finished.model.read_bytes() == model.read_bytes()
