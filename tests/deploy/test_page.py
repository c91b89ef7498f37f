"""The demo's page says of a study what it promises, and warns of what it does not; never one for the other."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.demo.page import promised
from privacy.grants import Claims
from tests import study_kit
from tests.study_kit import FIVE

NOISE: dict[str, Any] = {"expected_patients": 30, "patients_bound": 1000, "site_patients_bound": 100}


def words(mode: str, secagg: str) -> str:
    study = study_kit.study(
        "shown", FIVE,
        optimiser={"batch_size": 8},
        rounds={"local_steps": 1},
        aggregation={"weights": "equal", "minimum_sites": 4},
        secagg={"mode": secagg},
        privacy={"mode": mode, **({} if mode == "none" else NOISE)},
    )  # fmt: skip
    text = promised(study)
    if mode != "none":
        claims = Claims.of(study)
        assert f"ε {claims.epsilon:f} at δ 0.000001" in text
        assert (f"ε {claims.cap:f} if secure aggregation" in text) == (mode == "shared")
    return text


@pytest.mark.parametrize("secagg", ["on", "off"])
def test_S8_a_study_without_noise_says_so_and_what_its_secure_sums_do_not_stop(secagg: str) -> None:
    text = words("none", secagg)
    assert "<b>no differential privacy</b>" in text
    assert ("WITHOUT NOISE" in text) == (secagg == "on")
    assert ("<b>no secure aggregation</b>" in text) == (secagg == "off")


@pytest.mark.parametrize(("mode", "secagg"), [("shared", "on"), ("per-site", "on"), ("per-site", "off")])
def test_N7_a_study_with_noise_does_not_warn_that_it_has_none(mode: str, secagg: str) -> None:
    text = words(mode, secagg)
    assert "<b>differential privacy</b> for each patient at one hospital" in text
    assert "no differential privacy" not in text
    assert "WITHOUT NOISE" not in text
    assert ("<b>no secure aggregation</b>" in text) == (secagg == "off")
