"""Why can this hospital not reach the SuperLink? Turns a failed connection into words a network team can act on.

A hospital's network has a proxy, an inspecting firewall, a private name server and a clock of its own; each fails
in its own way. `certificate` looks, without trusting it, at what answers, so that an interceptor can be named.
"""

from __future__ import annotations

import base64
import email.utils
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from cryptography import x509

from privacy.errors import ConsiliumError

Kind = Literal["unreachable", "tls", "proxy", "refused", "clock", "version", "gone"]
CLOCK_AHEAD, CLOCK_BEHIND = 4.0, 300.0
_EXPIRED, _NOT_YET, _NAME, _ADDRESS = 10, 9, 62, 64
_PROXY_REPLY = 1 << 14


class NodeError(ConsiliumError):
    """The link does not work, or (`kind` "gone") one message can no longer be fetched or answered."""

    def __init__(self, kind: Kind, what: str, subject: str, remedy: str) -> None:
        super().__init__(what, subject, remedy)
        self.kind: Kind = kind


@dataclass(frozen=True)
class Facts:
    """What the certificate that answers says of itself. Nothing here has been verified."""

    subject: str
    issuer: str
    not_before: datetime
    not_after: datetime
    names: tuple[str, ...]
    der: bytes


def split(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def certificate(address: str, proxy: str | None = None, timeout: float = 5.0) -> Facts:
    """Fetch the certificate shown at `address` (through `proxy`, when given) without trusting it.

    Raises:
        OSError: nothing answers, or what answers does not speak TLS.
    """
    host, port = split(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        closing(_open(host, port, proxy, timeout)) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        der = wrapped.getpeercert(binary_form=True) or b""
    shown = x509.load_der_x509_certificate(der)
    try:
        extension = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = tuple(str(name.value) for name in extension)
    except x509.ExtensionNotFound:
        names = ()
    return Facts(
        shown.subject.rfc4514_string(),
        shown.issuer.rfc4514_string(),
        shown.not_valid_before_utc,
        shown.not_valid_after_utc,
        names,
        der,
    )


def explain(error: BaseException, address: str, ca: Path, proxy: str | None = None) -> NodeError:
    """Say why connecting to `address` failed with `error`."""
    causes = list(_causes(error))
    via = f"{address} through the proxy {_bare(proxy)}" if proxy else address
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(cause.verify_code, address, ca, proxy)
    if any(type(cause).__name__ == "ProxyError" for cause in causes):
        return NodeError(
            "proxy",
            "The proxy refused to connect",
            f"{via} ({error})",
            "Ask your network team to allow CONNECT to this host and port, and check the proxy's user name.",
        )
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return NodeError(
                "unreachable",
                "The name cannot be resolved",
                _bare(proxy) if proxy else split(address)[0],
                "Check the spelling, and ask your network team whether this machine's name server knows it.",
            )
        if isinstance(cause, ConnectionRefusedError):
            return NodeError(
                "unreachable",
                "Nobody listens there",
                _bare(proxy) if proxy else address,
                "Check host and port; the coordinator's SuperLink may be down.",
            )
        if isinstance(cause, ssl.SSLError):
            return NodeError(
                "tls",
                "What answers does not speak TLS as the SuperLink does",
                f"{via} ({cause.reason or cause})",
                "Check the port, and ask your network team whether something in between changes TLS.",
            )
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return NodeError(
                "unreachable",
                "No answer in time",
                via,
                "Ask your network team to open outbound HTTPS to this host and port, or to name the proxy.",
            )
    return NodeError(
        "unreachable",
        "The connection broke",
        f"{via} ({str(error) or type(error).__name__})",
        "It is tried again by itself; if it stays so, ask your network team.",
    )


def denied(date: str | None, address: str, now: datetime | None = None) -> NodeError:
    """Say why the SuperLink does not accept this node (HTTP 401), given the answer's Date header."""
    moment = now or datetime.now(UTC)
    try:
        ahead = (moment - email.utils.parsedate_to_datetime(date or "")).total_seconds()
    except (ValueError, TypeError):
        ahead = 0.0
    if ahead > CLOCK_AHEAD or ahead < -CLOCK_BEHIND:
        direction = "ahead of" if ahead > 0 else "behind"
        return NodeError(
            "clock",
            "This machine's clock is wrong",
            f"{abs(ahead):.0f} s {direction} the SuperLink at {address}",
            "Set the clock (NTP): signatures count for five minutes only.",
        )
    return NodeError(
        "refused",
        "The SuperLink does not accept this site",
        address,
        "The site's node key is not enrolled there, or was revoked: send your enrolment file to the coordinator, "
        "or renew it with `consilium-site enrol --renew`.",
    )


def _untrusted(code: int, address: str, ca: Path, proxy: str | None) -> NodeError:
    try:
        facts = certificate(address, proxy)
    except (OSError, ValueError):
        facts = None
    if code in {_EXPIRED, _NOT_YET} and facts is not None:
        moment = facts.not_after if code == _EXPIRED else facts.not_before
        return NodeError(
            "tls",
            "The SuperLink's certificate has expired"
            if code == _EXPIRED
            else "The SuperLink's certificate is not valid yet",
            f"{address}, {'until' if code == _EXPIRED else 'from'} {moment:%Y-%m-%d %H:%M} UTC",
            "Compare this machine's clock with the time; if it is right, the coordinator must renew it.",
        )
    if code in {_NAME, _ADDRESS}:
        names = ", ".join(facts.names) if facts and facts.names else "no name"
        return NodeError(
            "tls",
            "The certificate belongs to another host",
            f"{split(address)[0]}; the certificate names {names}",
            "Use a name the certificate holds, or ask the coordinator for a certificate with this name.",
        )
    issuer = facts.issuer if facts else "unknown"
    return NodeError(
        "tls",
        "The certificate was not issued by the consortium's authority",
        f"{address}, issued by {issuer}; trusted is {ca}",
        "If the issuer is your own firewall or proxy, ask your network team to exempt this host from TLS "
        "inspection, or add its CA in site.toml; otherwise do not go on, and telephone the coordinator.",
    )


def _open(host: str, port: int, proxy: str | None, timeout: float) -> socket.socket:
    if not proxy:
        return socket.create_connection((host, port), timeout)
    parts = urlsplit(proxy)
    plain = socket.create_connection((parts.hostname or "", parts.port or 80), timeout)
    try:
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        if parts.username:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            request += f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
        plain.sendall(request.encode() + b"\r\n")
        reply = b""
        while b"\r\n\r\n" not in reply:
            piece = plain.recv(4096)
            reply += piece
            if not piece or len(reply) > _PROXY_REPLY:
                raise ConnectionError("the proxy closed the connection")
        if reply.split(b" ", 2)[1:2] != [b"200"]:
            raise ConnectionError("the proxy refused: " + reply.split(b"\r\n", 1)[0].decode("latin-1"))
    except BaseException:
        plain.close()
        raise
    return plain


def _bare(proxy: str) -> str:
    """The proxy without user name and password."""
    parts = urlsplit(proxy)
    return f"{parts.hostname}:{parts.port or 80}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
