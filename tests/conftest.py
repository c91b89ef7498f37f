"""What every test shares: a run is the same twice, and no test waits for a core that another one holds."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The networks here are small, and a federation's processes share the machine; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says more about the other processes of the machine than about the code. The examples of a
# test are the same in every run, so that a run that passed passes again; CONSILIUM_EXPLORE=1 draws new ones.
settings.register_profile(
    "consilium",
    deadline=None,
    max_examples=60,
    derandomize=not os.environ.get("CONSILIUM_EXPLORE"),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("consilium")


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest's own with a shorter name: the path of a Unix socket below it has at most 107 bytes."""
    name = re.sub(r"\W", "_", request.node.name).removeprefix("test_")
    return tmp_path_factory.mktemp(name[:10])
