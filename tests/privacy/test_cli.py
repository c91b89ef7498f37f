"""What the officer's program says of files, and how all programs speak of errors."""

from __future__ import annotations

import errno
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console

from privacy import welcome
from privacy.checkpoint import cosign, witness_name
from privacy.cli import app
from privacy.errors import ConsiliumError
from privacy.identity import Document, Identity, fingerprint
from privacy.journal import Journal
from privacy.ledger import Leaf
from privacy.ledger_check import first_line
from privacy.reservation import reserve
from privacy.roster import Consortium, Enrolment, Roster, enrol, expiry, revoke
from privacy.study import Study, approval
from privacy.study_text import template
from privacy.terminal import os_error, run, table
from server.ledger import Ledger
from tests.privacy import ledger_kit as kit
from tests.privacy.grant_kit import study as noised

NOW = datetime.now(UTC)


class Files:
    """One consortium's papers in a folder, and the keys that signed them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coordinator, self.anna, self.stranger = (Identity.generate() for _ in range(3))
        key = ec.generate_private_key(ec.SECP384R1()).public_key()
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        self.enrolment = Enrolment(
            consortium="lungs", site="anna", identity=self.anna.public, node_key=pem, not_after=expiry(NOW)
        )
        empty = Roster(consortium="lungs", version=0, coordinator=self.coordinator.public, sites=())
        self.roster = enrol(empty, self.enrolment, NOW)
        self.study = Study.from_toml(template("chest", ["anna"]))
        consortium = Consortium(
            name="lungs", coordinator=self.coordinator.public, superlink="fl.example.org:8443", ca="none"
        )
        self.write("consortium", consortium.signed(self.coordinator))
        self.write("roster", self.roster.signed(self.coordinator))
        self.write("enrolment", self.enrolment.signed(self.anna))
        self.write("study", self.study.document().signed_by(self.coordinator))
        self.write("approval", approval(self.study.hash, "anna", "xrays").signed_by(self.anna))

    def write(self, name: str, document: Document) -> None:
        document.write(self.folder / f"{name}.json")

    def tampered(self, name: str, kind: str, **changes: object) -> None:
        document = Document.read(self.folder / f"{name}.json", kind)
        self.write(name, replace(document, body={**document.body, **changes}))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path)


def flat(text: str) -> str:
    """Printed text without its line ends."""
    return " ".join(text.split())


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(app, "consilium-officer", ["verify", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_papers_given_together_leave_little_open(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{name}.json" for name in ("approval", "study", "enrolment", "roster", "consortium")]
    code, out, err = verify(capsys, *names, "--coordinator", fingerprint(files.coordinator.public))
    assert (code, err) == (0, "")
    assert "open" not in out
    assert "signed with the key the roster lists for anna" in out
    assert "it approves `chest`, the study given" in out
    assert "NO differential privacy" in out


def test_the_order_of_the_files_does_not_matter(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["consortium.json", "roster.json", "study.json", "approval.json"]
    forward, backward = verify(capsys, *names)[1], verify(capsys, *reversed(names))[1]
    assert sorted(forward.splitlines()) == sorted(backward.splitlines())


@pytest.mark.parametrize(
    ("name", "doubt"),
    [
        ("consortium", "compare it by telephone"),
        ("study", "whose key that is"),
        ("roster", "whose key that is"),
        ("enrolment", "add its roster"),
        ("approval", "add the roster"),
    ],
)
def test_what_one_file_cannot_settle_is_said(
    files: Files, capsys: pytest.CaptureFixture[str], name: str, doubt: str
) -> None:
    code, out, _ = verify(capsys, f"{name}.json")
    assert code == 0
    assert doubt in out


@pytest.mark.parametrize("name", ["consortium", "roster", "enrolment", "approval"])
def test_a_changed_file_is_found(files: Files, capsys: pytest.CaptureFixture[str], name: str) -> None:
    changes = {
        "consortium": {"superlink": "evil.example.org:8443"},
        "roster": {"version": 9},
        "enrolment": {"site": "bruno"},
        "approval": {"data": "everything"},
    }
    files.tampered(name, name, **changes[name])
    code, out, err = verify(capsys, f"{name}.json")
    assert code == 1
    assert "cannot be trusted" in out
    assert "A signature does not match" in err


def test_a_changed_study_is_found(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    body = files.study.document().body
    files.tampered("study", "study", rounds={**body["rounds"], "count": 99})
    assert verify(capsys, "study.json")[0] == 1
    files.write("study", files.study.document())
    code, _, err = verify(capsys, "study.json")
    assert code == 1
    assert "Nobody signed this study" in err


def test_a_study_that_leaves_a_default_out_is_refused(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    body = files.study.document().body
    del body["publish"]
    files.write("study", Document("study", body).signed_by(files.coordinator))
    code, _, err = verify(capsys, "study.json")
    assert code == 1
    assert "not well formed" in err


@pytest.mark.parametrize("pinned", [True, False])
def test_a_study_signed_by_somebody_else_is_found(
    files: Files, capsys: pytest.CaptureFixture[str], pinned: bool
) -> None:
    files.write("study", files.study.document().signed_by(files.stranger))
    told = ["--coordinator", fingerprint(files.coordinator.public)] if pinned else ["consortium.json"]
    code, _, err = verify(capsys, "study.json", *told)
    assert code == 1
    assert "Another key signed this" in err


def test_an_approval_tells_what_its_operator_declared(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one image is one patient" not in flat(verify(capsys, "approval.json")[1])
    said = approval(files.study.hash, "anna", "xrays", one_image_per_patient=True)
    files.write("approval", said.signed_by(files.anna))
    assert "declared that one image is one patient" in flat(verify(capsys, "approval.json")[1])
    body = {name: value for name, value in said.body.items() if name != "one_image_per_patient"}
    files.write("approval", Document("approval", body).signed_by(files.anna))
    assert "The approval is not complete" in verify(capsys, "approval.json")[2]


def test_an_approval_signed_by_somebody_else_is_found(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write("approval", approval(files.study.hash, "anna", "xrays").signed_by(files.stranger))
    code, _, err = verify(capsys, "approval.json", "roster.json")
    assert code == 1
    assert "A signature does not match" in err


def test_an_approval_of_a_site_outside_the_study_is_found(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write("approval", approval(files.study.hash, "bruno", "xrays").signed_by(files.stranger))
    code, _, err = verify(capsys, "approval.json", "study.json")
    assert code == 1
    assert "does not name" in err


def test_a_revoked_site_is_named_as_such(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write("roster", revoke(files.roster, "anna").signed(files.coordinator))
    assert "site anna, revoked" in verify(capsys, "roster.json")[1]


def test_one_bad_file_does_not_hide_the_others(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    (files.folder / "notes.txt").write_text("hello")
    code, out, err = verify(capsys, "notes.txt", "gone.json", "consortium.json")
    assert code == 1
    assert "consortium `lungs`" in out
    assert err.count("→") == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"kind":"study"}', b"\xff" * 50, b"1" * 5000])
def test_rubbish_is_refused_in_words(files: Files, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (files.folder / "x").write_bytes(content)
    code, _, err = verify(capsys, "x")
    assert code == 1
    assert "→" in err


def journal(path: Path) -> None:
    log = Journal(path)
    for number in range(3):
        log.append(
            {"at": f"2030-01-0{number + 1}T00:00:00Z", "what": "train", "size": 1000, "study": "", "slot": number}
        )
    log.close()


def test_a_journal_is_summed_up(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    journal(files.folder / "journal.jsonl")
    code, out, _ = verify(capsys, "journal.jsonl")
    assert code == 0
    assert "3 entries" in out
    assert "train: 3 times, 3,000 bytes" in out
    assert "compare the head" in out


@pytest.mark.parametrize("line", [0, 1])
def test_a_changed_or_missing_journal_line_is_found(
    files: Files, capsys: pytest.CaptureFixture[str], line: int
) -> None:
    path = files.folder / "journal.jsonl"
    journal(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:line], lines[line].replace(b"1000", b"10"), *lines[line + 1 :]]))
    assert verify(capsys, "journal.jsonl")[0] == 1
    path.write_bytes(b"".join([*lines[:line], *lines[line + 1 :]]))
    code, _, err = verify(capsys, "journal.jsonl")
    assert code == 1
    assert "The journal was changed" in err


# ---- the consortium's ledger -----------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three slots as a coordinator exports it, cosigned by four of five sites; and the papers to it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ledger.jsonl"
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", kit.CONSORTIUM) as books:
        books.append(kit.course(3))
        size = books.checkpoint(kit.COORDINATOR).checkpoint.size
        for name in kit.NAMES[:4]:
            line = kit.witness(name).cosign(kit.SITES[name], books.proposal(name, 0), kit.NOW, kit.approved)[1]
            books.add_cosignature(size, name, line, kit.SITES[name].public)
        assert books.export(path) == 16
    kit.ROSTER.signed(kit.COORDINATOR).write(tmp_path / "roster.json")
    noised().document().signed_by(kit.COORDINATOR).write(tmp_path / "study.json")
    consortium = Consortium(
        name=kit.CONSORTIUM, coordinator=kit.COORDINATOR.public, superlink="fl.example.org:8443", ca="none"
    )
    consortium.signed(kit.COORDINATOR).write(tmp_path / "consortium.json")
    return path


def test_a_ledger_is_checked_against_the_roster(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["ledger.jsonl", "study.json", "roster.json", "consortium.json"]
    code, out, err = verify(capsys, *names)
    assert (code, err) == (0, "")
    assert "all 16 entries are under that head" in out
    assert "4 of 5 sites cosigned it, 4 are needed against 1 that collude" in out
    assert "coordinator's key according to the consortium file" in out
    assert "3 of 40 slots signed; it is still open" in out
    assert "is assumed" not in out
    assert "why these sites have not cosigned this head: st-emma" in out
    assert verify(capsys, *reversed(names))[0] == 0


def test_what_a_ledger_and_a_roster_cannot_settle_is_said(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = verify(capsys, "ledger.jsonl", "roster.json")
    assert code == 0
    assert "how many sites may collude: 1 is assumed" in out
    assert "whose key that is" in out


def test_the_study_says_how_many_may_collude(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = noised().document().body
    body["secagg"] |= {"colluding": 2, "threshold": 4}
    body["aggregation"] |= {"minimum_sites": 4}
    study = Study.from_body(body)
    study.document().signed_by(kit.COORDINATOR).write(ledger.parent / "study.json")
    assert "4 are needed against 2" in verify(capsys, "ledger.jsonl", "roster.json", "study.json")[1]
    body["sites"] = ["st-anna", "st-bona", "st-cara", "st-dora", "st-emma"]
    body["secagg"] |= {"colluding": 3, "threshold": 5}
    body["aggregation"] |= {"minimum_sites": 5}
    Study.from_body(body).document().signed_by(kit.COORDINATOR).write(ledger.parent / "study.json")
    code, _, err = verify(capsys, "ledger.jsonl", "roster.json", "study.json")
    assert code == 1
    assert "Too few sites have cosigned the head" in err


def reserving(ledger: Path, **changes: object) -> None:
    """Write the exported ledger anew: with what is reserved for the study that lies beside it, or something else."""
    study = noised()
    right = reserve(study, dict.fromkeys(study.sites, "a" * 64))
    log = kit.Log([Leaf.of(right.model_copy(update=changes)), *kit.course(2)])
    note, head = log.note(), log.note().checkpoint
    for name in kit.NAMES:
        note = note.adding(cosign(head, witness_name(kit.LOG, name), kit.SITES[name], kit.NOW))
    ledger.write_bytes(first_line(note, head.size) + b"".join(leaf.data + b"\n" for leaf in log.leaves))


def test_what_was_reserved_is_held_against_the_study_that_is_given(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reserving(ledger)
    code, out, _ = verify(capsys, "ledger.jsonl", "roster.json", "study.json")
    assert code == 0
    assert "its plan, slots, ε and δ are those that follow from `tiny`, the study given" in flat(out)
    assert flat(out).count("add the study's file") == 1, "of the other study in the log"
    code, out, _ = verify(capsys, "ledger.jsonl", "roster.json")
    assert flat(out).count("add the study's file") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": "b" * 64}, "the digest of the plan"),
        ({"slots": 99}, "slots: 99, not"),
        ({"epsilon_aggregate": "0.5"}, "ε against who sees aggregates: 0.5, not"),
        ({"epsilon_broken": "900"}, "ε if secure aggregation were broken: 900, not"),
        ({"delta": "0.0000001"}, "δ: 0.0000001, not"),
        ({"grants": {"st-emma": "a" * 64}}, "grants of sites that the study does not name: st-emma"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_attack_a_ledger_that_reserved_something_else_than_the_study_says(
    ledger: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str
) -> None:
    """The coordinator signs it and every site cosigns it: the officer has the study's file."""
    reserving(ledger, **changes)
    code, _, err = verify(capsys, "ledger.jsonl", "roster.json", "study.json")
    assert code == 1
    assert "What was reserved in the ledger is not what the study says" in flat(err)
    assert words in flat(err)


