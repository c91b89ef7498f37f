"""Imports point down only: deploy → server, client → privacy, models. Read from the source, without running it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("privacy", "models", "client", "server", "deploy")
MAY_IMPORT = {
    "privacy": {"privacy"},
    "models": {"models"},
    "client": {"client", "privacy", "models"},
    "server": {"server", "privacy", "models"},
    "deploy": set(ROOMS),
}
FLOWER_CONTACT = {
    "client/fleet.py",
    "client/flower.py",
    "client/objects.py",
    "client/refusal.py",
    "client/wire.py",
    "server/flower.py",
    "server/objects.py",
    "server/runs.py",
    "server/wire.py",
    "server/carrier.py",
    "server/superlink.py",
    "server/app.py",
}
FOREIGN_TO_PRIVACY = {
    "flwr",
    "grpc",
    "grpc_tools",
    "monai",
    "torch",
    "torchvision",
    "pydicom",
    "matplotlib",
    "sqlalchemy",
}
TERMINAL = {"typer", "rich", "click"}
TERMINAL_CONTACT = {"privacy/cli.py", "privacy/welcome.py", "privacy/terminal.py"}
CONNECTOR = ("client/connector.py", "client/flower.py")
LEARNING = {"torch", "monai", "pydicom", "models"}
COORDINATOR_LIGHT = ("server/supervisor.py", "server/guards.py", "server/registry.py", "server/home.py")


def sources(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if not path.name.startswith("agent_pb2")]


def imported(path: Path, *, top_only: bool = False) -> set[tuple[str, int]]:
    """Every module that a file names in an import (absolute name, line), those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[tuple[str, int]] = set()
    for node in ast.walk(tree) if not top_only else _module_level(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            found.add((name, node.lineno))
        elif isinstance(node, ast.Call) and _is_dynamic(node) and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                found.add((argument.value, node.lineno))
    return found


def _module_level(tree: ast.Module) -> list[ast.AST]:
    """Statements that run when the module is imported: not inside functions, not under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    result: list[ast.AST] = []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        result.append(node)
        pending.extend(child for child in ast.iter_child_nodes(node))
    return result


def _is_dynamic(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in {"import_module", "__import__"}


def offences(paths: list[Path], forbidden: set[str], *, top_only: bool = False) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for name, line in sorted(imported(path, top_only=top_only))
        if name.split(".")[0] in forbidden
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_its_own_floor_and_below(room: str) -> None:
    files = sources(room)
    assert files
    assert offences(files, set(ROOMS) - MAY_IMPORT[room]) == []


def test_nothing_outside_the_tests_imports_the_tests() -> None:
    files = [path for room in ROOMS for path in sources(room) if room != "deploy"]
    assert offences(files, {"tests", "deploy"}) == []


def test_privacy_knows_nothing_of_transport_or_learning() -> None:
    assert offences(sources("privacy"), FOREIGN_TO_PRIVACY) == []


def test_within_privacy_only_the_commands_know_the_terminal() -> None:
    files = [path for path in sources("privacy") if str(path.relative_to(ROOT)) not in TERMINAL_CONTACT]
    assert offences(files, TERMINAL) == []


def test_flower_is_touched_in_few_files() -> None:
    files = [path for room in ROOMS for path in sources(room)]
    contact = {line.split(":")[0] for line in offences(files, {"flwr"})}
    assert contact <= FLOWER_CONTACT


def test_the_process_with_the_network_cannot_read_images() -> None:
    files = [ROOT / name for name in CONNECTOR]
    assert offences(files, LEARNING) == []


def test_the_supervisor_stays_light() -> None:
    files = [ROOT / name for name in COORDINATOR_LIGHT]
    assert offences(files, {"flwr", "torch", "monai", "matplotlib"}, top_only=True) == []


def test_tests_have_no_package_files() -> None:
    """A `tests/client/__init__.py` alone would shadow the room `client`."""
    assert [str(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import server.registry", "server.registry"),
        ("from server import home", "server"),
        ("def f():\n    from server.home import x", "server.home"),
        ("import importlib\nimportlib.import_module('server.app')", "server.app"),
    ],
)
def test_the_reader_of_imports_finds_them(
    line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "client" / "x.py"
    path.parent.mkdir()
    path.write_text(line)
    assert name in {found for found, _ in imported(path)}
