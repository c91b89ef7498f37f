"""Preflight: each obstacle a hospital's network can set up is found, named, and comes with a remedy.

The SuperLink is a real one, the proxy a real one, and an interceptor shows a certificate of its own.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client import enrolment, link_state, preflight
from client.home import SiteHome
from client.preflight import Check
from server import tls
from tests.client.site_kit import Link, Proxy, new_site, running_link, until


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with running_link(tmp_path_factory.mktemp("link")) as link:
        yield link


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory, link: Link) -> SiteHome:
    home = new_site(tmp_path_factory.mktemp("enrolled"), link)
    link.admit(enrolment.enrolment(home))
    until(lambda: not problems(home), "the SuperLink knows the site")
    return home


def problems(home: SiteHome, now: datetime | None = None) -> dict[str, Check]:
    return {check.name: check for check in preflight.connector(home, now) if check.problem}


def the_problem(home: SiteHome, now: datetime | None = None) -> Check:
    found = problems(home, now)
    assert len(found) == 1, found
    (check,) = found.values()
    assert check.remedy
    return check


def redirect(home: SiteHome, **changes: str) -> None:
    home.write_config(home.config().model_copy(update=changes))


def variant(folder: Path, link: Link, enrolled: SiteHome, **changes: str) -> SiteHome:
    """The enrolled site once more, with other settings."""
    import shutil

    shutil.copytree(enrolled.root, folder / "site", ignore=shutil.ignore_patterns("*.sock"))
    home = SiteHome(folder / "site")
    redirect(home, **changes)
    return home


def test_all_is_well(enrolled: SiteHome) -> None:
    checks = list(preflight.connector(enrolled))
    assert [check.name for check in checks] == ["name", "port", "TLS", "certificate", "clock", "paths", "node key"]
    assert not any(check.problem for check in checks)


def test_a_name_nobody_knows(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    home = variant(tmp_path, link, enrolled, superlink="no-such-host.invalid:8443")
    check = the_problem(home)
    assert (check.name, check.detail) == ("name", "The name cannot be resolved: no-such-host.invalid")


def test_the_wrong_port(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        home = variant(tmp_path, link, enrolled, superlink=f"localhost:{taken.getsockname()[1]}")
        check = the_problem(home)
    assert check.name == "port"
    assert "Nobody listens" in check.detail


def test_something_else_listens_there(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    private = link.private.rpartition(":")[2]
    check = the_problem(variant(tmp_path, link, enrolled, superlink=f"localhost:{private}"))
    assert check.name == "TLS"
    assert "does not speak TLS" in check.detail


def test_an_authority_of_its_own_shows_an_interceptor(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    tls.create_ca(tmp_path / "firewall", "st-anna-firewall")
    tls.create_server(tmp_path / "firewall", ["localhost"])
    with Proxy(inspect=tmp_path / "firewall") as proxy:
        home = variant(tmp_path, link, enrolled, proxy=proxy.url)
        check = the_problem(home)
        assert check.name == "TLS"
        assert "st-anna-firewall CA" in check.detail
        assert "exempt this host" in check.remedy
        (home.root / enrolment.EXTRA_CA).write_bytes((tmp_path / "firewall" / "ca.pem").read_bytes())
        redirect(home, extra_ca=enrolment.EXTRA_CA)
        shown = {check.name: check for check in preflight.connector(home)}
    assert not any(check.problem for check in shown.values())
    assert "opened on the way by CN=st-anna-firewall CA" in shown["TLS"].detail


def test_through_a_proxy(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    with Proxy() as proxy:
        assert not problems(variant(tmp_path, link, enrolled, proxy=proxy.url))
        assert set(proxy.seen) == {link.address}


def test_a_proxy_that_wants_a_password(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    with Proxy(password="b3BlcmF0b3I6c2VjcmV0") as proxy:  # operator:secret
        check = the_problem(variant(tmp_path / "a", link, enrolled, proxy=proxy.url))
        assert (check.name, "407" in check.detail) == ("proxy", True)
        known = proxy.url.replace("//", "//operator:secret@")
        home = variant(tmp_path / "b", link, enrolled, proxy=known)
        assert not problems(home)
        assert all("secret" not in check.detail + check.remedy for check in preflight.connector(home))


def test_a_proxy_that_is_not_there(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    with Proxy() as proxy:
        url = proxy.url
    check = the_problem(variant(tmp_path, link, enrolled, proxy=url))
    assert check.name == "port"
    assert url.removeprefix("http://") in check.detail


@pytest.mark.parametrize(
    ("began", "days", "words"), [(-400, 365, "has expired"), (5, 365, "is not valid yet")], ids=["over", "early"]
)
def test_a_server_certificate_out_of_its_time(
    tmp_path: Path, link: Link, enrolled: SiteHome, began: int, days: int, words: str
) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    for name in ("ca.pem", "ca.key"):
        (folder / name).write_bytes((link.home / "tls" / name).read_bytes())
    tls.create_server(folder, ["localhost"], days, datetime.now(UTC) + timedelta(days=began))
    with Greeter(folder) as port:
        check = the_problem(variant(tmp_path, link, enrolled, superlink=f"localhost:{port}"))
    assert check.name == "TLS"
    assert words in check.detail


def test_a_certificate_for_another_host(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    for name in ("ca.pem", "ca.key"):
        (folder / name).write_bytes((link.home / "tls" / name).read_bytes())
    tls.create_server(folder, ["fl.example.org"])
    with Greeter(folder) as port:
        check = the_problem(variant(tmp_path, link, enrolled, superlink=f"localhost:{port}"))
    assert "belongs to another host" in check.detail
    assert "fl.example.org" in check.detail


def test_a_certificate_about_to_end_is_said_but_is_no_problem(enrolled: SiteHome) -> None:
    soon = datetime.now(UTC) + timedelta(days=360)
    certificate = next(check for check in preflight.connector(enrolled, soon) if check.name == "certificate")
    assert not certificate.problem
    assert "Tell the coordinator" in certificate.remedy


@pytest.mark.parametrize(
    ("seconds", "wrong"), [(0, False), (-200, False), (30, True), (-400, True)], ids=["right", "late", "fast", "slow"]
)
def test_the_clock(enrolled: SiteHome, seconds: int, wrong: bool) -> None:
    found = problems(enrolled, datetime.now(UTC) + timedelta(seconds=seconds))
    assert set(found) == ({"clock"} if wrong else set())


def test_a_server_that_shows_control_paths_is_reported(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    with Greeter(link.home / "tls") as port:
        found = problems(variant(tmp_path, link, enrolled, superlink=f"localhost:{port}"))
    assert list(found) == ["paths", "node key"]
    assert "/v1/control/list-runs" in found["paths"].detail


def test_a_node_key_that_is_not_enrolled(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    check = the_problem(new_site(tmp_path, link, "st-berta"))
    assert check.name == "node key"
    assert "enrol" in check.remedy


def test_a_running_connector_is_not_thrown_out(tmp_path: Path, link: Link, enrolled: SiteHome) -> None:
    home = variant(tmp_path, link, enrolled)
    lock = link_state.connector_lock(home)
    assert lock.acquire()
    link_state.write(home, link_state.LinkState(phase="connected", node_id="77"))
    shown = [check for check in preflight.connector(home) if check.name == "node key"]
    lock.release()
    assert shown[0].detail == "accepted; the connector is signed in as node 77"


def test_an_agent_that_is_down_is_a_problem_of_its_own(enrolled: SiteHome) -> None:
    (check,) = preflight.agent(enrolled)
    assert check.problem
    assert check.remedy == "Start the site's node: `consilium-site start`."


class Greeter:
    """A TLS server that answers every request with 200: not a SuperLink, but something a port may lead to."""

    def __init__(self, folder: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> int:
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(plain, server_side=True) as wrapped:
                    wrapped.settimeout(5)
                    while wrapped.recv(65536):
                        wrapped.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            except OSError:
                continue
