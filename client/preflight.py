"""Will this site's node work here? Each step of the way to the SuperLink, tried in order, and the agent's own checks.

A hospital's network team needs to know which step fails, so each is tried by itself: name, port or proxy, TLS against
the consortium's authority, clock, paths, node key. After a failure the steps behind it are not tried.
"""

from __future__ import annotations

import email.utils
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx

from client import link_state, reach
from client.agent_client import Local
from client.connector import connect
from client.home import SiteConfig, SiteHome
from client.reach import CLOCK_AHEAD, CLOCK_BEHIND, Facts, NodeError
from privacy.errors import ConsiliumError

FLEET_PATH = "/v1/fleet/activate-node"
CONTROL_PATHS = ("/v1/control/list-runs", "/v1/runtime/acquire-task")
PATIENCE = 10.0
SOON = timedelta(days=14)


@dataclass(frozen=True)
class Check:
    """One line of the table. `problem` False and a remedy: good to know, but nothing is wrong."""

    side: Literal["connector", "agent"]
    name: str
    problem: bool
    detail: str
    remedy: str = ""


def everything(home: SiteHome, now: datetime | None = None) -> Iterator[Check]:
    """All checks of both sides, as they are made."""
    yield from connector(home, now)
    yield from agent(home)


def agent(home: SiteHome) -> Iterator[Check]:
    """The agent's checks, over the operator's door: device, disk, network, a sample of images."""
    try:
        with Local(home.local_socket) as door:
            door.hello()
            for finding in door.preflight():
                yield Check("agent", finding.name, not finding.ok, finding.detail, finding.remedy)
    except ConsiliumError as error:
        yield _problem("agent", "agent", error)


def connector(home: SiteHome, now: datetime | None = None) -> Iterator[Check]:
    """The way to the SuperLink, step by step; stops at the first that makes the rest meaningless."""
    config = home.config()
    moment = now or datetime.now(UTC)
    for step in (_name, _port):
        check = step(config)
        yield check
        if check.problem:
            return
    if config.superlink != home.consortium().superlink:
        yield Check(
            "connector",
            "address",
            False,
            f"site.toml says {config.superlink}, the consortium document {home.consortium().superlink}",
            "Correct as long as you changed it on purpose.",
        )
    try:
        with _client(home, config) as client:
            answer = client.post(FLEET_PATH)
            controls = [client.post(path).status_code for path in CONTROL_PATHS]
    except (httpx.HTTPError, OSError, ValueError) as error:
        yield _problem("connector", "TLS", reach.explain(error, config.superlink, home.ca, config.proxy or None))
        return
    yield from _certificate(home, config, moment)
    clock = _clock(answer.headers.get("date"), moment)
    yield clock
    yield _paths(config.superlink, answer.status_code, controls)
    if not clock.problem:
        yield _node_key(home)


def _name(config: SiteConfig) -> Check:
    host, port = _first_hop(config)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return _problem("connector", "name", reach.explain(error, config.superlink, Path(), config.proxy or None))
    addresses = ", ".join(sorted({str(entry[4][0]) for entry in found}))
    what = f"{host} is {addresses}" + (" (the proxy; it resolves the SuperLink's name)" if config.proxy else "")
    return Check("connector", "name", False, what)


def _port(config: SiteConfig) -> Check:
    host, port = _first_hop(config)
    try:
        socket.create_connection((host, port), PATIENCE).close()
    except OSError as error:
        return _problem("connector", "port", reach.explain(error, config.superlink, Path(), config.proxy or None))
    return Check("connector", "port", False, f"{host}:{port} answers" + (" (the proxy)" if config.proxy else ""))


