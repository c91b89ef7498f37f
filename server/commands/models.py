"""What came out? `consilium-coordinator models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from models.statistics import title
from privacy.errors import ConsiliumError
from privacy.terminal import out, table
from server.commands.common import group, home_of, open_registry

app = group("See and take out the models that studies have published, and the networks that studies can name.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name, or at least 6 digits of its hash.")]


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the published models with their results on the test images of all sites.

    Anybody with access to the coordinator's folder may run it.

    Example: `consilium-coordinator models list`
    """
    with open_registry(context) as registry:
        published = registry.models()
    if not published:
        out().print("No model is published yet. `consilium-coordinator study status` says how studies stand.")
        return
    rows = [(m.name, m.study[:12], m.round, _result(m.metrics), m.at[:10]) for m in published]
    out().print(table("study", "hash", "round", "on test images", "on", rows=rows))


@app.command("show")
def show(context: typer.Context, name: Name) -> None:
    """Show the card of a published model: what it is for, how good it is, what protected the patients.

    Anybody with access to the coordinator's folder may run it.

    Example: `consilium-coordinator models show chest`
    """
    from rich.markdown import Markdown

    from server.outputs import CARD, MODEL

    home = home_of(context)
    with open_registry(context) as registry:
        record = registry.study(name)
        if all(m.study != record.hash for m in registry.models()):
            raise ConsiliumError(
                "The study has no published model yet",
                f"{record.name} is {record.state.value}",
                f"`consilium-coordinator study status {record.name}` says how it stands.",
            )
    folder = home.study(record.hash)
    if not (folder / CARD).is_file():
        raise ConsiliumError(
            "The model's folder is gone",
            str(folder),
            f"`consilium-coordinator models export {record.name}` makes a copy.",
        )
    console = out()
    console.print(Markdown((folder / CARD).read_text(encoding="utf-8")))
    console.print(f"\nIts folder: {escape(str(folder))} (the model is {MODEL})")


@app.command("export")
def export(
    context: typer.Context,
    name: Name,
    target: Annotated[Path, typer.Option("--out", help="A new folder.")],
    samples: Annotated[
        Path | None,
        typer.Option(help="A folder with up to 24 PNG, JPEG or NIfTI images that you may show to anybody."),
    ] = None,
) -> None:
    """Copy a published model, its card, its curves and the signed study into a folder.

    The coordinator runs it to hand the model on. Hospitals of the study receive theirs by themselves. With --samples
    the model is run on your own images, and overlays.png shows its outlines or classes on them. Take images of a public
    set: the picture goes wherever the model goes, and no hospital's image belongs on it.

    Example: `consilium-coordinator models export chest --out chest-model`

    Example: `consilium-coordinator models export cells --out cells-model --samples public-cells`
    """
    from server.outputs import export as copy

    with open_registry(context) as registry:
        files = copy(home_of(context), registry, registry.study(name), target, samples)
    console = out()
    for file in files:
        console.print(escape(str(file)))


@app.command("networks")
def networks() -> None:
    """List the networks that a study can name under [network].

    Whoever drafts a study runs it; it needs no coordinator.

    Example: `consilium-coordinator models networks`
    """
    from models.networks import NETWORKS

    rows = [
        (
            name,
            "masks" if network.answers == "pixels" else "images",
            f"{network.minimum}, multiples of {network.divisor}" if network.divisor > 1 else network.minimum,
            ", ".join(network.parameters) or "none",
            network.summary,
        )
        for name, network in sorted(NETWORKS.items(), key=lambda item: (item[1].answers, item[0]))
    ]
    out().print(table("name", "answers for", "least px", "parameters", "what it is", rows=rows))


def _result(metrics: object) -> str:
    """The figure that matters most, and the one beside it."""
    known = metrics if isinstance(metrics, dict) else {}
    shown = [f"{title(name)} {known[name]:.3f}" for name in ("auroc", "dice", "accuracy", "hd95") if name in known]
    return ", ".join(shown) or "not known"
