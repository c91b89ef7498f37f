"""The demo's page says of a study what it promises, and warns of what it does not; never one for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.demo.page import _STYLE, NARROW, _figure, _table, promised
from models import plots
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


def test_on_a_telephone_each_cell_says_its_column_and_pictures_have_a_narrow_form() -> None:
    table = _table(("hospital", "left out, and why"), [("north", "1 × <b>")])
    assert "<table class=rows>" in table
    assert '<td data-label="left out, and why">1 × &lt;b&gt;</td>' in table
    assert "class=rows" not in _table(("", ""), [("hash", "ab12")]), "two columns fit"
    figure = _figure("curves", "Loss", narrow=True)
    assert f'<source media="{NARROW}" srcset="curves-narrow.png"><img src="curves.png"' in figure
    assert "<source" not in _figure("roc", "ROC")
    style = _STYLE.read_text(encoding="utf-8")
    assert f"@media {NARROW}" in style
    assert "attr(data-label)" in style


def test_narrow_pictures_keep_their_text_legible_on_a_telephone(tmp_path: Path) -> None:
    rounds = [{"round": n, "train": {"loss": 1.0 / (n + 1)}, "validation": {"loss": 1.0, "auroc": 0.7}} for n in (0, 1)]
    plots.curves(rounds, tmp_path / "wide.png")
    plots.curves(rounds, tmp_path / "curves.png", narrow=True)
    plots.comparison({"all test images": {"together": 0.9, "north": 0.8}}, tmp_path / "dots.png", narrow=True)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes["wide"][0] > 2 * sizes["wide"][1]
    assert sizes["curves"][1] > sizes["curves"][0], "one above the other"
    assert sizes["curves"][0] == sizes["dots"][0] == sizes["wide"][0] / 2
