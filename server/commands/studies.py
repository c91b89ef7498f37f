"""How is a study drafted, signed, launched and watched? `consilium-coordinator study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import models
from models.fields import Problem
from privacy.errors import ConsiliumError
from privacy.identity import Document
from privacy.study import APPROVAL, Study
from privacy.study_text import explain, template
from privacy.terminal import out, show_error, table, warn
from server import console as view
from server.commands.common import (
    Follow,
    Force,
    Initial,
    Yes,
    confirm,
    group,
    home_of,
    open_registry,
    read_text,
    write_new,
)
from server.commands.planning import plan
from server.commands.signing import active, check_sites, sign_study
from server.guards import is_serving
from server.records import State, StudyRecord
from server.registry import Registry
from server.spending import Spending, has_noise

app = group("Draft a study, sign it, launch it, watch it, and steer it.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name, or at least 6 digits of its hash.")]


@app.command("new")
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Small letters, digits and hyphens.")],
    site: Annotated[
        list[str] | None, typer.Option("--site", help="A hospital to take part; give it once for each.")
    ] = None,
    target: Annotated[Path | None, typer.Option("--out", help="Where to write the draft [NAME.toml].")] = None,
    force: Force = False,
) -> None:
    """Write a commented draft of a study, with every entry and what it means.

    The coordinator runs it, then edits the file. Without --site every enrolled hospital is named.

    Example: `consilium-coordinator study new chest --site st-anna --site charite`
    """
    with open_registry(context) as registry:
        _, roster = registry.roster()
    sites = list(site or active(roster))
    if not sites:
        raise ConsiliumError(
            "A study needs at least one hospital",
            name,
            "Name some with --site, or enrol them first: `consilium-coordinator sites invite`.",
        )
    text = template(name, sites)
    Study.from_toml(text, f"{name}.toml")
    path = target or Path(f"{name}.toml")
    write_new(path, text.encode(), force=force)
    for missing in sorted(set(sites) - set(active(roster))):
        warn(f"{missing} is not enrolled (yet); the study cannot be signed before it is.")
    out().print(
        f"The draft is in {escape(str(path))}. Edit it, then: consilium-coordinator study sign {escape(str(path))}"
    )


@app.command("show")
def show(
    context: typer.Context,
    study: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A draft (.toml), a signed file (.json), or a name.")
    ],
) -> None:
    """Explain a study in plain words, and say what in a draft cannot stand yet.

    Anybody may run it on a file; on a name, it shows what this coordinator signed.

    Example: `consilium-coordinator study show chest.toml`
    """
    path = Path(study)
    problems: list[ConsiliumError] = []
    if path.suffix == ".toml":
        shown = Study.from_toml(read_text(path, "draft"), str(path))
        problems = [_spoken(problem) for problem in models.validate(shown.spec())]
    elif path.suffix == ".json":
        shown = Study.from_body(Document.read(path, "study").body)
    else:
        with open_registry(context) as registry:
            shown = registry.study(study).study
    _print_study(shown)
    for problem in problems:
        show_error(problem)
    if problems:
        raise typer.Exit(1)


app.command("plan")(plan)


@app.command("sign")
def sign(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The draft.")],
    initial: Initial = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Where to write the signed file [NAME.study.json].")
    ] = None,
    force: Force = False,
) -> None:
    """Check a draft, fix the weights it starts from, and sign it. From here on its hash names it, unchangeably.

    The coordinator runs it once the draft is as it should be. Nothing is sent yet.

    Example: `consilium-coordinator study sign chest.toml`
    """
    home = home_of(context)
    draft = Study.from_toml(read_text(file, "draft"), str(file))
    problems = [_spoken(problem) for problem in models.validate(draft.spec())]
    for problem in problems[1:]:
        show_error(problem)
    if problems:
        raise problems[0]
    path = target or Path(f"{draft.study.name}.study.json")
    with open_registry(context) as registry:
        _, roster = registry.roster()
        check_sites(draft, roster)
        record = sign_study(registry, home.identity(), draft, initial)
    document = record.document.encode() + b"\n"
    if not (path.is_file() and path.read_bytes() == document):
        write_new(path, document, force=force)
    console = out()
    _print_study(record.study)
    console.print(
        f"\nSigned; the file is {escape(str(path))}. Launch it: consilium-coordinator study launch {record.name}"
    )


@app.command("launch")
def launch(context: typer.Context, name: Name, follow: Follow = False) -> None:
    """Begin a signed study: it goes to its hospitals, waits for their approval, and trains.

    The coordinator runs it while `consilium-coordinator serve` is running. A stopped or failed study begins a new
    session and keeps the rounds it has.

    Example: `consilium-coordinator study launch chest --follow`
    """
    with open_registry(context) as registry:
        _with_slots(registry, name)
        record = registry.launch(name)
        _begun(context, registry, record, "Launched.", follow)


@app.command("resume")
def resume(
    context: typer.Context,
    name: Name,
    back_to: Annotated[
        int | None,
        typer.Option("--back-to", min=0, help="Go on from this round's model; later ones are left out."),
    ] = None,
    follow: Follow = False,
) -> None:
    """Go on with a paused or interrupted study where it stood; the open round is asked for again.

    The coordinator runs it after a pause, a crash or a restored backup. Hospitals that answered already send the very
    same bytes again. On a finished study it delivers the model to hospitals that were away.

    With --back-to the rounds after that one are left out: round numbers go on, from the older model. Use it when a
    study paused because a round looked wrong.

    Example: `consilium-coordinator study resume chest`

    Example: `consilium-coordinator study resume chest --back-to 4`
    """
    with open_registry(context) as registry:
        _with_slots(registry, name)
        if back_to is not None:
            registry.back_to(name, back_to)
        record = registry.resume(name)
        _begun(context, registry, record, "Goes on.", follow)


@app.command("pause")
def pause(context: typer.Context, name: Name) -> None:
    """Let a study rest; nothing is lost, and `resume` goes on.

    The coordinator runs it, for example before maintenance.

    Example: `consilium-coordinator study pause chest`
    """
    with open_registry(context) as registry:
        record = registry.pause(name)
    out().print(f"{record.name}: pause asked for." if record.request else f"{record.name} is {record.state.value}.")


@app.command("stop")
def stop(context: typer.Context, name: Name, yes: Yes = False) -> None:
    """End a study before its last round. No model is published.

    The coordinator runs it. `launch` can begin again later, in a new session, with the rounds that are done.

    Example: `consilium-coordinator study stop chest`
    """
    with open_registry(context) as registry:
        record = registry.study(name)
        if not yes:
            confirm(f"End {record.name} without a model?", record.name)
        record = registry.stop(name)
    out().print(f"{record.name}: stop asked for." if record.request else f"{record.name} is {record.state.value}.")


@app.command("abort")
def abort(context: typer.Context, name: Name, yes: Yes = False) -> None:
    """Give a study with noise up for good. The ledger says so, and neither `launch` nor `resume` begins it again.

    The coordinator runs it on a study that is stopped or paused and is not to go on. What left the hospitals was
    charged there, and what they reserved for the study is not given back by this. A study that may go on later is
    paused or stopped instead.

    Example: `consilium-coordinator study abort chest`
    """
    with open_registry(context) as registry:
        record = registry.study(name)
        if not yes and has_noise(record.study):
            confirm(f"Give up {record.name} for good? It can never run again.", record.name)
        record = registry.abort(name)
    out().print(f"{record.name} is aborted for good. A further study is drafted anew and reserves a budget of its own.")


@app.command("status")
def status(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One study; without it, all.")] = None,
    follow: Follow = False,
    rounds: Annotated[
        bool, typer.Option("--rounds", help="Also list every round, and who was not in it and why.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Also draw epsilon over the slots into this file.")
    ] = None,
) -> None:
    """Show how studies stand: per hospital and round, who is in, late or refused, and why.

    Anybody with access to the coordinator's folder may run it; it disturbs nothing. Of a study with noise it also says
    how many slots are used, what that has cost a patient so far and at the end, and what the ledger holds.

    Example: `consilium-coordinator study status chest --follow`

    Example: `consilium-coordinator study status chest --plot budget.png`
    """
    console = out()
    with open_registry(context) as registry:
        if name is None:
            if plot is not None:
                raise ConsiliumError("Which study is to be drawn?", str(plot), "Name one study with --plot.")
            records = registry.studies()
            if not records:
                console.print("No study is signed yet. `consilium-coordinator study new NAME` drafts one.")
                return
            console.print(view.studies_table(records))
            return
        record = registry.study(name)
        if follow and record.state in view.GOING:
            _watch(context, registry, record)
        else:
            console.print(view.status(registry, record.hash))
        if rounds:
            console.print()
            console.print(view.rounds_table(registry, record.hash))
        if plot is not None:
            Spending.of(record.study, registry.course(record.hash).slots()).draw(plot)
            console.print(f"\nThe picture is in {escape(str(plot))}.")


@app.command("accept")
def accept(
    context: typer.Context, file: Annotated[Path, typer.Argument(metavar="FILE", help="The approval the site made.")]
) -> None:
    """Take a hospital's approval that came as a file instead of over the network.

    The coordinator runs it on what `consilium-site study approve --out FILE` wrote.

    Example: `consilium-coordinator study accept st-anna.approval.json`
    """
    document = Document.read(file, APPROVAL)
    with open_registry(context) as registry:
        approval = registry.add_approval(document)
        record = registry.study(str(document.body["study"]))
    out().print(f"{approval.site} approves {record.name} ({record.hash[:12]}).")


@app.command("export")
def export(
    context: typer.Context,
    name: Name,
    target: Annotated[Path | None, typer.Option("--out", help="Where to write it [NAME.study.json].")] = None,
    force: Force = False,
) -> None:
    """Write the signed study file again, to hand it to a hospital or an officer.

    Hospitals receive it by themselves at launch; with the file, `consilium-site study import` works before that.

    Example: `consilium-coordinator study export chest --out chest.study.json`
    """
    with open_registry(context) as registry:
        record = registry.study(name)
    path = target or Path(f"{record.name}.study.json")
    write_new(path, record.document.encode() + b"\n", force=force)
    out().print(f"The signed study is in {escape(str(path))}.")


def _spoken(problem: Problem) -> ConsiliumError:
    return ConsiliumError(
        "The study asks for something that cannot be built", f"{problem.where}: {problem.what}", problem.remedy
    )


def _print_study(study: Study) -> None:
    grid = table("", "", rows=explain(study))
    grid.show_header = False
    grid.columns[0].style = "bold"
    grid.columns[0].no_wrap = True
    out().print(grid)


def _with_slots(registry: Registry, name: str) -> None:
    """Nothing, unless rounds are to come and the study has no slot left for one: then it would pause at once.

    Raises:
        ConsiliumError: that is so.
    """
    from server.slots import used_up  # what sums and carries updates: heavy, and not needed by other commands

    record = registry.study(name)
    if record.state not in {State.PAUSED, State.INTERRUPTED, State.STOPPED, State.FAILED}:
        return
    course = registry.course(record.hash)
    done = course.checkpoints()[-1].round
    if done < record.study.rounds.count and used_up(record.study, course.slots()):
        raise ConsiliumError(
            "No slot is left for another round",
            f"{record.name} has {done} of {record.study.rounds.count} rounds, and its reserve of "
            f"{record.study.rounds.reserve} repeated rounds is used up",
            "A longer run is a new study: draft one with a larger `reserve` under [rounds], and `study stop` this one.",
        )


def _begun(context: typer.Context, registry: Registry, record: StudyRecord, word: str, follow: bool) -> None:
    if not is_serving(home_of(context)):
        warn(f"{record.name} starts as soon as this runs: `consilium-coordinator serve`")
    if follow:
        _watch(context, registry, record)
    else:
        out().print(f"{word} Watch it: consilium-coordinator study status {record.name} --follow")


def _watch(context: typer.Context, registry: Registry, record: StudyRecord) -> None:
    """Follow a study; the exit code says whether it ended well."""
    try:
        state = view.watch(registry, record.hash)
    except KeyboardInterrupt:
        out().print(f"\nNo longer watching; {record.name} goes on by itself.")
        return
    if state in {State.FAILED, State.INTERRUPTED}:
        ended = registry.study(record.hash)
        again = "resume" if state is State.INTERRUPTED else "launch"
        raise ConsiliumError(
            f"The study is {state.value}",
            f"{record.name}: {ended.reason or 'no reason was given'}",
            f"Its log is {home_of(context).logs / f'study-{record.hash[:12]}.log'}; "
            f"go on with `consilium-coordinator study {again} {record.name}`.",
        )
