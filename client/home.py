"""Where does a hospital's node keep its things? One folder, two owners.

`agent/` belongs to the process that may see images and holds the identity; `connector/` to the process that may use
the network. `run/outward` is the door between them, `run/local` the operator's. Each of the four is a folder of its
own, so that the file system's permissions are the boundary.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privacy.errors import ConsiliumError
from privacy.files import write_atomically
from privacy.identity import Document
from privacy.roster import Address, Consortium, SiteName

SOCKET_PATH_LIMIT = 107


class SiteConfig(BaseModel):
    """`site.toml`: what the operator may edit by hand. Nothing in it is secret.

    `outward_group` and `operator_group` name the Unix groups that may use the two doors; empty means the owner only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: SiteName
    superlink: Address
    proxy: str = ""
    extra_ca: str = ""
    outward_group: str = ""
    operator_group: str = ""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0


@dataclass(frozen=True)
class SiteHome:
    """The paths of one site's folder."""

    root: Path

    @property
    def config_file(self) -> Path:
        """Settings, TOML."""
        return self.root / "site.toml"

    @property
    def consortium_file(self) -> Path:
        """The consortium document this site joined."""
        return self.root / "consortium.json"

    @property
    def agent(self) -> Path:
        """Keys, records and stored answers; the agent's alone."""
        return self.root / "agent"

    @property
    def connector(self) -> Path:
        """Node key and certificate authority; the connector's alone."""
        return self.root / "connector"

    @property
    def identity_key(self) -> Path:
        """The hospital's Ed25519 identity."""
        return self.agent / "identity.key"

    @property
    def node_key(self) -> Path:
        """The Flower node key (EC P-384, PEM)."""
        return self.connector / "node.key"

    @property
    def ca(self) -> Path:
        """Who may vouch for the coordinator's TLS certificate (PEM)."""
        return self.connector / "ca.pem"

    @property
    def outward_socket(self) -> Path:
        """The agent's door to the connector."""
        return self.root / "run" / "outward" / "agent.sock"

    @property
    def local_socket(self) -> Path:
        """The agent's door to the operator."""
        return self.root / "run" / "local" / "agent.sock"

    @property
    def reports(self) -> Path:
        """What the agent found in the connected images, one page a source; made by the agent, for the operator."""
        return self.agent / "reports"

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.root / "log"

    def config(self) -> SiteConfig:
        """Read the settings.

        Raises:
            ConsiliumError: no site here, or an entry is wrong.
        """
        try:
            values = tomllib.loads(self.config_file.read_text(encoding="utf-8"))
            return SiteConfig.model_validate(values)
        except FileNotFoundError as error:
            raise ConsiliumError(
                "There is no site here", str(self.root), "Make one: `consilium-site init NAME --consortium FILE`."
            ) from error
        except (tomllib.TOMLDecodeError, ValidationError, OSError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConsiliumError(
                "The site's settings cannot be read", f"{self.config_file}: {detail}", "Correct the entry by hand."
            ) from error

    def write_config(self, config: SiteConfig) -> None:
        """Write the settings, whole or not at all."""
        write_atomically(self.config_file, tomli_w.dumps(config.model_dump()).encode(), 0o644)

    def consortium(self) -> Consortium:
        """The consortium this site joined: whom it trusts."""
        return Consortium.verified(Document.read(self.consortium_file, "consortium"))

    def check_sockets(self) -> None:
        """Unix sockets have short names.

        Raises:
            ConsiliumError: the folder's path is too long for them.
        """
        longest = max(len(os.fsencode(p.resolve())) for p in (self.outward_socket, self.local_socket))
        if longest > SOCKET_PATH_LIMIT:
            raise ConsiliumError(
                "The site's folder has too long a path for a Unix socket",
                f"{self.root} ({longest} bytes, at most {SOCKET_PATH_LIMIT})",
                "Move the folder to a shorter path, such as /srv/consilium.",
            )
