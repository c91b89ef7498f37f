"""What does Flower's SuperLink do differently for us? It knows enrolled nodes only, and loses nothing on a restart.

`Carrier` is Flower's in-memory link state with seven changes, each a few lines over the parent's method:

1. Nodes come from the registry (`enrol`), never over the network; a revoked node is gone at once.
2. A node may activate again at any time (Flower makes a killed node wait a minute), and the messages it had taken
   but not answered are delivered to it again. Agents answer a repeated request with the same stored bytes.
3. A node that signs off keeps its messages for `GRACE` seconds, so that a restart costs no round.
4. An answer becomes visible when all its objects are there, so that a half-sent one blocks nobody.
5. What a finished run left behind (messages, models) is freed at once.
6. Whoever waits for a message or an answer is told, and who came and went is written to the audit log.
7. Messages that share a payload are taken and freed one after the other, so that no shared piece goes missing.

`build` puts Flower's application together over this state; `gates` are the filters for its two ports. No secret is
asked for inside: whoever passes the private gate with the token is Flower's one nameless account.

Everything here leans on private names of flwr 1.41.0; `tests/server/test_flower_contract.py` holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from flwr.app.message import Message
from flwr.common.constant import (
    ISOLATION_MODE_PROCESS,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
    Status,
    SubStatus,
)
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    TASK_TOKEN_HEADER,
    NodeStatus,
)
from flwr.supercore.date import now
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import RunStatus
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.federation import FederationManager
from flwr.superlink.main import create_app

from server import gate

GRACE = 75.0


class Waiters(Protocol):
    """Who waits for a node's messages or a run's answers, by node or run number (`server.gate.Waiting`)."""

    def wake(self, key: int) -> None:
        """Something has come for `key`."""

    def cut(self, key: int) -> None:
        """A new session of node `key` has begun: what waits now belongs to the former one."""


class Carrier(InMemoryLinkState):
    """Flower's link state, see the module's text. `record` writes one line of the audit log."""

    def __init__(
        self, federation: FederationManager, store: ObjectStore, record: Callable[..., None], waiters: Waiters
    ) -> None:
        super().__init__(federation, store)
        self._record, self._waiters = record, waiters

    def enrol(self, nodes: Mapping[bytes, str]) -> None:
        """Make `nodes` (public key as PEM -> site name) the only ones the link knows."""
        with self.lock:
            for key in [k for k in self.node_public_key_to_node_id if k not in nodes]:
                node = self.nodes[self.node_public_key_to_node_id[key]]
                if node.status != NodeStatus.UNREGISTERED:
                    node.status = NodeStatus.UNREGISTERED
                    node.unregistered_at = now().isoformat()
                    node.online_until = now().timestamp()
                    self._record("node-removed", site=node.name)
                    self._waiters.wake(node.node_id)
            for key, site in nodes.items():
                known = self.node_public_key_to_node_id.get(key)
                if known is None:
                    self.create_node(NOOP_FLWR_AID, site, key, 0, name=site)
                    self._record("node-enrolled", site=site)
                elif self.nodes[known].status == NodeStatus.UNREGISTERED:
                    node = self.nodes[known]
                    node.status, node.name, node.owner_name = NodeStatus.REGISTERED, site, site
                    node.ClearField("unregistered_at")
                    self._record("node-enrolled", site=site)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Let an enrolled node in, also when its last session never ended, and hand it its open messages again."""
        with self.lock:
            if self._status(node_id) == NodeStatus.ONLINE:
                super().deactivate_node(node_id)
            active = super().activate_node(node_id, heartbeat_interval)
            if active:
                self._waiters.cut(node_id)
                self._redeliver(node_id)
                self._record("node-activated", site=self.nodes[node_id].name)
        return active

    def deactivate_node(self, node_id: int) -> bool:
        """Sign a node off; its open messages stay for `GRACE` seconds."""
        with self.lock:
            done = super().deactivate_node(node_id)
            if done:
                self.nodes[node_id].online_until = now().timestamp() + GRACE
                self._record("node-deactivated", site=self.nodes[node_id].name)
        return done

    def store_message_ins(self, message: Message) -> str | None:
        """Take a message for a node and tell the node's pending poll."""
        stored = super().store_message_ins(message)
        if stored:
            self._waiters.wake(message.metadata.dst_node_id)
        return stored

    def preregister_object_tree(self, object_tree: ObjectTree, session_id: str) -> list[str]:
        """Note what a message consists of, while no confirmation of another message frees a piece both share."""
        with self._lock_object_push_sessions, cast(InMemoryObjectStore, self.object_store).lock_store:
            missing: list[str] = super().preregister_object_tree(object_tree, session_id)
            return missing

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Take one object; when it was a push's last, tell the run's pending poll."""
        stored = super().store_object(run_id, session_id, object_id, object_content)
        if stored and session_id not in self._object_push_sessions:
            self._waiters.wake(run_id)
        return stored

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """The answers to these messages that have arrived whole."""
        with self.lock:
            return super().get_message_res({m for m in message_ids if not self._arriving(m)}, run_id)

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """Status of runs; a run from before a restart of the link counts as finished, not as an error."""
        lost = RunStatus(Status.FINISHED, SubStatus.FAILED, "The SuperLink was restarted.")
        return dict.fromkeys(run_ids, lost) | super().get_run_status(run_ids)

    def claim_task(self, task_id: int) -> str | None:
        """Give a pending task to the process that asks with the secret."""
        token = super().claim_task(task_id)
        if token is not None:
            self._record("task-acquired", run=str(self.task_store[task_id].run_id))
        return token

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """End a task; with a run's own task the run ends and its messages and models are freed."""
        done = super().finish_task(task_id, sub_status, details)
        if done and self._is_primary_task(task_id):
            self._ended(self.task_store[task_id].run_id, sub_status)
        return done

    def _on_task_tokens_expired(self, tasks: list[Task]) -> None:
        super()._on_task_tokens_expired(tasks)
        for task in tasks:
            if self._is_primary_task(task.task_id):
                self._ended(task.run_id, "lost")

    def tidy(self) -> None:
        """Free what stopped half-way: runs whose process died, uploads that ended early. Called every second."""
        with self.lock_task_store:
            self._cleanup_expired_task_tokens_locked()
        with self._lock_object_push_sessions:
            over = [key for key, s in self._object_push_sessions.items() if s.expires_at <= now()]
        for key in over:
            with self.lock:
                self._cleanup_push_session(key, cleanup_messages=True)

    def has_message(self, node_id: int) -> bool:
        """Does a message wait for this node?"""
        with self.lock:
            return any(
                m.metadata.dst_node_id == node_id and not m.metadata.delivered_at
                for m in self.message_ins_store.values()
            )

    def has_answer(self, run_id: int) -> bool:
        """Has a whole, unread answer arrived for this run?"""
        with self.lock:
            return any(
                m.metadata.run_id == run_id
                and not m.metadata.delivered_at
                and m.metadata.message_id not in self._object_push_session_by_root
                for m in self.message_res_store.values()
            )

    def run_of(self, token: str) -> int | None:
        """The run whose task holds this token."""
        with self.lock_task_store:
            task = self.task_token_to_task_id.get(token)
            return None if task is None else self.task_store[task].run_id

    def _status(self, node_id: int) -> str:
        node = self.nodes.get(node_id)
        return "" if node is None else node.status

    def _arriving(self, message_id: str) -> bool:
        answer = self.message_ins_id_to_message_res_id.get(message_id)
        return answer is not None and answer in self._object_push_session_by_root

    def _redeliver(self, node_id: int) -> None:
        for message_id, message in list(self.message_ins_store.items()):
            if message.metadata.dst_node_id != node_id:
                continue
            answer = self.message_ins_id_to_message_res_id.get(message_id)
            if answer is not None and answer in self._object_push_session_by_root:
                self._cleanup_push_session(self._object_push_session_by_root[answer], cleanup_messages=True)
                answer = None
            if answer is None:
                message.metadata.delivered_at = ""

    def _ended(self, run_id: int, how: str) -> None:
        self.cleanup_run(run_id)
        self._record("run-ended", run=str(run_id), how=how)
        self._waiters.wake(run_id)


