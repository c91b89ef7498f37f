"""Small studies with noise in one process, and hospitals in it whose code was changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from privacy.study import Study
from server import simulation
from server.simulation import Simulation
from tests import study_kit

SITES = ("north", "south", "west")
PROGRAM = """
import sys
from client import simulation
{changed}
sys.exit(simulation.main(sys.argv[1:]))
"""


def draft(
    name: str, mode: str, rounds: int, steps: int = 1, noise: str = "0.5", sums: Mapping[str, object] | None = None
) -> Study:
    return study_kit.study(
        name,
        SITES,
        optimiser={"learning_rate": 0.5, "batch_size": 16},
        rounds={"count": rounds, "local_steps": steps, "reserve": 2},
        aggregation={"weights": "equal", "minimum_sites": 3},
        privacy={
            "mode": mode, "noise_multiplier": noise, "sampling_rate": 0.5, "images_per_patient": 2,
            "expected_patients": 30 if mode == "shared" else 10, "patients_bound": 400, "site_patients_bound": 30,
            "delta": 0.001, "evaluation_noise": 0.3,
        },
        secagg=sums or {"mode": "on"},
    )  # fmt: skip


def images(folder: Path, patients: int) -> Path:
    """Patients with two images each; who has the finding is brighter."""
    count = 2 * patients
    labels = np.array([i // 2 % 2 for i in range(count)])
    pixels = np.random.default_rng(2).integers(0, 150, (count, 8, 8)) + 100 * labels[:, None, None]
    np.savez(folder / "images.npz", images=pixels.astype(np.uint8))
    rows = [f"{i},{labels[i]},p{i // 2}" for i in range(count)]
    (folder / "index.csv").write_text("\n".join(["file,label,patient", *rows]))
    return folder


@contextmanager
def changed(folder: Path, code: str) -> Iterator[Simulation]:
    """The hospitals' process of this simulation runs `code` before anything else; the coordinator is as it is."""
    real = subprocess.Popen

    def start(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        return real([command[0], "-c", PROGRAM.format(changed=code), command[-1]], **more)

    with patch.object(simulation.subprocess, "Popen", start), Simulation(folder, SITES, threads=1) as made:
        yield made
