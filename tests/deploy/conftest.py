"""One federation of real processes, shared by every test that needs one, because starting it costs the most."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.lab import Lab, running_lab

SMALL_DISK = "west"


@pytest.fixture(scope="module")
def _root() -> Iterator[Path]:
    """A folder with a short name (Unix sockets), in which one site's home is a small disk of its own under root."""
    root = Path(tempfile.mkdtemp(prefix="con-"))
    home = root / SMALL_DISK
    home.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "consilium-test", str(home)], capture_output=True
        ).returncode
    )
    try:
        yield root
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(home)], check=True)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def lab(_root: Path) -> Iterator[Lab]:
    """Three sites and a coordinator, up, with images connected."""
    with running_lab(_root) as made:
        yield made
