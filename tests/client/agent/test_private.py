"""A study with noise at one site: paid before it is computed, noised before it leaves, and only once."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.agent.core import Agent
from client.agent.local import Local
from client.agent.private import groups
from client.imaging import Membership
from client.private import fitness
from client.private.fitness import Finding, Fitness
from models import additive, tasks
from models.weights import Layout
from privacy.airlock import Airlock
from privacy.canonical import sha256
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.journal import verify
from privacy.ledger import Leaf, Step
from privacy.mechanisms import Mechanism
from privacy.messages import Answer
from privacy.stages import TRANSCRIPT
from tests.client.agent.bed import ROOT, SITE, Bed, make_bed
from tests.client.agent.private_kit import (
    NOISE,
    allow,
    charges,
    die_at,
    granted,
    journal,
    private_bed,
    rows,
    shared_ring,
)
from tests.client.agent.ring_kit import ALL


@pytest.fixture
def bed(granted_bed: Bed) -> Bed:
    return granted_bed


def steps_of(answer_detail: dict[str, str]) -> list[Step]:
    found = [Leaf.read(line.encode()).entry for line in answer_detail["steps"].splitlines()]
    assert all(isinstance(entry, Step) for entry in found)
    return found  # type: ignore[return-value]


# ---- paid first ----------------------------------------------------------------------------------------------


def test_B6_without_a_grant_no_session_is_opened_and_nothing_is_computed(tmp_path: Path) -> None:
    bed = private_bed(tmp_path / "site")
    bed.start()
    try:
        bed.approve()
        assert bed.call("open", bed.initial).code == "no-grant"
        officer = allow(bed)
        assert bed.call("open", bed.initial).detail["initial"] == "held"
        assert bed.agent is not None
        assert officer.public == bed.agent.purse.officer()
    finally:
        bed.stop()


def test_B6_a_revoked_grant_stops_the_next_release_whatever_the_coordinator_says(bed: Bed) -> None:
    assert bed.call("train", bed.vector, slot=1).status == "done"
    assert bed.agent is not None
    bed.agent.purse.revoke(bed.hash)
    assert bed.call("train", bed.vector, slot=2, round=2).code == "grant-revoked"
    assert [row[0] for row in charges(bed)] == [1]
    assert rows(bed, "SELECT state FROM slots WHERE slot = 2") != [("stored",)]


def test_a_network_that_cannot_be_used_is_found_at_the_approval_and_before_any_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = private_bed(tmp_path / "site")
    granted(bed)
    assert bed.agent is not None
    unfit = Fitness((Finding("norm", "is a BatchNorm, whose statistics mix patients", "use a group norm"),), ())
    monkeypatch.setattr(fitness, "check", lambda network: unfit)
    with pytest.raises(ConsiliumError, match="Gradients of single patients cannot be taken"):
        Local(bed.agent)._usable(bed.agent.store.studies()[0], "")
    assert bed.call("train", bed.vector, slot=1).code == "no-data"
    assert (charges(bed), rows(bed, "SELECT * FROM plans")) == ([], [])
    bed.stop()


def test_what_was_changed_in_the_network_is_told_at_the_approval(tmp_path: Path) -> None:
    bed = make_bed(tmp_path / "site", **NOISE, network={"weight_standardisation": True})
    bed.start()
    bed.approve()
    assert bed.agent is not None
    _, told = Local(bed.agent)._usable(bed.agent.store.studies()[0], "")
    assert any("is our StandardisedConv2d in place of Conv2d, and so are" in text for text in told)
    bed.stop()


def test_S3_the_charge_is_on_the_disk_before_anything_is_computed(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[object, ...]]] = []
    real = Mechanism.release

    def look(self: Mechanism, *arguments: object) -> object:
        seen.append(charges(bed))
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Mechanism, "release", look)
    assert bed.call("train", bed.vector, slot=1).status == "done"
    assert seen == [[(1, "train", 1, 2, 1, 1)]] * 2, "two local steps, paid together before the first"


def test_B1_every_patient_pays_for_the_whole_plan_once(bed: Bed) -> None:
    bed.call("train", bed.vector, slot=1)
    counts = dict(rows(bed, "SELECT role, count(*) FROM members GROUP BY role"))
    assert counts == {"train": 24, "validation": 8, "test": 8}
    parts = dict(rows(bed, "SELECT role, held FROM parts"))
    assert parts == {"train": 4 * 2, "validation": 2, "test": 2}
    assert len(rows(bed, "SELECT DISTINCT history FROM patients")) <= 3, "equal histories are kept once"


def test_N6_an_evaluation_is_answered_as_often_as_the_plan_says_and_charged_each_time(bed: Bed) -> None:
    for slot in (1, 2):
        assert bed.call("test", bed.vector, slot=slot, round=4).status == "done"
    assert bed.call("test", bed.vector, slot=3, round=4).code == "grant-spent"
    assert bed.call("validate", bed.vector, slot=4, round=4).status == "done"
    assert [(row[1], row[3]) for row in charges(bed)] == [("test", 1), ("test", 1), ("validate", 1)]


def test_B1_a_patient_who_moved_to_another_side_is_in_neither(bed: Bed) -> None:
    """Reserved and charged as one to be tested: he does not train for that price when his side changes."""
    bed.call("train", bed.vector, slot=1)
    assert bed.agent is not None
    eligible = bed.agent.purse.eligible(bed.hash)
    row = bed.agent.store.sources()[0]
    cohort = bed.agent.desk.cohort(bed.study, row)
    swapped = {Membership.TRAIN: Membership.TEST, Membership.TEST: Membership.TRAIN}
    moved = replace(cohort, membership=tuple(swapped.get(side, side) for side in cohort.membership))
    assert len(groups(cohort, Membership.TRAIN, eligible)) == 24
    assert groups(moved, Membership.TRAIN, eligible) == []
    assert groups(moved, Membership.TEST, eligible) == []


# ---- what leaves ---------------------------------------------------------------------------------------------


def test_the_update_is_of_noised_steps_and_no_count_of_patients_travels(bed: Bed) -> None:
    answer = bed.call("train", bed.vector, slot=1)
    vector = np.frombuffer(bed.fetch(answer), "<f4")
    size = Layout.of_state(bed.initial).count
    sums = additive.leading(vector[size:])
    assert (vector[:size] != 0).mean() > 0.999, "noise is on every number, though in one it may round to nothing"
    assert (sums["train_examples"], sums["train_steps"]) == (1, 2), "public constants"
    assert not additive.task_sums(vector[size:]).any(), "no look at validation patients beside a training step"


def test_every_computation_has_noise_of_its_own(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        bed = private_bed(tmp_path / name)
        granted(bed)
        answer = bed.call("test", bed.vector, slot=1, round=4)
        found.append(np.frombuffer(bed.fetch(answer), "<f4"))
        bed.stop()
    assert (found[0] != found[1]).mean() > 0.9


def test_B7_each_release_is_signed_with_the_sites_own_gapless_number(bed: Bed) -> None:
    first = bed.call("train", bed.vector, slot=1)
    second = bed.call("train", bed.vector, slot=3, round=2)
    found = steps_of(second.detail)
    assert [(step.site, step.slot, step.counter) for step in found] == [(SITE, 1, 1), (SITE, 3, 2)]
    assert [step.release for step in found] == [first.payload_sha256, second.payload_sha256]
    again = bed.call("train", bed.vector, slot=3, round=2)
    assert again == second, "the same question gets the same bytes"


def test_N4_images_that_are_not_finite_cause_no_refusal(tmp_path: Path) -> None:
    bed = private_bed(tmp_path / "site")
    path = bed.home.root / "images.npz"
    arrays = dict(np.load(path))
    arrays["train_images"] = np.full_like(arrays["train_images"], np.inf)
    np.savez(path, **arrays)
    granted(bed)
    try:
        answer = bed.call("train", bed.vector, slot=1)
        assert answer.status == "done"
        assert np.isfinite(np.frombuffer(bed.fetch(answer), "<f4")).all()
    finally:
        bed.stop()


@pytest.mark.parametrize("mode", ["per-site", "shared"])
def test_nothing_that_leaves_depends_on_one_patient_but_the_noised_numbers(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two neighbouring sites, the same questions: what is observable has the same sizes, words and order."""
    caplog.set_level(logging.DEBUG)
    seen = []
    for patients in (24, 23):
        caplog.clear()
        bed, answers = asked_everything(tmp_path / str(patients), mode, patients)
        assert [answer.code for answer in answers] == ["", "", "", "", "grant-spent"]
        left = [(line["what"], line["slot"], line["size"]) for line in journal(bed)]
        logged = [line.getMessage() for line in caplog.records if line.name.startswith("consilium")]
        seen.append((left, logged, [(a.status, a.payload_bytes, a.statistics, sorted(a.detail)) for a in answers]))
    assert seen[0] == seen[1]


