"""`consilium-site` as an operator meets it: joining, deciding, connecting images, starting and stopping."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
from PIL import Image as Pillow
from rich.console import Console
from typer.main import get_command

from client import enrolment, link_state
from client.agent import agent_pb2 as pb
from client.cli import app
from client.commands.data import _guessed, _summarised
from client.commands.models import _found
from client.commands.study import refusals
from client.home import SiteHome
from client.link_state import LinkState, Trouble
from client.supervisor import Part, Supervisor, separate
from privacy.errors import ConsiliumError
from privacy.identity import Document, Identity, fingerprint
from privacy.roster import Enrolment, Roster, enrol
from privacy.study import Study
from privacy.study_text import template
from privacy.terminal import out, run
from tests.client.site_kit import LIVENESS, REPOSITORY, Link, child_environment, new_site, until

Site = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Link:
    """A coordinator that is not reachable: only its documents are."""
    link = Link(tmp_path_factory.mktemp("link"), port=1)
    link.prepare()
    return link


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, link: Link) -> SiteHome:
    return new_site(tmp_path_factory.mktemp("site"), link)


@pytest.fixture
def site(capsys: pytest.CaptureFixture[str]) -> Site:
    """site(home, "status") -> exit code, standard output, standard error."""

    def call(home: SiteHome, *arguments: str) -> tuple[int, str, str]:
        code = run(app, "consilium-site", ["--home", str(home.root), *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def node(home: SiteHome) -> Iterator[subprocess.Popen[bytes]]:
    """The node, started by the command."""
    command = [sys.executable, "-m", "client.cli", "--home", str(home.root), "start"]
    with open(home.root / "start.log", "ab") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=child_environment(), stderr=log)
    until(home.local_socket.exists, "the agent's door is open", (home.root / "start.log").read_text)
    until(lambda: link_state.connector_alive(home), "the connector runs", (home.root / "start.log").read_text)
    yield process
    process.terminate()
    assert process.wait(LIVENESS) == 0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Path:
    """A signed study as a file."""
    text = template("chest", ["st-anna"]).replace("densenet-small", "plain-cnn").replace("[64, 64]", "[16, 16]")
    read = Study.from_toml(text)
    read = read.model_copy(update={"initial": read.initial.model_copy(update={"sha256": "ab" * 32})})
    path = tmp_path_factory.mktemp("study") / "chest.study.json"
    read.document().signed_by(link.identity).write(path)
    return path


def commands() -> list[str]:
    """Every command line that has a help page of its own."""

    def walk(command: object, name: str) -> Iterator[str]:
        yield name
        for sub, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{name} {sub}".strip())

    return list(walk(get_command(app), ""))


def own_text(words: list[str]) -> str:
    command = get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    return command.help or ""


@pytest.mark.parametrize("name", commands())
def test_each_help_page_says_what_for_who_and_how(name: str, site: Site, tmp_path: Path) -> None:
    code, out, _ = site(SiteHome(tmp_path), *name.split(), "--help")
    assert code == 0
    assert "Usage" in out
    text = own_text(name.split())
    if name in {"study", "data", "models"}:
        return
    assert "operator" in text
    assert "Example: consilium-site" in text


def test_init_shows_the_coordinators_fingerprint_in_big_letters(tmp_path: Path, link: Link, site: Site) -> None:
    home = SiteHome(tmp_path / "site")
    code, out, _ = site(home, "init", "st-anna", "--consortium", str(link.consortium(tmp_path)))
    assert code == 0
    assert fingerprint(link.identity.public) in out
    assert "Compare it by telephone" in out
    for line in enrolment.big(link.identity.public):
        assert line in out


def test_enrol_writes_a_file_that_the_coordinator_can_read(tmp_path: Path, link: Link, site: Site) -> None:
    home = new_site(tmp_path, link)
    path = tmp_path / "st-anna.enrol.json"
    code, out, _ = site(home, "enrol", "--out", str(path))
    enrolled = Enrolment.verified(Document.read(path, "enrolment"))
    assert (code, enrolled.site) == (0, "st-anna")
    assert fingerprint(enrolled.identity) in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status"], ["There is no site here", "consilium-site init"]),
        (["enrol"], ["There is no site here", "consilium-site init"]),
        (["start"], ["There is no site here", "consilium-site init"]),
        (["preflight"], ["There is no site here", "consilium-site init"]),
        (["init", "st-anna", "--consortium", "nowhere.json"], ["The file cannot be read: nowhere.json"]),
        (["init", "St Anna", "--consortium", "x"], ["This cannot be a site's name: St Anna"]),
    ],
)
def test_without_a_site_the_error_says_what_to_do(
    tmp_path: Path, site: Site, arguments: list[str], words: list[str]
) -> None:
    code, out, err = site(SiteHome(tmp_path / "none"), *arguments)
    assert (code, out) == (1, "")
    assert all(word in err for word in words)
    assert "→" in err


@pytest.mark.parametrize(
    "arguments", [["study", "list"], ["study", "approve"], ["data", "list"], ["data", "check", "x"], ["models", "list"]]
)
def test_with_the_agent_down_the_error_says_to_start_it(
    tmp_path: Path, link: Link, site: Site, arguments: list[str]
) -> None:
    code, _, err = site(new_site(tmp_path, link), *arguments)
    assert code == 1
    assert "The agent does not answer" in err
    assert "→ Start the site's node: `consilium-site start`." in err


def test_a_wrong_command_line_is_exit_code_2(home: SiteHome, site: Site) -> None:
    assert site(home, "status", "--nonsense")[0] == 2


def test_settings_that_are_wrong_are_named(tmp_path: Path, link: Link, site: Site) -> None:
    home = new_site(tmp_path, link)
    home.config_file.write_text(home.config_file.read_text().replace("localhost:1", "localhost"))
    code, _, err = site(home, "status")
    assert code == 1
    assert "site.toml" in err
    assert "host:port" in err


def test_status_works_with_both_processes_down(tmp_path: Path, link: Link, site: Site) -> None:
    home = new_site(tmp_path, link)
    code, out, _ = site(home, "status")
    assert code == 0
    assert out.count("Start") == 2
    assert "not running" in out


def test_status_shows_why_the_connector_is_refused(tmp_path: Path, link: Link, site: Site) -> None:
    home = new_site(tmp_path, link)
    trouble = Trouble(what="The SuperLink does not accept this site", subject="x:1", remedy="Enrol.", at="2030")
    link_state.write(home, LinkState(superlink="x:1", phase="waiting", since="2030", network=trouble))
    lock = link_state.connector_lock(home)
    assert lock.acquire()
    out = site(home, "status")[1]
    lock.release()
    assert "does not accept this site" in out
    assert "→ Enrol." in out
    assert "not running" in site(home, "status")[1]


def test_a_study_can_be_reviewed_from_a_file_without_a_node(
    tmp_path: Path, link: Link, site: Site, study: Path
) -> None:
    code, out, _ = site(new_site(tmp_path, link), "study", "review", "--file", str(study))
    assert code == 0
    assert "NO differential privacy" in out
    assert Document.read(study, "study").digest in re.sub(r"\s", "", out)


def test_a_study_of_another_coordinator_is_refused(tmp_path: Path, link: Link, site: Site, study: Path) -> None:
    stranger = tmp_path / "stranger.json"
    Document("study", Document.read(study, "study").body).signed_by(Identity.generate()).write(stranger)
    code, _, err = site(new_site(tmp_path, link), "study", "review", "--file", str(stranger))
    assert code == 1
    assert "A signature does not match" in err


@pytest.mark.usefixtures("node")
def test_a_whole_day_by_files(home: SiteHome, link: Link, site: Site, study: Path, tmp_path: Path) -> None:
    """Images in, the study in as a file, reviewed, approved, the approval out as a file, withdrawn."""
    dice = np.random.default_rng(1)
    np.savez(tmp_path / "images.npz", images=dice.integers(0, 255, (40, 16, 16), np.uint8), labels=np.arange(40) % 2)
    code, out, err = site(home, "data", "connect", "archive", str(tmp_path / "images.npz"), "--one-image-per-patient")
    assert code == 0, err
    assert "One image is one patient" in out
    assert "not checked" in site(home, "data", "list")[1]

    assert site(home, "study", "import", str(study))[0] == 0
    out = site(home, "study", "review")[1]
    assert "Decision so far: pending" in out
    page = tmp_path / "archive.html"
    code, out, err = site(home, "data", "check", "archive", "--report", str(page))
    assert code == 0, err
    assert "40 images of 40 patients, 0 left out" in out
    assert "each study splits" not in out, "a study is here, and the sides are its own"
    assert "Report, for this site only" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert page.stat().st_mode & 0o077 == 0
    code, _, err = site(home, "data", "check", "archive", "--report", str(tmp_path / "gone" / "r.html"))
    assert code == 1
    assert "The report cannot be copied" in err
    assert re.search(r"side +train +validation +test *\nimages +\d+ +\d+ +\d+ *\npatients +\d+ +\d+ +\d+ *\n", out)
    assert re.search(r"\n\w+ +\d+ \(\d+ %\) +\d+", out), "a line for each class"
    assert "own_split" not in site(home, "data", "show", "archive")[1]

    approval = tmp_path / "approval.json"
    code, out, err = site(home, "study", "approve", "chest", "--out", str(approval))
    assert code == 0, err
    signed = Document.read(approval, "approval")
    signed.verify(Identity.load(home.identity_key).public)
    assert signed.body["study"] == Document.read(study, "study").digest
    assert "approved" in site(home, "study", "list")[1]
    assert site(home, "study", "withdraw", "chest")[0] == 0
    assert "withdrawn" in site(home, "status")[1]
    assert site(home, "data", "forget", "archive")[0] == 0
    assert "No model yet" in site(home, "models", "list")[1]


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "review", "unheard-of"], "There is no such study: unheard-of"),
        (["data", "check", "unheard-of"], "There is no such data source: unheard-of"),
        (["data", "show", "unheard-of"], "There is no such data source: unheard-of"),
        (["data", "connect", "x1", "/nowhere", "--labels", "/nowhere.csv"], "There is no such image folder: /nowhere"),
        (["data", "connect", "x1", "/nowhere.npz", "--class", "pos"], "--class needs two words: pos"),
        (["data", "connect", "x1", "/nowhere", "--kind", "tiff"], "The source declaration is not valid"),
        (["models", "show", "unheard-of"], "There is no such model: unheard-of"),
        (["study", "import", "/nowhere"], "The file cannot be read: /nowhere"),
    ],
)
def test_what_does_not_exist_is_named(home: SiteHome, site: Site, arguments: list[str], words: str) -> None:
    code, _, err = site(home, *arguments)
    assert code == 1
    assert words in err
    assert "→" in err


@pytest.mark.usefixtures("node")
def test_a_check_that_finds_nothing_usable_shows_why_and_fails(home: SiteHome, site: Site, tmp_path: Path) -> None:
    Pillow.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "001.png")
    (tmp_path / "labels.csv").write_text("file,label\n1,a\n")
    command = ["data", "connect", "prints", str(tmp_path), "--labels", str(tmp_path / "labels.csv")]
    assert site(home, *command, "--one-image-per-patient")[0] == 0
    code, out, err = site(home, "data", "check", "prints")
    assert site(home, "data", "forget", "prints")[0] == 0
    assert code == 1
    assert "The source holds no usable image: prints" in err
    assert "not in the label table" in out
    assert "The table names “1” where the folder has “001.png”" in out
    assert "Report, for this site only" in out


@pytest.mark.usefixtures("node")
def test_preflight_shows_a_table_and_fails_when_there_is_a_problem(home: SiteHome, site: Site) -> None:
    code, out, err = site(home, "preflight")
    assert code == 1
    assert "Nobody listens there" in out
    assert re.search(r"agent +network +ok", out)
    assert "problem" in err


@pytest.mark.usefixtures("node")
def test_a_second_node_in_the_same_home_is_refused(home: SiteHome) -> None:
    said: list[str] = []
    supervisor = Supervisor(home, [Part("agent")], said.append)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConsiliumError, match="is running already"):
        patch.setattr("client.supervisor.GRACE", 0.2)
        supervisor.run()
    assert said == []


def test_a_renewed_identity_is_used_once_its_roster_is_imported(
    home: SiteHome, link: Link, site: Site, node: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    empty = Roster(consortium="heart", version=0, coordinator=link.identity.public, sites=())
    first = enrol(empty, Enrolment.verified(enrolment.enrolment(home)), now)
    path = tmp_path / "renewed.json"
    assert site(home, "enrol", "--renew-identity", "--out", str(path))[0] == 0
    renewed = Enrolment.verified(Document.read(path, "enrolment"))
    enrol(first, renewed, now).signed(link.identity).write(tmp_path / "roster.json")
    before = agent_of(node)
    code, out, err = site(home, "enrol", "--roster", str(tmp_path / "roster.json"))
    assert code == 0, err
    assert "The new identity is in use" in out
    assert Identity.load(home.identity_key).public == renewed.identity
    until(lambda: agent_of(node) not in {None, before}, "the agent starts again", (home.root / "start.log").read_text)


def test_a_killed_supervisor_leaves_nothing_behind_and_the_next_one_starts(tmp_path: Path, link: Link) -> None:
    home = new_site(tmp_path, link)
    command = [sys.executable, "-m", "client.cli", "--home", str(home.root), "start", "--connector-only"]
    for signal_number in (signal.SIGKILL, signal.SIGINT):
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, stderr=log)
        until(lambda: link_state.connector_alive(home), "the connector runs", (tmp_path / "log").read_text)
        (child,) = psutil.Process(process.pid).children()
        process.send_signal(signal_number)
        process.wait(LIVENESS)
        until(lambda: not link_state.connector_alive(home), "the connector has ended")
        until(lambda pid=child.pid: not psutil.pid_exists(pid), "its process is gone")  # type: ignore[misc]
    assert process.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to other users")
def test_under_root_each_process_owns_only_its_folder(tmp_path: Path, link: Link) -> None:
    home = new_site(tmp_path, link)
    parts = [Part("agent", "nobody"), Part("connector", "daemon")]
    with pytest.raises(ConsiliumError, match="could not reach the agent"):
        separate(home, parts)
    with pytest.raises(ConsiliumError, match="There is no such user"):
        separate(home, [Part("agent", "nobody-at-all")])
    home.write_config(home.config().model_copy(update={"outward_group": "daemon"}))
    separate(home, parts)
    owners = {path: pwd.getpwuid(path.stat().st_uid).pw_name for path in (home.identity_key, home.node_key)}
    assert owners == {home.identity_key: "nobody", home.node_key: "daemon"}
    assert home.outward_socket.parent.stat().st_mode & 0o777 == 0o750
    assert home.agent.stat().st_mode & 0o777 == 0o700


def agent_of(node: subprocess.Popen[bytes]) -> int | None:
    for child in psutil.Process(node.pid).children():
        with suppress(psutil.Error):
            if "client.agent" in child.cmdline():
                return child.pid
    return None


def test_the_commands_need_no_learning_library() -> None:
    """A command answers at once: torch and MONAI belong to the agent."""
    code = "import sys, client.cli; print(sorted({'torch', 'monai', 'pydicom'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert isinstance(app, typer.Typer)


def test_the_kind_of_a_folder_is_guessed_or_said_to_be_a_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "images.npz"
    packed.write_bytes(b"")
    assert _guessed(packed, None) == ("npz", packed)
    assert _guessed(tmp_path, None) == ("npz", packed)
    assert capsys.readouterr().err == ""
    (tmp_path / "index.csv").write_text("label\n")
    assert _guessed(tmp_path, tmp_path / "index.csv") == ("npz", packed)
    assert capsys.readouterr().err == ""
    assert _guessed(tmp_path, None) == ("npz", packed)
    assert "index.csv lies beside images.npz and is not used" in capsys.readouterr().err
    (tmp_path / "more.npz").write_bytes(b"")
    with pytest.raises(ConsiliumError, match="several npz files"):
        _guessed(tmp_path, None)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.PNG").write_bytes(b"")
    assert _guessed(tmp_path, None) == ("images", tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "IM0001").write_bytes(b"")
    assert _guessed(plain, None) == ("dicom", plain)
    assert "taken for DICOM" in capsys.readouterr().err


def test_a_refusal_is_shown_in_words_with_what_to_do() -> None:
    studies = [
        pb.StudyLine(name="chest", last="train refused: no-grant"),
        pb.StudyLine(name="lung", last="slot 3: answer stored"),
        pb.StudyLine(name="knee", last="train refused: of-another-release"),
    ]
    (said,) = refusals(studies)
    assert said.startswith("chest (no-grant): The privacy officer of this site has not granted the study")
    assert "consilium-site grant import FILE" in said


def test_a_check_without_a_study_says_that_each_study_splits(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(study: str, **images: int) -> str:
        split = {side: {"images": images.get(side, 0), "patients": 0} for side in ("train", "validation", "test")}
        _summarised(out(), "archive", json.dumps({"images": 9, "patients": 9, "study": study, "split": split}))
        return capsys.readouterr().out

    assert "each study splits the patients by itself" in shown("", train=9)
    assert "splits" not in shown("", train=6, test=3), "the source brings its own sides"
    assert "splits" not in shown("chest", train=9)


def test_many_classes_fit_a_narrow_terminal_and_one_patient_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["actinic keratosis", "basal cell carcinoma", "benign keratosis", "dermatofibroma", "melanoma", "naevus",
             "vascular"]  # fmt: skip
    sides = {"train": 60, "validation": 0, "test": 0}
    split = {
        side: {"images": images, "patients": images // 60, "classes": dict.fromkeys(names, images // 7)}
        for side, images in sides.items()
    }
    told = json.dumps({"images": 60, "patients": 1, "split": split, "on_two_sides": 1})
    _summarised(Console(width=80, highlight=False), "skin", told)
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        assert sum(re.fullmatch(rf"{name} +8 \(14 %\) +0 +0 *", line) is not None for line in lines) == 1
    said = " ".join(" ".join(lines).split())
    assert "60 images of 1 patient, 0 left out" in said
    assert "all 60 images count as one patient's" in said
    assert "1 pair of equal or nearly equal images stands on two sides" in said
    _summarised(Console(width=80), "skin", json.dumps({"images": 1, "patients": 1}))
    assert "Mind" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chest", "Chest X-rays", "ab12"])
def test_a_model_is_found_by_name_title_or_hash(name: str) -> None:
    line = pb.ModelLine(study="ab12" * 16, title="Chest X-rays")

    class Door:
        def models(self) -> list[pb.ModelLine]:
            return [line, pb.ModelLine(study="cd34" * 16, title="Knees")]

        def status(self) -> pb.StatusReply:
            return pb.StatusReply(studies=[pb.StudyLine(study=line.study, name="chest")])

    assert _found(Door(), name) == line  # type: ignore[arg-type]
