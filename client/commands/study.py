"""How does a hospital look at a study and decide? `study list, review, import, approve, decline, withdraw`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.agent import agent_pb2 as pb
from client.agent_client import Local
from client.home import SiteHome
from privacy.errors import REFUSALS, ConsiliumError, RefusalCode
from privacy.identity import Document
from privacy.study import APPROVAL, KIND, Study, read_signed
from privacy.study_text import explain
from privacy.terminal import out, table

STYLES = {"pending": "yellow", "approved": "green", "declined": "red", "withdrawn": "red", "finished": "blue"}

NAME = Annotated[str, typer.Argument(metavar="[NAME]", help="The study's name, or the beginning of its hash.")]
FILE = Annotated[
    Path | None, typer.Option("--file", help="The signed study as a file, when it did not come over the wire.")
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at studies and decide. Nothing is computed for a study before the site approved it, by its hash.",
)


@app.command("list")
def list_studies(context: typer.Context) -> None:
    """Show every study this site has heard of, and what was decided.

    The site operator runs it; the node must be running.

    Example: consilium-site study list
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        studies = door.status().studies
    console = out()
    if not studies:
        console.print(
            "No study yet. It comes with the coordinator's launch, or with `consilium-site study import FILE`."
        )
        return
    console.print(lines(studies))
    for text in refusals(list(studies)):
        console.print(escape(text), soft_wrap=True)


@app.command()
def review(context: typer.Context, name: NAME = "", file: FILE = None) -> None:
    """Explain in plain words what a study does, what would leave the hospital, and under which protection.

    The site operator runs it together with whoever decides. Without a name: the study that waits for a decision.

    Example: consilium-site study review chest-triage

    Example: consilium-site study review --file chest-triage.study.json
    """
    home: SiteHome = context.obj
    if file is not None:
        read = _from_file(home, file)
        _explained(out(), read)
        if home.config().site not in read.sites:
            out().print(f"[red]This site, {home.config().site}, is not among them: it cannot take part.[/]")
        return
    with Local(home.local_socket) as door:
        detail = door.study(name or _waiting(door))
    console = out()
    _explained(console, read_signed(Document.decode(detail.document, KIND), home.consortium().coordinator))
    state = detail.line.state
    console.print(f"Decision so far: [{STYLES.get(state, 'bold')}]{state}[/]" + _with_data(detail.line.data))
    if state == "pending":
        console.print(f"To decide: `consilium-site study approve {detail.line.name}`, or `decline`.")


@app.command("import")
def import_study(
    context: typer.Context, file: Annotated[Path, typer.Argument(help="The signed study, or a roster.")]
) -> None:
    """Hand a signed study or roster to the agent as a file, where it does not come over the wire.

    The site operator runs it; the node must be running. Nothing is approved by it.

    Example: consilium-site study import chest-triage.study.json
    """
    home: SiteHome = context.obj
    try:
        data = file.read_bytes().strip()
    except OSError as error:
        raise ConsiliumError("The file cannot be read", str(file), "Check the path and its permissions.") from error
    with Local(home.local_socket) as door:
        imported = door.hand_in(data)
    out().print(f"Imported: {imported.kind} {escape(imported.subject)}.")


@app.command()
def approve(
    context: typer.Context,
    name: NAME = "",
    file: FILE = None,
    data: Annotated[str, typer.Option(help="Which data source to use, when there are several.")] = "",
    output: Annotated[
        Path | None, typer.Option("--out", help="Write the signed approval for the coordinator to this file.")
    ] = None,
) -> None:
    """Agree to one study, by its hash: the agent will compute for it, and for nothing else.

    The site operator runs it after `review`. The approval travels by itself; with --out also as a file.

    Example: consilium-site study approve chest-triage --data archive

    Example: consilium-site study approve --file chest-triage.study.json --out st-anna.approval.json
    """
    decided = _decide(context.obj, name, file, "approve", data)
    console = out()
    console.print(f"[green]Approved[/] {decided.line.name}{_with_data(decided.line.data)}.")
    console.print(f"Hash {decided.line.study}")
    for caution in decided.cautions:
        console.print(f"[yellow]Mind:[/] {escape(caution)}")
    document = Document.decode(decided.approval, APPROVAL)
    if document.body["one_image_per_patient"]:
        console.print("The approval says, as you declared, that one image is one patient; the model's card repeats it.")
    if output is not None:
        document.write(output)
        console.print(f"The signed approval is in {escape(str(output))}; hand it to the coordinator.")


