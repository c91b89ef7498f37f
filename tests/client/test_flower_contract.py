"""What a site relies on inside flwr 1.41.0, and what its node makes of a network that does not work as it should."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import flwr
import httpx
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesRequest, PullMessagesResponse
from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client import reach, refusal
from client.fleet import Fleet, load_key
from client.flower import Node, NodeError, create_key, public_pem
from privacy.errors import ConsiliumError
from server import tls
from server.flower import Outgoing
from tests.client.site_kit import Proxy
from tests.server.link_kit import REPOSITORY, LinkProcess, collect


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkProcess]:
    process = LinkProcess(tmp_path_factory.mktemp("link"), ["st-anna"])
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    tls.create_ca(folder, "Firewall")
    tls.create_server(folder, ["localhost", "127.0.0.1"])
    return folder


# --- what we rely on -----------------------------------------------------------------------------------------------


def test_the_release_is_the_one_we_have_read() -> None:
    assert flwr.__version__ == "1.41.0"


@pytest.mark.parametrize(
    "name",
    [
        "ActivateNode",
        "DeactivateNode",
        "SendNodeHeartbeat",
        "PullMessages",
        "PushMessages",
        "PushObject",
        "PullObject",
        "ConfirmMessageReceived",
    ],
)
def test_flowers_client_has_the_calls_we_make(name: str) -> None:
    assert callable(getattr(FleetHttpClient, name))


def test_we_sign_as_flowers_own_node_does(tmp_path: Path) -> None:
    public = create_key(tmp_path / "node.key")
    key = load_key(tmp_path / "node.key")
    with Fleet("localhost:1", ssl.create_default_context(), key, None) as client:
        ours = _context(client._client)
        client._sign(ours)
    theirs = _context(httpx.Client())
    chain = NodeAuthHttpInterceptor(key, key.public_key())
    version = RuntimeVersionHttpInterceptor("SuperNode")
    chain.intercept(theirs, lambda c: version.intercept(c, lambda _: httpx.Response(200)))
    flower = {name for name in theirs.request.headers if name.startswith("flwr-")}
    assert flower == {name for name in ours.request.headers if name.startswith("flwr-")}
    for name in ("flwr-public-key", "flwr-package-name", "flwr-package-version", "flwr-component-name"):
        assert ours.request.headers[name] == theirs.request.headers[name]
    stamp = next(value for name, value in ours.request.headers.items() if "timestamp" in name)
    signature = b64decode(ours.request.headers["flwr-signature"])
    assert verify_signature(bytes_to_public_key(public.encode()), stamp.encode(), signature)


def test_a_message_is_void_at_flower_when_the_heart_has_stopped_for_a_minute() -> None:
    assert HEARTBEAT_PATIENCE == 2


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "query.offer", "train.anything"])
def test_the_app_the_bundle_names_refuses_everything(kind: str) -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(RecordDict({"document": ConfigRecord({"x": 1})}), 7, kind)
    answer = refusal.app(message, SimpleNamespace(spec=Context))  # type: ignore[arg-type]
    assert isinstance(refusal.app, ClientApp)
    assert answer.has_error()
    assert (answer.error.code, answer.has_content()) == (refusal.REFUSED, False)


def test_a_key_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    assert create_key(path) == public_pem(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_key(path)
    path.write_text("nothing")
    with pytest.raises(ConsiliumError, match="node key cannot be read"):
        public_pem(path)


# --- the wire as hospitals have it ---------------------------------------------------------------------------------


def test_a_node_goes_through_a_proxy_and_no_other_way(link: LinkProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with Proxy() as proxy, link.connect("st-anna", proxy=proxy.url) as node, link.exchange() as exchange:
        sent = exchange.send([Outgoing(node.node_id, "train", b"through", b"model")], 60)
        incoming = node.receive()
        assert b"".join(incoming.payload()) == b"model"
        node.reply(incoming, b"back")
        assert list(collect(exchange, sent).values()) == [(b"back", b"", "")]
        assert set(proxy.seen) == {f"127.0.0.1:{link.port}"}
        assert node.alive


def test_a_proxy_that_refuses_is_named_without_its_password(link: LinkProcess) -> None:
    with Proxy(password="right") as proxy:
        error = _fails(link, proxy=proxy.url.replace("//", "//me:secret@"))
    assert error.kind == "proxy"
    assert f"through the proxy 127.0.0.1:{proxy.port}" in str(error)
    assert "secret" not in str(error)


def test_an_inspecting_firewall_is_named_by_its_issuer(link: LinkProcess, other_ca: Path) -> None:
    with _server(other_ca, b"") as port:
        error = _fails(link, address=f"localhost:{port}")
        assert error.kind == "tls"
        assert "issued by CN=Firewall CA" in str(error)
        assert "TLS inspection" in error.remedy
        facts = reach.certificate(f"localhost:{port}")
        assert facts.names == ("localhost", "127.0.0.1")
        extra = _fails(link, address=f"localhost:{port}", extra_ca=other_ca / "ca.pem")
        assert extra.kind == "refused", "the operator may trust a further authority"


def test_an_expired_certificate_is_told_apart_from_a_stranger(link: LinkProcess, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    tls.create_ca(folder, "lab")
    tls.create_server(folder, ["localhost"], days=2, now=datetime.now(UTC) - timedelta(days=9))
    with _server(folder, b"") as port:
        error = _fails(link, address=f"localhost:{port}", ca=folder / "ca.pem")
    assert (error.kind, error.what) == ("tls", "The SuperLink's certificate has expired")
    assert "until" in error.subject


def test_a_certificate_of_another_host_names_its_hosts(link: LinkProcess, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    tls.create_ca(folder, "lab")
    tls.create_server(folder, ["fl.example.org"])
    with _server(folder, b"") as port:
        error = _fails(link, address=f"localhost:{port}", ca=folder / "ca.pem")
    assert error.kind == "tls"
    assert error.subject == "localhost; the certificate names fl.example.org"


def test_a_name_that_does_not_exist_and_a_port_nobody_listens_on(link: LinkProcess) -> None:
    unknown = _fails(link, address="superlink.invalid:8443")
    assert (unknown.kind, unknown.subject) == ("unreachable", "superlink.invalid")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = _fails(link, address=f"127.0.0.1:{closed.getsockname()[1]}")
    assert (nobody.kind, nobody.what) == ("unreachable", "Nobody listens there")


def test_something_that_does_not_speak_tls_is_said_so(link: LinkProcess) -> None:
    host, port = reach.split(link.private)
    error = _fails(link, address=f"{host}:{port}")
    assert (error.kind, error.what) == ("tls", "What answers does not speak TLS as the SuperLink does")


def test_an_unknown_node_is_told_what_to_do(link: LinkProcess, tmp_path: Path) -> None:
    create_key(tmp_path / "stranger.key")
    with pytest.raises(NodeError, match="does not accept this site") as error:
        Node.connect(f"127.0.0.1:{link.port}", link.ca, tmp_path / "stranger.key")
    assert error.value.kind == "refused"
    assert "enrol --renew" in error.value.remedy


@pytest.mark.parametrize(
    ("seconds", "kind"), [(0, "refused"), (3, "refused"), (30, "clock"), (-200, "refused"), (-400, "clock")]
)
def test_a_wrong_clock_is_told_apart_from_a_wrong_key(seconds: int, kind: str) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    assert reach.denied(format_datetime(now - timedelta(seconds=seconds), usegmt=True), "x:1", now).kind == kind


@pytest.mark.parametrize("date", [None, "", "nonsense"])
def test_a_missing_date_is_no_clock_error(date: str | None) -> None:
    assert reach.denied(date, "x:1").kind == "refused"


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (404, {}, "refused"),
        (302, {"location": "https://example.org/"}, "refused"),
        (500, {}, "unreachable"),
        (503, {}, "unreachable"),
        (400, {"flwr-version-incompatibility-message": "1.2 against 1.41"}, "version"),
    ],
)
def test_other_servers_are_told_apart(link: LinkProcess, status: int, headers: dict[str, str], kind: str) -> None:
    with _server(link.home / "tls", b"<html>", status, headers) as port:
        assert _fails(link, address=f"localhost:{port}").kind == kind


@pytest.mark.parametrize("body", [b"<html>not protobuf", b"\xff" * 100])
def test_an_answer_that_is_no_flower_message_ends_in_a_clear_error(link: LinkProcess, body: bytes) -> None:
    with _server(link.home / "tls", body) as port:
        assert _fails(link, address=f"localhost:{port}").kind == "unreachable"


@pytest.mark.parametrize("encoding", [{}, {"content-encoding": "gzip"}])
def test_an_answer_without_end_is_cut_off(link: LinkProcess, encoding: dict[str, str]) -> None:
    with _server(link.home / "tls", b"\0" * (64 << 20), 200, encoding) as port:
        error = _fails(link, address=f"localhost:{port}")
    assert "larger than any the SuperLink gives" in str(error)


def test_a_message_that_is_not_ours_is_dismissed(link: LinkProcess) -> None:
    from flwr.proto.message_pb2 import Message as Proto
    from flwr.proto.message_pb2 import Metadata, ObjectTree

    strange = PullMessagesResponse(
        messages_list=[Proto(metadata=Metadata(run_id=1, message_id="x", message_type="query.train", ttl=60))],
        message_object_trees=[ObjectTree(object_id="x")],
    )
    bodies = {
        "/v1/fleet/activate-node": ActivateNodeResponse(node_id=7).SerializeToString(),
        "/v1/fleet/pull-messages": strange.SerializeToString(),
    }
    with (
        _server(link.home / "tls", bodies) as port,
        link.connect("st-anna", address=f"localhost:{port}") as node,
        pytest.raises(NodeError, match="not well formed") as error,
    ):
        node.receive()
    assert error.value.kind == "gone"


def test_an_unreadable_ca_is_named(link: LinkProcess, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="CA file cannot be read"):
        Node.connect("localhost:1", tmp_path / "none.pem", link.key("st-anna"))


_A_CONNECTOR = """
import pathlib, sys
from client.flower import Node