def build(secret: bytes, record: Callable[..., None], waiters: Waiters) -> tuple[Any, Carrier]:
    """Flower's SuperLink application over a new `Carrier`, not yet behind a gate.

    Args:
        secret: what a process shows to take a task (process isolation).
        record: writes one line of the audit log.
        waiters: told of new messages, answers, and sessions.
    """
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    factory = app.state.linkstate_factory
    carrier = Carrier(factory.federation_manager, factory.objectstore_factory.store(), record, waiters)
    factory.state_instance = carrier
    return app, carrier


def gates(
    app: gate.ASGIApp, carrier: Carrier, token: str, audit: gate.Refusals, waiting: gate.Waiting
) -> tuple[gate.Gate, gate.Gate]:
    """The filters for the public and the private port; control paths ask for `token`."""

    def fleet_knock(path: str, headers: gate.Headers) -> str | None:
        key = gate.shown_key(headers, FLEET_HTTP_PUBLIC_KEY_HEADER)
        return None if carrier.get_node_id_by_public_key(key) is not None else "not enrolled"

    def fleet_hold(path: str, headers: gate.Headers) -> tuple[int, Callable[[], bool]] | None:
        node = carrier.get_node_id_by_public_key(gate.shown_key(headers, FLEET_HTTP_PUBLIC_KEY_HEADER))
        if path != "/v1/fleet/pull-messages" or node is None:
            return None
        return node, lambda: carrier.has_message(node)

    def private_knock(path: str, headers: gate.Headers) -> str | None:
        if path in gate.CONTROL_PATHS and not gate.bearer(headers, token):
            return "no control token"
        return None

    def private_hold(path: str, headers: gate.Headers) -> tuple[int, Callable[[], bool]] | None:
        run = carrier.run_of(headers.get(TASK_TOKEN_HEADER.encode(), b"").decode("latin-1"))
        if path != "/v1/runtime/pull-messages" or run is None:
            return None
        return run, lambda: carrier.has_answer(run)

    private = {**gate.CONTROL_PATHS, **gate.RUNTIME_PATHS}
    return (
        gate.Gate(app, "public", gate.PUBLIC_PATHS, fleet_knock, audit, waiting, fleet_hold),
        gate.Gate(app, "private", private, private_knock, audit, waiting, private_hold),
    )
