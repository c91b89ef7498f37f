"""How long does a round take in Flower as it is shipped? Its own SuperLink, SuperNodes and FedAvg, over TLS.

Nothing is tuned: TLS and node authentication as its documentation sets them up, the link's state in memory (the
default) or in SQLite, a process for each message. Two settings differ from the defaults, and neither is in a round:
no packages are installed at run time, no telemetry is sent. The app is the tutorial's: the state dictionary as it is,
and train messages only (half of what the default sends: the received model is looked at in the same message, as ours
is).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.federation import free_port
from server import tls
from tests.bench import measured
from tests.bench.measured import SITES, Measured, Size
from tests.bench.memory import Sampler

PEER = Path(__file__).parent / "peer"
ROLES = {
    "flower-superlink": "SuperLink",
    "flower-supernode": "SuperNode",
    "flower-superexec": "SuperExec",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
}
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "bench"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "{server}:app"
clientapp = "{client}:app"
[tool.flwr.app.config]
width = 1
rounds = 1
nodes = 3
stamps = ""
"""
START_SECONDS = 60.0


def label(line: Sequence[str]) -> str:
    """The role of a process, by its command line."""
    return next((ROLES[name] for part in line[:3] if (name := Path(part).name) in ROLES), "")


def measure(
    folder: Path,
    size: Size,
    rounds: int,
    limit: float,
    *,
    sqlite: bool = False,
    work: bool = True,
    secagg: bool = False,
) -> Measured:
    """One run.

    Args:
        folder: emptied and used for everything.
        limit: seconds after which the run is given up.
        sqlite: keep the link's state in a file, not in memory.
        work: load torch and train; else the client sends the same number of bytes back and does nothing.
        secagg: with Flower's own SecAgg+, three shares, two of which open.

    Raises:
        RuntimeError: the run did not get to its end; the message holds the end of the logs.
    """
    shutil.rmtree(folder, ignore_errors=True)
    client = "flower_client" if work else "bare_client"
    _prepare(folder, *(("secagg_server", "secagg_client") if secagg else ("flower_server", client)))
    port, stamps = free_port(), folder / "stamps"
    running: list[subprocess.Popen[bytes]] = []
    with Sampler(label) as sampler:
        try:
            running.append(_superlink(folder, port, sqlite))
            _until(lambda: _flwr(folder, port, "supernode", "list", "bench") == 0, running, folder)
            for number, site in enumerate(SITES):
                _must(folder, port, "supernode", "register", str(folder / f"{site}.pub"), "bench", "--name", site)
                running.append(_supernode(folder, port, site, number))
            settings = f'width={size.width} rounds={rounds} nodes={len(SITES)} stamps="{stamps}"'
            _must(folder, port, "run", str(folder / "app"), "bench", "-c", settings)
            end = time.monotonic() + limit
            while len(_read(stamps)) < rounds + 1:
                if time.monotonic() > end or any(process.poll() is not None for process in running):
                    raise RuntimeError(f"stock Flower did not get to its end\n{logs(folder)}")
                time.sleep(0.5)
        finally:
            measured.end(running)
    return measured.of(_read(stamps), sampler)


def logs(folder: Path, lines: int = 15) -> str:
    """The last lines of every log."""
    tails = (path.read_text(errors="replace").splitlines()[-lines:] for path in sorted(folder.glob("*.out")))
    return "\n".join("\n".join(tail) for tail in tails)


def _prepare(folder: Path, server: str, client: str) -> None:
    app, certificates = folder / "app", folder / "tls"
    for made in (app, certificates):
        made.mkdir(parents=True)
    for name in ("network", server, client):
        shutil.copy(PEER / f"{name}.py", app)
    (app / "pyproject.toml").write_text(PROJECT.format(server=server, client=client), encoding="utf-8")
    tls.create_ca(certificates, "bench")
    tls.create_server(certificates, ["localhost", "127.0.0.1"])
    for site in SITES:
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"{site}.key").write_bytes(private)
        (folder / f"{site}.key").chmod(0o600)
        (folder / f"{site}.pub").write_bytes(public + b"\n")


def _environment(folder: Path, home: str) -> dict[str, str]:
    path = folder / f"home-{home}"
    path.mkdir(exist_ok=True)
    own = {
        "PYTHONDONTWRITEBYTECODE": "",
        "FLWR_HOME": str(path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    binaries = str(Path(sys.executable).parent)  # Flower starts its parts by name
    return {**os.environ, **own, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def _start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    with open(folder / f"{name}.out", "ab") as output:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / arguments[0]), *arguments[1:]],
            env=_environment(folder, name),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _superlink(folder: Path, port: int, sqlite: bool) -> subprocess.Popen[bytes]:
    certificates = folder / "tls"
    return _start(
        folder,
        "superlink",
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", str(certificates / "ca.pem")),
        *("--ssl-certfile", str(certificates / "server.pem"), "--ssl-keyfile", str(certificates / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *(("--database", str(folder / "link.db")) if sqlite else ()),
    )


def _supernode(folder: Path, port: int, site: str, number: int) -> subprocess.Popen[bytes]:
    return _start(
        folder,
        site,
        "flower-supernode",
        *("--root-certificates", str(folder / "tls" / "ca.pem"), "--superlink", f"127.0.0.1:{port}"),
        *("--auth-supernode-private-key", str(folder / f"{site}.key"), "--port", str(free_port())),
        *("--node-config", f"partition-id={number} num-partitions={len(SITES)}"),
    )


def _flwr(folder: Path, port: int, *arguments: str) -> int:
    environment = _environment(folder, "cli")
    authority = folder / "tls" / "ca.pem"
    Path(environment["FLWR_HOME"], "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{authority}"\n',
        encoding="utf-8",
    )
    with open(folder / "cli.out", "ab") as output:
        return subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), *arguments],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        ).returncode


def _must(folder: Path, port: int, *arguments: str) -> None:
    if _flwr(folder, port, *arguments):
        raise RuntimeError(f"flwr {' '.join(arguments[:2])} failed\n{logs(folder)}")


def _until(done: Callable[[], bool], running: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not done():
        if time.monotonic() > end or any(process.poll() is not None for process in running):
            raise RuntimeError(f"stock Flower did not start\n{logs(folder)}")
        time.sleep(0.5)


def _read(stamps: Path) -> list[float]:
    return [float(line) for line in stamps.read_text(encoding="ascii").split()] if stamps.exists() else []
