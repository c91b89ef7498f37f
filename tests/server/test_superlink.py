"""The SuperLink process: what its two ports let through, what it writes down, and how it refuses to start."""

from __future__ import annotations

import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from client.flower import Node, NodeError
from privacy import journal
from privacy.errors import ConsiliumError
from server import audit, superlink, tls
from server.flower import LinkLost, acquire, runs, start_run
from tests.server.link_kit import REPOSITORY, STUDY, LinkProcess, until

PROTOBUF = {"content-type": PROTOBUF_MEDIA_TYPE}


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkProcess]:
    process = LinkProcess(tmp_path_factory.mktemp("link"), ["st-anna", "st-bruno"])
    process.start()
    yield process
    assert process.stop() == 0


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-task-input",
        "/v1/runtime/get-nodes",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/pull-messages?x=1",
        "//v1/fleet/pull-messages",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_stranger_finds_nothing_on_the_public_port(link: LinkProcess, method: str, path: str) -> None:
    with link.client() as client:
        answer = client.request(method, path, headers={"authorization": f"Bearer {link.secrets.control}"})
    assert (answer.status_code, answer.content) == (404, b"")
    assert "server" not in answer.headers


def test_a_node_that_is_not_enrolled_is_turned_away_before_its_body_is_read(link: LinkProcess) -> None:
    with link.client() as client:
        answer = client.post("/v1/fleet/pull-messages", headers=PROTOBUF, content=b"x" * 1000)
        shown = {"flwr-public-key": b64encode(b"not enrolled").decode()}
        known = client.post("/v1/fleet/pull-messages", headers=PROTOBUF | shown, content=b"")
    assert (answer.status_code, answer.content) == (401, b"")
    assert (known.status_code, known.content) == (401, b"")


def test_an_enrolled_key_without_its_signature_is_refused(link: LinkProcess) -> None:
    shown = {"flwr-public-key": b64encode(link.keys["st-anna"].encode()).decode()}
    with link.client() as client:
        answer = client.post("/v1/fleet/pull-messages", headers=PROTOBUF | shown, content=b"")
    assert answer.status_code == 401


@pytest.mark.parametrize(("path", "size"), [("pull-messages", (1 << 20) + 1), ("push-object", 6 << 20)])
def test_a_body_larger_than_a_piece_is_refused(link: LinkProcess, path: str, size: int) -> None:
    shown = {"flwr-public-key": b64encode(link.keys["st-anna"].encode()).decode()}
    with link.client() as client:
        declared = client.post(f"/v1/fleet/{path}", headers=PROTOBUF | shown, content=b"x" * size)
        pieces = (b"x" * 65536 for _ in range(size // 65536 + 1))
        chunked = client.post(f"/v1/fleet/{path}", headers=PROTOBUF | shown, content=pieces)
    assert (declared.status_code, chunked.status_code) == (413, 413)


@pytest.mark.parametrize("path", ["/docs", "/health", "/v1/control/register-node", "/v1/fleet/pull-messages"])
def test_the_private_port_serves_its_own_paths_only(link: LinkProcess, path: str) -> None:
    headers = {"authorization": f"Bearer {link.secrets.control}"}
    assert httpx.post(f"http://{link.private}{path}", headers=headers).status_code == 404


@pytest.mark.parametrize("authorization", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}])
def test_control_needs_the_token(link: LinkProcess, authorization: dict[str, str]) -> None:
    answer = httpx.post(f"http://{link.private}/v1/control/list-runs", headers=PROTOBUF | authorization)
    assert (answer.status_code, answer.content) == (401, b"")
    with pytest.raises(ConsiliumError, match="refuses the command"):
        start_run(link.private, "wrong", STUDY)


def test_a_task_needs_the_secret_and_runtime_its_token(link: LinkProcess) -> None:
    with pytest.raises(LinkLost, match="401"):
        acquire(link.private, b"wrong", STUDY)
    for path in ("get-nodes", "pull-messages", "push-object", "pull-task-input"):
        assert httpx.post(f"http://{link.private}/v1/runtime/{path}", headers=PROTOBUF).status_code == 401