@app.command()
def decline(context: typer.Context, name: NAME = "", file: FILE = None) -> None:
    """Say no to a study. The coordinator learns that the site declined, nothing else.

    The site operator runs it. A changed study is a new study, with a new hash and a new decision.

    Example: consilium-site study decline chest-triage
    """
    decided = _decide(context.obj, name, file, "decline")
    out().print(f"[red]Declined[/] {decided.line.name} ({decided.line.study[:16]}).")


@app.command()
def withdraw(context: typer.Context, name: NAME = "", file: FILE = None) -> None:
    """Take an approval back: from this moment the agent refuses every request of the study.

    The site operator runs it. What has left before cannot be called back; the study goes on without the site.

    Example: consilium-site study withdraw chest-triage
    """
    if not name and file is None:
        raise ConsiliumError("It is not clear which study is meant", "no name given", "Name it, or give its --file.")
    decided = _decide(context.obj, name, file, "withdraw")
    out().print(f"[red]Withdrawn[/] from {decided.line.name} ({decided.line.study[:16]}).")


def lines(studies: list[pb.StudyLine]) -> Table:
    """The studies as a table."""
    shown = Table("study", "state", "data", "slot", "last", "hash", box=None, pad_edge=False, header_style="bold")
    for line in studies:
        state = f"[{STYLES.get(line.state, 'bold')}]{escape(line.state)}[/]"
        last = f"{line.last} ({line.at})" if line.at else line.last
        shown.add_row(
            escape(line.name), state, escape(line.data), f"{line.slot}/{line.slots}", escape(last), line.study[:16]
        )
    return shown


def refusals(studies: list[pb.StudyLine]) -> list[str]:
    """Of each study whose last event was a refusal, what that means and what to do."""
    found = []
    for line in studies:
        code = line.last.rpartition(" refused: ")[2]
        if code != line.last and code in set(RefusalCode):
            what, remedy = REFUSALS[RefusalCode(code)]
            found.append(f"{line.name} ({code}): {what}. → {remedy}")
    return found


def _decide(home: SiteHome, name: str, file: Path | None, decision: str, data: str = "") -> pb.Decided:
    with Local(home.local_socket) as door:
        if file is not None:
            study = _from_file(home, file)
            door.hand_in(Document.read(file, KIND).encode())
            name = study.hash
        return door.decide(door.study(name or _waiting(door)).line.study, decision, data)


def _from_file(home: SiteHome, file: Path) -> Study:
    return read_signed(Document.read(file, KIND), home.consortium().coordinator)


def _waiting(door: Local) -> str:
    """The one study that waits for a decision."""
    studies = door.status().studies
    waiting = [line for line in studies if line.state == "pending"] or list(studies)
    if len(waiting) != 1:
        names = ", ".join(line.name for line in waiting)
        raise ConsiliumError(
            "Several studies could be meant" if waiting else "There is no study yet",
            names,
            "Name one of them."
            if waiting
            else "It comes with the coordinator's launch, or with `consilium-site study import FILE`.",
        )
    return str(waiting[0].study)


def _explained(console: Console, study: Study) -> None:
    shown = table("", "")
    shown.show_header = False
    shown.columns[0].style, shown.columns[1].overflow = "bold", "fold"
    for heading, sentence in explain(study):
        loud = heading in {"Privacy", "Secure aggregation"}
        shown.add_row(heading, f"[bold yellow]{escape(sentence)}[/]" if loud else escape(sentence))
    console.print(shown)


def _with_data(name: str) -> str:
    return f", with the data source “{escape(name)}”" if name else ""
