"""How would a study go, before a hospital is asked? `consilium-coordinator simulate` and `baseline`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import models
from models import tasks
from privacy.errors import ConsiliumError
from privacy.study import Study
from privacy.terminal import err, out
from server import arms, comparison
from server.commands.common import Initial, read_text
from server.comparison import ALL, Row

if TYPE_CHECKING:
    from server.simulation import Finished, Heard, Simulation

MOST_SITES = 100

Draft = Annotated[Path, typer.Argument(metavar="STUDY", help="The draft of a study (TOML).")]
Data = Annotated[
    Path, typer.Option("--data", help="An npz, a folder with an npz and an index.csv, or a folder for each hospital.")
]
Sites = Annotated[
    int, typer.Option("--sites", min=0, max=MOST_SITES, help="How many hospitals; 0: as many as the study names.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Deals patients out; another seed, other hospitals.")]
Out = Annotated[Path | None, typer.Option("--out", help="A new folder for the results [NAME-simulation].")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="For computing; 0 takes every core.")]


class Arm(StrEnum):
    """What the federation is compared with."""

    LOCAL = "local"
    POOLED = "pooled"
    ALL = "all"


def simulate(
    study: Draft,
    data: Data,
    sites: Sites = 0,
    out_: Out = None,
    leave_out: Annotated[
        str, typer.Option("--leave-out", help="A hospital to leave out and test on, or `all`, one after the other.")
    ] = "",
    seed: Seed = arms.DEAL_SEED,
    threads: Threads = 0,
    initial: Initial = None,
) -> None:
    """Run a study with simulated hospitals on this machine, each with the agent that a real one runs.

    Whoever drafts a study runs it, before hospitals are asked; nothing is enrolled, nothing leaves this machine. With
    `seed` under [rounds] two runs are equal bit for bit, and equal to the real deployment on the same images. With
    --leave-out the study is run without a hospital, and the model tested on that hospital's images. What `study sign`
    will be given as --initial is given here too.

    Example: `consilium-coordinator simulate chest.toml --sites 5 --data chest_xray_pneumonia --leave-out all`
    """
    from server.simulation import Simulation, metrics, names  # Flower: seconds to load, and needed here only

    draft, folder = _draft(study), _folder(out_, study)
    chosen = names(draft, sites or len(draft.sites))
    rows: list[Row] = []
    with Simulation(data, chosen, seed=seed, threads=threads, initial=initial) as simulation:
        _noted(simulation)
        if leave_out:
            for site in chosen if leave_out == "all" else (leave_out,):
                plan = arms.without(draft, chosen, site)
                model = _run(simulation, plan, f"without {site}")
                rows.append(Row(f"without {site}", site, metrics(plan, simulation.measure(model, [site]))))
                simulation.export(model, folder / f"without-{site}")
        else:
            plan = arms.together(draft, chosen)
            model = _run(simulation, plan, "together")
            rows += _measured(simulation, model, "together", chosen)
            simulation.export(model, folder / "together")
    facts = {"sites": list(chosen), "images": simulation.images, "seed": seed, "initial": model.record.initial}
    _report(draft, rows, folder, facts)


def baseline(
    arm: Annotated[Arm, typer.Argument(help="local: each hospital alone; pooled: all images in one place; all: both.")],
    study: Draft,
    data: Data,
    sites: Sites = 0,
    out_: Out = None,
    seed: Seed = arms.DEAL_SEED,
    threads: Threads = 0,
    initial: Initial = None,
) -> None:
    """Say what a study is to be compared with: each hospital by itself, or everything in one place.

    Whoever drafts a study runs it on the same images as `simulate`. Compute is equal: a hospital alone takes as many
    steps as in the federation, the pooled model as many as all together. Every model is measured on every hospital's
    test images; `all` runs the federation too. All of them start from the same weights.

    Example: `consilium-coordinator baseline all chest.toml --sites 3 --data chest_xray_pneumonia`
    """
    from server.simulation import POOLED, Simulation, names

    draft, folder = _draft(study), _folder(out_, study)
    chosen = names(draft, sites or len(draft.sites))
    rows: list[Row] = []
    with Simulation(
        data, chosen, seed=seed, pooled=arm is not Arm.LOCAL, threads=threads, initial=initial
    ) as simulation:
        _noted(simulation)
        plans: dict[str, Study] = {}
        if arm is Arm.ALL:
            plans["together"] = arms.together(draft, chosen)
        if arm is not Arm.POOLED:
            plans |= {f"{site} alone": arms.alone(draft, chosen, site) for site in chosen}
        if arm is not Arm.LOCAL:
            plans["pooled"] = arms.pooled(draft, POOLED, len(chosen))
        for name, plan in plans.items():
            model = _run(simulation, plan, name)
            rows += _measured(simulation, model, name, chosen)
            simulation.export(model, folder / name.replace(" ", "-"))
    facts = {"sites": list(chosen), "images": simulation.images, "seed": seed, "initial": model.record.initial}
    _report(draft, rows, folder, facts)


def _noted(simulation: Simulation) -> None:
    if simulation.note:
        err().print(escape(simulation.note))


def _draft(path: Path) -> Study:
    draft = Study.from_toml(read_text(path, "study"), str(path))
    problems = models.validate(draft.spec())
    if problems:
        first = problems[0]
        raise ConsiliumError(
            "The study asks for something that cannot be built", f"{first.where}: {first.what}", first.remedy
        )
    return draft


def _folder(given: Path | None, study: Path) -> Path:
    folder = given or Path(f"{study.stem}-simulation")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConsiliumError("The folder is not empty", str(folder), "Name a new folder with --out.")
    return folder


def _run(simulation: Simulation, plan: Study, name: str) -> Finished:
    with _bar(name, len(plan.sites) * (plan.rounds.count + 2)) as heard:
        return simulation.run(plan, heard)


@contextmanager
def _bar(name: str, total: int) -> Iterator[Heard]:
    """A bar of the answers that have come in."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err()) as progress:
        task = progress.add_task(name, total=total)
        yield lambda site: progress.advance(task)


def _measured(simulation: Simulation, model: Finished, name: str, sites: Sequence[str]) -> list[Row]:
    """A model on all test images together, and on each hospital's own."""
    from server.simulation import metrics

    sums = simulation.measure(model, sites)
    whole = Row(name, ALL, metrics(model.record.study, sums))
    return [whole, *(Row(name, site, metrics(model.record.study, {site: found})) for site, found in sums.items())]


def _report(draft: Study, rows: Sequence[Row], folder: Path, facts: dict[str, object]) -> None:
    primary = tasks.get(draft.spec()).primary
    comparison.write(folder, rows, primary, {"study": draft.study.name, **facts})
    console = out()
    console.print(comparison.shown(rows, primary))
    console.print(f"Results are in {escape(str(folder))}.")
