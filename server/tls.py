"""Which certificate does the public port show? Makes the consortium's own CA and server certificate, and checks them.

The CA serves one purpose: sites pin it, so that nobody between a hospital and the coordinator can answer in the
coordinator's place. A certificate from another authority works as well; then its CA goes to the sites instead.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy.errors import ConsiliumError
from privacy.files import write_atomically

CA, CA_KEY = "ca.pem", "ca.key"
SERVER, SERVER_KEY = "server.pem", "server.key"
_REPLACE = "Put a valid certificate and its key in their place (tls/server.pem, tls/server.key) and start again."


def create_ca(folder: Path, name: str, days: int = 3650, now: datetime | None = None) -> None:
    """Write `ca.pem` and `ca.key` (0600), valid from `now` for `days`, for the consortium called `name`."""
    moment = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA"[:64])])
    certificate = (
        _builder(subject, subject, key.public_key(), moment, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(folder, CA, CA_KEY, certificate, key)


def create_server(folder: Path, hosts: Sequence[str], days: int = 365, now: datetime | None = None) -> None:
    """Write `server.pem` and `server.key` (0600), signed by the CA in the same folder.

    Args:
        folder: holds `ca.pem` and `ca.key`.
        hosts: DNS names and IP addresses under which the sites reach the SuperLink.
        days: lifetime from `now`.

    Raises:
        ConsiliumError: the CA cannot be read.
    """
    moment = now or datetime.now(UTC)
    authority, signer = _certificate(folder / CA), _private(folder / CA_KEY)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), moment, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write(folder, SERVER, SERVER_KEY, certificate, key)


def check(certificate: Path, key: Path, now: datetime | None = None) -> datetime:
    """Make sure the server can show this certificate, and return when it ends.

    Raises:
        ConsiliumError: a file is missing or unreadable, the certificate is not valid now, or the key is another's.
    """
    shown, private, moment = _certificate(certificate), _private(key), now or datetime.now(UTC)
    if shown.not_valid_after_utc <= moment:
        ended = shown.not_valid_after_utc.strftime("%Y-%m-%d %H:%M UTC")
        raise ConsiliumError("The server certificate has expired", f"{certificate}, on {ended}", _REPLACE)
    if shown.not_valid_before_utc > moment:
        begins = shown.not_valid_before_utc.strftime("%Y-%m-%d %H:%M UTC")
        raise ConsiliumError(
            "The server certificate is not valid yet",
            f"{certificate}, from {begins}",
            "Compare this machine's clock with the time; if it is right, use another certificate.",
        )
    if _spki(shown.public_key()) != _spki(private.public_key()):
        raise ConsiliumError(
            "The private key does not belong to the server certificate",
            f"{key} and {certificate}",
            _REPLACE,
        )
    return shown.not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(
    folder: Path, name: str, key_name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, data, mode in (
        (folder / key_name, secret, 0o600),
        (folder / name, certificate.public_bytes(serialization.Encoding.PEM), 0o644),
    ):
        write_atomically(path, data, mode)


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConsiliumError("The certificate cannot be read", f"{path} ({_reason(error)})", _REPLACE) from error


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)  # type: ignore[return-value]
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConsiliumError("The private key cannot be read", f"{path} ({_reason(error)})", _REPLACE) from error


def _reason(error: BaseException) -> str:
    return error.strerror or "no access" if isinstance(error, OSError) else "not in PEM form"


def _spki(public: object) -> bytes:
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return public.public_bytes(encoding, form)  # type: ignore[attr-defined,no-any-return]
