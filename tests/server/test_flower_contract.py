"""What the coordinator relies on inside flwr 1.41.0, and one real exchange over it with every way it can go wrong."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import socket
import ssl
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import flwr
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.serverapp import ServerApp
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.federation import NoOpFederationManager

from client.flower import Incoming, Node, NodeError
from privacy.errors import ConsiliumError
from server import gate, objects, runs
from server.carrier import Carrier
from server.flower import Exchange, LinkLost, Outgoing, acquire, bundle, bundle_hash, run_serverapp, start_run, stop_run
from tests.server.link_kit import LIVENESS, REPOSITORY, STUDY, LinkProcess, Site, ask, collect, until

SITES = ("st-anna", "st-bruno")


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkProcess]:
    process = LinkProcess(tmp_path_factory.mktemp("link"), SITES)
    process.start()
    yield process
    process.stop()


def echo(incoming: Incoming, payload: bytes) -> tuple[bytes, bytes]:
    return incoming.document, payload[::-1]


# --- what we rely on -----------------------------------------------------------------------------------------------


def test_the_release_is_the_one_we_have_read() -> None:
    assert flwr.__version__ == "1.41.0"


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (InMemoryLinkState, "__init__", ["federation_manager", "object_store"]),
        (InMemoryLinkState, "activate_node", ["node_id", "heartbeat_interval"]),
        (InMemoryLinkState, "deactivate_node", ["node_id"]),
        (
            InMemoryLinkState,
            "create_node",
            ["owner_aid", "owner_name", "public_key", "heartbeat_interval", "location", "name"],
        ),
        (InMemoryLinkState, "store_message_ins", ["message"]),
        (InMemoryLinkState, "store_object", ["run_id", "session_id", "object_id", "object_content"]),
        (InMemoryLinkState, "get_message_res", ["message_ids", "run_id"]),
        (InMemoryLinkState, "get_run_status", ["run_ids"]),
        (InMemoryLinkState, "claim_task", ["task_id"]),
        (InMemoryLinkState, "finish_task", ["task_id", "sub_status", "details"]),
        (InMemoryLinkState, "_on_task_tokens_expired", ["tasks"]),
        (InMemoryLinkState, "_is_primary_task", ["task_id"]),
        (InMemoryLinkState, "_cleanup_push_session", ["session_id", "cleanup_messages"]),
        (InMemoryLinkState, "_cleanup_expired_task_tokens_locked", []),
        (InMemoryLinkState, "cleanup_run", ["run_id"]),
        (ProtobufClient, "_unary_unary", ["path", "rpc_method", "request", "response_type", "timeout"]),
    ],
)
def test_methods_we_extend_or_call_have_these_parameters(owner: type, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters)[1:] == parameters


def test_private_names_of_the_link_state_are_there() -> None:
    carrier, _ = _carrier()
    for name in (
        "nodes",
        "node_public_key_to_node_id",
        "message_ins_store",
        "message_res_store",
        "message_ins_id_to_message_res_id",
        "task_store",
        "task_token_to_task_id",
        "_object_push_sessions",
        "_object_push_session_by_root",
    ):
        assert isinstance(getattr(carrier, name), dict), name
    for name in ("lock", "lock_task_store", "_lock_object_push_sessions"):
        assert hasattr(getattr(carrier, name), "acquire"), name


def test_the_configuration_of_the_superlink_has_these_fields() -> None:
    assert len(fields(SuperLinkLifespanConfig)) == 22


def test_every_path_let_through_exists_and_no_other_fleet_path_does() -> None:
    known = {path for method, path in PROTOBUF_REQUEST_TYPES if method == "POST"}
    assert known >= {*gate.PUBLIC_PATHS, *gate.CONTROL_PATHS, *gate.RUNTIME_PATHS}
    closed = {f"/v1/fleet/{name}" for name in ("register-node", "unregister-node", "get-run", "get-fab")}
    assert {path for path in known if path.startswith("/v1/fleet/")} == {*gate.PUBLIC_PATHS, *closed}


def test_both_sides_carry_the_same_wire_format() -> None:
    for name in ("objects.py", "wire.py"):
        assert (REPOSITORY / "client" / name).read_bytes() == (REPOSITORY / "server" / name).read_bytes()


@pytest.mark.parametrize("size", [1, 5 << 20, (12 << 20) + 7])
def test_our_messages_are_flowers_own_objects(size: int) -> None:
    data = os.urandom(size) if size < 12 << 20 else b"\0" * size
    pieces = [objects.piece_id(data[offset : offset + length]) for offset, length in objects.spans(size)]
    assert pieces[0] == ArrayChunk(memoryview(data[: 5 << 20])).object_id
    inside = objects.content(b"document", size, pieces)
    order = [list(dict.fromkeys(pieces)).index(piece) for piece in pieces]
    theirs = RecordDict(
        {
            "document": ConfigRecord({"document": b"document", "size": size, "pieces": order}),
            "payload": ArrayRecord({"payload": Array("uint8", (size,), "consilium.bytes", data)}),
        }
    )
    assert inside.tree == get_object_tree(theirs)
    assert dict(inside.small)[theirs.object_id] == theirs.deflate()
    metadata = Metadata(run_id=1, src_node_id=1, dst_node_id=2, ttl=3.5, message_type="query.train", created_at=1.8e9)
    name, whole, tree = objects.message(metadata, inside)
    flowers = message_from_proto(Message(metadata=metadata, content=RecordDictProto()))
    flowers.content = theirs
    assert (name, whole, tree) == (flowers.object_id, flowers.deflate(), get_object_tree(flowers))
    opened = objects.opened("query.train", tree, dict(inside.small)[objects.document_name(tree)])
    assert opened == objects.Opened("train", b"document", size, tuple(pieces))


def test_pieces_are_as_large_as_flowers() -> None:
    assert objects.PIECE == FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


@pytest.mark.parametrize("size", [0, 1, 200, 70_000])
def test_a_piece_is_sent_as_flower_would_send_it(size: int) -> None:
    data = os.urandom(size)
    request = PushObjectRequest(node=NodeProto(node_id=5), object_id="a" * 64, run_id=7, session_id="s")
    sent: list[bytes] = []

    class Recorder(runs.Runtime):
        def _exchange(self, path, rpc, message, response_type, body, timeout=None):  # type: ignore[no-untyped-def]
            sent.append(b"".join(body))
            return response_type(stored=True)

    with Recorder("127.0.0.1:9") as client:
        assert client.push_chunk("/v1/runtime/push-object", request, data)
    whole = PushObjectRequest()
    whole.CopyFrom(request)
    whole.object_content = ArrayChunk(memoryview(data)).deflate()
    assert PushObjectRequest.FromString(sent[0]) == whole


def test_the_bundle_holds_names_and_no_code() -> None:
    content = bundle(STUDY)
    assert content == bundle(STUDY)
    assert bundle_hash(STUDY) == hashlib.sha256(content).hexdigest() != bundle_hash("00" * 32)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
    config = get_fab_config(content)
    assert get_metadata_from_config(config) == ("consilium/study", "1.0.0")
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "server.app:app", "clientapp": "client.refusal:app"}


# --- one exchange --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 5 << 20, (12 << 20) + 3])
def test_a_payload_goes_out_and_comes_back(link: LinkProcess, tmp_path: Path, size: int | None) -> None:
    data = b"" if size is None else os.urandom(size)
    payload = tmp_path / "payload"
    payload.write_bytes(data)
    sites = [Site(link, name, echo) for name in SITES]
    try:
        with link.exchange() as exchange:
            assert set(exchange.nodes()) == set(link.keys.values())
            answers = collect(exchange, ask(exchange, "train", None if size is None else payload))
        assert answers == {site.node.node_id: (b'{"r":1}', data[::-1], "") for site in sites}
    finally:
        for site in sites:
            site.close()
    assert [site.error for site in sites] == [None, None]


def test_equal_answers_of_two_sites_and_repeated_pieces_are_kept_apart(link: LinkProcess) -> None:
    sites = [Site(link, name, lambda incoming, payload: (b"zeros", b"\0" * (12 << 20))) for name in SITES]
    try:
        with link.exchange() as exchange:
            answers = collect(exchange, ask(exchange, "train", b"\0" * (11 << 20)))
            assert {len(payload) for _, payload, _ in answers.values()} == {12 << 20}
            assert len(answers) == 2
    finally:
        for site in sites:
            site.close()


def test_a_site_that_dies_is_given_its_message_again_when_it_is_back(link: LinkProcess) -> None:
    dead = link.connect("st-anna")
    with link.exchange() as exchange:
        sent = exchange.send([Outgoing(dead.node_id, "train", b"once", b"model")], 60)
        first = dead.receive()
        assert first is not None
        assert dead.receive(0) is None, "a message is taken once"
        _abandon(dead)
        with link.connect("st-anna") as back:
            assert back.node_id == dead.node_id
            again = back.receive()
            assert again is not None
            assert (again.message_id, again.document) == (first.message_id, b"once")
            assert b"".join(again.payload()) == b"".join(again.payload()) == b"model"
            back.reply(again, b"answer", 3, lambda offset, length: b"abc"[offset : offset + length])
            assert collect(exchange, sent) == {back.node_id: (b"answer", b"abc", "")}
            assert back.receive(0) is None


@pytest.mark.parametrize("silently", [False, True])
def test_a_poll_that_a_dead_session_left_behind_takes_no_message(link: LinkProcess, silently: bool) -> None:
    dead = link.connect("st-anna")
    held = _held_poll(dead)
    if not silently:
        held.close()
    with link.connect("st-anna") as back, link.exchange() as exchange:
        sent = exchange.send([Outgoing(back.node_id, "train", b"for the living")], 60)
        incoming = back.receive()
        assert incoming is not None
        back.reply(incoming, b"answer")
        assert len(collect(exchange, sent)) == 1
    if silently:
        assert held.recv(4096).startswith(b"HTTP/1.1 503 ")
        held.close()
    _abandon(dead)


def test_a_site_that_dies_while_it_answers_holds_nobody_up(link: LinkProcess) -> None:
    class Death(Exception):
        pass

    def half(offset: int, length: int) -> bytes:
        if offset and calls.append(offset) is None and len(calls) > 1:
            raise Death
        return b"x" * length

    calls: list[int] = []
    dying, other = link.connect("st-anna"), Site(link, "st-bruno", echo)
    try:
        with link.exchange() as exchange:
            sent = ask(exchange, "train", b"model")
            with pytest.raises(Death):
                dying.reply(dying.receive(), b"half", 6 << 20, half)
            answers = collect(exchange, {m: n for m, n in sent.items() if n == other.node.node_id})
            assert answers == {other.node.node_id: (b'{"r":1}', b"ledom", "")}
            _abandon(dying)
            with link.connect("st-anna") as back:
                back.reply(back.receive(), b"whole")
                open_ = {m: n for m, n in sent.items() if n == back.node_id}
                assert collect(exchange, open_) == {back.node_id: (b"whole", b"", "")}
    finally:
        other.close()


def test_after_the_deadline_the_site_learns_that_it_is_late(link: LinkProcess) -> None:
    with link.connect("st-anna") as node, link.exchange() as exchange:
        sent = exchange.send([Outgoing(node.node_id, "train", b"soon")], 1.0)
        incoming = node.receive()
        until(lambda: incoming.ttl_left < 0, "the deadline passes")
        with pytest.raises(NodeError, match="deadline is over") as late:
            node.reply(incoming, b"late")
        assert late.value.kind == "gone"
        (answer,) = collect(exchange, sent).values()
        assert answer[2] != ""
        assert node.receive(0) is None


def test_a_dropped_message_is_freed_and_its_answer_not_taken(link: LinkProcess) -> None:
    with link.connect("st-anna") as node, link.exchange() as exchange:
        sent = exchange.send([Outgoing(node.node_id, "train", b"dropped", b"model")], 60)
        incoming = node.receive()
        exchange.drop(sent)
        with pytest.raises(NodeError, match="withdrew the message"):
            list(incoming.payload())
        assert list(exchange.poll(sent)) == []


def test_an_answer_that_needs_no_payload_ends_nothing(link: LinkProcess, tmp_path: Path) -> None:
    """An agent that sends a stored answer again, or refuses, is done before the payload is at the SuperLink."""
    model = tmp_path / "model"
    model.write_bytes(bytes(40 << 20))
    with link.connect("st-anna") as node, link.exchange() as exchange:

        def answer() -> None:
            incoming = node.receive(30)
            assert incoming is not None
            node.reply(incoming, b"as before")

        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(answer)
            sent = exchange.send([Outgoing(node.node_id, "train", b"again", model)], 60)
            answering.result(LIVENESS)
        assert [answer[0] for answer in collect(exchange, sent).values()] == [b"as before"]


def test_a_node_that_is_not_there_cannot_be_addressed(link: LinkProcess) -> None:
    with link.exchange() as exchange:
        assert exchange.send([Outgoing(12345, "train", b"nobody")], 60) == {}
        assert exchange.send([], 60) == {}


def test_a_stopped_run_is_lost_to_its_process_and_over_for_the_site(link: LinkProcess) -> None:
    with link.connect("st-anna") as node:
        with pytest.raises(LinkLost) as lost, link.exchange() as exchange:
            sent = exchange.send([Outgoing(node.node_id, "train", b"x", b"model")], 60)
            incoming = node.receive()
            assert stop_run(link.private, link.secrets.control, exchange.run_id)
            assert not stop_run(link.private, link.secrets.control, exchange.run_id)
            list(exchange.poll(sent))
        assert lost.value.kind == "forgotten"
        assert "study resume" in str(lost.value)
        with pytest.raises(NodeError) as over:
            node.reply(incoming, b"answer")
        assert over.value.kind == "gone"


def test_run_serverapp_runs_our_app_and_unpacks_nothing(link: LinkProcess) -> None:
    app, seen = ServerApp(), []

    @app.main()
    def main(grid: Exchange, context: Context) -> None:
        seen.append((grid.run_id, context.run_config))

    run_id = start_run(link.private, link.secrets.control, STUDY)
    token, _ = acquire(link.private, link.secrets.runtime, STUDY)
    run_serverapp(app, link.private, token, STUDY)
    assert seen == [(run_id, {"study": STUDY})]
    status = {run.run_id: run.status for run in runs.runs(link.private, link.secrets.control)}
    assert status[run_id] == "finished"
    assert not (link.home / "run" / "flwr" / "apps").exists()


def test_a_task_of_another_study_is_not_worked_on(link: LinkProcess) -> None:
    start_run(link.private, link.secrets.control, "22" * 32)
    token, _ = acquire(link.private, link.secrets.runtime, "22" * 32)
    with pytest.raises(ConsiliumError, match="another study"), Exchange(link.private, token, STUDY):
        raise AssertionError("must not get here")


def test_a_restart_of_the_superlink_is_said_so_and_all_can_come_back(tmp_path: Path) -> None:
    link = LinkProcess(tmp_path, SITES)
    link.start()
    node = link.connect("st-anna")
    with pytest.raises(LinkLost) as lost, link.exchange() as exchange:
        sent = exchange.send([Outgoing(node.node_id, "train", b"x", b"model")], 60)
        link.kill()
        list(exchange.poll(sent))
    assert lost.value.kind == "unreachable"
    with pytest.raises(NodeError) as gone:
        node.receive(0)
    assert gone.value.kind == "unreachable"
    link.start()
    with pytest.raises(NodeError) as unknown:
        node.receive(0)
    assert unknown.value.kind == "refused"
    _abandon(node)
    sites = [Site(link, name, echo) for name in SITES]
    try:
        with link.exchange() as exchange:
            assert len(collect(exchange, ask(exchange, "train", b"abc"))) == 2
    finally:
        for site in sites:
            site.close()
        assert link.stop() == 0


# --- the carrier by itself -----------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind_is_freed(link: LinkProcess) -> None:
    carrier, woken = _carrier()
    carrier.enrol({b"key": "st-anna"})
    node_id = carrier.get_node_id_by_public_key(b"key")
    assert carrier.activate_node(node_id, 30)
    assert carrier.activate_node(node_id, 30), "a killed node is in again at once"
    run_id = carrier.create_run("a", "1", None, {}, "@none/default", None, "aid", "flwr-serverapp")
    (task_id,) = carrier.task_store
    token = carrier.claim_task(task_id)
    assert carrier.run_of(token) == run_id
    inside = objects.content(b"document", 3, [objects.piece_id(b"abc")])
    metadata = Metadata(run_id=run_id, src_node_id=1, dst_node_id=node_id, ttl=60, message_type="query.train")
    metadata.created_at = 1.9e9
    metadata.message_id, whole, tree = objects.message(metadata, inside)
    message = message_from_proto(Message(metadata=metadata, content=RecordDictProto()))
    session = carrier.start_session(run_id)
    stored, missing = carrier.store_message_and_object_tree(message, tree, session)
    assert (stored, len(missing)) == (True, 6)
    assert node_id in woken
    assert carrier.has_message(node_id)
    for name, data in [*inside.small, (metadata.message_id, whole)]:
        assert carrier.store_object(run_id, session, name, data)
    assert len(carrier.object_store) == 6
    assert carrier.finish_task(task_id, "failed", "")
    assert len(carrier.object_store) == 0
    assert not carrier.has_message(node_id)
    assert carrier.get_run_status({99})[99].status == "finished", "a run from before a restart"


def _carrier() -> tuple[Carrier, list[int]]:
    woken: list[int] = []

    class Waiters:
        def wake(self, key: int) -> None:
            woken.append(key)

        def cut(self, key: int) -> None:
            woken.clear()

    return Carrier(NoOpFederationManager(), InMemoryObjectStore(), lambda *_, **__: None, Waiters()), woken


def _abandon(node: Node) -> None:
    """Leave a node as kill -9 does: nothing is said to the SuperLink."""
    node._stop.set()
    node._client.close()


def _held_poll(node: Node) -> ssl.SSLSocket:
    """A poll of this node's that the SuperLink is holding, on a connection of its own."""
    request = PullMessagesRequest(node=NodeProto(node_id=node.node_id))
    context = ProtobufRequestContext("", request, node._client._client.build_request("POST", "https://x/"))
    node._client.wait = 15
    node._client._sign(context)
    body = request.SerializeToString()
    lines = [
        "POST /v1/fleet/pull-messages HTTP/1.1",
        "content-type: application/protobuf",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in context.request.headers.items() if name.startswith(("flwr", "cons"))),
    ]
    host, port = node._address.split(":")
    plain = socket.create_connection((host, int(port)), 30)
    held = ssl.create_default_context(cafile=node._ca).wrap_socket(plain, server_hostname=host)
    held.sendall("\r\n".join([*lines, "host: x", "", ""]).encode() + body)
    time.sleep(0.5)
    return held