def test_a_ledger_without_a_roster_is_not_believed(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pinned in ([], ["--coordinator", fingerprint(kit.COORDINATOR.public)]):
        code, out, err = verify(capsys, "ledger.jsonl", "consortium.json", *pinned)
        assert code == 1
        assert "ledger.jsonl: cannot be trusted" in out
        assert "→ Give the coordinator's roster" in err


def test_a_ledger_is_not_tied_to_a_roster_of_another_coordinator(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = kit.identity("stranger")
    other = kit.ROSTER.model_copy(update={"coordinator": stranger.public})
    other.signed(stranger).write(ledger.parent / "roster.json")
    assert verify(capsys, "ledger.jsonl", "roster.json")[0] == 1
    code, _, err = verify(capsys, "ledger.jsonl", "roster.json", "consortium.json")
    assert code == 1
    assert "Another key signed this" in err


def test_one_key_for_two_sites_is_no_second_witness(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = kit.roster(version=6, st_berta=kit.SITES["st-anna"].public)
    twice.signed(kit.COORDINATOR).write(ledger.parent / "roster.json")
    code, _, err = verify(capsys, "ledger.jsonl", "roster.json")
    assert code == 1
    assert "one key for two sites" in err


@pytest.mark.parametrize("change", ["slot", "removed", "added", "cut", "head", "first", "order"])
def test_a_tampered_ledger_is_found(ledger: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    lines = ledger.read_bytes().splitlines(keepends=True)
    changed = {
        "slot": [*lines[:1], lines[1].replace(b'"slots":40', b'"slots":99'), *lines[2:]],
        "removed": [*lines[:5], *lines[6:]],
        "added": [*lines, kit.step("st-anna", 4).data + b"\n"],
        "cut": lines[:-2],
        "head": [lines[0].replace(b'"size":16', b'"size":15'), *lines[1:]],
        "first": [b'{"ledger":1}\n', *lines[1:]],
        "order": [*lines[:2], lines[3], lines[2], *lines[4:]],
    }[change]
    assert changed != lines
    ledger.write_bytes(b"".join(changed))
    code, out, err = verify(capsys, "ledger.jsonl", "roster.json", "study.json", "consortium.json")
    assert code == 1
    assert "ledger.jsonl: cannot be trusted" in out
    assert err.count("→") == 1


def test_welcome_names_the_three_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(welcome.app, "consilium", []) == 0
    out = capsys.readouterr().out
    for command in ("consilium-coordinator", "consilium-site", "consilium-officer"):
        assert command in out
    assert out.count("  1. ") == out.count("  3. ") == 3


# ---- how errors are spoken -----------------------------------------------------------------------------------


def program(error: BaseException) -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)

    @made.command()
    def fail() -> None:
        raise error

    return made


def test_an_error_says_what_to_what_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConsiliumError("It broke", "the [bold]thing[/]", "Mend [it].")
    assert run(program(error), "x", []) == 1
    assert capsys.readouterr().err == "It broke: the [bold]thing[/]\n  → Mend [it].\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EIO])
def test_errors_of_the_system_have_a_remedy(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(program(OSError(number, "in the system's words", "/some/file")), "x", []) == 1
    err = capsys.readouterr().err
    assert "/some/file" in err
    assert "→" in err


def test_an_unknown_error_of_the_system_keeps_its_words() -> None:
    assert "in the system's words" in os_error(OSError(errno.EIO, "in the system's words", "/some/file")).subject


def test_interrupting_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(program(KeyboardInterrupt()), "x", []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_shows_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        run(program(ZeroDivisionError()), "x", [])


def test_with_debugging_on_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_DEBUG", "1")
    with pytest.raises(ConsiliumError):
        run(program(ConsiliumError("a", "b", "c")), "x", [])


def test_a_narrow_terminal_never_cuts_a_hash() -> None:
    console = Console(width=40)
    with console.capture() as capture:
        console.print(table("study", "hash", rows=[("[x]", "0123456789" * 6)]))
    shown = capture.get()
    assert "[x]" in shown
    assert "".join(c for c in shown if c.isdigit()) == "0123456789" * 6
