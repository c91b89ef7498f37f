"""How does a hospital keep its patients' budgets? `officer trust`, `grant import, revoke`, and `budget` to look."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from client.agent_client import AgentDown, Local
from client.home import SiteHome
from privacy.errors import ConsiliumError, Refusal
from privacy.files import replacing
from privacy.grants import Allowance, Grant
from privacy.identity import KEY, Document, fingerprint
from privacy.terminal import out, table

WIDTH = 40
"""Columns of the longest bar."""

officer = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Whom this hospital lets decide on patients' budgets. The site operator pins the privacy officer's key.\n\n"
    "Example: consilium-site officer trust officer.pub",
)
grant = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="What the privacy officer allowed; the site operator hands it in. No study with noise runs without it.\n\n"
    "Example: consilium-site grant import chest.grant.json",
)


@officer.command()
def trust(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The officer's file officer.pub, or its 64 digits.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of another officer, whose open grants end.")
    ] = False,
) -> None:
    """Pin the privacy officer's key: from now on only this officer's allowances and grants count.

    The site operator runs it once, with the officer on the telephone to compare the fingerprint.

    Example: consilium-site officer trust officer.pub
    """
    home: SiteHome = context.obj
    found = key if KEY.match(key) else _key(Path(key))
    with Local(home.local_socket) as door:
        door.trust(found, replace=replace)
    console = out()
    console.print(f"Trusted: the privacy officer with the fingerprint [bold]{fingerprint(found)}[/].")
    console.print("[bold yellow]Compare it by telephone[/] with the officer, on a number you know from elsewhere.")


@grant.command("import")
def import_grant(
    context: typer.Context, file: Annotated[Path, typer.Argument(help="The officer's allowance or grant.")]
) -> None:
    """Hand an allowance or a grant of the privacy officer to the agent.

    The site operator runs it; the node must be running. It counts only if the trusted officer signed it for this site.

    Example: consilium-site grant import chest.grant.json
    """
    home: SiteHome = context.obj
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConsiliumError("The file cannot be read", str(file), "Check the path and its permissions.") from error
    try:
        with Local(home.local_socket) as door:
            taken = door.take_grant(data)
    except AgentDown:
        raise
    except ConsiliumError as error:
        if _is_paper(data):
            raise
        raise ConsiliumError(
            "This is no paper of a privacy officer",
            str(file),
            "Name the allowance or the grant as `consilium-officer` wrote it; if it is one, ask for it again.",
        ) from error
    out().print(f"Taken: {taken.kind}, {escape(taken.subject)}.")


@grant.command()
def revoke(
    context: typer.Context,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="The study's name, or the beginning of its hash.")],
) -> None:
    """End a study's grant at once: its work ends, and nothing more leaves. What has left cannot be called back.

    The site operator runs it when the privacy officer says so. What was charged stays charged, and what was reserved
    stays reserved until the study is over; a new grant lets it go on.

    Example: consilium-site grant revoke chest-triage
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        ended = door.revoke_grant(study)
    out().print(f"[red]Revoked[/]: the grant for study {ended[:16]}. Nothing more leaves for it.")


