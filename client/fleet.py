"""Who is this node? The key a site shows the SuperLink, and Flower's client that signs with it."""

from __future__ import annotations

import os
import ssl
import time
from base64 import b64encode
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
    sign_message,
)
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.wire import WAIT_HEADER, Wire
from privacy.errors import ConsiliumError

_SIGNATURE_LASTS = 5.0


def create_key(path: Path) -> str:
    """Make a new node key at `path` (PEM, 0600) and return its public half (PEM, SPKI, P-384)."""
    private, public = generate_key_pairs()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private_key_to_bytes(private))
    return public_key_to_bytes(public).decode()


def public_pem(path: Path) -> str:
    """The public half of the node key at `path`.

    Raises:
        ConsiliumError: the file is missing or holds no EC private key.
    """
    return public_key_to_bytes(load_key(path).public_key()).decode()


class Fleet(Wire, FleetHttpClient):
    """Flower's client for nodes; signs as Flower's SuperNode does. One signature serves five seconds of requests."""

    def __init__(
        self, address: str, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey, proxy: str | None
    ) -> None:
        self.public = public_key_to_bytes(key.public_key())
        self.wait = 0.0
        self._key, self._until = key, 0.0
        self._headers: dict[str, str] = {}
        self._dial(f"https://{address}", "SuperNode", context, proxy)

    def _sign(self, context: ProtobufRequestContext) -> None:
        if time.monotonic() > self._until:
            stamp = now().isoformat()
            signature = sign_message(self._key, stamp.encode("ascii"))
            self._headers = {
                FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public).decode("ascii"),
                TIMESTAMP_HEADER: stamp,
                FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
            }
            self._until = time.monotonic() + _SIGNATURE_LASTS
        context.request.headers.update(self._headers)
        if isinstance(context.message, PullMessagesRequest) and self.wait > 0:
            context.request.headers[WAIT_HEADER] = f"{self.wait:.1f}"


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The node key at `path`.

    Raises:
        ConsiliumError: the file is missing or holds no EC private key.
    """
    try:
        key = bytes_to_private_key(path.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConsiliumError(
            "The node key cannot be read", str(path), "Restore the file, or make a new key and enrol again."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConsiliumError("The node key is not an EC key", str(path), "Make a new key and enrol again.")
    return key
