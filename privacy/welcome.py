"""Which of the commands is mine? `consilium` names the three people and each one's first three steps."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from privacy.terminal import out, run

PEOPLE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "consilium-coordinator",
        "You bring hospitals together and lead a study.",
        "consortium coordinator",
        (
            "consilium-coordinator init NAME --host fl.example.org",
            "consilium-coordinator serve",
            "consilium-coordinator sites add FILE-FROM-A-SITE",
        ),
    ),
    (
        "consilium-site",
        "You run your hospital's node.",
        "hospital site operator",
        (
            "consilium-site init NAME --consortium FILE-FROM-THE-COORDINATOR",
            "consilium-site enrol --out FILE-FOR-THE-COORDINATOR",
            "consilium-site start",
        ),
    ),
    (
        "consilium-officer",
        "You answer for the patients' privacy.",
        "privacy officer",
        (
            "consilium-officer verify STUDY-FILE",
            "consilium-officer verify SITE-FOLDER/agent/journal.jsonl",
            "consilium-officer --help",
        ),
    ),
)

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def welcome(
    show_version: Annotated[bool, typer.Option("--version", help="Print the release that is installed.")] = False,
) -> None:
    """Print which command is whose, and how each person begins.

    Hospitals train one medical-imaging model together: the images stay where they are, and a signed study says what
    may leave. Anybody may run this; it changes nothing.

    Example: consilium
    """
    console = out()
    if show_version:
        console.print(f"consilium {version('consilium')}")
        return
    console.print("[bold]Consilium[/]: hospitals train one imaging model together; the images stay at home.\n")
    for command, sentence, person, steps in PEOPLE:
        console.print(f"[bold]{command}[/]  ({person})")
        console.print(f"  {sentence}")
        for number, step in enumerate(steps, 1):
            console.print(f"    {number}. {step}")
        console.print()
    console.print("Every command and its parts answer to --help. `make demo` shows all of it on one machine.")


def main() -> None:
    """The `consilium` command."""
    raise SystemExit(run(app, "consilium"))