def budget(
    context: typer.Context,
    plot: Annotated[Path | None, typer.Option(help="Also draw the lifetimes into this PNG file.")] = None,
) -> None:
    """Show what each study has cost and may still cost, and how far patients' lifetime budgets are spent.

    The site operator runs it, with the privacy officer. Numbers of patients are in it: it is for this site's eyes only.

    Example: consilium-site budget --plot budget.png
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        report = door.budget()
    console = out()
    if report["trouble"]:
        console.print(f"[bold red]The privacy ledger is in doubt[/]: {escape(report['trouble'])}.")
    if not report["officer"]:
        console.print("No privacy officer is trusted yet: `consilium-site officer trust KEY`.")
    else:
        console.print(f"Privacy officer {fingerprint(report['officer'])}; {report['counter']} charge(s) so far.")
    _grants(console, report)
    _studies(console, report["studies"])
    _lifetimes(console, report["lifetime"])
    if plot is not None:
        _drawn(report["lifetime"], plot)
        console.print(f"Drawn: {escape(str(plot))}")


def _grants(console: Console, report: dict[str, Any]) -> None:
    begun = {line["study"] for line in report["studies"]}
    waiting = [line for line in report["grants"] if line["state"] != "consumed" or line["study"] not in begun]
    if waiting:
        rows = [
            (line["study"][:16], line["state"], line["epsilon"], line["cap"], line["slots"], line["expires"])
            for line in waiting
        ]
        console.print()
        console.print(table("grant for", "state", "epsilon", "cap", "slots", "may begin until", rows=rows))


def _studies(console: Console, studies: list[dict[str, Any]]) -> None:
    console.print()
    if not studies:
        console.print("No study with noise has begun.")
        return
    rows = [
        (
            line["name"] or line["study"][:16],
            line["state"],
            role,
            line["patients"].get(role, 0),
            f"{part['charged']}/{part['reserved']}",
            part["left"],
            part["epsilon"],
        )
        for line in studies
        for role, part in line["roles"].items()
    ]
    console.print(table("study", "state", "role", "patients", "charged", "left", "epsilon held", rows=rows))


def _lifetimes(console: Console, lifetime: dict[str, Any] | None) -> None:
    console.print()
    if lifetime is None:
        console.print("No allowance yet: the officer writes one with `consilium-officer allow`.")
        return
    console.print(
        f"Lifetime: epsilon {lifetime['epsilon']} at delta {lifetime['delta']}, order {lifetime['order']}; "
        f"{lifetime['patients']} patient(s) charged so far"
    )
    most = max(lifetime["bins"]) or 1
    for label, count in zip(_labels(len(lifetime["bins"])), lifetime["bins"], strict=True):
        bar = "█" * -(-WIDTH * count // most)
        console.print(f"{label:>12} spent [blue]{bar}[/] {count}")
    names = {"untouched": "a patient never in a study", "middle": "a patient in the middle", "most": "the most charged"}
    rows = [(names[name], f"{part['free']:.0%}", part["spent_epsilon"]) for name, part in lifetime["room"].items()]
    console.print()
    console.print(table("room for a next study", "free", "epsilon spent", rows=rows))
    console.print("Room is counted in Rényi divergence at that order; epsilons neither add up nor share out.")


def _labels(bins: int) -> list[str]:
    return [f"{10 * at} to {10 * at + 10} %" for at in range(bins - 1)] + ["100 % or more"]


def _drawn(lifetime: dict[str, Any] | None, path: Path) -> None:
    """The lifetimes as a bar chart in a PNG file."""
    if lifetime is None:
        raise ConsiliumError(
            "There is nothing to draw yet",
            str(path),
            "Import the officer's allowance first: `consilium-site grant import`.",
        )
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(_labels(len(lifetime["bins"])), lifetime["bins"], color="#2563a8")
    axes.set_ylim(0, 1.05 * max(1, *lifetime["bins"]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("lifetime budget reserved or spent")
    axes.set_ylabel("patients")
    axes.set_title(f"ε = {lifetime['epsilon']} at δ = {lifetime['delta']}, order {lifetime['order']}")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _is_paper(data: bytes) -> bool:
    """Whether these bytes are an allowance or a grant by their form; who signed it is the agent's to judge."""
    for kind in (Allowance.KIND, Grant.KIND):
        with suppress(Refusal):
            Document.decode(data.strip(), kind)
            return True
    return False


def _key(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ConsiliumError(
            "This is neither a key nor a file that can be read", str(path), "Give officer.pub, or its 64 digits."
        ) from error
    if not KEY.match(text):
        raise ConsiliumError("This is not an officer's key", str(path), "It is one line of 64 hexadecimal digits.")
    return text
