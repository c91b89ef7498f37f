"""A grant that comes late, and one that is revoked half way: nobody is shut out, and nobody is charged for nothing."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.errors import ConsiliumError
from server import simulation as simulated
from server.records import State
from server.simulation import Simulation
from tests.server.test_private_studies import SITES, draft

LATE = """
asked = []
real = Purse.granted

def granted(self, study):
    if self._site == "west":
        asked.append(study.hash)
        if len(asked) < 3:
            raise Refusal(RefusalCode.NO_GRANT, study.hash)
    return real(self, study)

Purse.granted = granted
"""
REVOKED = """
real = Purse.charge

def charge(self, study, slot, *rest):
    if self._site == "west" and slot == 2:
        self.revoke(study.hash)
    return real(self, study, slot, *rest)

Purse.charge = charge
"""
PROGRAM = """
import sys
from client import simulation
from client.agent.purse import Purse
from privacy.errors import Refusal, RefusalCode
{changed}
sys.exit(simulation.main(sys.argv[1:]))
"""


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Simulation]]:
    """Three hospitals whose process runs some changed code."""
    labels = np.array([i // 2 % 2 for i in range(90)])
    pixels = np.random.default_rng(2).integers(0, 150, (90, 8, 8)) + 100 * labels[:, None, None]
    np.savez(tmp_path / "images.npz", images=pixels.astype(np.uint8))
    rows = [f"{i},{labels[i]},p{i // 2}" for i in range(90)]
    (tmp_path / "index.csv").write_text("\n".join(["file,label,patient", *rows]))
    made: list[Simulation] = []
    real = subprocess.Popen

    def begin(changed: str) -> Simulation:
        def start(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
            return real([command[0], "-c", PROGRAM.format(changed=changed), command[-1]], **more)

        monkeypatch.setattr(simulated.subprocess, "Popen", start)
        made.append(Simulation(tmp_path, SITES, threads=1).__enter__())
        return made[0]

    yield begin
    for simulation in made:
        simulation.__exit__(None, None, None)


def test_B6_nothing_is_reserved_in_the_log_before_enough_sites_have_their_grants(
    sites: Callable[[str], Simulation],
) -> None:
    """Whoever is not in RESERVE takes no part for good, so a grant that comes a minute late must not be too late."""
    simulation = sites(LATE)
    done = simulation.run(draft("late", "shared", 1))
    with simulation.registry.ledger() as ledger:
        account = ledger.account(done.record.hash)
    assert account is not None
    assert set(account.reserve.grants) == set(SITES)


def test_B6_a_revoked_grant_that_leaves_too_few_sites_pauses_the_study_and_costs_the_others_one_slot(
    sites: Callable[[str], Simulation],
) -> None:
    simulation = sites(REVOKED)
    study = draft("ended", "shared", 4)
    with pytest.raises(ConsiliumError):
        simulation.run(study)
    record = simulation.registry.study("ended")
    assert record.state is State.PAUSED
    assert "west: " in record.reason
    assert "revoked" in record.reason
    path = simulation.home.root.parent / "sites" / "north" / "agent" / "agent.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as records:
        charged = records.execute("SELECT slot FROM charges WHERE study = ? ORDER BY slot", (record.hash,)).fetchall()
    assert charged in ([(1,)], [(1,), (2,)]), "the reserve of two more slots is untouched"
