"""How is a run of Flower's started, taken, and stopped? The coordinator's clients of the SuperLink's private port.

To Flower a study that runs is a run, and the process that works on it is the process of its ServerApp. The bundle
that Flower wants for a run holds names only; its hash ties the run to the study, so that no process can take the
task of another.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import httpx
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.supercore.version import package_version

from privacy.errors import ConsiliumError
from server.wire import WAIT_HEADER, Wire

Q = TypeVar("Q")
A = TypeVar("A")

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_RESUME = "`consilium-coordinator study resume` goes on with the same round."
_MANIFEST = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "study"
version = "1.0.0"
description = "Study {study}. This bundle holds names only; sites decide by the study's own hash."
license = "Apache-2.0"
dependencies = ["flwr=={flwr}"]

[tool.flwr.app]
publisher = "consilium"
flwr-version-target = "{flwr}"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.refusal:app"

[tool.flwr.app.config]
study = "{study}"
"""


class LinkLost(ConsiliumError):
    """The SuperLink is gone ("unreachable") or does not know this run any more ("forgotten")."""

    def __init__(self, kind: Literal["unreachable", "forgotten"], subject: str) -> None:
        what = {
            "unreachable": "The SuperLink does not answer",
            "forgotten": "The SuperLink was restarted, or the run was stopped: it does not know this run",
        }[kind]
        super().__init__(what, subject, _RESUME)
        self.kind = kind


@dataclass(frozen=True)
class RunInfo:
    """One run the SuperLink knows. `bundle` is the hash of its bundle, `status` Flower's word for its state."""

    run_id: int
    bundle: str
    status: str


def bundle(study: str) -> bytes:
    """The bundle (FAB) for runs of the study with this hash: a manifest and no code. Equal input, equal bytes."""
    manifest = _MANIFEST.format(study=study, flwr=package_version).encode()
    content = f"pyproject.toml,{hashlib.sha256(manifest).hexdigest()},{len(manifest) * 8}"
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ((".info/CONTENT", content.encode()), ("pyproject.toml", manifest)):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return target.getvalue()


def bundle_hash(study: str) -> str:
    """Flower's name for `bundle(study)`."""
    return hashlib.sha256(bundle(study)).hexdigest()


def start_run(private: str, token: str, study: str) -> int:
    """Start a run of `study` and return its number.

    Args:
        private: the SuperLink's private port, "127.0.0.1:port".
        token: the control token.
        study: hash of the study.

    Raises:
        LinkLost: the SuperLink does not answer.
        ConsiliumError: it refuses.
    """
    content = bundle(study)
    request = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content))
    with Control(private, token) as client:
        run_id = control(client.StartRun, request, private).run_id
    if not run_id:
        raise ConsiliumError("The SuperLink did not start the run", study[:16], "See the SuperLink's log.")
    return run_id


def stop_run(private: str, token: str, run_id: int) -> bool:
    """Stop a run; False when it has ended already or is not known. Its process then meets `LinkLost`."""
    with Control(private, token) as client:
        try:
            return control(client.StopRun, StopRunRequest(run_id=run_id), private).success
        except LinkLost:
            raise
        except ConsiliumError:
            return False


def runs(private: str, token: str) -> list[RunInfo]:
    """The runs the SuperLink knows since it was started."""
    with Control(private, token) as client:
        known = control(client.ListRuns, ListRunsRequest(), private).run_dict
    return [RunInfo(run_id, run.fab_hash, run.status.status) for run_id, run in known.items()]


def acquire(private: str, secret: bytes, study: str) -> tuple[str, int] | None:
    """Take the oldest waiting run of `study`: (task token, run number), or None when none waits.

    Raises:
        LinkLost: the SuperLink does not answer, or refuses the secret.
    """
    with Runtime(private, secret=secret) as client:
        request = AcquireTaskRequest(agentapp_fab_hashes=[bundle_hash(study)])
        answer = runtime(client.AcquireTask, request, private)
    return (answer.token, answer.task.run_id) if answer.token else None


class Control(Wire, ControlHttpClient):
    """Flower's client of the control interface, with our token."""

    def __init__(self, private: str, token: str) -> None:
        self._dial(f"http://{private}", "flwr-cli", headers={"authorization": f"Bearer {token}"})


class Runtime(Wire, RuntimeHttpClient):
    """Flower's client of the runtime interface; signs `AcquireTask` with the secret when it has it."""

    def __init__(self, private: str, token: str = "", secret: bytes | None = None) -> None:
        self._secret = None if secret is None else derive_auth_secret(secret)
        self.wait = 0.0
        headers = {TASK_TOKEN_HEADER: token} if token else {}
        self._dial(f"http://{private}", "flwr-serverapp", headers=headers)

    def _sign(self, context: ProtobufRequestContext) -> None:
        if self._secret is not None and context.rpc_method == ACQUIRE:
            context.request.headers.update(
                create_superexec_auth_metadata(auth_secret=self._secret, method=ACQUIRE, request=context.message)
            )
        if isinstance(context.message, PullAppMessagesRequest) and self.wait > 0:
            context.request.headers[WAIT_HEADER] = f"{self.wait:.1f}"


def control(method: Callable[[Q], A], request: Q, private: str) -> A:
    """Call the control interface; see `start_run` for what it raises."""
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise ConsiliumError(
            "The SuperLink refuses the command",
            f"HTTP {error.response.status_code} {error.response.extensions.get('reason', '')[:200]}",
            "Use the same home folder as the running SuperLink, or start it again.",
        ) from error
    except (httpx.HTTPError, ValueError) as error:
        raise LinkLost("unreachable", f"{private} ({type(error).__name__})") from error


def runtime(method: Callable[[Q], A], request: Q, private: str) -> A:
    """Call the runtime interface.

    Raises:
        LinkLost: the SuperLink is gone or has forgotten the run.
    """
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status < 500:
            raise LinkLost("forgotten", f"{private} (HTTP {status})") from error
        raise LinkLost("unreachable", f"{private} (HTTP {status})") from error
    except (httpx.HTTPError, ValueError) as error:
        raise LinkLost("unreachable", f"{private} ({type(error).__name__})") from error
