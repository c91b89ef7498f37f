"""`consilium-officer init, allow, grant` as a privacy officer meets them: a key, papers, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from privacy.cli import app
from privacy.errors import ConsiliumError
from privacy.grants import Allowance, Claims, Grant
from privacy.identity import Document, Identity, fingerprint
from privacy.officer import Office
from privacy.terminal import run
from tests.privacy.grant_kit import NOW, SITE, study

Officer = Callable[..., tuple[int, str, str]]
STUDY = study()
COORDINATOR = Identity.generate()


@pytest.fixture
def officer(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Officer:
    """officer("allow", "--site", …) in a folder with an identity and a signed study: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONSILIUM_OFFICER_HOME", raising=False)
    STUDY.document().signed_by(COORDINATOR).write(tmp_path / "tiny.study.json")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(app, "consilium-officer", list(arguments))
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return code, said.out, said.err

    assert call("init", "officer")[0] == 0
    return call


def grant(officer: Officer, study_file: str = "tiny.study.json", **changes: str) -> tuple[int, str, str]:
    options = {"site": SITE, "epsilon": "3", "cap": "8", "expires": "2100-01-31", "out": "g.json", **changes}
    return officer("grant", study_file, *(word for name, value in options.items() for word in (f"--{name}", value)))


def public(folder: Path = Path("officer")) -> str:
    return Office(folder).public.read_text().strip()


def test_init_makes_a_key_that_is_the_officers_alone(officer: Officer) -> None:
    office = Office(Path("officer"))
    assert Identity.load(office.key).public == public()
    assert office.key.stat().st_mode & 0o077 == 0
    code, out, _ = officer("init", "second")
    assert code == 0
    assert fingerprint(public(Path("second"))) in out
    assert "consilium-site officer trust officer.pub" in out


def test_a_key_is_never_overwritten(officer: Officer) -> None:
    before = public()
    code, _, err = officer("init", "officer")
    assert code == 1
    assert "There is an identity already" in err
    assert public() == before


def test_allow_signs_a_lifetime(officer: Officer) -> None:
    code, out, err = officer(
        "allow", "--site", SITE, "--epsilon", "8", "--delta", "1e-6", "--order", "4", "--out", "a.json"
    )
    assert (code, err) == (0, "")
    paper = Allowance.verified(Document.read(Path("a.json"), "allowance"), public())
    assert (paper.epsilon, paper.delta, paper.order, paper.serial) == ("8", "0.000001", 4, 1)
    assert "consilium-site grant import a.json" in out


def test_allow_settles_a_doubt_that_it_names(officer: Officer) -> None:
    code, out, err = officer("allow", "--site", SITE, "--settle", "0123456789abcdef", "--out", "a.json")
    assert (code, err) == (0, "")
    assert "settles the doubt 0123456789abcdef" in out
    assert Document.read(Path("a.json"), "allowance").body["settles"] == "0123456789abcdef"
    code, _, err = officer("allow", "--site", SITE, "--settle", "the doubt", "--out", "b.json")
    assert code == 1
    assert "settles" in err


def test_B6_serials_count_up_for_each_site_over_both_kinds(officer: Officer) -> None:
    officer("allow", "--site", SITE, "--out", "a.json")
    assert grant(officer)[0] == 0
    officer("allow", "--site", "st-bona", "--out", "b.json")
    officer("allow", "--site", SITE, "--epsilon", "9", "--out", "c.json")
    serials = [
        Document.read(Path(name), kind).body["serial"]
        for name, kind in (
            ("a.json", "allowance"),
            ("g.json", "grant"),
            ("b.json", "allowance"),
            ("c.json", "allowance"),
        )
    ]
    assert serials == [1, 2, 1, 3]
    assert len(list(Path("officer/issued").iterdir())) == 4
    assert Path("officer/issued/st-anna.000002.grant.json").read_bytes() == Path("g.json").read_bytes()


def test_B6_a_grant_binds_what_the_study_says(officer: Officer) -> None:
    code, _, err = grant(officer)
    assert (code, err) == (0, "")
    paper = Grant.verified(Document.read(Path("g.json"), "grant"), public())
    assert (paper.study, paper.slots, paper.delta) == (STUDY.hash, STUDY.slots, STUDY.privacy.delta)
    assert (paper.epsilon, paper.cap, paper.expires) == ("3", "8", "2100-01-31T23:59:59Z")


