"""How does a hospital join a consortium at the terminal? `init` and `enrol`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.align import Align
from rich.markup import escape
from rich.panel import Panel

from client import enrolment
from client.agent_client import Local
from client.home import SiteHome
from privacy.errors import ConsiliumError
from privacy.identity import Document, fingerprint
from privacy.roster import Enrolment, Roster
from privacy.terminal import out


def init(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The site's name: small letters, digits, hyphens.")],
    consortium: Annotated[Path, typer.Option("--consortium", help="The file the coordinator handed out.")],
    proxy: Annotated[str, typer.Option(help="http://[user:password@]host:port, if outbound HTTPS needs one.")] = "",
    extra_ca: Annotated[
        Path | None, typer.Option(help="CA certificate (PEM) of a firewall that inspects TLS, if you permit it to.")
    ] = None,
) -> None:
    """Make this hospital's folder and keys, and pin the coordinator it will listen to.

    The site operator runs it once. Back up the folder agent/ afterwards: its keys cannot be made again.

    Example: consilium-site init st-anna --consortium consortium.json --proxy http://proxy.st-anna.org:3128
    """
    home: SiteHome = context.obj
    joined = enrolment.create(home, name, consortium, proxy=proxy, extra_ca=extra_ca)
    console = out()
    console.print(f"The site [bold]{name}[/] is ready in {escape(str(home.root))}.")
    console.print(
        f"Consortium [bold]{joined.name}[/], SuperLink {escape(joined.superlink)}. Its coordinator's fingerprint:"
    )
    lines = "\n".join(f"[bold]{line}[/]" for line in enrolment.big(joined.coordinator))
    console.print(Panel(Align.center(f"\n{lines}\n"), border_style="yellow", width=72))
    console.print(f"In one line: {fingerprint(joined.coordinator)}")
    console.print(
        "[bold yellow]Compare it by telephone[/] with the coordinator, on a number you know from elsewhere. If it "
        "differs, delete the folder: somebody stands in between."
    )
    console.print("Next: `consilium-site enrol`, and hand the file it writes to the coordinator.")


def enrol(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--out", help="Where to write it; NAME.enrol.json if left out.")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="With a new node key, and valid for another 397 days.")
    ] = False,
    renew_identity: Annotated[
        bool, typer.Option("--renew-identity", help="With a new identity, signed by the old one too.")
    ] = False,
    roster: Annotated[
        Path | None, typer.Option("--roster", help="Import the coordinator's roster from a file instead.")
    ] = None,
) -> None:
    """Write the signed file with this site's public keys, for the coordinator; or import the roster he returns.

    The site operator runs it after `init`, and once a year with --renew. The old keys stay in use until the
    coordinator has taken the new ones, so nothing stops meanwhile. The roster also comes along with each study.

    Example: consilium-site enrol --out st-anna.enrol.json

    Example: consilium-site enrol --roster roster.json
    """
    home: SiteHome = context.obj
    if roster is not None:
        if renew or renew_identity or output is not None:
            raise ConsiliumError(
                "--roster imports a file and writes none", str(roster), "Give it alone, then run `enrol` again."
            )
        _import_roster(home, roster)
        return
    document = enrolment.enrolment(home, renew=renew, renew_identity=renew_identity)
    enrolled = Enrolment.verified(document)
    path = output or Path(f"{enrolled.site}.enrol.json")
    document.write(path)
    console = out()
    console.print(
        f"[bold]{escape(str(path))}[/]: the public keys of {enrolled.site}, valid until {enrolled.not_after}."
    )
    console.print(f"Fingerprint of this site's identity: [bold]{fingerprint(enrolled.identity)}[/]")
    console.print(
        "Hand the file to the coordinator and read the fingerprint out over the telephone; he runs "
        f"`consilium-coordinator sites add {escape(path.name)}`."
    )
    if renew_identity:
        console.print(
            "When he returns the roster: `consilium-site enrol --roster FILE` takes the new identity into use."
        )


def _import_roster(home: SiteHome, path: Path) -> None:
    document = Document.read(path, Roster.KIND)
    verified = Roster.verified(document, home.consortium().coordinator)
    name = home.config().site
    with Local(home.local_socket) as door:
        door.hand_in(document.encode())
    adopted = enrolment.adopt_identity(home, verified)
    line = next((site for site in verified.sites if site.name == name), None)
    console = out()
    console.print(f"Roster {verified.version} of {verified.consortium}: {len(verified.sites)} site(s).")
    if line is None:
        raise ConsiliumError(
            "The roster does not name this site", name, "Hand your enrolment file to the coordinator first."
        )
    console.print(
        f"{name} is {'[red]revoked[/]' if line.revoked else 'enrolled'} until {line.not_after}."
        + (" The new identity is in use; the agent starts again with it." if adopted else "")
    )
