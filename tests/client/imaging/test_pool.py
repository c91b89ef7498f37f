"""Processes that read files: they end with the process that started them, an agent's, whatever ended that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]
PROGRAM = """
import time
from client.imaging import pool

def work(item):
    time.sleep(0.2)
    return item

if __name__ == "__main__":
    for result in pool.each(work, range(1000), lambda item: item, 2, 1):
        print(result, flush=True)
"""


def test_no_process_outlives_the_killed_one_that_started_it(tmp_path: Path) -> None:
    """They hold images in memory and files open."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, env=environment, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "0\n"
        children = psutil.Process(program.pid).children(recursive=True)
        assert len(children) >= 2
        program.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left, "a process outlived the one that started it"