def asked_everything(folder: Path, mode: str, patients: int) -> tuple[Bed, list[Answer]]:
    """A site with so many patients to train, and its answers to every kind of question, the last once too often."""

    def prepare(bed: Bed) -> None:
        path = bed.home.root / "images.npz"
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {name: arrays[name][:patients] for name in ("train_images", "train_labels")})
        granted(bed)

    more: dict[str, object] = {}
    if mode == "shared":
        ring = shared_ring(folder, prepare)
        assert ring.ring is not None
        bed, more = ring.bed, {"cohort": ALL, "parameters": {TRANSCRIPT: ring.ring.transcript}}
    else:
        bed = private_bed(folder)
        prepare(bed)
    answers = []
    for kind, slot, round_ in (("train", 1, 1), ("validate", 2, 4), ("test", 3, 4), ("test", 4, 4), ("test", 5, 4)):
        answers.append(bed.call(kind, bed.vector, slot=slot, round=round_, **more))
        if answers[-1].status == "done":
            bed.fetch(answers[-1])
    assert Counter(row[0] for row in rows(bed, "SELECT role FROM members")) == {
        "train": patients, "validation": 8, "test": 8,
    }  # fmt: skip
    bed.stop()
    return bed, answers


def test_the_outward_door_has_no_other_way_for_numbers(bed: Bed) -> None:
    """Refusals and stages of a study with noise carry constants: no digits that the request did not bring."""
    answer = bed.call("train", bed.vector, slot=99)
    assert (answer.status, answer.code, answer.detail) == ("refused", "slot-limit", {})
    assert bed.call("keys").code == "malformed"
    assert bed.call("train", bed.vector, slot=1).status == "done"
    details = [json.loads(data)["body"].get("detail", {}) for data in bed.received if data.startswith(b'{"body"')]
    assert {name for detail in details for name in detail} == {"state", "approval", "initial", "grant", "steps"}
    forms = {"state": r"[a-z]+", "initial": r"[a-z]+", "approval": r"[0-9a-f]*", "grant": r"[0-9a-f]{64}"}
    for name, value in ((name, value) for detail in details for name, value in detail.items() if name != "steps"):
        assert re.fullmatch(forms[name], value), name
    lines = [json.loads(line) for detail in details for line in detail.get("steps", "").splitlines()]
    assert lines
    for line in lines:
        assert set(line) == {"kind", "body", "signatures"}
        assert {*line["body"]} == {"ledger", "study", "site", "slot", "counter", "request", "release"}
        assert (line["body"]["site"], line["body"]["study"]) == (SITE, bed.hash)


