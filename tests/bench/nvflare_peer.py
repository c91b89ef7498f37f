"""How long does a round take in NVFLARE's simulator? Its FedAvg recipe, three sites, a process for each, no TLS.

It lives in a virtual environment of its own, `build/bench/nvflare-venv`, because it pins other versions than we do; it
is measured when that exists, and made on request. Its defaults are kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench import measured
from tests.bench.measured import SITES, Measured, Size
from tests.bench.memory import Sampler
from tests.bench.table import FOLDER

VENV = FOLDER / "nvflare-venv"
PACKAGES = ("torch==2.13.0", "nvflare==2.9.0")
PEER = Path(__file__).parent / "peer"


def installed() -> bool:
    """Whether it can be measured here."""
    return (VENV / ".ready").exists()


def install() -> None:
    """Make its virtual environment; about a minute and 1.1 GB.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    (VENV / ".ready").touch()


def label(line: Sequence[str]) -> str:
    """The role of a process, by its command line: sites have a worker of their own."""
    text = " ".join(line)
    if str(VENV) not in text:
        return ""
    if "nvflare_client.py" in text:
        return "client script"
    return "site" if "simulator_worker" in text else "server"


def measure(folder: Path, size: Size, rounds: int, limit: float) -> Measured:
    """One run. A round is from one model's arrival at a site to the next one's.

    Raises:
        RuntimeError: the run did not get to its end; the message holds the end of the log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    stamps = folder / "stamps"
    stamps.mkdir(parents=True)
    for name in ("network", "nvflare_job", "nvflare_client"):
        shutil.copy(PEER / f"{name}.py", folder)
    python = (VENV / "bin" / "python").absolute()
    environment = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder.absolute()),
        "BENCH_STAMPS": str(stamps.absolute()),
        "BENCH_WIDTH": str(size.width),
        "OMP_NUM_THREADS": "1",
    }
    workspace = str((folder / "workspace").absolute())
    with Sampler(label) as sampler, open(folder / "job.out", "ab") as output:
        process = subprocess.Popen(
            [str(python), "nvflare_job.py", str(len(SITES)), str(rounds + 1), str(size.width), workspace],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            measured.end([process])
    read = [sorted(map(float, file.read_text().split())) for file in sorted(stamps.iterdir())]
    if not read or min(map(len, read)) < rounds + 1:
        tail = (folder / "job.out").read_text(errors="replace").splitlines()[-20:]
        raise RuntimeError("NVFLARE did not get to its end\n" + "\n".join(tail))
    return measured.of([max(arrivals) for arrivals in zip(*read, strict=False)], sampler)
