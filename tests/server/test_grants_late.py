"""A grant that comes late, and one that is revoked half way: nobody is shut out, and nobody is charged for nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from privacy.errors import ConsiliumError
from server.outputs import publisher
from server.records import OutcomeState, State
from server.rounds import Loop
from server.simulation import StillClock
from tests.server.private_kit import SITES, changed, draft, images

LATE = """
from client.agent.purse import Purse
from privacy.errors import Refusal, RefusalCode

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
from client.agent.purse import Purse

real = Purse.charge

def charge(self, study, slot, *rest):
    if self._site == "west" and slot == 2:
        self.revoke(study.hash)
    return real(self, study, slot, *rest)

Purse.charge = charge
"""
HALF_WAY = """
from client.agent.gate import Gate
from client.agent.purse import Purse

gates, begun, charged = {}, Gate.__init__, Purse.charge

def begin(self, store, purse, *rest):
    begun(self, store, purse, *rest)
    gates[purse._site] = self

def charge(self, study, slot, *rest):
    paid = charged(self, study, slot, *rest)
    if self._site == "west" and slot == 2:
        gates["west"].revoke(study.hash)
    return paid

Gate.__init__, Purse.charge = begin, charge
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path, 45)


def test_B6_nothing_is_reserved_in_the_log_before_enough_sites_have_their_grants(
    data: Path,
) -> None:
    """Whoever is not in RESERVE takes no part for good, so a grant that comes a minute late must not be too late."""
    with changed(data, LATE) as simulation:
        done = simulation.run(draft("late", "shared", 1))
        with simulation.registry.ledger() as ledger:
            account = ledger.account(done.record.hash)
    assert account is not None
    assert set(account.reserve.grants) == set(SITES)


def test_B6_a_revoked_grant_that_leaves_too_few_sites_pauses_the_study_and_costs_the_others_one_slot(
    data: Path,
) -> None:
    with changed(data, REVOKED) as simulation:
        study = draft("ended", "shared", 4)
        with pytest.raises(ConsiliumError):
            simulation.run(study)
        record = simulation.registry.study("ended")
        assert record.state is State.PAUSED
        assert "west: " in record.reason
        assert "revoked" in record.reason
        path = simulation.home.root.parent / "sites" / "north" / "agent" / "agent.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as records:
            charged = records.execute(
                "SELECT slot FROM charges WHERE study = ? ORDER BY slot", (record.hash,)
            ).fetchall()
        assert charged in ([(1,)], [(1,), (2,)]), "the reserve of two more slots is untouched"


def test_B6_a_study_whose_grant_was_revoked_while_a_site_computed_goes_on_with_a_new_one(data: Path) -> None:
    with changed(data, HALF_WAY) as simulation:
        with pytest.raises(ConsiliumError):
            simulation.run(draft("anew", "shared", 2))
        record = simulation.registry.study("anew")
        assert record.state is State.PAUSED
        assert "west: the privacy officer's grant for this study was revoked" in record.reason
        outcomes = {o.site: o for o in simulation.registry.course(record.hash).outcomes(2)}
        assert (outcomes["west"].state, outcomes["west"].code) == (OutcomeState.REFUSED, "grant-revoked")

        roster, _ = simulation.registry.roster()
        papers = {"study": record.document.encode().hex(), "roster": roster.encode().hex()}
        simulation.hospitals.call("approve", **papers, sites=list(SITES))  # the officers grant it anew
        simulation.registry.resume(record.hash)
        publish = publisher(simulation.home, simulation.registry)
        loop = Loop(
            simulation.registry, simulation.registry.study(record.hash), simulation.identity, simulation.hospitals,
            publish, StillClock(),
        )  # fmt: skip
        assert loop.run() is State.FINISHED
