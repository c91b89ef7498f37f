"""What a site makes of the officer's papers beyond the first of each: RULES B3, B6."""

from __future__ import annotations

from pathlib import Path

import pytest

from privacy.errors import ConsiliumError
from privacy.identity import Identity
from tests.client.agent.test_purse import Site
from tests.privacy.grant_kit import study


@pytest.fixture
def office(tmp_path: Path) -> Site:
    """A trusted officer, and an allowance at order 4."""
    made = Site(tmp_path / "agent.db")
    made.purse.trust(made.officer.public)
    made.allow(order=4)
    return made


def test_B3_another_officer_keeps_the_order_that_patients_were_charged_at(office: Site) -> None:
    office.begin(study())
    office.officer = Identity.generate()
    office.purse.trust(office.officer.public, replace=True)
    with pytest.raises(ConsiliumError, match="4 here, 5 in the allowance"):
        office.allow(order=5)
    office.allow(order=4)


def test_what_is_missing_before_a_study_can_begin_is_said_one_by_one(tmp_path: Path) -> None:
    site, noised = Site(tmp_path / "agent.db"), study()
    (said,) = site.purse.lacking(noised)
    assert "No privacy officer is trusted here yet" in said
    site.purse.trust(site.officer.public)
    allowance, granted = site.purse.lacking(noised)
    assert "allowance is missing" in allowance
    assert "grant for this study is missing" in granted
    site.allow(order=4)
    assert site.purse.lacking(noised) == [granted]
    site.grant(noised, epsilon="0.001")
    (said,) = site.purse.lacking(noised)
    assert "does not cover it (epsilon is" in said
    assert "and 0.001 is granted" in said
    site.grant(noised, serial=2)
    assert site.purse.lacking(noised) == []
    site.purse.reserve(noised, {"ada": "train"})
    assert site.purse.lacking(noised) == []


def test_an_older_allowance_handed_in_again_is_not_said_to_count(office: Site) -> None:
    office.allow(serial=2, epsilon="9", order=4)
    said = office.allow(serial=1, order=4)
    assert "a newer one is here already, and that counts" in said
    lifetime = office.purse.report()["lifetime"]
    assert lifetime["epsilon"] == "9"
    assert "newer" not in office.allow(serial=2, epsilon="9", order=4)
