"""`consilium-coordinator ledger`, `study status` and `study abort` of a study with noise, as a person runs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from privacy import cli as officer
from privacy.accounting import events
from privacy.canonical import sha256
from privacy.checkpoint import origin
from privacy.claims import epsilon_rdp, rounded
from privacy.errors import ConsiliumError
from privacy.ledger import Abort, Commit, Leaf, Step
from privacy.reservation import differences
from privacy.terminal import run
from privacy.witness import Witness
from server.books import Books
from server.cli import app
from server.desk import Desk
from server.ledger import Ledger
from server.records import SlotRecord, SlotState, State
from server.spending import Spending
from tests.server.round_kit import Bench

torch.set_num_threads(1)
Cli = Callable[..., tuple[int, str, str]]
PNG = b"\x89PNG\r\n"
NOISE = {
    "privacy": {"mode": "shared", "noise_multiplier": "2", "evaluation_noise": "8", "delta": "0.000001"},
    "secagg": {"mode": "on"},
    "aggregation": {"weights": "equal", "minimum_sites": 3},
    "optimiser": {"name": "sgd"},
    "rounds": {"count": 20, "local_steps": 1, "reserve": 4, "deadline_seconds": 60},
    "publish": {"choose": "last"},
}


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
def bench(tmp_path: Path) -> Bench:
    """A coordinator with one signed study with noise, at four hospitals."""
    return Bench(tmp_path / "coordinator", 4, **NOISE)


def begin(bench: Bench) -> None:
    """RESERVE, as the round loop writes it."""
    record = bench.registry.study(bench.hash)
    with bench.registry.ledger() as ledger:
        desk = Desk(bench.registry, record, bench.identity, bench.wire, bench.clock)
        Books(ledger, bench.identity, desk).reserve({name: sha256(name.encode()) for name in bench.sites})


def serve(bench: Bench, kinds: list[str]) -> None:
    """Slots that every hospital answers, written into the registry and the ledger."""
    begin(bench)
    with bench.registry.ledger() as ledger:
        for slot, kind in enumerate(kinds, 1):
            bench.course.open_slot(
                SlotRecord(
                    slot, 1, slot, kind, 1, b"{}", "a" * 64, "b" * 64, tuple(bench.sites), SlotState.OPEN, "", "", ""
                )
            )
            bench.course.close_slot(slot, SlotState.FAILED, "a test")
            for name, site in bench.sites.items():
                step = Step(study=bench.hash, site=name, slot=slot, counter=slot, request="c" * 64, release="d" * 64)
                ledger.take(Leaf.signed(step, site.identity).data, [site.identity.public])


def witness(bench: Bench, names: tuple[str, ...]) -> None:
    """A new head, cosigned by hospitals that see it for the first time."""
    with bench.registry.ledger() as ledger:
        size = ledger.checkpoint(bench.identity).checkpoint.size
        for name in names:
            who, at = bench.sites[name].identity, int(datetime.now(UTC).timestamp())
            fresh = Witness(name, "consortium", bench.identity.public)
            line = fresh.cosign(who, ledger.proposal(name, 0), at, lambda found: differences(bench.study, found))[1]
            ledger.add_cosignature(size, name, line, who.public)


def books(bench: Bench) -> Ledger:
    return bench.registry.ledger()


# ---- ledger show, ledger export ------------------------------------------------------------------------------


def test_show_says_what_is_reserved_used_and_who_has_seen_it(cli: Cli, bench: Bench) -> None:
    serve(bench, ["train"] * 3)
    witness(bench, ("anna", "bert", "cleo"))
    with books(bench) as ledger:
        account = ledger.account(bench.hash)
        ledger.append([Leaf.of(Commit(study=bench.hash, slots_used=3))])
    witness(bench, ("dora",))
    code, out, err = cli("ledger", "show")
    assert (code, err) == (0, "")
    assert account is not None
    reserve = account.reserve
    line = next(line.split() for line in out.splitlines() if line.startswith("chest"))
    assert line[1:6] == [bench.hash[:12], "3", "26", reserve.epsilon_aggregate, reserve.epsilon_broken]
    assert line[6:] == ["0.000001", "14", "committed"]
    assert "The newest head holds 14, cosigned by 1 of 4 hospitals: dora." in out
    assert "The newest believed head holds 13; 3 cosignatures are needed against 1 that collude." in out


def test_show_says_that_nothing_is_believed_before_enough_have_cosigned(cli: Cli, bench: Bench) -> None:
    begin(bench)
    assert "No head is signed yet" in cli("ledger", "show")[1]
    witness(bench, ())
    out = cli("ledger", "show")[1]
    assert "cosigned by 0 of 4 hospitals: nobody" in out
    assert "No head is believed yet: that takes 3 cosignatures" in out


def test_an_export_is_what_the_officer_believes(cli: Cli, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    serve(bench, ["train"] * 2)
    witness(bench, ("anna", "bert", "dora"))
    with books(bench) as ledger:
        ledger.append([Leaf.of(Abort(study=bench.hash, reason="stopped"))])
    code, out, _ = cli("ledger", "export", "--out", "ledger.jsonl")
    assert code == 0
    assert "9 entries, 1 more since" in out
    assert cli("sites", "roster", "--out", "roster.json")[0] == 0
    assert cli("study", "export", "chest", "--out", "chest.study.json")[0] == 0
    assert run(officer.app, "consilium-officer", ["verify", "ledger.jsonl", "roster.json", "chest.study.json"]) == 0
    assert "all 9 entries are under that head" in capsys.readouterr().out


def test_an_export_under_the_newest_head_is_there_but_not_believed(
    cli: Cli, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(bench)
    code, _, err = cli("ledger", "export", "--out", "ledger.jsonl", "--newest")
    assert code == 1
    assert "no head yet" in err
    witness(bench, ("anna",))
    code, _, err = cli("ledger", "export", "--out", "ledger.jsonl")
    assert code == 1
    assert "--newest" in err
    assert not Path("ledger.jsonl").exists()
    assert cli("ledger", "export", "--out", "ledger.jsonl", "--newest")[0] == 0
    assert cli("sites", "roster")[0] == 0
    assert run(officer.app, "consilium-officer", ["verify", "ledger.jsonl", "roster.json"]) == 1
    assert "Too few sites have cosigned" in capsys.readouterr().err


def test_an_export_writes_over_a_file_only_when_told_to(cli: Cli, bench: Bench) -> None:
    begin(bench)
    witness(bench, tuple(bench.sites))
    Path("ledger.jsonl").write_text("precious")
    code, _, err = cli("ledger", "export", "--out", "ledger.jsonl")
    assert code == 1
    assert "--force" in err
    assert Path("ledger.jsonl").read_text() == "precious"
    assert cli("ledger", "export", "--out", "ledger.jsonl", "--force")[0] == 0
    assert Path("ledger.jsonl").read_bytes().startswith(b'{"ledger":1,')
    code, _, err = cli("ledger", "export", "--out", "none/ledger.jsonl")
    assert code == 1
    assert "→" in err


@pytest.mark.parametrize("command", [("show",), ("export", "--out", "ledger.jsonl")])
def test_without_a_study_with_noise_the_remedy_is_named(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    Bench(tmp_path / "coordinator")
    code, _, err = cli("ledger", *command)
    assert code == 1
    assert "no study with noise has begun" in err
    assert "no study here has noise" in err
    assert "→" in err


@pytest.mark.parametrize("command", [("show",), ("export", "--out", "ledger.jsonl")])
def test_before_the_first_reservation_the_ledger_is_empty(cli: Cli, bench: Bench, command: tuple[str, ...]) -> None:
    code, _, err = cli("ledger", *command)
    assert code == 1
    assert "1 signed, none begun" in err


# ---- study status --------------------------------------------------------------------------------------------


def test_status_says_what_is_spent_and_what_is_left_in_both_tiers(cli: Cli, bench: Bench) -> None:
    serve(bench, ["train"] * 5 + ["validate"])
    witness(bench, ("anna", "bert", "cleo"))
    code, out, err = cli("study", "status", "chest")
    assert (code, err) == (0, "")
    assert "6 of T_max 26 slots used, 20 left; δ 0.000001" in out
    assert "sees noisy sums over hospitals only" in out
    assert "WITHOUT NOISE" not in out
    for tier, name in ((1, "1: sums only"), (2, "2: sums broken open")):
        plan = events(bench.study, tier)
        for role, so_far in (("train", 5), ("validation", 1), ("test", 0)):
            event = plan[role]
            cells = [
                f"{so_far} of {event.count}",
                rounded(epsilon_rdp(event, "0.000001", so_far)),
                rounded(epsilon_rdp(event, "0.000001")),
            ]
            first = re.escape(name) + " +" if role == "train" else " *"
            assert re.search(rf"^{first}{role} +{' +'.join(map(re.escape, cells))} *$", out, re.M), (tier, role)
    assert "ledger: open; 25 entries of this study, the newest believed head holds 25 of 25" in out


def test_status_before_anything_was_reserved(cli: Cli, bench: Bench) -> None:
    out = cli("study", "status", "chest")[1]
    assert "0 of T_max 26 slots used, 26 left" in out
    assert "ledger: nothing reserved yet; no head is believed yet" in out


def test_status_of_a_study_without_noise_says_nothing_of_budgets(cli: Cli, tmp_path: Path) -> None:
    Bench(tmp_path / "coordinator")
    code, out, _ = cli("study", "status", "chest")
    assert code == 0
    assert "T_max" not in out
    code, _, err = cli("study", "status", "chest", "--plot", "budget.png")
    assert code == 1
    assert "no noise" in err
    assert not Path("budget.png").exists()


def test_status_draws_epsilon_over_the_slots(cli: Cli, bench: Bench) -> None:
    serve(bench, ["train"] * 5)
    code, out, _ = cli("study", "status", "chest", "--plot", "budget.png")
    assert code == 0
    assert "The picture is in budget.png" in out
    assert Path("budget.png").read_bytes().startswith(PNG)
    for arguments in (("chest", "--plot", "none/x.png"), ("--plot", "x.png")):
        code, _, err = cli("study", "status", *arguments)
        assert code == 1
        assert "→" in err


def test_the_curve_rises_to_the_claim_and_passes_through_where_the_study_stands(bench: Bench) -> None:
    serve(bench, ["train"] * 7)
    spending = Spending.of(bench.study, bench.course.slots())
    for tier in (1, 2):
        marks, values = spending.curve(tier)
        assert values == sorted(values)
        assert (marks[0], values[0]) == (0, 0.0)
        assert (marks[-1], rounded(values[-1])) == (24, spending.epsilon("train", tier, whole=True))
        assert rounded(values[marks.index(7)]) == spending.epsilon("train", tier)


def test_B2_with_noise_of_each_site_a_round_asked_again_costs_nothing(tmp_path: Path) -> None:
    changes = {**NOISE, "rounds": {**NOISE["rounds"], "local_steps": 3}}
    changes["privacy"] = {**NOISE["privacy"], "mode": "per-site"}
    bench = Bench(tmp_path / "coordinator", 4, **changes)
    slots = [
        SlotRecord(n, 1, round_, "train", 1, b"", "", "", (), SlotState.DONE, "", "", "")
        for n, round_ in enumerate((1, 2, 2, 3), 1)
    ]
    spending = Spending.of(bench.study, slots)
    assert (spending.used, spending.training, spending.training_slots) == (4, 3, 20)
    assert spending.releases["train"] == (9, 60)
    assert spending.epsilon("train", 1) == spending.epsilon("train", 2)


# ---- study abort ---------------------------------------------------------------------------------------------


def test_an_aborted_study_never_runs_again(cli: Cli, bench: Bench) -> None:
    serve(bench, ["train"] * 2)
    bench.registry.launch("chest")
    bench.registry.pause("chest")
    code, out, err = cli("study", "abort", "chest", "--yes")
    assert (code, err) == (0, "")
    assert "aborted for good" in out
    with books(bench) as ledger:
        account = ledger.account(bench.hash)
        assert account is not None
        assert account.final == Abort(study=bench.hash, reason="stopped")
        assert ledger.note().checkpoint.size == ledger.size == 10
        assert ledger.note().checkpoint.origin == origin("consortium")
    assert bench.registry.study("chest").state is State.STOPPED
    for verb in (("launch",), ("resume",), ("resume", "--back-to", "0"), ("abort", "--yes")):
        code, _, err = cli("study", verb[0], "chest", *verb[1:])
        assert code == 1, verb
        assert "→" in err
    assert "never runs again" in cli("study", "launch", "chest")[2]
    out = cli("study", "status", "chest")[1]
    assert "ledger: aborted: stopped" in out
    assert "draft a new study" in out
    assert "Begin again" not in out
    assert "no more will be" in out


@pytest.mark.parametrize("state", [State.WAITING, State.RUNNING])
def test_a_running_study_is_stopped_before_it_is_aborted(cli: Cli, bench: Bench, state: State) -> None:
    begin(bench)
    bench.registry.launch("chest")
    bench.registry.transition(bench.hash, state)
    code, _, err = cli("study", "abort", "chest", "--yes")
    assert code == 1
    assert "study stop" in err
    with books(bench) as ledger:
        account = ledger.account(bench.hash)
        assert account is not None
        assert account.open


def test_what_cannot_be_aborted_says_why(cli: Cli, bench: Bench) -> None:
    code, _, err = cli("study", "abort", "chest", "--yes")
    assert code == 1
    assert "Nothing was reserved" in err
    begin(bench)
    assert "--yes" in cli("study", "abort", "chest")[2]
    with books(bench) as ledger:
        ledger.append([Leaf.of(Commit(study=bench.hash, slots_used=0))])
    bench.registry.launch("chest")
    bench.registry.transition(bench.hash, State.RUNNING)
    bench.registry.transition(bench.hash, State.INTERRUPTED)
    code, _, err = cli("study", "abort", "chest", "--yes")
    assert code == 1
    assert "holds the end of this study already" in err
    assert bench.registry.study("chest").state is State.INTERRUPTED, "a finished study may still be delivered"
    assert bench.registry.resume("chest").state is State.REQUESTED


def test_a_study_without_noise_is_not_aborted(cli: Cli, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "coordinator")
    code, _, err = cli("study", "abort", "chest")
    assert code == 1
    assert "study stop" in err
    with pytest.raises(ConsiliumError):
        bench.registry.abort("chest")
    assert bench.registry.study("chest").state is State.SIGNED
