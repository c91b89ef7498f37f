"""A hospital that lies in a study with shared noise, and a study that is given up: with real agents in one process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from privacy.errors import ConsiliumError
from privacy.ledger import Abort
from privacy.ledger_check import verify_file
from privacy.study import Study
from server.records import SlotState, State
from server.simulation import Simulation
from tests.server.private_kit import SITES, changed, draft, images

LIAR = """
import numpy as np
from client.agent.secure import Secure

honest = Secure.hide
lie = np.uint32(1 << 29)

def hide(self, request, study, words):
    if self._here.name == "west" and request.header.kind == "train":
        words += lie
    honest(self, request, study, words)

Secure.hide = hide
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("set"), 45)


@pytest.fixture
def lying(data: Path) -> Iterator[Simulation]:
    """West adds a huge number to every coordinate of what it masks."""
    with changed(data, LIAR) as made:
        yield made


def test_attack_a_hospital_that_adds_a_huge_vector_is_left_out_with_its_round_and_the_study_pauses(
    lying: Simulation,
) -> None:
    with pytest.raises(ConsiliumError) as caught:
        lying.run(draft("lied-to", "shared", 2))
    record = lying.registry.study("lied-to")
    assert record.state is State.PAUSED
    for words in ("round 1 was left out: the opened sum has norm", "one of them runs something else"):
        assert words in record.reason
        assert words in str(caught.value)
    course = lying.registry.course(record.hash)
    first, *rest = course.checkpoints()
    assert [point.weights for point in rest] == [first.weights], "the model is what it was"
    assert [slot.state for slot in course.slots()] == [SlotState.FAILED]


@pytest.fixture(scope="module")
def simulation(data: Path) -> Iterator[Simulation]:
    with Simulation(data, SITES, threads=1) as made:
        yield made


def held(simulation: Simulation, site: str, study: str) -> tuple[str, int]:
    """The state of a study in a site's own ledger, and the releases of training that patients' histories hold."""
    path = simulation.home.root.parent / "sites" / site / "agent" / "agent.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as records:
        ((state, count),) = records.execute(
            "SELECT p.state, c.held FROM plans p JOIN parts c ON c.plan = p.id WHERE c.role = 'train' AND p.study = ?",
            (study,),
        ).fetchall()
    return state, count


def test_B2_a_study_that_was_aborted_is_given_back_at_its_sites_with_the_next_heads(
    simulation: Simulation, tmp_path: Path
) -> None:
    """The coordinator stops it after its first slot and aborts it; the sites learn of it while another study runs."""
    study = draft("given-up", "shared", 6)
    heard: list[str] = []

    def stop(site: str) -> None:
        heard.append(site)
        if len(heard) == len(SITES):
            simulation.registry.stop("given-up")

    with pytest.raises(ConsiliumError, match="stopped"):
        simulation.run(study, stop)
    given_up = simulation.registry.abort("given-up").hash
    reserved = study.rounds.count + study.rounds.reserve
    assert {held(simulation, site, given_up) for site in SITES} == {("reserved", reserved)}
    done = simulation.run(draft("next", "shared", 1))
    used = len(simulation.registry.course(given_up).slots())
    assert {held(simulation, site, given_up) for site in SITES} == {("aborted", used)}
    assert used < reserved
    assert {held(simulation, site, done.record.hash)[0] for site in SITES} == {"committed"}
    _, roster = simulation.registry.roster()
    path = tmp_path / "ledger.jsonl"
    with simulation.registry.ledger() as ledger:
        account = ledger.account(given_up)
        ledger.export(path)
    assert account is not None
    assert isinstance(account.final, Abort)
    studies: dict[str, Study] = {record.hash: record.study for record in simulation.registry.studies()}
    report = verify_file(path, [roster], 1, studies)
    assert report.error is None, report.error
    assert sum("the study given" in fact for fact in report.facts) == 2