def _certificate(home: SiteHome, config: SiteConfig, now: datetime) -> Iterator[Check]:
    try:
        facts = reach.certificate(config.superlink, config.proxy or None, PATIENCE)
    except (OSError, ValueError) as error:
        yield _problem("connector", "TLS", reach.explain(error, config.superlink, home.ca, config.proxy or None))
        return
    if not _issued_by(facts, home.ca):
        yield Check(
            "connector",
            "TLS",
            False,
            f"opened on the way by {facts.issuer}, which site.toml permits (extra_ca)",
            "The inspector reads what passes, though not what the agent signed unnoticed. Better: exempt this host.",
        )
    else:
        yield Check("connector", "TLS", False, f"verified; {facts.subject}, issued by {facts.issuer}")
    left = facts.not_after - now
    yield Check(
        "connector",
        "certificate",
        left < timedelta(0),
        f"valid until {facts.not_after:%Y-%m-%d %H:%M} UTC ({left.days} days)",
        "Tell the coordinator: the server's certificate has to be renewed." if left < SOON else "",
    )


def _clock(date: str | None, now: datetime) -> Check:
    try:
        theirs = email.utils.parsedate_to_datetime(date or "")
    except (ValueError, TypeError):
        return Check("connector", "clock", False, "the SuperLink's answer carries no time to compare with")
    ahead = (now - theirs).total_seconds()
    if -CLOCK_BEHIND <= ahead <= CLOCK_AHEAD:
        return Check("connector", "clock", False, f"within {max(1, round(abs(ahead)))} s of the SuperLink's")
    return Check(
        "connector",
        "clock",
        True,
        f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink",
        "Set the clock (NTP): signatures count for five minutes only.",
    )


def _paths(address: str, fleet: int, controls: list[int]) -> Check:
    if fleet in {404, 405} or fleet >= 500:
        return Check(
            "connector",
            "paths",
            True,
            f"{FLEET_PATH} at {address} answers HTTP {fleet}",
            "What listens there is not the consortium's SuperLink, or a gateway blocks the path. Check host and port.",
        )
    exposed = [path for path, status in zip(CONTROL_PATHS, controls, strict=True) if status != 404]
    if exposed:
        return Check(
            "connector",
            "paths",
            True,
            f"{address} answers on {', '.join(exposed)}",
            "The coordinator's port shows more than sites need. Tell the coordinator to serve it with "
            "`consilium-coordinator serve`.",
        )
    return Check("connector", "paths", False, "the sites' paths answer, control paths do not exist")


def _node_key(home: SiteHome) -> Check:
    lock = link_state.connector_lock(home)
    try:
        if lock.acquire():
            try:
                with connect(home) as node:
                    return Check("connector", "node key", False, f"accepted; signed in as node {node.node_id}")
            finally:
                lock.release()
        state = link_state.read(home)
    except (ConsiliumError, OSError) as error:
        return _problem("connector", "node key", error)
    if state is not None and state.phase == "connected":
        return Check("connector", "node key", False, f"accepted; the connector is signed in as node {state.node_id}")
    trouble = state.network if state is not None else None
    if trouble is None:
        return Check("connector", "node key", False, "the connector is just signing in")
    return Check("connector", "node key", True, f"{trouble.what}: {trouble.subject}", trouble.remedy)


def _client(home: SiteHome, config: SiteConfig) -> httpx.Client:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(home.ca)
    if config.extra_ca:
        context.load_verify_locations(home.root / config.extra_ca)
    return httpx.Client(
        base_url=f"https://{config.superlink}",
        verify=context,
        proxy=config.proxy or None,
        trust_env=False,
        follow_redirects=False,
        timeout=PATIENCE,
    )


def _first_hop(config: SiteConfig) -> tuple[str, int]:
    if not config.proxy:
        return reach.split(config.superlink)
    parts = urlsplit(config.proxy)
    return parts.hostname or "", parts.port or 80


def _issued_by(facts: Facts, ca: Path) -> bool:
    from cryptography import x509

    authorities = x509.load_pem_x509_certificates(ca.read_bytes())
    return any(authority.subject.rfc4514_string() == facts.issuer for authority in authorities)


def _problem(side: Literal["connector", "agent"], name: str, error: Exception) -> Check:
    if isinstance(error, NodeError) and error.kind == "proxy":
        name = "proxy"
    if isinstance(error, ConsiliumError):
        detail = f"{error.what}: {error.subject}" if error.subject else error.what
        return Check(side, name, True, detail, error.remedy)
    return Check(side, name, True, str(error), "Put right what it says, then run preflight again.")
