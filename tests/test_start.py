"""Ctrl-C while a command is still loading, and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = """
import sys, time
def wait(what):
    print(what, flush=True)
    time.sleep(60)
if sys.argv[1] == "loading":
    try:
        wait("loading")
    except BaseException:
        print("swallowed", flush=True)
def main():
    try:
        wait("running")
    except KeyboardInterrupt:
        raise SystemExit(7)
"""


LISTEN, IGNORE = (
    f"import signal; signal.signal(signal.SIGINT, signal.{how})" for how in ("default_int_handler", "SIG_IGN")
)


def interrupted(folder: Path, when: str, before: str = LISTEN) -> tuple[int, str, str]:
    """A command that takes long to load, or to run, and Ctrl-C in the middle of that.

    Whether these tests are a script's background job, which starts without Ctrl-C, makes no difference.
    """
    (folder / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom privacy.start import start; start('slow')", when],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{when}\n"
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=3 if before == IGNORE else 30)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return process.returncode, out, err


def test_an_interrupt_while_a_command_loads_ends_it_with_one_line(tmp_path: Path) -> None:
    assert interrupted(tmp_path, "loading") == (130, "", "Interrupted.\n")


def test_an_interrupt_of_a_running_command_is_its_own_affair(tmp_path: Path) -> None:
    assert interrupted(tmp_path, "running")[0] == 7


def test_a_command_that_ignores_interrupts_goes_on_doing_so(tmp_path: Path) -> None:
    assert interrupted(tmp_path, "loading", IGNORE)[0] == -signal.SIGKILL, "it waited on"


def scripts() -> dict[str, str]:
    found: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return found


@pytest.mark.parametrize("name", sorted(scripts()))
def test_each_command_begins_light_and_still_answers(name: str) -> None:
    module, _, function = scripts()[name].partition(":")
    code = (
        f"import sys\nfrom {module} import {function}\nheavy = {{'typer', 'numpy', 'grpc'}} & set(sys.modules)\n"
        f"assert not heavy, heavy\nsys.argv = [{name!r}, '--help']\n{function}()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name}" in done.stdout
