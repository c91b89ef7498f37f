"""An agent in this process, or as a process of its own, with a study to serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client.agent.bed import Bed, Process, make_bed
from tests.client.agent.private_kit import granted, private_bed


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    """An agent in this process that knows nothing yet."""
    made = make_bed(tmp_path / "site")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def open_bed(bed: Bed) -> Bed:
    """An agent with an approved study and an open session."""
    bed.ready()
    return bed


@pytest.fixture
def granted_bed(tmp_path: Path) -> Iterator[Bed]:
    """An agent with an approved study with noise of its own, an officer's grant for it, and an open session."""
    made = private_bed(tmp_path / "site")
    granted(made)
    yield made
    made.stop()


@pytest.fixture
def processes() -> Iterator[Callable[..., Process]]:
    """Start real agents; whatever still runs at the end is killed by its id."""
    started: list[Process] = []

    def start(bed: Bed, *prefix: str) -> Process:
        started.append(Process(bed, *prefix))
        return started[-1]

    yield start
    for process in started:
        if process.process.poll() is None:
            process.kill()
