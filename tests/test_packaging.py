"""What a hospital installs: the four rooms, their protocol files, four commands, and nothing else."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"client", "server", "models", "privacy"}
KINDS = {".py", ".pyi", ".proto", ".html", ".css", ".js", ".toml", ".svg"}
COMMANDS = {
    "consilium": "privacy.start:welcome",
    "consilium-coordinator": "server.start:main",
    "consilium-site": "client.start:main",
    "consilium-officer": "privacy.start:officer",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_four_rooms_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == ROOMS
    assert sum(top.endswith(".dist-info") for top in tops) == 1


def test_the_wheel_holds_only_source_protocol_and_templates(wheel: zipfile.ZipFile) -> None:
    inside = [PurePosixPath(name) for name in wheel.namelist() if ".dist-info/" not in name]
    assert {path.suffix for path in inside} <= KINDS
    assert not [path for path in inside if "__pycache__" in path.parts or "tests" in path.parts]
    assert PurePosixPath("client/agent/agent.proto") in inside


def test_every_module_of_the_tree_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    here = {str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert here <= names


def test_the_wheel_brings_the_four_commands(wheel: zipfile.ZipFile) -> None:
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry).decode())
    assert parser.sections() == ["console_scripts"]
    assert dict(parser["console_scripts"]) == COMMANDS


def test_the_wheel_brings_its_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert b"Apache License" in wheel.read(licence)


def test_every_command_names_a_function_that_exists() -> None:
    for target in COMMANDS.values():
        module, _, name = target.partition(":")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert f"\ndef {name}() -> None:" in source


def test_flower_is_pinned_exactly() -> None:
    values = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (flower,) = [line for line in values["project"]["dependencies"] if line.startswith("flwr")]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert flower in constraints


def test_constraints_pin_exactly_what_is_installed_directly() -> None:
    values = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in constraints:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pinned[canonicalize_name(requirement.name)] = specifier.version
    for line in values["project"]["dependencies"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier
