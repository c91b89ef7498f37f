"""How does a hospital join? It makes its keys, pins one coordinator, and hands in the public halves, signed.

Every step can be broken off at any point and run again: a key is written under another name first, `site.toml` comes
last, and a renewed key waits beside the old one (`.next`) until the coordinator's roster knows it.
"""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from client.home import SiteConfig, SiteHome
from privacy.errors import ConsiliumError, Refusal
from privacy.files import sync_folder, write_atomically
from privacy.identity import Document, Identity, fingerprint
from privacy.roster import NAME, Consortium, Enrolment, Roster, expiry

PSEUDONYM_BYTES = 32
EXTRA_CA = "connector/extra-ca.pem"


def pseudonym_key(home: SiteHome) -> Path:
    """The key under which patients get their pseudonyms. Without it the split of every study changes."""
    return home.agent / "pseudonym.key"


def following(key: Path) -> Path:
    """Where a renewed key waits for the roster to name it."""
    return key.with_name(key.name + ".next")


def create(
    home: SiteHome, name: str, consortium_file: Path, *, proxy: str = "", extra_ca: Path | None = None
) -> Consortium:
    """Make a site in `home.root`: folders, keys, the pinned consortium, the settings. May be broken off and run again.

    Args:
        home: the new folder.
        name: the site's name in the consortium.
        consortium_file: the document the coordinator handed out.
        proxy: "http://[user:password@]host:port" of the hospital's proxy, or empty.
        extra_ca: PEM of an authority that the hospital's proxy signs with, when it opens TLS.

    Raises:
        ConsiliumError: a site is there already, the name or a file is not usable.
    """
    if home.config_file.exists():
        raise ConsiliumError(
            "There is a site here already",
            str(home.root),
            "Choose another folder with --home; keys are never replaced.",
        )
    if not NAME.match(name):
        raise ConsiliumError(
            "This cannot be a site's name", name, "Use 2 to 40 small letters, digits and hyphens, such as `st-anna`."
        )
    document = Document.read(consortium_file, Consortium.KIND)
    try:
        consortium = Consortium.verified(document)
    except Refusal as error:
        raise ConsiliumError(
            "The consortium document is not signed by the coordinator it names",
            str(consortium_file),
            "It was changed on the way. Ask the coordinator for it again.",
        ) from error
    authority(consortium.ca.encode(), str(consortium_file))
    if extra_ca is not None:
        authority(extra_ca.read_bytes(), str(extra_ca))
    home.check_sockets()
    _folders(home)
    if not home.identity_key.exists():
        part = _part(home.identity_key)
        Identity.create(part)
        part.replace(home.identity_key)
    if not pseudonym_key(home).exists():
        write_atomically(pseudonym_key(home), secrets.token_bytes(PSEUDONYM_BYTES), 0o600)
    if not home.node_key.exists():
        _new_node_key(home.node_key)
    write_atomically(home.ca, consortium.ca.encode(), 0o644)
    if extra_ca is not None:
        write_atomically(home.root / EXTRA_CA, extra_ca.read_bytes(), 0o644)
    write_atomically(home.consortium_file, document.encode() + b"\n", 0o644)
    sync_folder(home.agent)
    sync_folder(home.connector)
    home.write_config(
        SiteConfig(
            site=name,
            superlink=consortium.superlink,
            proxy=proxy,
            extra_ca=EXTRA_CA if extra_ca is not None else "",
        )
    )
    sync_folder(home.root)
    return consortium


def enrolment(
    home: SiteHome, *, renew: bool = False, renew_identity: bool = False, now: datetime | None = None
) -> Document:
    """The signed file for the coordinator: this site's public keys, valid for 397 days.

    A renewal names the waiting key, made here if there is none yet, so that running it twice gives the same keys.
    A renewed identity is signed by the old one too.

    Raises:
        ConsiliumError: no site here, or its keys cannot be read.
    """
    from client.flower import public_pem

    config, consortium = home.config(), home.consortium()
    current = Identity.load(home.identity_key)
    signer, previous, node_key = current, None, home.node_key
    if renew and not following(home.node_key).exists():
        _new_node_key(following(home.node_key))
    if renew_identity and not following(home.identity_key).exists():
        part = _part(following(home.identity_key))
        Identity.create(part)
        part.replace(following(home.identity_key))
        sync_folder(home.agent)
    if following(home.node_key).exists():
        node_key = following(home.node_key)
    if following(home.identity_key).exists():
        signer, previous = Identity.load(following(home.identity_key)), current
    return Enrolment(
        consortium=consortium.name,
        site=config.site,
        identity=signer.public,
        node_key=public_pem(node_key),
        not_after=expiry(now or datetime.now(UTC)),
        previous=previous.public if previous is not None else None,
    ).signed(signer, previous)


def adopt_identity(home: SiteHome, roster: Roster) -> bool:
    """Take the waiting identity into use if the roster names it; whether it did.

    The roster must have been verified. The old key stays beside it as `identity.key.old`.
    """
    waiting = following(home.identity_key)
    if not waiting.exists():
        return False
    key = Identity.load(waiting).public
    if all(site.name != home.config().site or site.identity != key for site in roster.sites):
        return False
    shutil.copy2(home.identity_key, home.identity_key.with_name(home.identity_key.name + ".old"))
    waiting.replace(home.identity_key)
    sync_folder(home.agent)
    return True


def adopt_node_key(home: SiteHome) -> None:
    """Take the waiting node key into use: the SuperLink has just accepted it. Touches `connector/` only."""
    following(home.node_key).replace(home.node_key)
    sync_folder(home.connector)


def big(key: str) -> list[str]:
    """A fingerprint in two lines of four groups, spread out to be read over the telephone."""
    groups = fingerprint(key).split(" ")
    return ["   ".join(" ".join(group.upper()) for group in groups[i : i + 4]) for i in (0, 4)]


def authority(pem: bytes, source: str) -> None:
    """Check that `pem` holds certificates.

    Raises:
        ConsiliumError: it does not.
    """
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConsiliumError(
            "There is no certificate in PEM form", source, "Ask for the authority's certificate as a .pem file."
        ) from error


def _folders(home: SiteHome) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    for folder in (home.agent, home.connector, home.outward_socket.parent, home.local_socket.parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    home.logs.mkdir(exist_ok=True, mode=0o755)


def _new_node_key(path: Path) -> None:
    from client.flower import create_key

    part = _part(path)
    create_key(part)
    part.replace(path)
    sync_folder(path.parent)


def _part(path: Path) -> Path:
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    return part
