"""Where does a coordinator keep its things? One folder, its paths, and the settings a person may edit by hand."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privacy.errors import ConsiliumError
from privacy.files import write_atomically
from privacy.identity import Document, Identity
from privacy.roster import Consortium, SiteName

Port = Annotated[int, Field(ge=1, le=65535)]


class CoordinatorConfig(BaseModel):
    """`coordinator.toml`. Nothing in it is secret, unless a PostgreSQL URL with a password is written into it.

    `host` and `port` are what the hospitals dial; `listen` is the interface the public port is bound to.
    `private_port` serves control and runtime on the loopback interface only; 0 takes a free one at each start.
    `registry` is an SQLAlchemy URL; empty means `registry.db` in this folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: SiteName
    host: Annotated[str, Field(min_length=1, max_length=253)] = "localhost"
    listen: Annotated[str, Field(min_length=1, max_length=253)] = "0.0.0.0"  # noqa: S104 - the port is public by purpose
    port: Port = 8443
    private_port: Annotated[int, Field(ge=0, le=65535)] = 0
    registry: str = ""

    @property
    def superlink(self) -> str:
        """The public address, host:port."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class CoordinatorHome:
    """The paths of one coordinator's folder."""

    root: Path

    @property
    def config_file(self) -> Path:
        """Settings, TOML."""
        return self.root / "coordinator.toml"

    @property
    def identity_key(self) -> Path:
        """The coordinator's Ed25519 identity (0600)."""
        return self.root / "identity.key"

    @property
    def consortium_file(self) -> Path:
        """The signed consortium document that sites are given."""
        return self.root / "consortium.json"

    @property
    def tls(self) -> Path:
        """Certificate authority and server certificate: ca.pem, ca.key, server.pem, server.key."""
        return self.root / "tls"

    @property
    def ca(self) -> Path:
        """The certificate authority that sites pin (PEM)."""
        return self.tls / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The public port's certificate (PEM)."""
        return self.tls / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """Its private key (PEM, 0600)."""
        return self.tls / "server.key"

    @property
    def database(self) -> Path:
        """The default registry."""
        return self.root / "registry.db"

    @property
    def blobs(self) -> Path:
        """Weights, optimiser states and packages, by their SHA-256."""
        return self.root / "blobs"

    @property
    def run(self) -> Path:
        """What only lives while processes do: tokens, ports, process ids (0700)."""
        return self.root / "run"

    @property
    def nodes_file(self) -> Path:
        """Which node keys the SuperLink lets in: {site: public key PEM}."""
        return self.run / "nodes.json"

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.root / "log"

    @property
    def audit(self) -> Path:
        """The SuperLink's hash-chained record."""
        return self.root / "audit.jsonl"

    def study(self, study: str) -> Path:
        """Outputs of one study, by its hash."""
        return self.root / "studies" / study

    def registry_url(self, config: CoordinatorConfig | None = None) -> str:
        """Where the registry stands, as an SQLAlchemy URL."""
        return (config or self.config()).registry or f"sqlite:///{self.database.resolve()}"

    def make_folders(self) -> None:
        """Create every folder; those with secrets are closed to others."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.tls, self.run, self.blobs, self.logs, self.root / "studies"):
            folder.mkdir(exist_ok=True, mode=0o700)

    def config(self) -> CoordinatorConfig:
        """Read the settings.

        Raises:
            ConsiliumError: no coordinator here, or an entry is wrong.
        """
        try:
            values = tomllib.loads(self.config_file.read_text(encoding="utf-8"))
            return CoordinatorConfig.model_validate(values)
        except FileNotFoundError as error:
            raise ConsiliumError(
                "There is no coordinator here",
                str(self.root),
                "Make one: `consilium-coordinator init NAME`, or name another folder with --home.",
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConsiliumError(
                "The coordinator's settings have an entry that cannot stand",
                f"{where} in {self.config_file}: {first['msg']}",
                "Correct the entry by hand.",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ConsiliumError(
                "The coordinator's settings cannot be read",
                f"{self.config_file}: {error}",
                "Correct the file by hand, or restore it from your backup.",
            ) from error

    def write_config(self, config: CoordinatorConfig) -> None:
        """Write the settings, whole or not at all."""
        write_atomically(self.config_file, tomli_w.dumps(config.model_dump()).encode())

    def identity(self) -> Identity:
        """The coordinator's identity.

        Raises:
            ConsiliumError: the key is missing or unreadable.
        """
        return Identity.load(self.identity_key)

    def consortium(self) -> Consortium:
        """What sites are given to join."""
        return Consortium.verified(Document.read(self.consortium_file, "consortium"))

    def write_nodes(self, nodes: Mapping[str, str]) -> None:
        """Tell the SuperLink which node keys to let in; it reads the file every second."""
        self.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(self.nodes_file, json.dumps(dict(nodes), indent=1, sort_keys=True).encode())
