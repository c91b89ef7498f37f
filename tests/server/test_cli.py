"""The coordinator's commands, run as a person runs them, on a real home with a real registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privacy.errors import ConsiliumError
from privacy.identity import Document, Identity, fingerprint
from privacy.roster import Consortium, Enrolment, Roster, expiry
from privacy.study import Study, approval
from privacy.terminal import run
from server import tls
from server.cli import app
from server.commands import common
from server.guards import lock
from server.home import CoordinatorHome
from server.records import Outcome, OutcomeState, SlotRecord, SlotState, State
from server.registry import Registry

Cli = Callable[..., tuple[int, str, str]]
NOW = datetime.now(UTC)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CONSILIUM_COORDINATOR_HOME", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(app, "consilium-coordinator", arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def home(cli: Cli, tmp_path: Path) -> CoordinatorHome:
    assert cli("init", "lungs", "--host", "fl.example.org")[0] == 0
    return CoordinatorHome(tmp_path / "coordinator")


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def enrolment(name: str, identity: Identity | None = None, consortium: str = "lungs", days: int = 397) -> Document:
    who = identity or Identity.generate()
    body = Enrolment(
        consortium=consortium, site=name, identity=who.public, node_key=node_key(), not_after=expiry(NOW, days)
    )
    return body.signed(who)


@pytest.fixture
def sites(cli: Cli, home: CoordinatorHome, tmp_path: Path) -> dict[str, Identity]:
    """Two enrolled hospitals."""
    identities = {}
    for name in ("anna", "bruno"):
        identities[name] = Identity.generate()
        enrolment(name, identities[name]).write(tmp_path / f"{name}.json")
        assert cli("sites", "add", f"{name}.json", "--yes")[0] == 0
    return identities


def draft(name: str = "chest", **replace: str) -> str:
    from privacy.study_text import template

    text = template(name, ["anna", "bruno"]).replace('name = "densenet-small"', 'name = "resnet-small"')
    text = text.replace("size = [64, 64]", "size = [32, 32]")
    for old, new in replace.items():
        text = text.replace(old, new)
    return text


@pytest.fixture
def signed(cli: Cli, sites: dict[str, Identity], tmp_path: Path) -> str:
    (tmp_path / "chest.toml").write_text(draft())
    code, _, err = cli("study", "sign", "chest.toml")
    assert (code, err) == (0, "")
    return "chest"


# ---- founding ------------------------------------------------------------------------------------------------


def test_init_makes_a_coordinator_that_sites_can_trust(home: CoordinatorHome) -> None:
    consortium = Consortium.verified(Document.read(home.consortium_file, "consortium"))
    assert consortium.superlink == "fl.example.org:8443"
    assert consortium.coordinator == home.identity().public
    assert consortium.ca == home.ca.read_text()
    until = tls.check(home.certificate, home.certificate_key)
    assert timedelta(days=395) < until - NOW < timedelta(days=398)
    for secret in (home.identity_key, home.certificate_key, home.tls / "ca.key", home.database):
        assert secret.stat().st_mode & 0o077 == 0, secret
    with Registry(home) as registry:
        assert registry.roster()[1].sites == ()


def test_init_prints_the_fingerprint_and_what_to_do_next(cli: Cli) -> None:
    code, out, _ = cli("init", "lungs", "--host", "fl.example.org")
    assert code == 0
    assert fingerprint(CoordinatorHome(Path("coordinator")).identity().public) in out
    assert "consilium-coordinator serve" in out


def test_init_never_touches_a_folder_with_something_in_it(cli: Cli, home: CoordinatorHome) -> None:
    before = home.identity().public
    code, _, err = cli("init", "lungs", "--host", "fl.example.org")
    assert code == 1
    assert "There is something in this folder already" in err
    assert home.identity().public == before


def test_a_failed_init_leaves_no_half_coordinator(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    options = ("--cert", "cert.pem", "--key", "cert.pem", "--ca", "cert.pem")
    code, _, err = cli("init", "lungs", "--host", "fl.example.org", *options)
    assert code == 1
    assert "cannot be read" in err
    assert not (tmp_path / "coordinator").exists()


def test_init_takes_a_certificate_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "own"
    tls.create_ca(own, "hospital trust")
    tls.create_server(own, ["fl.example.org"])
    options = ("--cert", str(own / "server.pem"), "--key", str(own / "server.key"), "--ca", str(own / "ca.pem"))
    assert cli("init", "lungs", "--host", "fl.example.org", *options)[0] == 0
    made = CoordinatorHome(tmp_path / "coordinator")
    assert made.consortium().ca == (own / "ca.pem").read_text()
    assert not (made.tls / "ca.key").exists()
    code, _, err = cli("certificate", "--renew")
    assert code == 1
    assert "authority of your own" in err


@pytest.mark.parametrize(
    ("host", "foreign", "words"),
    [("other.example.org", False, "for another name"), ("fl.example.org", True, "not issued by this authority")],
)
def test_init_refuses_a_certificate_no_hospital_would_accept(
    cli: Cli, tmp_path: Path, host: str, foreign: bool, words: str
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        tls.create_ca(folder, "trust")
    tls.create_server(own, ["fl.example.org"])
    ca = (other if foreign else own) / "ca.pem"
    options = ("--cert", str(own / "server.pem"), "--key", str(own / "server.key"), "--ca", str(ca))
    code, _, err = cli("init", "lungs", "--host", host, *options)
    assert code == 1
    assert words in err


def test_certificate_renews_under_the_same_authority(cli: Cli, home: CoordinatorHome) -> None:
    before = home.certificate.read_bytes(), home.ca.read_bytes()
    assert cli("certificate", "--renew", "--days", "30")[0] == 0
    assert home.certificate.read_bytes() != before[0]
    assert home.ca.read_bytes() == before[1]


def test_the_home_may_come_from_the_environment(
    cli: Cli, home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_COORDINATOR_HOME", str(home.root))
    monkeypatch.chdir("/")
    assert cli("sites", "list")[0] == 0


# ---- sites ---------------------------------------------------------------------------------------------------


def test_adding_a_site_asks_for_its_fingerprint(
    cli: Cli, home: CoordinatorHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Identity.generate()
    enrolment("anna", identity).write(tmp_path / "anna.json")
    code, out, err = cli("sites", "add", "anna.json")
    assert code == 1  # nobody is here to be asked
    assert fingerprint(identity.public) in out
    assert "--yes" in err
    with Registry(home) as registry:
        assert registry.roster()[1].sites == ()
    monkeypatch.setattr(common.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(common.typer, "confirm", lambda *_, **__: True)
    assert cli("sites", "add", "anna.json")[0] == 0
    with Registry(home) as registry:
        assert [site.name for site in registry.roster()[1].sites] == ["anna"]


def test_the_superlink_is_told_of_each_change(cli: Cli, home: CoordinatorHome, sites: dict[str, Identity]) -> None:
    assert set(json.loads(home.nodes_file.read_text())) == {"anna", "bruno"}
    assert cli("sites", "revoke", "anna", "--yes")[0] == 0
    assert set(json.loads(home.nodes_file.read_text())) == {"bruno"}


def test_a_renewal_under_the_same_identity_needs_no_comparison(
    cli: Cli, sites: dict[str, Identity], tmp_path: Path
) -> None:
    enrolment("anna", sites["anna"]).write(tmp_path / "again.json")
    code, out, _ = cli("sites", "add", "again.json")
    assert code == 0
    assert "(renewal)" in out


def test_a_stranger_cannot_take_an_enrolled_name(cli: Cli, sites: dict[str, Identity], tmp_path: Path) -> None:
    enrolment("anna").write(tmp_path / "stranger.json")
    code, _, err = cli("sites", "add", "stranger.json", "--yes")
    assert code == 1
    assert "Another key is enrolled under this name" in err


def test_a_tampered_enrolment_is_refused(cli: Cli, home: CoordinatorHome, tmp_path: Path) -> None:
    document = enrolment("anna")
    Document(document.kind, {**document.body, "site": "bruno"}, document.signatures).write(tmp_path / "x.json")
    code, _, err = cli("sites", "add", "x.json", "--yes")
    assert code == 1
    assert "A signature does not match" in err


def test_list_show_and_roster_tell_of_sites(cli: Cli, home: CoordinatorHome, sites: dict[str, Identity]) -> None:
    cli("sites", "revoke", "bruno", "--yes")
    out = cli("sites", "list")[1]
    assert fingerprint(sites["anna"].public) in out
    assert "revoked" in out
    assert sites["anna"].public in cli("sites", "show", "anna")[1]
    assert cli("sites", "roster", "--out", "r.json")[0] == 0
    roster = Roster.verified(Document.read(Path("r.json"), "roster"), home.identity().public)
    assert [site.revoked for site in roster.sites] == [False, True]
    code, _, err = cli("sites", "roster", "--out", "r.json")
    assert code == 1
    assert "--force" in err


def test_list_warns_of_an_enrolment_that_ends_soon(cli: Cli, home: CoordinatorHome, tmp_path: Path) -> None:
    enrolment("anna", days=10).write(tmp_path / "a.json")
    cli("sites", "add", "a.json", "--yes")
    assert "anna ends in 9 days" in cli("sites", "list")[2]


def test_invite_hands_out_the_consortium_file(cli: Cli, home: CoordinatorHome) -> None:
    code, out, _ = cli("sites", "invite", "--out", "c.json")
    assert code == 0
    assert Path("c.json").read_bytes() == home.consortium_file.read_bytes()
    assert fingerprint(home.identity().public) in out


# ---- studies -------------------------------------------------------------------------------------------------


def test_a_new_draft_can_be_read_back_and_names_every_enrolled_site(cli: Cli, sites: dict[str, Identity]) -> None:
    assert cli("study", "new", "chest")[0] == 0
    assert Study.from_toml(Path("chest.toml").read_text()).sites == ("anna", "bruno")
    assert cli("study", "show", "chest.toml")[0] == 0
    assert cli("study", "new", "chest")[0] == 1  # never overwritten


def test_sign_fixes_the_weights_and_can_be_repeated(cli: Cli, home: CoordinatorHome, signed: str) -> None:
    document = Document.read(Path("chest.study.json"), "study")
    document.verify(home.identity().public)
    study = Study.from_body(document.body)
    with Registry(home) as registry:
        record = registry.study("chest")
        assert record.state is State.SIGNED
        assert record.hash == study.hash
        assert record.initial == study.initial.sha256
        from models.weights import Layout

        layout = Layout.of_state(registry.blobs.path(record.initial))
        assert registry.blobs.size(record.weights) == 4 * layout.count
    before = Path("chest.study.json").read_bytes()
    assert cli("study", "sign", "chest.toml")[0] == 0
    assert Path("chest.study.json").read_bytes() == before


def test_sign_takes_weights_of_an_earlier_model(cli: Cli, home: CoordinatorHome, signed: str) -> None:
    with Registry(home) as registry:
        first = registry.study("chest")
        source = registry.blobs.path(first.initial)
    Path("next.toml").write_text(draft("next", **{"seed = 1": "seed = 2"}))
    assert cli("study", "sign", "next.toml", "--initial", str(source))[0] == 0
    with Registry(home) as registry:
        assert registry.study("next").initial == first.initial
    Path("other.toml").write_text(draft("other", **{"resnet-small": "densenet-small"}))
    code, _, err = cli("study", "sign", "other.toml", "--initial", str(source))
    assert code == 1
    assert "do not fit the study's network" in err


def test_a_batch_norm_that_was_trained_elsewhere_is_where_a_study_with_frozen_norms_starts(
    cli: Cli, home: CoordinatorHome, sites: dict[str, Identity]
) -> None:
    from safetensors.torch import save_file

    from models import networks
    from models.architectures import Shape

    elsewhere = networks.NETWORKS["resnet-small"].make(Shape(1, (32, 32), 2), "batch", {"width": 1})
    save_file(elsewhere.state_dict(), "elsewhere.safetensors")
    Path("frozen.toml").write_text(draft("frozen", **{'norm = "group"': 'norm = "frozen"'}))
    code, _, err = cli("study", "sign", "frozen.toml")
    assert code == 1
    assert "Name them with --initial" in err
    assert cli("study", "sign", "frozen.toml", "--initial", "elsewhere.safetensors")[0] == 0
    Path("group.toml").write_text(draft("group"))
    code, _, err = cli("study", "sign", "group.toml", "--initial", "elsewhere.safetensors")
    assert code == 1
    assert 'norm = "frozen"' in err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"anna", "bruno"', '"anna", "clara"', "not enrolled: clara"),
        ('name = "resnet-small"', 'name = "resnet-smal"', "network.name"),
        ("count = 10", "count = -1", "rounds.count"),
        ("[rounds]", "[rounds", "not valid TOML"),
    ],
)
def test_sign_refuses_a_draft_that_cannot_stand(
    cli: Cli, sites: dict[str, Identity], old: str, new: str, words: str
) -> None:
    Path("chest.toml").write_text(draft().replace(old, new))
    code, _, err = cli("study", "sign", "chest.toml")
    assert code == 1
    assert words in err
    assert "→" in err
    assert not Path("chest.study.json").exists()


def test_sign_refuses_a_revoked_site(cli: Cli, sites: dict[str, Identity]) -> None:
    cli("sites", "revoke", "bruno", "--yes")
    Path("chest.toml").write_text(draft())
    code, _, err = cli("study", "sign", "chest.toml")
    assert code == 1
    assert "bruno is revoked" in err


def test_launch_says_when_nothing_serves(cli: Cli, home: CoordinatorHome, signed: str) -> None:
    code, _, err = cli("study", "launch", "chest")
    assert code == 0
    assert "consilium-coordinator serve" in err
    with Registry(home) as registry:
        assert registry.study("chest").state is State.REQUESTED
    cli("study", "pause", "chest")
    with lock(home):
        assert cli("study", "resume", "chest")[2] == ""


def test_a_study_without_a_slot_left_is_not_resumed_but_told_so(cli: Cli, home: CoordinatorHome, signed: str) -> None:
    with Registry(home) as registry:
        record = registry.launch("chest")
        course, most = registry.course(record.hash), record.study.slots
        for number in range(1, most - 1):
            request = (b"{}", "a" * 64, record.weights, tuple(record.study.sites))
            course.open_slot(SlotRecord(number, 1, 1, "train", number, *request, SlotState.OPEN, "", "", ""))
            if number == most - 2:
                registry.transition(record.hash, State.PAUSED, "a test")
                registry.resume("chest")  # the slot that is open goes on
                assert registry.study("chest").state is State.REQUESTED
            course.close_slot(number, SlotState.FAILED, "a test")
        registry.transition(record.hash, State.PAUSED, "the reserve is used up")
    code, _, err = cli("study", "resume", "chest")
    assert code == 1
    assert "No slot is left for another round" in err
    assert "A longer run is a new study" in err
    with Registry(home) as registry:
        assert registry.study("chest").state is State.PAUSED
    assert cli("study", "stop", "chest", "--yes")[0] == 0
    assert "No slot is left" in cli("study", "launch", "chest")[2]


def test_moves_that_make_no_sense_are_refused_with_a_remedy(cli: Cli, signed: str) -> None:
    code, _, err = cli("study", "resume", "chest")
    assert code == 1
    assert "study launch" in err
    assert cli("study", "stop", "chest", "--yes")[0] == 0
    assert "stopped" in cli("study", "status")[1]
    assert cli("study", "launch", "chest")[0] == 0


def test_an_approval_may_come_as_a_file(
    cli: Cli, home: CoordinatorHome, sites: dict[str, Identity], signed: str
) -> None:
    with Registry(home) as registry:
        study = registry.study("chest").hash
    approval(study, "anna", "xrays").signed_by(sites["anna"]).write(Path("ok.json"))
    assert cli("study", "accept", "ok.json")[0] == 0
    approval(study, "bruno", "xrays").signed_by(sites["anna"]).write(Path("forged.json"))
    assert cli("study", "accept", "forged.json")[0] == 1
    with Registry(home) as registry:
        assert [(a.site, a.state) for a in registry.approvals(study)] == [("anna", "approved"), ("bruno", "")]


def test_export_writes_the_signed_study_again(cli: Cli, signed: str) -> None:
    assert cli("study", "export", "chest", "--out", "copy.json")[0] == 0
    assert Path("copy.json").read_bytes() == Path("chest.study.json").read_bytes()
    assert "Chest X-ray triage" in cli("study", "show", "copy.json")[1]
    assert "Chest X-ray triage" in cli("study", "show", "chest")[1]


def test_status_says_per_site_who_is_in_late_or_refused_and_why(cli: Cli, home: CoordinatorHome, signed: str) -> None:
    with Registry(home) as registry:
        record = registry.launch("chest")
        registry.transition(record.hash, State.RUNNING)
        course = registry.course(record.hash)
        course.open_slot(
            SlotRecord(
                1, 1, 1, "train", 1, b"{}", "a" * 64, record.weights, ("anna", "bruno"), SlotState.OPEN, "", "", ""
            )
        )
        course.outcome(1, Outcome("anna", OutcomeState.IN, bytes=400, seconds=3.21))
        course.outcome(1, Outcome("bruno", OutcomeState.REFUSED, "no-data", "The site has no usable images"))
    code, out, _ = cli("study", "status", "chest", "--rounds")
    assert code == 0
    lines = out.splitlines()
    assert any("anna" in line and " in " in line and "3.2 s" in line for line in lines)
    assert any("bruno" in line and "refused" in line and "The site has no usable images" in line for line in lines)
    assert "0 of 10 rounds, now round 1; 1 of 17 slots used" in out
    assert "1 of 2" in out


def test_following_ends_with_the_study_and_its_exit_code_tells(cli: Cli, home: CoordinatorHome, signed: str) -> None:
    import threading

    def work() -> None:
        with Registry(home) as registry:
            study = registry.study("chest").hash
            while registry.study(study).state is not State.REQUESTED:
                pass
            registry.transition(study, State.RUNNING)
            registry.transition(study, State.INTERRUPTED, "the disk was full")

    worker = threading.Thread(target=work)
    worker.start()
    code, out, err = cli("study", "launch", "chest", "--follow")
    worker.join()
    assert code == 1
    assert "interrupted: the disk was full" in out
    assert "study resume chest" in err


# ---- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sites", "list"), "There is no coordinator here"),
        (("serve",), "There is no coordinator here"),
        (("study", "status", "x"), "There is no coordinator here"),
        (("backup", "--out", "b"), "There is no coordinator here"),
    ],
)
def test_without_a_coordinator_the_remedy_is_named(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = cli(*arguments)
    assert code == 1
    assert words in err
    assert "consilium-coordinator init" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("study", "status", "nope"), "No such study"),
        (("study", "launch", "nope"), "No such study"),
        (("study", "sign", "nope.toml"), "The draft cannot be read"),
        (("study", "sign", "."), "The draft cannot be read"),
        (("sites", "add", "nope.json"), "The file cannot be read"),
        (("sites", "show", "nope"), "No such site"),
        (("sites", "revoke", "nope", "--yes"), "No such site"),
        (("study", "accept", "nope.json"), "The file cannot be read"),
        (("models", "show", "nope"), "No such study"),
        (("models", "export", "chest", "--out", "m"), "no published model yet"),
        (("study", "export", "chest", "--out", "nowhere/x.json"), "There is no such folder"),
        (("study", "new", "Bad Name"), "study.name"),
    ],
)
def test_bad_input_ends_in_words_and_a_remedy(cli: Cli, signed: str, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = cli(*arguments)
    assert code == 1
    assert words in err
    assert "→" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [("nope",), ("study", "launch"), ("init", "lungs"), ("study", "new", "--bad")])
def test_usage_errors_have_their_own_exit_code(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli(*arguments)[0] == 2


def test_a_binary_draft_is_refused_in_words(cli: Cli, sites: dict[str, Identity]) -> None:
    Path("chest.toml").write_bytes(b"\xff\xfe\x00study")
    code, _, err = cli("study", "sign", "chest.toml")
    assert code == 1
    assert "not text" in err


def test_a_damaged_registry_is_reported(cli: Cli, home: CoordinatorHome) -> None:
    for path in home.root.glob("registry.db*"):
        path.unlink()
    home.database.write_bytes(b"this is not a database" * 100)
    code, _, err = cli("sites", "list")
    assert code == 1
    assert "registry" in err
    assert "→" in err


def test_a_full_disk_is_reported_in_words(cli: Cli, home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "r.json")

    monkeypatch.setattr("server.commands.common.write_atomically", full)
    code, _, err = cli("sites", "roster", "--out", "r.json")
    assert code == 1
    assert "The disk is full: r.json" in err


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, cli: Cli, home: CoordinatorHome) -> None:
    monkeypatch.setattr("server.commands.sites.fingerprint", None)
    with pytest.raises(TypeError):
        cli("sites", "invite")


def test_only_one_supervisor_serves_a_home(cli: Cli, home: CoordinatorHome) -> None:
    with lock(home):
        with pytest.raises(ConsiliumError, match="being served already"), lock(home):
            pass
        code, _, err = cli("serve")
    assert code == 1
    assert "being served already" in err
