"""`consilium-coordinator study plan`, as a person runs it, and the gate that stands before a signature."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privacy.accounting import Event, events
from privacy.claims import claim, epsilon_pld, epsilon_rdp
from privacy.identity import Identity
from privacy.roster import Enrolment, expiry
from privacy.study import Study
from privacy.study_text import S8, explain, template
from privacy.terminal import run
from server import second_opinion
from server.cli import app
from server.commands import planning, signing

torch.set_num_threads(1)
Cli = Callable[..., tuple[int, str, str]]
SITES = ["st-anna", "st-bona", "st-cara"]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(app, "consilium-coordinator", arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def noised() -> str:
    """The template with its noise switched on, as its own comments say it is done."""
    text = template("chest", SITES)
    for old, new in {
        'mode = "none"   ': 'mode = "shared" ',
        'mode = "off"': 'mode = "on"',
        'name = "adamw"': 'name = "sgd"',
        "local_steps = 20": "local_steps = 1",
        "count = 10\n": "count = 200\n",
        'weights = "examples"': 'weights = "equal"',
        "minimum_sites = 2": "minimum_sites = 3",
        'name = "densenet-small"': 'name = "resnet-small"',
        "size = [64, 64]": "size = [16, 16]",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    path = tmp_path / "chest.toml"
    path.write_text(noised())
    return path


def test_the_template_says_how_noise_is_switched_on(draft: Path) -> None:
    study = Study.from_toml(draft.read_text())
    assert study.privacy.mode == "shared"
    named = set(re.findall(r"^# (\w+) = ", template("chest", SITES).split("[privacy]")[1].split("[secagg]")[0], re.M))
    assert named == set(type(study.privacy).model_fields) - {"mode"}
    for line in re.findall(
        r"^# (\w+ = [^#]+)", template("chest", SITES).split("[privacy]")[1].split("[secagg]")[0], re.M
    ):
        entry, value = line.strip().split(" = ")
        shown = Study.from_toml(draft.read_text().replace("[privacy]\n", f"[privacy]\n{entry} = {value}\n"))
        assert shown.privacy == study.privacy, f"{line} is the default"


def test_plan_shows_both_tiers_every_role_and_what_it_means(cli: Cli, draft: Path) -> None:
    code, out, err = cli("study", "plan", "chest.toml")
    assert (code, err) == (0, "")
    made = claim(Study.from_toml(draft.read_text()))
    for promise in made.promises:
        assert re.search(rf"{promise.role} .*{re.escape(promise.epsilon_rdp)}.*{re.escape(promise.epsilon_pld)}", out)
    for said in ("binds, RDP", "ideal, PLD", "2: sums broken open", "at order 4", "added up", "1.22 times", "█"):
        assert said in out


def test_plan_finds_the_noise_says_the_line_and_leaves_the_file(cli: Cli, draft: Path) -> None:
    before = draft.read_bytes()
    code, out, _ = cli("study", "plan", "chest.toml", "--epsilon", "3")
    assert code == 0
    found = re.search(r"^  noise_multiplier = (\S+)$", out, re.M)
    assert found is not None
    assert "evaluation_noise" not in out.split("This holds")[1]
    assert draft.read_bytes() == before
    study = Study.from_toml(before.decode().replace("[privacy]\n", f"[privacy]\nnoise_multiplier = {found[1]}\n"))
    assert 2.99 < epsilon_rdp(events(study, 1)["train"], study.privacy.delta) <= 3


def test_plan_writes_the_noise_and_nothing_else(cli: Cli, draft: Path) -> None:
    before = draft.read_text().split("\n")
    code, out, _ = cli("study", "plan", "chest.toml", "--epsilon", "1", "--write")
    assert code == 0
    assert "Written into chest.toml: noise_multiplier = " in out
    after = draft.read_text().split("\n")
    assert len(after) == len(before)
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [re.sub(r"[\d.]+", "…", old).split(" #")[0].strip("# ") for old, _ in changed] == [
        "noise_multiplier = …",
        "evaluation_noise = …",
    ]
    assert all(old.count("#") - 1 == new.count("#") for old, new in changed), "comments stay"
    study = Study.from_toml(draft.read_text())
    assert all(0.99 < epsilon_rdp(event, study.privacy.delta) <= 1 for event in events(study, 1).values())
    again = draft.read_text()
    assert cli("study", "plan", "chest.toml", "--epsilon", "1", "--write")[0] == 0
    assert draft.read_text() == again


def test_a_draft_without_the_entry_gets_it_under_its_mode() -> None:
    text = '[privacy]  # noise\nmode = "shared"\n[secagg]\nmode = "on"\n'
    lines = text.split("\n")
    planning._write(lines, 0, 2, "noise_multiplier", "1.5")
    assert lines[:4] == ["[privacy]  # noise", 'mode = "shared"', "noise_multiplier = 1.5", "[secagg]"]


def test_a_draft_that_cannot_be_edited_by_lines_says_what_to_write(cli: Cli, draft: Path) -> None:
    text = draft.read_text()
    start, end = text.index("[privacy]"), text.index("[secagg]")
    draft.write_text('privacy = { mode = "shared" }\n' + text[:start] + text[end:])
    code, _, err = cli("study", "plan", "chest.toml", "--epsilon", "3", "--write")
    assert code == 1
    assert "Write it yourself under [privacy]: noise_multiplier = " in err


def test_plan_draws(cli: Cli, draft: Path, tmp_path: Path) -> None:
    from PIL import Image

    assert cli("study", "plan", "chest.toml", "--plot", "epsilon.png")[0] == 0
    with Image.open(tmp_path / "epsilon.png") as picture:
        assert min(picture.size) > 400
        assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 5
    code, _, err = cli("study", "plan", "chest.toml", "--plot", "nowhere/epsilon.png")
    assert code == 1
    assert "There is no such folder" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--write",), "nothing to write"),
        (("--epsilon", "0.001"), "No noise is enough"),
    ],
)
def test_plan_teaches(cli: Cli, draft: Path, arguments: tuple[str, ...], said: str) -> None:
    draft.write_text(
        draft.read_text()
        .replace("count = 200", "count = 100000")
        .replace("# sampling_rate = 0.05", "sampling_rate = 1")
    )
    code, _, err = cli("study", "plan", "chest.toml", *arguments)
    assert code == 1
    assert said in err


def test_plan_on_a_draft_without_noise_says_how_to_switch_it_on(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "chest.toml").write_text(template("chest", SITES))
    code, _, err = cli("study", "plan", "chest.toml")
    assert code == 1
    assert "has no noise" in err
    assert 'mode = "shared"' in err


def test_a_claim_is_ready_while_one_waits(draft: Path) -> None:
    study = Study.from_toml(draft.read_text())
    claim(study)  # loads the libraries
    other = study.model_copy(update={"rounds": study.rounds.model_copy(update={"count": 1000})})
    began = time.process_time()
    claim(other)
    assert time.process_time() - began < 6  # 1 to 2 s on a quiet machine


# ---- in words ------------------------------------------------------------------------------------------------


def test_n7_n8_a_noised_study_is_explained_with_its_unit_and_its_factor(draft: Path) -> None:
    shown = dict(explain(Study.from_toml(draft.read_text())))
    for said in (
        "Unit: one patient at one site",
        "added or removed",
        "over k sites group privacy applies",
        "C = 1 ",
        "σ = 1 ",
        "q = 0.05",
        "T = 205 noised steps",
        "δ = 0.000001",
        "1.22 times",
        "study plan",
    ):
        assert said in shown["Privacy"], said
    assert "number" not in shown["Leaves the site"]
    assert S8 not in shown["Secure aggregation"]


def test_n8_per_site_noise_says_the_root_of_the_sites(draft: Path) -> None:
    text = (
        draft.read_text()
        .replace('mode = "shared"', 'mode = "per-site"')
        .replace("local_steps = 1 ", "local_steps = 7 ")
    )
    shown = dict(explain(Study.from_toml(text)))
    assert "1.73 times" in shown["Privacy"]
    assert "to each of its steps" in shown["Privacy"]


# ---- the gate at signing -------------------------------------------------------------------------------------


@pytest.fixture
def enrolled(cli: Cli, tmp_path: Path) -> None:
    assert cli("init", "lungs", "--host", "fl.example.org")[0] == 0
    for name in SITES:
        key = ec.generate_private_key(ec.SECP384R1()).public_key()
        node = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        who = Identity.generate()
        enrolment = Enrolment(
            consortium="lungs", site=name, identity=who.public, node_key=node, not_after=expiry(datetime.now(UTC), 100)
        )
        enrolment.signed(who).write(tmp_path / f"{name}.json")
        assert cli("sites", "add", f"{name}.json", "--yes")[0] == 0


@pytest.mark.usefixtures("enrolled")
def test_b4_sign_asks_the_second_accountant_and_refuses_what_it_contradicts(
    cli: Cli, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(event: Event, delta: str) -> float:
        return epsilon_pld(event, delta) * 0.9

    with monkeypatch.context() as sabotage:
        sabotage.setattr(signing, "check", functools.partial(second_opinion.check, opinion=sabotaged))
        code, _, err = cli("study", "sign", "chest.toml")
        assert code == 1
        assert "Two accountants disagree" in err
        assert not (tmp_path / "chest.study.json").exists()
        assert "No study is signed yet" in cli("study", "status")[1]
    code, _, err = cli("study", "sign", "chest.toml")
    assert (code, err) == (0, "")
    code, out, err = cli("study", "plan", "chest.study.json", "--epsilon", "3")
    assert (code, err) == (0, "")
    assert "noise_multiplier = " in out
    assert cli("study", "plan", "chest.study.json", "--epsilon", "3", "--write")[0] == 1


@pytest.mark.parametrize("epsilon", ["nan", "inf", "-inf"])
def test_an_epsilon_that_is_no_number_is_refused_in_words(cli: Cli, epsilon: str) -> None:
    Path("chest.toml").write_text(noised())
    code, _, err = cli("study", "plan", "chest.toml", f"--epsilon={epsilon}")
    assert code in {1, 2}
    assert "--epsilon" in err
    assert "Traceback" not in err
