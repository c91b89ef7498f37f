"""What can a privacy officer do? `consilium-officer`: allow and grant budgets; verify the record, trusting nobody."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from privacy.errors import ConsiliumError
from privacy.identity import fingerprint
from privacy.officer import Issued, Office, asks, read_study
from privacy.terminal import out, run, show_error, table
from privacy.verify import verify

SITE = Annotated[str, typer.Option("--site", help="The hospital's name in the consortium.")]
OUT = Annotated[Path, typer.Option("--out", help="Where to write the signed paper for the site.")]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown"
)


@app.callback()
def officer(
    context: typer.Context,
    home: Annotated[
        Path,
        typer.Option(
            "--home", "-H", envvar="CONSILIUM_OFFICER_HOME", help="The officer's own folder.", show_default=True
        ),
    ] = Path("officer"),
) -> None:
    """For the privacy officer: allow and grant budgets, check what was agreed and what has left, trusting nobody.

    Nothing here needs a running node, a network, or the hospital's keys: the files are enough.

    Example: consilium-officer verify consortium.json roster.json chest.study.json
    """
    context.obj = Office(home)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make; give it to later commands with --home.")],
) -> None:
    """Make the officer's identity: the key that allowances and grants are signed with.

    The privacy officer runs it once, on a machine of his own, and backs the folder up; the key never leaves it.

    Example: consilium-officer init officer
    """
    office = Office(folder)
    key = office.create()
    console = out()
    console.print(f"The officer's identity is in [bold]{escape(str(office.root))}[/]. Back it up; never hand it out.")
    console.print(f"Public key, for the sites: [bold]{escape(str(office.public))}[/]\n{key}")
    console.print(f"Fingerprint, to be compared by telephone: [bold]{fingerprint(key)}[/]")
    console.print(f"At the site: `consilium-site officer trust {escape(office.public.name)}`.")


@app.command()
def allow(
    context: typer.Context,
    site: SITE,
    output: OUT,
    epsilon: Annotated[str, typer.Option(help="The most that all studies together may cost one patient.")] = "8",
    delta: Annotated[str, typer.Option(help="Below one in the number of patients; a tenth of that is usual.")] = "1e-6",
    order: Annotated[
        int, typer.Option(help="The Rényi order that decides, for ever; 4 or 5 suit several studies.")
    ] = 4,
    settle: Annotated[
        str,
        typer.Option("--settle", metavar="CODE", help="Settle the doubt of which the site's `budget` shows this code."),
    ] = "",
) -> None:
    """Sign the lifetime budget of every patient at one hospital.

    The privacy officer runs it before the first study with noise. A later one replaces it, at the same order; what was
    reserved before stays reserved. With --settle, also the word that a site whose records were restored from a backup
    may go on: once you know what they have forgotten.

    Example: consilium-officer allow --site st-anna --epsilon 8 --delta 1e-6 --order 4 --out st-anna.allowance.json
    """
    office: Office = context.obj
    issued = office.allow(site, epsilon, delta, order, settle)
    console = out()
    console.print(
        f"Every patient of [bold]{escape(site)}[/] may be charged epsilon {escape(epsilon)} at delta {escape(delta)}, "
        f"decided at order {order}, over all studies for ever."
    )
    if settle:
        console.print(f"It settles the doubt {settle} about its ledger: what was reserved there counts as spent.")
    _handed_out(console, issued, output)


@app.command("grant")
def grant_study(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The signed study, NAME.study.json.")],
    site: SITE,
    epsilon: Annotated[str, typer.Option(help="The most it may cost a patient against all who see only sums.")],
    cap: Annotated[str, typer.Option(help="The same if secure aggregation were wholly broken.")],
    expires: Annotated[str, typer.Option(help="The last day on which the study may begin, such as 2030-01-31.")],
    output: OUT,
    coordinator: Annotated[
        str, typer.Option("--coordinator", help="The coordinator's fingerprint as read out over the telephone.")
    ] = "",
) -> None:
    """Show what a study asks of each patient, and sign the leave for it at one hospital.

    The privacy officer runs it for each study with noise. It refuses when the plan claims more than you grant; the
    figures are computed here, from the study alone. A grant serves one study, once.

    Example: consilium-officer grant chest.study.json --site st-anna --epsilon 3 --cap 8 --expires 2030-01-31
    --out g.json
    """
    office: Office = context.obj
    read, key = read_study(study, coordinator)
    console = out()
    shown = table("", "", rows=asks(read, office.lifetime(site)))
    shown.show_header = False
    console.print(shown)
    compared = "as you gave it" if coordinator else "compare it by telephone, or give it with --coordinator"
    console.print(f"Signed by {fingerprint(key)}: {compared}.")
    issued = office.grant(read, site, epsilon, cap, expires, datetime.now(UTC))
    console.print(
        f"[green]Granted[/] to {escape(site)}: epsilon {escape(epsilon)}, cap {escape(cap)}, {read.slots} slots, to "
        f"begin until {escape(expires)}."
    )
    _handed_out(console, issued, output)


def _handed_out(console: Console, issued: Issued, output: Path) -> None:
    try:
        issued.document.write(output)
    except OSError as error:
        raise ConsiliumError(
            f"The paper is signed, under serial {issued.serial}, and could not be written there",
            f"{output}: {error.strerror}",
            f"Hand out its copy: {issued.copy}.",
        ) from error
    console.print(
        f"Serial {issued.serial}, in [bold]{escape(str(output))}[/]; a copy stays in {escape(str(issued.copy))}."
    )
    console.print(f"At the site: `consilium-site grant import {escape(output.name)}`.")


@app.command("verify")
def verify_files(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Signed files, a site's journal.jsonl, a ledger.")
    ],
    coordinator: Annotated[
        str, typer.Option("--coordinator", help="The coordinator's fingerprint as read out over the telephone.")
    ] = "",
) -> None:
    """Check signed files, journals and ledgers, and say in plain words what holds and what stays open.

    The privacy officer runs it on a consortium, roster, enrolment, study or approval file, on a site's journal, or on
    the consortium's ledger as `consilium-coordinator ledger export` wrote it. Files given together vouch for each
    other: add consortium.json and the roster to learn whose keys signed. A ledger needs the roster, and the studies in
    it say how many sites may collude.

    Example: consilium-officer verify consortium.json roster.json chest.study.json st-anna.approval.json

    Example: consilium-officer verify consortium.json roster.json chest.study.json ledger.jsonl
    """
    reports = verify(files, coordinator)
    console = out()
    for report in reports:
        console.print(f"[bold]{escape(str(report.path))}[/]: {escape(report.title)}")
        for fact in report.facts:
            console.print(f"  [green]✓[/] {escape(fact)}")
        for doubt in report.doubts:
            console.print(f"  [yellow]?[/] open: {escape(doubt)}")
        if report.error is not None:
            show_error(report.error)
    if any(report.error for report in reports):
        raise typer.Exit(1)


def main() -> None:
    """The `consilium-officer` command."""
    raise SystemExit(run(app, "consilium-officer"))
