"""What may a privacy officer ask? `consilium-officer`: the record, verified without trusting anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from privacy.terminal import out, run, show_error
from privacy.verify import verify

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown"
)


@app.callback()
def officer() -> None:
    """For the privacy officer: check what was agreed and what has left, trusting nobody's word.

    Nothing here needs a running node, a network, or the hospital's keys: the files are enough.

    Example: consilium-officer verify consortium.json roster.json chest.study.json
    """


@app.command("verify")
def verify_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Signed files, or a site's journal.jsonl.")],
    coordinator: Annotated[
        str, typer.Option("--coordinator", help="The coordinator's fingerprint as read out over the telephone.")
    ] = "",
) -> None:
    """Check signed files and journals, and say in plain words what holds and what stays open.

    The privacy officer runs it on a consortium, roster, enrolment, study or approval file, or on a site's journal.
    Files given together vouch for each other: add consortium.json and the roster to learn whose keys signed.

    Example: consilium-officer verify consortium.json roster.json chest.study.json st-anna.approval.json
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