def test_only_the_purse_makes_a_charge_and_only_the_airlock_puts_noise_on() -> None:
    makers, noisers = set(), set()
    for path in [
        path for room in ("client", "server", "privacy", "models", "deploy") for path in (ROOT / room).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name == "Charge":
                    makers.add(path.relative_to(ROOT).as_posix())
                if name == "release" and len(node.args) == 2 and "Source" in ast.dump(node):
                    noisers.add(path.relative_to(ROOT).as_posix())
    assert makers == {"client/agent/purse.py"}
    assert noisers == {"privacy/airlock.py"}


# ---- retries (B2) --------------------------------------------------------------------------------------------


def test_B2_a_round_asked_for_in_another_slot_sends_the_same_noised_update_for_nothing(bed: Bed) -> None:
    first = bed.call("train", bed.vector, slot=1)
    second = bed.call("train", bed.vector, slot=2)
    assert first.payload_sha256 == second.payload_sha256
    assert [(row[0], row[3], row[4]) for row in charges(bed)] == [(1, 2, 1), (2, 0, 1)]


def test_B2_when_the_kept_update_is_lost_the_round_is_over_and_nothing_is_noised_anew(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bed.call("train", bed.vector, slot=1).status == "done"
    for kept in (bed.home.agent / "studies" / bed.hash / "kept").iterdir():
        kept.unlink()
    monkeypatch.setattr(Airlock, "noise", lambda *_: pytest.fail("noised again"))
    assert bed.call("train", bed.vector, slot=2).code == "slot-spent"


# ---- kill -9 at every point between the charge and the handing over ------------------------------------------

POINTS = [
    "before client.agent.purse Purse reserve",
    "after client.agent.purse Purse reserve",
    "before client.agent.purse Purse charge",
    "after client.agent.purse Purse charge",
    "before privacy.airlock Airlock noise",
    "after privacy.airlock Airlock noise",
    "before client.agent.keepsakes Keepsakes keep",
    "after client.agent.keepsakes Keepsakes keep",
    "before privacy.airlock Airlock keep",
    "after privacy.airlock Airlock keep",
    "after client.agent.logbook Logbook released",
    "before client.agent.store Store keep_answer",
    "after client.agent.store Store keep_answer",
    "before privacy.airlock Airlock release",
]


USUAL = {
    "after client.agent.purse Purse charge", "after privacy.airlock Airlock noise",
    "before client.agent.store Store keep_answer", "after client.agent.store Store keep_answer",
}  # fmt: skip


@pytest.mark.parametrize(
    "where", [point if point in USUAL else pytest.param(point, marks=pytest.mark.long) for point in POINTS]
)
def test_S3_killed_between_charge_and_hand_over(tmp_path: Path, where: str) -> None:
    bed = private_bed(tmp_path / "site")
    granted(bed)
    bed.stop()
    before = len(journal(bed))
    document = bed.request("train", bed.vector, slot=1)
    die_at(bed, where, document, bed.vector)
    assert [line for line in journal(bed)[before:] if line["slot"]] == [], "nothing of the slot has left"
    assert len(charges(bed)) <= 1
    agent = bed.start()
    try:
        assert agent.purse.trouble() == ""
        answer = bed.call("train", bed.vector, slot=1)
        assert answer.status == "done"
        assert sha256(bed.fetch(answer)) == answer.payload_sha256
        assert [(row[0], row[3], row[5]) for row in charges(bed)] == [(1, 2, 1)], "one charge for one release"
        assert [step.counter for step in steps_of(answer.detail)] == [1]
        assert bed.call("train", bed.vector, slot=2, round=2).status == "done"
        assert [row[5] for row in charges(bed)] == [1, 2]
    finally:
        bed.stop()
    assert verify(bed.home.agent / "journal.jsonl") > 0
    reopened = Agent(bed.home)
    assert reopened.purse.trouble() == ""
    reopened.close()


def test_B6_a_spent_grant_is_spent_after_the_study_and_its_plan_never_runs_again(bed: Bed) -> None:
    for slot in (1, 2):
        bed.call("train", bed.vector, slot=slot, round=slot)
    assert bed.call("deliver", bed.parcel(), round=4).status == "done"
    assert dict(rows(bed, "SELECT role, held FROM parts"))["train"] == 4, "two of four rounds were used"
    assert rows(bed, "SELECT state FROM plans") == [("committed",)]
    assert bed.agent is not None
    with pytest.raises(Refusal) as refusal:
        bed.agent.purse.charge(bed.study, 5, "train", 3, "0" * 64)
    assert refusal.value.code is RefusalCode.GRANT_SPENT


def test_metrics_of_a_noised_evaluation_can_be_read(bed: Bed) -> None:
    answer = bed.call("test", bed.vector, slot=1, round=4)
    vector = np.frombuffer(bed.fetch(answer), "<f4")
    task = tasks.get(bed.study.spec())
    assert len(vector) == additive.size(task)
    assert np.isfinite(vector).all()
    assert rows(bed, "SELECT result != '' FROM studies") == [(1,)], "the plain figures stay at the site"
