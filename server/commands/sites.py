"""Which hospitals are in? `consilium-coordinator sites`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from privacy.errors import ConsiliumError
from privacy.identity import Document, fingerprint
from privacy.roster import Enrolment, RosterSite, enrol, parse_timestamp, revoke
from privacy.terminal import out, table, warn
from server.commands.common import Force, Yes, confirm, group, home_of, open_registry, write_new

app = group("Enrol hospitals, renew and revoke them, and publish the signed list of their keys.")

SOON_DAYS = 30

SiteArgument = Annotated[str, typer.Argument(metavar="NAME", help="A site's name.")]


@app.command("invite")
def invite(
    context: typer.Context,
    target: Annotated[Path | None, typer.Option("--out", help="Also copy the consortium file here.")] = None,
    force: Force = False,
) -> None:
    """Say how a hospital joins, and hand out the consortium file it needs.

    The coordinator runs it for each new hospital. The file holds no secret, but it must arrive unchanged: read the
    fingerprint out over the telephone.

    Example: `consilium-coordinator sites invite --out st-anna/consortium.json`
    """
    home = home_of(context)
    consortium = home.consortium()
    path = home.consortium_file
    if target is not None:
        write_new(target, path.read_bytes(), force=force)
        path = target
    console = out()
    console.print(f"1. Send the hospital this file: [bold]{escape(str(path))}[/]")
    console.print(f"2. Read out the coordinator's fingerprint: [bold]{fingerprint(consortium.coordinator)}[/]")
    console.print(f"3. There: consilium-site init NAME --consortium {escape(path.name)}")
    console.print("          consilium-site enrol --out NAME.enrolment.json")
    console.print("4. Here, with what they send back: consilium-coordinator sites add NAME.enrolment.json")


@app.command("add")
def add(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The enrolment file that the site made.")],
    yes: Yes = False,
) -> None:
    """Enrol a hospital, or renew its keys, from the file it made with `consilium-site enrol`.

    The coordinator runs it after comparing the fingerprint shown with the one the hospital reads out over the
    telephone. A renewal under the same identity, or signed with the old one, needs no comparison.

    Example: `consilium-coordinator sites add st-anna.enrolment.json`
    """
    home = home_of(context)
    document = Document.read(file, "enrolment")
    enrolment = Enrolment.verified(document)
    with open_registry(context) as registry:
        _, before = registry.roster()
        after = enrol(before, enrolment, datetime.now(UTC))
        known = next((site for site in before.sites if site.name == enrolment.site), None)
        console = out()
        console.print(f"site         [bold]{escape(enrolment.site)}[/]{' (renewal)' if known else ''}")
        console.print(f"fingerprint  [bold]{fingerprint(enrolment.identity)}[/]")
        console.print(f"valid until  {enrolment.not_after[:10]}")
        if known is None and not yes:
            confirm("Did the hospital read out this very fingerprint?", f"the fingerprint of {enrolment.site}")
        roster = registry.save_roster(after.signed(home.identity()), document)
    console.print(f"Enrolled. The roster is now version {roster.version}, with {len(roster.sites)} sites.")


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the enrolled hospitals: until when, whether revoked, and their fingerprints.

    The coordinator runs it to see who may take part, and whose enrolment ends soon.

    Example: `consilium-coordinator sites list`
    """
    with open_registry(context) as registry:
        _, roster = registry.roster()
    if not roster.sites:
        out().print("No hospital is enrolled yet. `consilium-coordinator sites invite` says how one joins.")
        return
    now = datetime.now(UTC)
    rows = [(site.name, _state(site, now), site.not_after[:10], fingerprint(site.identity)) for site in roster.sites]
    out().print(table("site", "state", "until", "fingerprint", rows=rows))
    for site in roster.sites:
        days = (parse_timestamp(site.not_after) - now).days
        if site.active(now) and days < SOON_DAYS:
            warn(f"{site.name} ends in {days} days; there: `consilium-site enrol --renew`.")


@app.command("show")
def show(context: typer.Context, name: SiteArgument) -> None:
    """Show one hospital: its keys, how long they hold, and the studies that name it.

    The coordinator runs it, for example to compare a fingerprint once more.

    Example: `consilium-coordinator sites show st-anna`
    """
    with open_registry(context) as registry:
        _, roster = registry.roster()
        site = next((s for s in roster.sites if s.name == name), None)
        if site is None:
            known = ", ".join(s.name for s in roster.sites) or "none yet"
            raise ConsiliumError("No such site", name, f"Enrolled sites: {known}.")
        lines = [
            (
                record.name,
                record.state.value,
                next((a.state for a in registry.approvals(record.hash) if a.site == name), ""),
            )
            for record in registry.studies()
            if name in record.study.sites
        ]
    console = out()
    console.print(f"site         [bold]{escape(site.name)}[/], {_state(site, datetime.now(UTC))}")
    console.print(f"fingerprint  {fingerprint(site.identity)}")
    console.print(f"identity     {site.identity}")
    console.print(f"valid until  {site.not_after}")
    console.print(escape(site.node_key.strip()))
    if lines:
        console.print(table("study", "state", "its answer", rows=[(n, s, a or "not asked yet") for n, s, a in lines]))


@app.command("revoke")
def revoke_(context: typer.Context, name: SiteArgument, yes: Yes = False) -> None:
    """Shut a hospital out for good: its node is turned away within seconds, in running studies too.

    The coordinator runs it when a hospital leaves or its keys may be in other hands. The name does not come back.

    Example: `consilium-coordinator sites revoke st-anna`
    """
    home = home_of(context)
    with open_registry(context) as registry:
        _, before = registry.roster()
        after = revoke(before, name)
        if next(site for site in before.sites if site.name == name).revoked:
            out().print(f"{name} is revoked already.")
            return
        if not yes:
            confirm(f"Shut {name} out for good?", name)
        roster = registry.save_roster(after.signed(home.identity()))
    out().print(f"{name} is revoked. The roster is now version {roster.version}.")


@app.command("roster")
def roster_(
    context: typer.Context,
    target: Annotated[Path, typer.Option("--out", help="Where to write it.")] = Path("roster.json"),
    force: Force = False,
) -> None:
    """Write the signed roster: the list of all enrolled hospitals and their keys, for whoever wants to check.

    Sites receive it by themselves with each study; the file is for those without a connection and for officers.

    Example: `consilium-coordinator sites roster --out roster.json`
    """
    with open_registry(context) as registry:
        document, roster = registry.roster()
    write_new(target, document.encode() + b"\n", force=force)
    out().print(f"Roster version {roster.version} is in {escape(str(target))}.")


def _state(site: RosterSite, now: datetime) -> str:
    if site.revoked:
        return "revoked"
    return "enrolled" if site.active(now) else "expired"
