"""Which models has a hospital received, and how did they do on its own images? `models list, show, compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.agent import agent_pb2 as pb
from client.agent_client import Local
from client.home import SiteHome
from privacy.errors import ConsiliumError
from privacy.terminal import err, out, table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The models that finished studies delivered, with this site's own test result.",
)


@app.command("list")
def list_models(context: typer.Context) -> None:
    """Show the models that studies delivered to this hospital.

    The site operator runs it; the node must be running.

    Example: consilium-site models list
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        models = door.models()
    console = out()
    if not models:
        console.print("No model yet: it comes when a study that this site took part in is finished.")
        return
    rows = [(line.study[:16], line.title, _short(line.result), line.folder) for line in models]
    console.print(table("study", "title", "own test result", "folder", rows=rows))


@app.command()
def show(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="The study's name or title, or the beginning of its hash.")],
) -> None:
    """Show one delivered model: its files and this hospital's own test result, which nobody else sees by name.

    The site operator runs it; the model's card is MODEL_CARD.md in the folder shown.

    Example: consilium-site models show 3f2a91bc
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        line = _found(door, study)
    console = out()
    console.print(f"[bold]{escape(line.title)}[/]\nStudy {line.study}\nFolder {escape(line.folder)}")
    try:
        files = sorted(path for path in Path(line.folder).iterdir() if path.is_file())
        console.print(table("file", "bytes", rows=[(path.name, path.stat().st_size) for path in files]))
    except OSError:
        console.print("The files belong to the agent's user: look at them as that user, or as root.")
    result = _json(line.result)
    if result:
        own = result.pop("personal", {})
        rows = [(k, _number(v), _number(own.get(k, ""))) for k, v in result.items()]
        columns = ("on this site's own test images", "common model", "personal model")
        console.print(table(*columns[: 3 if own else 2], rows=[row[: 3 if own else 2] for row in rows]))
    else:
        console.print("No test result of this site.")


@app.command()
def compare(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="The study's name or title, or the beginning of its hash.")],
) -> None:
    """Say what this hospital gained: train a model on its own images alone, and measure it beside the delivered one.

    The site operator runs it once a study is finished; it takes as long as this site's part of the study did. Both
    models are measured on this site's own test images, and the figures stay at the site.

    Example: consilium-site models compare 3f2a91bc
    """
    home: SiteHome = context.obj
    report = ""
    columns = (TextColumn("training alone"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Local(home.local_socket) as door:
        line = _found(door, study)
        with Progress(*columns, console=err(), transient=True) as progress:
            task = progress.add_task("alone", total=None)
            for event in door.compare(line.study):
                progress.update(task, completed=event.done, total=event.total or None)
                report = event.summary or report
    console, found = out(), _json(report)
    alone, federated = (found.get(side, {}) for side in ("alone", "federated"))
    console.print(f"[bold]{escape(line.title)}[/], on this site's own test images")
    console.print(table("", "this site alone", "together", rows=_compared(alone, federated)))
    console.print(_gain(found))


def _compared(alone: dict[str, Any], federated: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name, _bounded(alone, name), _bounded(federated, name))
        for name in federated.get("metrics", {})
        if name in alone.get("metrics", {})
    ]


def _bounded(side: dict[str, Any], name: str) -> str:
    """A figure with its 95 % interval, where it has one."""
    text = _number(side["metrics"][name])
    ends = side.get("intervals", {}).get(name)
    return f"{text} ({ends[0]:.3f} to {ends[1]:.3f})" if ends else text


def _gain(report: dict[str, Any]) -> str:
    """The difference in words; no more is claimed than the intervals allow."""
    name = report.get("primary", "")
    try:
        alone, together = (report[side]["metrics"][name] for side in ("alone", "federated"))
        (low, high), (from_, to) = (report[side]["intervals"][name] for side in ("alone", "federated"))
    except (KeyError, TypeError, ValueError):
        return "The study's own figure cannot be known here: too few test images, or a class without any."
    if from_ > high or low > to:
        sure = "The two intervals do not overlap."
    else:
        sure = "The two intervals overlap: another sample of patients could say otherwise."
    return f"Together {together - alone:+.3f} {name}. {sure}"


def _found(door: Local, name: str) -> pb.ModelLine:
    models = door.models()
    named = {line.study for line in door.status().studies if line.name == name}
    found = [line for line in models if line.study in named] or [
        line for line in models if name and (line.study.startswith(name) or line.title == name)
    ]
    if len(found) != 1:
        known = ", ".join(f"{line.study[:16]} ({line.title})" for line in models) or "none yet"
        raise ConsiliumError(
            "Several models could be meant" if found else "There is no such model", name, f"Delivered: {known}."
        )
    return found[0]


def _short(text: str) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in list(_json(text).items())[:3])


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