def test_grant_shows_in_plain_words_what_is_asked(officer: Officer) -> None:
    officer("allow", "--site", SITE, "--out", "a.json")
    _, out, _ = grant(officer)
    text, claims = re.sub(r"\s+", " ", out), Claims.of(STUDY)
    for words in (
        "A tiny study", "8 at most, every one of them charged to every patient",
        f"{claims.epsilon:f} at delta 0.000001",
        f"{claims.cap:f} if secure aggregation were wholly broken", "A train patient 6 releases",
        "A validation patient 2 releases", "of a patient's lifetime budget", fingerprint(COORDINATOR.public),
        "compare it by telephone",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": "0.5"}, "asks for more than you grant: epsilon is"),
        ({"cap": "0.9", "epsilon": "0.9"}, "asks for more than you grant: the cap"),
        ({"cap": "1", "epsilon": "3"}, "cap is below epsilon"),
        ({"epsilon": "much"}, "is not a number"),
        ({"expires": "2020-01-31"}, "would have expired already"),
        ({"expires": "tomorrow"}, "Write a day, such as 2030-01-31 (until its end, UTC), or a moment, such as"),
        ({"expires": "2100-02-30"}, "This is neither a day nor a moment: --expires 2100-02-30"),
        ({"expires": "2100-01-31T12:00:00+01:00"}, "a time is written as"),
        ({"site": "st-eva"}, "does not name this site: st-eva"),
        ({"site": "../x"}, "does not name this site"),
        ({"coordinator": "ab" * 16}, "Another key signed this"),
    ],
)
def test_a_grant_that_should_not_be_written_is_not(officer: Officer, changes: dict[str, str], words: str) -> None:
    code, _, err = grant(officer, **changes)
    assert code == 1
    assert words in err
    assert "→" in err
    assert not Path("g.json").exists()
    assert not Path("officer/issued").exists() or not list(Path("officer/issued").iterdir()), "no serial is used up"


def test_a_study_that_the_allowance_cannot_bear_gets_no_grant(officer: Officer) -> None:
    officer("allow", "--site", SITE, "--epsilon", "3.99", "--out", "a.json")
    loud = study(noise="0.5")
    loud.document().signed_by(COORDINATOR).write(Path("loud.study.json"))
    code, _, err = grant(officer, "loud.study.json", epsilon="50", cap="50")
    assert code == 1
    assert "does not fit the allowance of st-anna: it costs more than epsilon 3.99 at order 4" in err


def test_the_compared_fingerprint_is_held_to(officer: Officer) -> None:
    code, out, _ = grant(officer, coordinator=fingerprint(COORDINATOR.public))
    assert code == 0
    assert "as you gave it" in out


def test_a_changed_or_unsigned_study_is_found(officer: Officer) -> None:
    document = Document.read(Path("tiny.study.json"), "study")
    body = {**document.body, "rounds": {**document.body["rounds"], "count": 5}}
    replace(document, body=body).write(Path("changed.json"))
    STUDY.document().write(Path("unsigned.json"))
    assert "A signature does not match" in grant(officer, "changed.json")[2]
    assert "Nobody signed this study" in grant(officer, "unsigned.json")[2]


def test_a_study_without_noise_needs_no_grant(officer: Officer) -> None:
    study(mode="none").document().signed_by(COORDINATOR).write(Path("public.json"))
    code, _, err = grant(officer, "public.json")
    assert code == 1
    assert "no noise" in err


@pytest.mark.parametrize("changes", [("--order", "7"), ("--epsilon", "0.001"), ("--delta", "1"), ("--epsilon", "x")])
def test_an_allowance_that_decides_nothing_is_refused(officer: Officer, changes: tuple[str, str]) -> None:
    code, _, err = officer("allow", "--site", SITE, *changes, "--out", "a.json")
    assert code == 1
    assert "An entry cannot stand" in err
    assert not Path("a.json").exists()


def test_without_an_identity_the_error_says_what_to_do(officer: Officer) -> None:
    code, _, err = officer("--home", "elsewhere", "allow", "--site", SITE, "--out", "a.json")
    assert code == 1
    assert "consilium-officer init FOLDER" in err


def test_a_serial_is_never_used_twice(officer: Officer) -> None:
    """Even when the copy of the last paper was written and the command then died."""
    office = Office(Path("officer"))
    first = office.grant(STUDY, SITE, "3", "8", "2100-01-31", NOW)
    second = office.grant(STUDY, SITE, "3", "8", "2100-01-31", NOW)
    assert (first.serial, second.serial) == (1, 2)
    with pytest.raises(ConsiliumError, match="would have expired"):
        office.grant(STUDY, SITE, "3", "8", "2100-01-31", NOW + timedelta(days=40_000))
    assert office.grant(STUDY, SITE, "3", "8", "2100-01-31", NOW).serial == 3


def test_a_paper_that_cannot_be_written_where_it_was_wanted_is_signed_and_its_copy_is_named(officer: Officer) -> None:
    """Its serial is used, and later grants are held against it, so the officer must know that it is there."""
    code, _, err = officer("allow", "--site", SITE, "--out", "nowhere/a.json")
    assert code == 1
    assert "nowhere/a.json" in err
    copy = Path(err.replace("\n", "").partition("Hand out its copy: ")[2].strip().rstrip("."))
    assert Allowance.of(Document.read(copy, Allowance.KIND)).serial == 1
    assert "serial 1" in err
