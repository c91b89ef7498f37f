"""More patients than a study counts on, or images that name nobody: said to the operator, and to nobody else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from client.agent.cautions import cautions
from client.cli import app
from client.imaging import Source
from privacy.terminal import run
from tests import study_kit
from tests.client.agent.bed import Bed, Process, make_bed
from tests.client.agent.private_kit import NOISE, granted

NAMED = Source.from_fields({"kind": "npz", "path": "/images.npz"}, "archive")
UNNAMED = Source.from_fields({"kind": "npz", "path": "/images.npz", "one_image_per_patient": True}, "archive")
FEWER: Any = {"privacy": {"site_patients_bound": 20}}


def said(source: Source, patients: int, **privacy: Any) -> str:
    study = study_kit.study(**study_kit.merged(NOISE, {"privacy": privacy}))
    return " ".join(cautions(study, source, patients))


def test_what_the_study_counts_on_needs_no_caution() -> None:
    assert said(NAMED, 40) == "", "40 is the bound"
    plain = study_kit.study()
    assert cautions(plain, UNNAMED, 10**6) == [], "a study without noise promises nothing that could fail"


def test_more_patients_than_the_bound_of_a_site_are_said_with_what_it_means() -> None:
    words = said(NAMED, 41)
    assert "41 patients here" in words
    assert "at most 40 at one hospital (privacy.site_patients_bound)" in words
    assert "What is promised to patients holds all the same" in words


def test_more_patients_than_delta_is_meant_for_are_said_more_loudly() -> None:
    words = said(NAMED, 1001)
    assert "meant for at most 1000 in all (privacy.patients_bound)" in words
    assert "Do not approve it" in words


def test_images_declared_one_to_a_patient_are_said_to_be_the_unit() -> None:
    assert "k times epsilon" in said(UNNAMED, 40)
    assert "site_patients_bound" in said(UNNAMED, 41)


@pytest.mark.parametrize("checked", [True, False], ids=["after a check", "without one"])
def test_the_operator_reads_them_when_he_checks_and_when_he_approves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checked: bool
) -> None:
    bed = make_bed(tmp_path / "site", **study_kit.merged(NOISE, FEWER))
    bed.start()
    bed.call("offer", bed.offer_payload(), session=0)
    bed.connect_data()
    bed.stop()
    process = Process(bed)

    def site(*arguments: str) -> str:
        assert run(app, "consilium-site", ["--home", str(bed.home.root), *arguments]) == 0
        return re.sub(r"\s+", " ", capsys.readouterr().out)

    try:
        commands = [("data", "check", "archive")] if checked else []
        for command in [*commands, ("study", "approve", "tiny")]:
            shown = site(*command)
            assert "Mind: There are 40 patients here, and the study counts on at most 20" in shown
            assert "Mind: The source is declared to hold one image per patient" in shown
        assert not checked or "Mind: There are 40 patients here" in site("data", "show", "archive")
    finally:
        process.end()
    assert "patients here" not in process.log.read_text(), "the agent's log says nothing that hangs on patients"


def test_nothing_of_it_crosses_the_wire(tmp_path: Path) -> None:
    """A site with too many patients and one with few enough say as many bytes, and no word of patients."""

    def spoken(name: str, images: int) -> list[int]:
        bed: Bed = make_bed(tmp_path / name, images=images, **study_kit.merged(NOISE, FEWER))
        granted(bed)
        try:
            assert bed.call("train", bed.vector, slot=1).status == "done"
        finally:
            bed.stop()
        assert not any(b"patient" in data for data in bed.received)
        return [len(data) for data in bed.received]

    assert spoken("many", 40) == spoken("few", 20)