def anonymous_kb():
    return int(pathlib.Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

address, ca, key = sys.argv[1:]
with Node.connect(address, pathlib.Path(ca), pathlib.Path(key)) as node:
    incoming = node.receive()
    before, most, size = anonymous_kb(), 0, 0
    for piece in incoming.payload():
        size += len(piece)
        most = max(most, anonymous_kb() - before)
    node.reply(incoming, b"%d %d" % (size, most))
"""


def test_the_connector_needs_little_memory(link: LinkProcess, tmp_path: Path) -> None:
    """Forty megabytes must not cost forty megabytes; in a process of its own, as a connector is."""
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(40 << 20))
    arguments = [f"127.0.0.1:{link.port}", str(link.ca), str(link.key("st-anna"))]
    with link.connect("st-anna") as node:
        node_id = node.node_id
    with link.exchange() as exchange:
        connector = subprocess.Popen([sys.executable, "-c", _A_CONNECTOR, *arguments], cwd=REPOSITORY)
        sent = exchange.send([Outgoing(node_id, "train", b"large", payload)], 60)
        [(report, _, error)] = collect(exchange, sent).values()
        assert connector.wait(60) == 0
    assert not error
    size, most = map(int, report.split())
    assert size == 40 << 20
    assert most < 30 << 10


def _context(client: httpx.Client) -> ProtobufRequestContext:
    request = client.build_request("POST", "https://localhost/v1/fleet/pull-messages")
    return ProtobufRequestContext("/flwr.proto.Fleet/PullMessages", PullMessagesRequest(), request)


def _fails(link: LinkProcess, ca: Path | None = None, **options: object) -> NodeError:
    address = str(options.pop("address", f"127.0.0.1:{link.port}"))
    with pytest.raises(NodeError) as caught:
        Node.connect(address, ca or link.ca, link.key("st-anna"), **options)  # type: ignore[arg-type]
    assert caught.value.what
    assert caught.value.remedy.endswith(".")
    return caught.value


@contextmanager
def _server(
    folder: Path, body: bytes | dict[str, bytes], status: int = 200, headers: dict[str, str] | None = None
) -> Iterator[int]:
    """A TLS server that is no SuperLink: it gives every POST the same answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            self.rfile.read(length)
            content = body.get(self.path, b"") if isinstance(body, dict) else body
            self.send_response(status)
            for name, value in {**(headers or {}), "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(content)
            except OSError:
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            return

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            return

        def finish_request(self, request: socket.socket, client_address: object) -> None:
            wrapped = context.wrap_socket(request, server_side=True)
            super().finish_request(wrapped, client_address)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(10)
