"""Noise in the real deployment: officers' papers by their commands, kill -9 half way, and what the records say after.

Four hospitals; a patient's budget is granted at each by its own officer.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.agent_client import Local
from client.home import SiteHome
from privacy.checkpoint import needed, witnesses_of
from privacy.grants import Claims
from privacy.ledger import Commit
from server.records import OutcomeState, SlotState, State, StudyRecord
from tests.deploy.lab import Lab, running_lab

pytestmark = pytest.mark.long

SITES = ("east", "north", "south", "west")
NOISE = {
    "aggregation": {"weights": "equal"},
    "privacy": {
        "mode": "shared", "noise_multiplier": 4, "sampling_rate": 0.5, "expected_patients": 40, "images_per_patient": 1,
        "patients_bound": 1000, "site_patients_bound": 40, "delta": 0.0001, "evaluation_noise": 4,
    },
    "secagg": {"mode": "on"},
}  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Four hospitals and a coordinator."""
    root = Path(tempfile.mkdtemp(prefix="prv-"))
    try:
        with running_lab(root, SITES) as made:
            offices(made)
            yield made
    finally:
        shutil.rmtree(root, ignore_errors=True)


def officer(lab: Lab, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The officer's own program, as a person types it."""
    program = Path(sys.executable).with_name("consilium-officer")
    command = [str(program), "--home", str(lab.federation.root / "officer"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=lab.federation.root, timeout=120)


def offices(lab: Lab) -> None:
    """One officer for all four sites, a lifetime budget at each."""
    root = lab.federation.root
    officer(lab, "init", str(root / "officer"))
    for site in SITES:
        lab.federation.site(site, "officer", "trust", str(root / "officer" / "officer.pub"))
        paper = root / f"{site}.allowance.json"
        officer(lab, "allow", "--site", site, "--epsilon", "60", "--delta", "1e-4", "--order", "4", "--out", str(paper))
        lab.federation.site(site, "grant", "import", str(paper))


def launched(lab: Lab, name: str, rounds: int, grant: tuple[str, ...] = SITES) -> StudyRecord:
    """Sign, grant at some sites, approve and launch."""
    record = lab.sign(name, sites=SITES, minimum=3, extra=NOISE, rounds=rounds, reserve=4)
    study = lab.federation.root / f"{name}.study.json"
    study.write_bytes(record.document.encode())
    claims = Claims.of(record.study)
    for site in grant:
        paper = lab.federation.root / f"{name}.{site}.grant.json"
        officer(
            lab, "grant", str(study), "--site", site, "--epsilon", f"{claims.epsilon:f}", "--cap", f"{claims.cap:f}",
            "--expires", "2099-01-01", "--out", str(paper),
        )  # fmt: skip
        lab.federation.site(site, "grant", "import", str(paper))
    lab.registry.launch(name)
    lab.approve(record)
    return record


def trained(lab: Lab, record: StudyRecord) -> int:
    """Training slots that are done."""
    return sum(s.kind == "train" and s.state is SlotState.DONE for s in lab.slots(record))


def charged(lab: Lab, site: str, record: StudyRecord) -> list[int]:
    """The slots a site has paid for."""
    rows = lab.agent(site, "SELECT slot FROM charges WHERE study = ? ORDER BY counter", record.hash)
    return [int(str(row[0])) for row in rows]


def test_a_study_with_noise_survives_kill_9_of_an_agent_a_connector_and_the_coordinator(lab: Lab) -> None:
    record = launched(lab, "noisy", 12)
    lab.until(lambda: trained(lab, record) >= 3, "three steps")
    lab.federation.kill("west", "agent")
    lab.until(lambda: trained(lab, record) >= 5, "steps without it")
    lab.federation.kill("north", "connector")
    lab.until(lambda: trained(lab, record) >= 7, "two more steps")
    lab.federation.kill("coordinator", "serverapp")
    lab.reaches(record, State.INTERRUPTED)
    lab.resume(record)
    lab.finishes(record)
    used = len(lab.slots(record))
    for site in SITES:
        slots = charged(lab, site, record)
        assert len(slots) == len(set(slots)), "no release is charged twice"
        released = lab.agent(site, "SELECT slot FROM slots WHERE study = ? AND sha256 != ''", record.hash)
        assert {int(str(row[0])) for row in released} <= set(slots), "no release without its charge"
        assert max(slots) <= used
    with lab.registry.ledger() as ledger:
        account = ledger.account(record.hash)
        assert account is not None
        assert isinstance(account.final, Commit)
        assert account.final.slots_used == used
        _, roster = lab.registry.roster()
        note = ledger.valid_note(lab.home.identity().public, witnesses_of(roster), 1)
        assert note is not None
        assert note.checkpoint.size == ledger.size, "the end is under a head that the sites believe"
        assert len(note.cosigners(witnesses_of(roster))) >= needed(4, 1)
    for site in SITES:
        with Local(SiteHome(lab.federation.site_home(site)).local_socket) as door:
            report = door.budget()
        assert report["studies"][0]["state"] == "committed"
    assert "noisy" in lab.federation.site("east", "budget").stdout


def test_the_officer_verifies_what_the_coordinator_exports(lab: Lab) -> None:
    root = lab.federation.root
    ledger, roster = root / "ledger.jsonl", root / "roster.json"
    lab.federation.coordinator("ledger", "export", "--out", str(ledger))
    document, _ = lab.registry.roster()
    roster.write_bytes(document.encode())
    found = officer(lab, "verify", str(ledger), str(roster), str(root / "noisy.study.json"))
    assert "believed" in found.stdout or "cosigned" in found.stdout
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    bad = officer(lab, "verify", str(ledger), str(roster), check=False)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr + bad.stdout


def test_B6_a_site_whose_grant_is_revoked_stops_by_itself_and_the_others_go_on(lab: Lab) -> None:
    record = launched(lab, "revoked", 10)
    lab.until(lambda: trained(lab, record) >= 2, "two steps")
    lab.federation.site("south", "grant", "revoke", "revoked")
    before = charged(lab, "south", record)
    lab.finishes(record)
    assert charged(lab, "south", record) == before, "nothing is charged from then on"
    later = [slot for slot in lab.slots(record) if slot.slot > max(before)]
    assert later
    outcomes = [lab.outcomes(record, slot.slot) for slot in later]
    assert all(found["south"].state is not OutcomeState.IN for found in outcomes if "south" in found)
    assert "south" not in later[-1].cohort, "it is not asked in vain for the rest of the study"


def test_B6_a_site_without_a_grant_takes_no_part_and_says_why(lab: Lab) -> None:
    record = launched(lab, "ungranted", 3, grant=SITES[:3])
    lab.finishes(record)
    assert charged(lab, "west", record) == []
    assert all("west" not in slot.cohort for slot in lab.slots(record))
    assert "west takes no part" in lab.story(record)
    assert "has not granted the study" in lab.story(record)


def test_the_status_of_a_site_and_of_the_coordinator_show_what_is_spent(lab: Lab) -> None:
    plot = lab.federation.root / "spent.png"
    shown = lab.federation.coordinator("study", "status", "noisy", "--plot", str(plot)).stdout
    assert plot.stat().st_size > 5_000
    assert "tier" in shown.lower() or "aggregat" in shown.lower()
    picture = lab.federation.root / "budget.png"
    budget = lab.federation.site("east", "budget", "--plot", str(picture)).stdout
    assert picture.stat().st_size > 5_000
    assert json.dumps("noisy")[1:-1] in budget
