"""What a stranger reads: the --help of every command of the four programs, and every error with its remedy.

The golden files stand in tests/golden. After a wanted change: CONSILIUM_UPDATE_GOLDEN=1 pytest tests/test_help.py,
and read the difference.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.main import get_command

import client.cli
import privacy.cli
import privacy.welcome
import server.cli
from privacy.errors import REFUSALS
from privacy.ledger_codes import LEDGER_REFUSALS
from privacy.terminal import OS_ERRORS, run

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
UPDATE = "CONSILIUM_UPDATE_GOLDEN"
ROOMS = ("privacy", "models", "client", "server", "deploy")
PROGRAMS: dict[str, typer.Typer] = {
    "consilium": privacy.welcome.app,
    "consilium-coordinator": server.cli.app,
    "consilium-site": client.cli.app,
    "consilium-officer": privacy.cli.app,
}
ERRORS = {"ConsiliumError", "NodeError", "LinkLost", "Problem"}
FINDINGS = {"Finding", "Check"}


def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from walk(child, (*path, name))


COMMANDS = [entry for name, app in PROGRAMS.items() for entry in walk(get_command(app), (name,))]
LEAVES = [(path, command) for path, command in COMMANDS if not hasattr(command, "commands")]


def held(name: str, text: str) -> None:
    """Compare with the golden file, or write it when asked to."""
    path = GOLDEN / name
    if os.environ.get(UPDATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; make it with {UPDATE}=1"
    assert text == path.read_text(encoding="utf-8"), f"{name} differs; when that is wanted: {UPDATE}=1"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same page on every machine."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "_TYPER_FORCE_DISABLE_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONSILIUM_COORDINATOR_HOME", "CONSILIUM_SITE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_every_command(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for path, _ in COMMANDS:
        if path[0] != program:
            continue
        assert run(PROGRAMS[program], program, [*path[1:], "--help"]) == 0
        text = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
        pages.append(f"$ {' '.join(path)} --help\n\n{text}\n")
    held(f"help/{program}.txt", "\n\n".join(pages))


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_help_teaches(path: tuple[str, ...], command: click.Command) -> None:
    """One sentence what it is for, more for whom and when, and an example."""
    text = command.help or ""
    first = text.strip().split("\n\n")[0]
    assert first.rstrip().endswith((".", "?")), "the first paragraph is a sentence"
    assert len(text.split("\n\n")) >= 3, "what it is for, who runs it, an example"
    assert "Example: " in text


def examples() -> list[str]:
    found = []
    for path, command in COMMANDS:
        for line in (command.help or "").replace("\n", " ").split("Example:")[1:]:
            found.append(line.strip().strip("`").split("`")[0].strip())
            assert found[-1].startswith(path[0]), f"the example of {' '.join(path)} calls {found[-1]}"
    return found


@pytest.mark.parametrize("example", examples())
def test_every_example_is_a_command_that_parses(example: str) -> None:
    words = shlex.split(example)
    command: click.Command = get_command(PROGRAMS[words[0]])
    context: click.Context | None = None
    rest = words[1:]
    while hasattr(command, "commands"):
        while rest and rest[0].startswith("-"):  # options of the program: each takes a value
            rest = rest[2:]
        name, child, remaining = command.resolve_command(click.Context(command), rest)  # type: ignore[attr-defined]
        assert child is not None
        context = click.Context(command, info_name=name, parent=context)
        command, rest = child, remaining
    command.make_context(command.name, rest, parent=context)


# ---- errors --------------------------------------------------------------------------------------------------


def template(node: ast.expr) -> str:
    """The text an expression will give, with its variable parts in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{" + ast.unparse(node) + "}"


def errors() -> list[tuple[str, str, str, str]]:
    """(file, what, subject, remedy) of every error that the code can raise, in the order of the files."""
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in FINDINGS and (finding := _finding(node)) is not None:
                    found.append((str(path.relative_to(ROOT)), *finding))
                elif name in ERRORS:
                    parts = [template(argument) for argument in node.args][-3:]
                    if len(parts) == 3:
                        found.append((str(path.relative_to(ROOT)), *parts))
    return sorted(set(found))  # type: ignore[arg-type]


