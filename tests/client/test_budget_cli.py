"""`consilium-site officer, grant, budget` against a running agent: one officer, papers, what was spent, and a stop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.agent.store import Store
from client.cli import app
from client.home import SiteHome
from privacy.identity import Identity, fingerprint
from privacy.officer import Office
from privacy.terminal import run
from tests.client.agent.bed import Bed, Process, make_bed
from tests.privacy.grant_kit import NOW, SITE
from tests.study_kit import Sections

Site = Callable[..., tuple[int, str, str]]
NOISED: Sections = {
    "aggregation": {"weights": "equal"},
    "privacy": {"mode": "per-site", "noise_multiplier": 4, "evaluation_noise": 8},
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """A site's home with a study that has noise of its own."""
    return make_bed(tmp_path_factory.mktemp("site") / "s", **NOISED)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Office:
    office = Office(tmp_path_factory.mktemp("office"))
    office.create()
    return office


@pytest.fixture(scope="module")
def agent(bed: Bed) -> Iterator[list[Process]]:
    """The agent as a process; a test may end it and append the next one."""
    started = [Process(bed)]
    yield started
    if started[-1].process.poll() is None:
        started[-1].end()


@pytest.fixture
def site(bed: Bed, capsys: pytest.CaptureFixture[str]) -> Site:
    """site("budget") -> exit code, output in one line, errors."""

    def call(*arguments: str, home: SiteHome = bed.home) -> tuple[int, str, str]:
        code = run(app, "consilium-site", ["--home", str(home.root), *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return code, re.sub(r"\s+", " ", said.out), said.err

    return call


def paper(office: Office, bed: Bed, path: Path, kind: str = "grant") -> Path:
    issued = (
        office.allow(SITE, "8", "1e-6", 4)
        if kind == "allowance"
        else office.grant(bed.study, SITE, "10", "10", "2100-01-31", NOW)
    )
    issued.document.write(path)
    return path


@pytest.mark.parametrize(
    "arguments", [["officer", "trust", "ab" * 32], ["grant", "import", "{file}"], ["grant", "revoke", "x"], ["budget"]]
)
def test_with_the_agent_down_the_error_says_to_start_it(tmp_path: Path, site: Site, arguments: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    words = [word.format(file=tmp_path / "file") for word in arguments]
    code, _, err = site(*words, home=SiteHome(tmp_path))
    assert code == 1
    assert "consilium-site start" in err


def test_B6_from_the_officers_key_to_a_revoked_grant(
    bed: Bed, office: Office, agent: list[Process], site: Site, tmp_path: Path
) -> None:
    assert "No privacy officer is trusted yet" in site("budget")[1]
    allowance = paper(office, bed, tmp_path / "a.json", "allowance")
    assert "First: `consilium-site officer trust KEY`" in site("grant", "import", str(allowance))[2]

    code, out, err = site("officer", "trust", str(office.public))
    assert code == 0, err
    assert fingerprint(office.public.read_text()) in out
    code, _, err = site("officer", "trust", "ab" * 32)
    assert code == 1
    assert "Another privacy officer is trusted here already" in err
    assert site("officer", "trust", office.public.read_text().strip())[0] == 0

    assert "No allowance yet" in site("budget")[1]
    (tmp_path / "tiny.json").write_bytes(bed.signed_study)
    code, _, err = site("grant", "import", str(tmp_path / "tiny.json"))
    assert code == 1
    assert "no paper of a privacy officer" in err
    assert "tiny.json" in err
    assert "hostile" not in err, "a person took the wrong file; nothing came over the wire"
    code, out, err = site("grant", "import", str(allowance))
    assert code == 0, err
    assert "epsilon 8 at delta 0.000001, decided at order 4" in out
    out = site("budget")[1]
    assert "No study with noise has begun" in out
    assert "0 patient(s) charged so far" in out

    assert site("study", "import", str(tmp_path / "tiny.json"))[0] == 0
    images = bed.home.root / "images.npz"
    assert site("data", "connect", "archive", str(images), "--one-image-per-patient")[0] == 0
    code, out, err = site("study", "approve", "tiny")
    assert code == 0, err
    assert "Mind: The privacy officer's grant for this study is missing" in out
    assert "Until then nothing is computed." in out
    granted = paper(office, bed, tmp_path / "g.json")
    code, out, err = site("grant", "import", str(granted))
    assert code == 0, err
    assert bed.hash in out
    assert f"{bed.hash[:16]} open 10 10" in site("budget")[1]
    assert "grant for this study" not in site("study", "approve", "tiny")[1]

    assert agent[-1].end() == 0
    store = Store(bed.home.agent / "agent.db")
    purse = store.purse(SITE)
    purse.verify_whole((bed.home.agent / "pseudonym.key").read_bytes())
    purse.reserve(bed.study, {"ada": "train", "bob": "train", "cyd": "test"})
    purse.charge(bed.study, 1, "train", 1, "ab" * 32)
    store.close()
    agent.append(Process(bed))

    picture = tmp_path / "budget.png"
    code, out, err = site("budget", "--plot", str(picture))
    assert code == 0, err
    assert "tiny reserved train 2 3/12 9" in out
    assert "tiny reserved test 1 0/2 2" in out
    assert "3 patient(s) charged so far" in out
    assert re.search(r"0 to 10 % spent █+ \d", out)
    assert "a patient never in a study 100%" in out
    assert "ada" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    code, out, err = site("grant", "revoke", "tiny")
    assert code == 0, err
    assert f"Revoked: the grant for study {bed.hash[:16]}" in out
    assert "revoked" in site("budget")[1]
    assert "no grant that could be revoked" in site("grant", "revoke", bed.hash[:12])[2]
    assert "used or revoked here before" in site("grant", "import", str(granted))[2]


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["officer", "trust", "/nowhere"], "neither a key nor a file that can be read: /nowhere"),
        (["officer", "trust", __file__], "This is not an officer's key"),
        (["grant", "import", "/nowhere"], "The file cannot be read: /nowhere"),
        (["grant", "revoke", "unheard-of"], "There is no such study: unheard-of"),
        (["grant", "revoke", "unheard-of"], "was not offered here yet has no name here: give its hash"),
    ],
)
def test_what_does_not_exist_is_named(site: Site, arguments: list[str], words: str) -> None:
    code, _, err = site(*arguments)
    assert code == 1
    assert words in err
    assert "→" in err


@pytest.mark.usefixtures("agent")
def test_rubbish_and_strangers_papers_are_refused(site: Site, office: Office, tmp_path: Path) -> None:
    site("officer", "trust", str(office.public), "--replace")
    (tmp_path / "rubbish").write_bytes(b"\xff{}")
    assert "no paper of a privacy officer" in site("grant", "import", str(tmp_path / "rubbish"))[2]
    (tmp_path / "strange").mkdir()
    stranger = Office(tmp_path / "strange")
    stranger.create()
    stranger.allow(SITE, "8", "1e-6", 4).document.write(tmp_path / "s.json")
    assert "A signature does not match" in site("grant", "import", str(tmp_path / "s.json"))[2]
    office.allow("st-bona", "8", "1e-6", 4).document.write(tmp_path / "b.json")
    assert "for another hospital: st-bona" in site("grant", "import", str(tmp_path / "b.json"))[2]
    assert Identity.load(stranger.key).public not in site("budget")[1]
