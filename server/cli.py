"""What may a coordinator do? `consilium-coordinator`: the program and its groups of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privacy.terminal import run
from server.commands import keeping, ledger, models, simulate, sites, studies
from server.commands.common import PROGRAM
from server.home import CoordinatorHome

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown"
)


@app.callback()
def coordinator(
    context: typer.Context,
    home: Annotated[
        Path, typer.Option("--home", "-H", envvar="CONSILIUM_COORDINATOR_HOME", help="The coordinator's folder.")
    ] = Path("coordinator"),
) -> None:
    """For the consortium coordinator: bring hospitals together, and lead a study from the draft to the model.

    A consortium begins with `init`, `serve` and `sites`; a study goes through `study new`, `sign`, `launch` and
    `status`; its model is under `models`. Every command answers to --help.

    Example: `consilium-coordinator init lungs --host fl.example.org`
    """
    context.obj = CoordinatorHome(home)


app.command()(keeping.init)
app.command()(keeping.serve)
app.add_typer(sites.app, name="sites")
app.add_typer(studies.app, name="study")
app.add_typer(ledger.app, name="ledger")
app.add_typer(models.app, name="models")
app.command()(simulate.simulate)
app.command()(simulate.baseline)
app.command()(keeping.certificate)
app.command()(keeping.backup)
app.command()(keeping.restore)


def main() -> None:
    """The `consilium-coordinator` command."""
    raise SystemExit(run(app, PROGRAM))


if __name__ == "__main__":
    main()