def test_secrets_are_readable_by_the_owner_only(link: LinkProcess) -> None:
    for name in ("control.token", "runtime.secret", "nodes.json", "superlink.json"):
        assert (link.home / "run" / name).stat().st_mode & 0o077 == 0
    assert (link.home / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_a_revoked_site_is_out_at_once_and_comes_back_with_the_next_roster_that_names_it(link: LinkProcess) -> None:
    with link.connect("st-anna") as anna, link.connect("st-bruno") as bruno:
        superlink.write_nodes(link.home, {"st-bruno": link.keys["st-bruno"]})

        until(lambda: _refusal(anna) == "refused", "the revoked site is refused")
        assert bruno.receive(0) is None
        with pytest.raises(NodeError, match="not enrolled there, or was revoked"):
            link.connect("st-anna")
    superlink.write_nodes(link.home, link.keys)
    until(lambda: _connects(link, "st-anna"), "the site is in again")


def test_an_unreadable_list_of_nodes_changes_nothing(link: LinkProcess) -> None:
    (link.home / "run" / "nodes.json").write_text('{"st-anna": "no key"}')
    until(lambda: "nodes-unreadable" in {line["event"] for line in link.audit()}, "it is written down")
    assert _connects(link, "st-bruno")
    superlink.write_nodes(link.home, link.keys)


def test_a_renewed_certificate_is_shown_without_a_restart(link: LinkProcess) -> None:
    tls.create_server(link.home / "tls", ["localhost", "127.0.0.1", "renewed.example"])
    until(lambda: "certificate-renewed" in {line["event"] for line in link.audit()}, "it is loaded")
    assert _connects(link, "st-anna")


def test_the_audit_log_is_chained_and_counts_what_repeats(link: LinkProcess) -> None:
    before = len(link.audit())
    with link.client() as client:
        for number in range(200):
            client.get(f"/somewhere/{number}")
    with link.connect("st-anna"):
        until(lambda: "node-activated" in {line["event"] for line in link.audit()}, "the node's line")
    assert journal.verify(link.home / "audit.jsonl") == len(link.audit()) < before + 20
    refusals = [line for line in link.audit() if line["event"] == "refused"]
    assert {line["reason"] for line in refusals} >= {"no such path", "not enrolled", "no control token"}
    assert {"site": "st-anna"}.items() <= next(e for e in link.audit() if e["event"] == "node-activated").items()


def test_runs_are_listed_and_written_down(link: LinkProcess) -> None:
    run_id = start_run(link.private, link.secrets.control, "11" * 32)
    assert run_id in {run.run_id for run in runs(link.private, link.secrets.control)}
    assert acquire(link.private, link.secrets.runtime, STUDY) is None, "a task of another study"
    token, taken = acquire(link.private, link.secrets.runtime, "11" * 32)
    assert (taken, len(token) > 16) == (run_id, True)
    until(lambda: "task-acquired" in {line["event"] for line in link.audit()}, "it is written down")


def test_a_taken_port_is_named(link: LinkProcess, tmp_path: Path) -> None:
    other = LinkProcess(tmp_path)
    code, text = _refuses_to_start(other.home, link.port)
    assert code == 2
    assert text.startswith(f"The port is taken: 127.0.0.1:{link.port}.")


def test_an_expired_certificate_stops_the_start_with_a_remedy(tmp_path: Path) -> None:
    other = LinkProcess(tmp_path)
    tls.create_server(tmp_path / "tls", ["localhost"], days=1, now=datetime.now(UTC) - timedelta(days=3))
    code, text = _refuses_to_start(other.home, 0)
    assert code == 2
    assert text.startswith(f"The server certificate has expired: {tmp_path}/tls/server.pem")
    assert "Put a valid certificate" in text
    assert len(text.splitlines()) == 1


def test_a_certificate_that_cannot_serve_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    certificate, key = folder / "server.pem", folder / "server.key"
    with pytest.raises(ConsiliumError, match=r"cannot be read: .*server.pem \(No such file"):
        tls.check(certificate, key)
    tls.create_ca(folder, "lab")
    tls.create_server(folder, ["localhost"], days=30)
    assert tls.check(certificate, key) > datetime.now(UTC) + timedelta(days=29)
    with pytest.raises(ConsiliumError, match="not valid yet"):
        tls.check(certificate, key, datetime.now(UTC) - timedelta(days=1))
    good = key.read_bytes()
    key.write_bytes((folder / "ca.key").read_bytes())
    with pytest.raises(ConsiliumError, match=r"does not belong .*server.key and .*server.pem"):
        tls.check(certificate, key)
    key.write_text("nothing")
    with pytest.raises(ConsiliumError, match=r"private key cannot be read: .*not in PEM form"):
        tls.check(certificate, key)
    key.write_bytes(good)
    assert key.with_suffix(".part").exists() is False
    assert (folder / "server.key").stat().st_mode & 0o777 == 0o600


def test_no_superlink_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="No SuperLink is running"):
        superlink.private_url(tmp_path)


def test_many_strangers_cannot_make_the_audit_log_grow(tmp_path: Path) -> None:
    clock = [0.0]
    log = audit.Audit(tmp_path / "audit.jsonl", clock=lambda: clock[0])
    for number in range(20_000):
        log.refused("public", f"10.0.{number // 250}.{number % 250}", "no such path", "/x\n\x1b[31m")
    log.settle()
    clock[0] = audit.WINDOW
    log.settle()
    log.close()
    lines = list(journal.read(tmp_path / "audit.jsonl"))
    assert len(lines) <= 2 * (audit.PEERS + 1)
    assert sum(line.get("times", 1) for line in lines) == 20_000
    assert {line["path"] for line in lines if "path" in line} == {"/x??[31m"}


def _refusal(node: Node) -> str:
    try:
        node.receive(0)
    except NodeError as error:
        return error.kind
    return ""


def _connects(link: LinkProcess, site: str) -> bool:
    try:
        link.connect(site).close()
    except NodeError:
        return False
    return True


def _refuses_to_start(home: Path, port: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "server.superlink", str(home), "--host", "127.0.0.1", "--port", str(port)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.strip()
