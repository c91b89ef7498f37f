"""The [secagg] section: RULES S4 is checked when a study is read, and every refusal names what to change."""

import pytest

from privacy.errors import ConsiliumError
from privacy.study import Study
from privacy.study_text import S8, explain, template


def toml(sites: int, minimum: int, **entries: object) -> str:
    text = template("chest", [f"site-{i:02}" for i in range(sites)])
    lines = "\n".join(f"{key} = {value!r}".replace("'", '"') for key, value in entries.items())
    return text.replace("minimum_sites = 2", f"minimum_sites = {minimum}").replace(
        'mode = "off" ', f'mode = "on"\n{lines}\n#', 1
    )


@pytest.mark.parametrize(
    ("sites", "colluding", "least"),
    [(3, 1, 3), (4, 1, 3), (4, 2, 4), (5, 1, 4), (6, 1, 4), (7, 1, 5), (10, 1, 6), (10, 2, 7), (50, 1, 26)],
)
def test_S4_the_threshold_left_out_is_the_smallest_above_half_of_sites_and_colluding(sites, colluding, least):
    study = Study.from_toml(toml(sites, max(least, colluding + 2), colluding=colluding))
    assert study.secagg.threshold == least
    assert 2 * least > sites + colluding >= 2 * (least - 1)
    assert study.body()["secagg"]["threshold"] == least


@pytest.mark.parametrize(
    ("sites", "minimum", "entries", "words"),
    [
        (2, 2, {}, "needs 3 to 50 sites"),
        (51, 40, {}, "needs 3 to 50 sites"),
        (5, 4, {"threshold": 3}, "from 4 to 5"),
        (5, 4, {"threshold": 6}, "from 4 to 5"),
        (5, 3, {}, "set it to 4 or more"),
        (5, 4, {"threshold": 5}, "set it to 5 or more"),
        (4, 3, {"colluding": 2}, "set it to 4 or more"),
        (5, 5, {"colluding": 4}, "set it to 3 or less"),
        (5, 5, {"colluding": 5}, "set it to 3 or less"),
        (50, 26, {"examples_bound": 200_000}, "set it to 167772 or less"),
        (5, 4, {"session_slots": 0}, "secagg.session_slots"),
        (5, 4, {"update_bound": "0"}, "secagg.update_bound"),
        (5, 4, {"rounding": "down"}, "secagg.rounding"),
        (5, 4, {"peek": True}, "no such entry"),
    ],
)
def test_S4_a_section_that_cannot_hold_is_refused_with_its_remedy(sites, minimum, entries, words):
    with pytest.raises(ConsiliumError, match=words):
        Study.from_toml(toml(sites, minimum, **entries).replace("True", "true"))


def test_a_study_without_it_keeps_the_body_it_always_had():
    study = Study.from_toml(template("chest", ["st-anna", "st-berta"]))
    assert study.body()["secagg"] == {"mode": "off"}
    with pytest.raises(ConsiliumError, match="colluding belongs to"):
        Study.from_toml(template("chest", ["st-anna"]).replace("# colluding = 1 ", "colluding = 1 "))


def test_the_signed_body_is_read_back_as_the_same_study():
    study = Study.from_toml(toml(5, 4))
    assert Study.from_body(study.body()) == study
    assert Study.from_toml(toml(5, 4, threshold=4)).hash == study.hash


def test_S8_the_explanation_says_what_it_does_not_hold_against():
    words = dict(explain(Study.from_toml(toml(5, 4))))
    assert S8 in words["Secure aggregation"]
    assert "honest but curious" in words["Secure aggregation"]
    assert "masked" in words["Leaves the site"]
