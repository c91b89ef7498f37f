"""What can a hospital do? `consilium-site`: join, look at a study and decide, connect images, run the node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands import budget, data, join, models, node, study
from client.home import SiteHome
from privacy.terminal import run

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown"
)
app.command("init")(join.init)
app.command("enrol")(join.enrol)
app.add_typer(study.app, name="study")
app.add_typer(data.app, name="data")
app.add_typer(budget.officer, name="officer")
app.add_typer(budget.grant, name="grant")
app.command("budget")(budget.budget)
app.command("start")(node.start)
app.command("status")(node.status)
app.command("preflight")(node.preflight)
app.add_typer(models.app, name="models")


@app.callback()
def site(
    context: typer.Context,
    home: Annotated[
        Path, typer.Option("--home", "-H", envvar="CONSILIUM_SITE_HOME", help="The site's folder.", show_default=True)
    ] = Path("site"),
) -> None:
    """For the operator at a hospital: take part in studies without an image ever leaving.

    In this order: init, enrol, start, data connect, data check, preflight, study review, study approve, status. For
    studies with noise also officer trust and grant import, before study approve.

    Example: consilium-site --home /srv/consilium init st-anna --consortium consortium.json
    """
    context.obj = SiteHome(home)


def main() -> None:
    """The `consilium-site` command."""
    raise SystemExit(run(app, "consilium-site"))


if __name__ == "__main__":
    main()