def _finding(node: ast.Call) -> tuple[str, str, str] | None:
    """(detail, name, remedy) of a check of `preflight` that may fail; None for one that never asks for anything."""
    named = {keyword.arg: template(keyword.value) for keyword in node.keywords}
    if len(node.args) == 5:
        named = dict(zip(("side", "name", "failed", "detail", "remedy"), map(template, node.args), strict=True))
    return (named["detail"], named["name"], named["remedy"]) if named.get("remedy") else None


def entries() -> list[tuple[str, str]]:
    """(file, words) of every reason for which an entry of a study cannot stand.

    They stand where a section of the study is read, where its kinds of entry are (entries, fields), and in functions
    named `problem`, which give back the words.
    """
    found = []
    for room in ("privacy", "models"):
        for path in sorted((ROOT / room).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if path.name in {"entries.py", "fields.py"} or any(_is_section(node) for node in ast.walk(tree)):
                found += [(str(path.relative_to(ROOT)), words) for words in _reasons(tree)]
    return sorted(set(found))


def _is_section(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Section" for base in node.bases)


def _reasons(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ValueError":
            yield template(node.args[0])
        elif isinstance(node, ast.FunctionDef) and node.name == "problem":
            given = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value)
            yield from filter(None, map(template, given))


def test_every_reason_why_an_entry_cannot_stand_is_a_sentence_that_names_an_entry() -> None:
    files = {where for where, _ in entries()}
    assert {"privacy/study.py", "privacy/patient.py", "privacy/entries.py", "models/fields.py"} <= files
    for where, words in entries():
        assert not words.rstrip().endswith((".", ":")), f"{where}: {words}"
        assert len(words.split()) > 3 or words.startswith("{"), f"{where}: {words}"


def test_every_error_says_what_to_what_and_what_to_do() -> None:
    lines = [f"{where}\n    {what}: {subject}\n    → {remedy}\n" for where, what, subject, remedy in errors()]
    lines += [f"refusal {code.value}\n    {what}\n    → {remedy}\n" for code, (what, remedy) in REFUSALS.items()]
    lines += [f"ledger {code.value}\n    {what}\n    → {remedy}\n" for code, (what, remedy) in LEDGER_REFUSALS.items()]
    lines += [f"operating system, {errno.errorcode[n]}\n    {w}\n    → {r}\n" for n, (w, r) in OS_ERRORS.items()]
    lines += [f"an entry of a study, {where}\n    {words}\n" for where, words in entries()]
    held("errors.txt", "\n".join(lines))


def test_every_error_has_a_remedy_in_a_sentence() -> None:
    offences = []
    typed = [("refusal", w, "", r) for w, r in (*REFUSALS.values(), *LEDGER_REFUSALS.values())]
    for where, what, _, remedy in [*errors(), *typed]:
        if re.fullmatch(r"\{\w[^}]*\}", remedy):
            continue  # handed through from an error that is listed itself
        if not remedy.strip() or remedy.rstrip()[-1] not in ".?!}…" or what.rstrip().endswith((".", ":")):
            offences.append(f"{where}: {what!r} → {remedy!r}")
    assert offences == []


def test_every_command_that_a_remedy_names_exists() -> None:
    """`consilium-… group command` in an error must be a command of that program."""
    known = {path for path, _ in COMMANDS}
    texts = [remedy for _, _, _, remedy in errors()] + [remedy for _, remedy in REFUSALS.values()]
    unknown = []
    for text in texts:
        for words in re.findall(r"`(consilium(?:-\w+)?(?: [a-z-]+)*)", text):
            path = tuple(word for word in words.split() if not word.startswith("-"))
            while path and path not in known and len(path) > 1 and path[:-1] in known and _takes_arguments(path[:-1]):
                path = path[:-1]
            if path not in known:
                unknown.append(words)
    assert unknown == []


def _takes_arguments(path: tuple[str, ...]) -> bool:
    command = dict(COMMANDS)[path]
    return any(isinstance(parameter, click.Argument) for parameter in command.params)
