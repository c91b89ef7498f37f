"""How does a consortium begin, keep running, and survive? `init`, `serve`, `certificate`, `backup`, `restore`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from pydantic import ValidationError
from rich.markup import escape

from privacy.errors import ConsiliumError
from privacy.identity import Identity, fingerprint
from privacy.roster import Consortium, Roster
from privacy.terminal import out
from server import tls
from server.commands.common import home_of, read_text
from server.guards import is_serving
from server.home import CoordinatorConfig, CoordinatorHome
from server.registry import Registry

PASSPHRASE = "CONSILIUM_PASSPHRASE"  # noqa: S105 - the name of a variable

PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help=f"Its first line is the passphrase. Or set {PASSPHRASE}.")
]


def init(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The consortium: small letters, digits, hyphens.")],
    host: Annotated[str, typer.Option("--host", help="The name or address that hospitals dial.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port that hospitals dial.")] = 8443,
    listen: Annotated[str, typer.Option("--listen", help="The interface to bind; 0.0.0.0 means all.")] = "0.0.0.0",  # noqa: S104
    days: Annotated[
        int, typer.Option("--days", min=1, max=3650, help="How long the server certificate is valid.")
    ] = 397,
    cert: Annotated[
        Path | None, typer.Option("--cert", help="Your own server certificate (PEM, with --key and --ca).")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Its private key (PEM).")] = None,
    ca: Annotated[
        Path | None, typer.Option("--ca", help="The authority that issued it (PEM); sites trust only this one.")
    ] = None,
) -> None:
    """Found a consortium: make the coordinator's identity, its TLS certificate, and the file that hospitals join with.

    The coordinator runs it once. Without --cert, --key and --ca it makes an authority of its own, which is safe:
    hospitals receive it with the consortium file and trust no other.

    Example: `consilium-coordinator init lungs --host fl.example.org`
    """
    home = home_of(context)
    own = (cert, key, ca)
    if any(own) and not all(own):
        raise typer.BadParameter("--cert, --key and --ca belong together")
    if home.root.exists() and (not home.root.is_dir() or any(home.root.iterdir())):
        raise ConsiliumError(
            "There is something in this folder already", str(home.root), "Name a new folder: `--home NEW init …`."
        )
    config = _config(name, host, port, listen)
    made = not home.root.exists()
    with ExitStack() as undo:
        undo.callback(_clear, home.root, made)
        home.make_folders()
        identity = Identity.create(home.identity_key)
        if cert and key and ca:
            _take_certificate(home, host, cert, key, ca)
        else:
            tls.create_ca(home.tls, name)
            tls.create_server(home.tls, _names(host), days=days)
        consortium = Consortium(
            name=name,
            coordinator=identity.public,
            superlink=config.superlink,
            ca=home.ca.read_text(encoding="ascii"),
        )
        consortium.signed(identity).write(home.consortium_file)
        empty = Roster(consortium=name, version=0, coordinator=identity.public, sites=())
        with Registry(home, url=home.registry_url(config)) as registry:
            registry.save_roster(empty.signed(identity))
        home.write_config(config)
        undo.pop_all()
    console = out()
    console.print(f"The consortium [bold]{escape(name)}[/] is founded in {escape(str(home.root))}.")
    console.print(f"Coordinator's fingerprint: [bold]{fingerprint(identity.public)}[/]")
    console.print("Next:")
    console.print(
        f"  1. Hand {escape(str(home.consortium_file))} to each hospital, and read out the fingerprint by telephone."
    )
    console.print("  2. consilium-coordinator serve")
    console.print("  3. consilium-coordinator sites add FILE, with what each hospital sends back")
    console.print("  4. consilium-coordinator backup --out FILE, and keep it elsewhere")


def serve(context: typer.Context) -> None:
    """Run the coordinator: the server that hospitals dial, and one process for each study that is launched.

    The coordinator keeps it running, for example as a service. It stays in the foreground; Ctrl-C or SIGTERM ends
    everything in order, and `study resume` goes on later.

    Example: `consilium-coordinator serve`
    """
    from server.supervisor import serve as run

    console = out()
    run(home_of(context), lambda line: console.print(f"{datetime.now(UTC):%H:%M:%S}  {escape(line)}"))


def certificate(
    context: typer.Context,
    renew: Annotated[bool, typer.Option("--renew", help="Make a new one under the same authority.")] = False,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long the new one is valid.")] = 397,
) -> None:
    """Show until when the server certificate is valid, or renew it. Hospitals need nothing new.

    The coordinator runs it when `serve` warns; a running one takes the new certificate up by itself.

    Example: `consilium-coordinator certificate --renew`
    """
    home = home_of(context)
    config = home.config()
    if renew:
        if not (home.tls / tls.CA_KEY).is_file():
            raise ConsiliumError(
                "The certificate is from an authority of your own",
                str(home.certificate),
                "Let that authority renew it, then put certificate and key in its place.",
            )
        tls.create_server(home.tls, _names(config.host), days=days)
    until = tls.check(home.certificate, home.certificate_key)
    out().print(f"The certificate for {config.host} is valid until {until:%Y-%m-%d}.")
    if renew:
        out().print(
            "The running coordinator takes it up within seconds."
            if is_serving(home)
            else "`consilium-coordinator serve` uses it from its next start."
        )


def backup(
    context: typer.Context,
    target: Annotated[Path, typer.Option("--out", help="The new file.")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Put keys, registry, models and records into one encrypted file. It may be made while the coordinator serves.

    The coordinator runs it after `init`, after each new site, and every night. Without the passphrase the file is
    worth nothing, to a thief and to you: keep both, apart.

    Example: `consilium-coordinator backup --out 2030-01-31.backup`
    """
    from server.backup import backup as write

    home = home_of(context)
    home.config()
    content = write(home, target, _passphrase(passphrase_file, new=True))
    out().print(f"{content.files} files, {content.bytes:,} bytes are in {escape(str(target))}, read back and whole.")
    if not content.registry:
        out().print("The registry is a PostgreSQL database and is not among them: back it up with pg_dump.")


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Bring a coordinator back from a backup, into a new or empty folder: wholly, or not at all.

    The coordinator runs it on a new machine. The old one must never serve again, or hospitals will see two.

    Example: `consilium-coordinator --home coordinator restore 2030-01-31.backup`
    """
    from server.backup import restore as read

    home = home_of(context)
    if not file.is_file():
        raise ConsiliumError("There is no such file", str(file), "Check the path.")
    content = read(home, file, _passphrase(passphrase_file, new=False))
    console = out()
    console.print(f"{content.files} files, {content.bytes:,} bytes are back in {escape(str(home.root))}.")
    if not content.registry:
        console.print("The registry was a PostgreSQL database: restore it with its own tools before serving.")
    console.print("Make sure that the old coordinator never serves again, then: consilium-coordinator serve")


def _config(name: str, host: str, port: int, listen: str) -> CoordinatorConfig:
    try:
        return CoordinatorConfig(name=name, host=host, port=port, listen=listen)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConsiliumError(
            "The consortium cannot be founded like this",
            f"{'.'.join(str(part) for part in first['loc'])}: {str(first['msg']).removeprefix('Value error, ')}",
            "Correct it and give the command again.",
        ) from error


def _names(host: str) -> list[str]:
    return list(dict.fromkeys([host, "localhost", "127.0.0.1"]))


def _take_certificate(home: CoordinatorHome, host: str, cert: Path, key: Path, ca: Path) -> None:
    """Copy a certificate of the person's own, after seeing that a hospital would accept it."""
    for path, name in ((cert, tls.SERVER), (key, tls.SERVER_KEY), (ca, tls.CA)):
        target = home.tls / name
        target.touch(mode=0o600 if name == tls.SERVER_KEY else 0o644)
        target.write_text(read_text(path, "certificate file"), encoding="utf-8")
    tls.check(home.certificate, home.certificate_key)
    chain = x509.load_pem_x509_certificates(home.certificate.read_bytes())
    try:
        authorities = x509.load_pem_x509_certificates(home.ca.read_bytes())
    except ValueError as error:
        raise ConsiliumError("The authority's certificate cannot be read", str(ca), "Name a PEM file.") from error
    if not _chained(chain[0], chain[1:], authorities):
        raise ConsiliumError(
            "The certificate was not issued by this authority",
            f"{cert} and {ca}",
            "Name the authority that issued it; put intermediate certificates behind the server's own in --cert.",
        )
    alternatives = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    names = [
        *alternatives.get_values_for_type(x509.DNSName),
        *map(str, alternatives.get_values_for_type(x509.IPAddress)),
    ]
    wildcard = f"*.{host.partition('.')[2]}"
    if host not in names and wildcard not in names:
        raise ConsiliumError(
            "The certificate is for another name", f"{', '.join(names)}, not {host}", "Name its host with --host."
        )


def _chained(
    leaf: x509.Certificate, between: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> bool:
    """Whether one of the authorities issued `leaf`, directly or by certificates in between."""
    current, steps = leaf, 0
    while steps <= len(between):
        following = None
        for issuer in (*authorities, *between):
            try:
                current.verify_directly_issued_by(issuer)
            except (ValueError, TypeError, InvalidSignature):
                continue
            if issuer in authorities:
                return True
            following = issuer
        if following is None:
            return False
        current, steps = following, steps + 1
    return False


def _passphrase(file: Path | None, *, new: bool) -> str:
    """From the file, the environment, or the person; asked twice when it is new."""
    if file is not None:
        lines = read_text(file, "passphrase file").splitlines()
        return lines[0] if lines else ""
    if value := os.environ.get(PASSPHRASE):
        return value
    if not sys.stdin.isatty():
        raise ConsiliumError(
            "No passphrase was given", "", f"Set {PASSPHRASE}, or name a file that holds it with --passphrase-file."
        )
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=new, err=True))


def _clear(root: Path, made: bool) -> None:
    """Undo a failed `init`: the folder is gone, or empty as it was."""
    if made:
        shutil.rmtree(root, ignore_errors=True)
        return
    for path in root.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
