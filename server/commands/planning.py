"""What does a draft promise its patients, and how much noise does it need? `consilium-coordinator study plan`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from privacy.accounting import ROLES, Role, events
from privacy.claims import TIERS, Claim, claim, epsilon_rdp, words
from privacy.errors import ConsiliumError
from privacy.files import replacing, write_atomically
from privacy.identity import Document
from privacy.planning import LIFETIME_DELTA, LIFETIME_EPSILON, MOST_REPEATS, Repeats, find_noise, repeats
from privacy.study import Study
from privacy.terminal import out, table
from server.commands.common import read_text

ENTRIES: dict[Role, str] = {"train": "noise_multiplier", "validation": "evaluation_noise"}
"""Which entry of [privacy] holds the noise of a role; test patients have that of validation patients."""
_TIERS = {1: "1: sums only", 2: "2: sums broken open"}
_BAR = 40


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A draft (.toml) or a signed file (.json).")],
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", min=0.001, help="Find the least noise for at most this epsilon.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the noise that was found into the draft.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Also draw epsilon over the rounds into this file.")
    ] = None,
) -> None:
    """Show what a study with noise promises each patient, and find the noise for a wanted epsilon.

    Anybody may run it on a file, best on a draft before it is signed. Tier 1 is what everyone can learn who sees the
    opened sums; tier 2 is what is left if secure aggregation were wholly broken.

    Example: `consilium-coordinator study plan chest.toml --epsilon 8 --write`
    """
    if epsilon is not None and not math.isfinite(epsilon):
        raise ConsiliumError("This is no epsilon", str(epsilon), "Name a number, such as --epsilon 8.")
    if write and epsilon is None:
        raise ConsiliumError("There is nothing to write", str(file), "Say which epsilon is wanted, with --epsilon.")
    if file.suffix == ".json":
        if write:
            raise ConsiliumError("A signed study cannot be changed", str(file), "Plan its draft, and sign that anew.")
        text, study = "", Study.from_body(Document.read(file, "study").body)
    else:
        text = read_text(file, "draft")
        study = Study.from_toml(text, str(file))
    console = out()
    found: dict[str, Decimal] = {}
    if epsilon is not None:
        with console.status("Finding the noise …"):
            study, found = wanted(study, Decimal(str(epsilon)))
    with console.status("Accounting …"):
        made, often = claim(study), repeats(study)
    _show(study, made, often)
    if found:
        lines = [f"{entry} = {value}" for entry, value in found.items()]
        if write:
            write_atomically(file, noised(text, study, found, str(file)).encode(), file.stat().st_mode & 0o777)
            console.print(f"\nWritten into {escape(str(file))}: {', '.join(lines)}")
        else:
            console.print(f"\nThis holds with these lines under \\[privacy] in {escape(str(file))} (--write does it):")
            for line in lines:
                console.print(f"  {line}")
    if plot is not None:
        draw(made, plot)
        console.print(f"\nThe picture is in {escape(str(plot))}.")


def wanted(study: Study, epsilon: Decimal) -> tuple[Study, dict[str, Decimal]]:
    """The draft with the least noise for an ε, and the entries that were found.

    The noise of training is always sought; that of evaluation only where the draft's is too little for this ε.

    Raises:
        ConsiliumError: the study has no noise, or none is enough.
    """
    asked = events(study, 1)
    found = {ENTRIES["train"]: find_noise(study, epsilon)}
    if epsilon_rdp(asked["validation"], study.privacy.delta) > float(epsilon):
        found[ENTRIES["validation"]] = find_noise(study, epsilon, role="validation")
    return _with(study, found), found


def _with(study: Study, found: Mapping[str, Decimal]) -> Study:
    body = study.body()
    body["privacy"] |= {entry: str(value) for entry, value in found.items()}
    return Study.model_validate(body)


def noised(text: str, study: Study, found: Mapping[str, Decimal], source: str) -> str:
    """A draft's text with the found entries written under [privacy]; comments and all else stay.

    Raises:
        ConsiliumError: the section is written in a way that cannot be edited line by line.
    """
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if re.match(r"\s*\[\s*privacy\s*\]", line)), None)
    if start is not None:
        for entry, value in found.items():
            end = next((i for i in range(start + 1, len(lines)) if re.match(r"\s*\[", lines[i])), len(lines))
            _write(lines, start, end, entry, str(value))
        changed = "\n".join(lines)
        try:
            if Study.from_toml(changed, source) == study:
                return changed
        except ConsiliumError:
            pass  # said below, with what to do
    raise ConsiliumError(
        "The noise cannot be written into the draft",
        source,
        f"Write it yourself under [privacy]: {', '.join(f'{entry} = {value}' for entry, value in found.items())}.",
    )


def _write(lines: list[str], start: int, end: int, entry: str, value: str) -> None:
    """Set one entry between two lines: where it stands, else where it stands as a comment, else under the mode."""
    for mark in (r"", r"#\s*"):
        pattern = re.compile(rf"(\s*){mark}{entry}\s*=\s*[^#\s]+(.*)")
        for index in range(start + 1, end):
            if match := pattern.fullmatch(lines[index]):
                lines[index] = f"{match[1]}{entry} = {value}{match[2]}"
                return
    mode = next((i for i in range(start + 1, end) if re.match(r"\s*mode\s*=", lines[i])), start)
    lines.insert(mode + 1, f"{entry} = {value}")


# ---- shown ---------------------------------------------------------------------------------------------------


def _show(study: Study, made: Claim, often: Repeats) -> None:
    console = out()
    privacy = study.privacy
    console.print(
        f"[bold]{escape(study.study.title)}[/] ({escape(study.study.name)}): {privacy.mode}, C {privacy.clip}, "
        f"σ {privacy.noise_multiplier}, q {privacy.sampling_rate}, "
        f"T {made.promise('train', 1).event.count} noised steps in {study.slots} slots, δ {made.delta}\n"
    )
    rows = []
    for tier in TIERS:
        for role in ROLES:
            promise, worst = made.promise(role, tier), made.worst(tier)
            rows.append(
                (
                    _TIERS[tier] if role == ROLES[0] else "",
                    role,
                    f"{float(promise.event.noise_multiplier):.3f}",
                    promise.event.count,
                    promise.epsilon_rdp + (" ←" if promise is worst else ""),
                    promise.epsilon_pld,
                    f"{promise.spotted} %",
                )
            )
    columns = ("tier", "patients for", "noise", "releases", "ε (binds, RDP)", "ε (ideal, PLD)", "spotted (PLD)")
    console.print(table(*columns, rows=rows))
    console.print("← is the most that any patient of that tier gives away; a patient is in one role only.\n")
    console.print(table("after round", "ε", "", rows=_bars(made)))
    console.print()
    for sentence in words(study, made):
        console.print(f"• {escape(sentence)}", soft_wrap=False)
    console.print(f"• {_lifetime(often)}")


def _bars(made: Claim) -> list[tuple[str, str, str]]:
    """ε over the rounds of training, as a picture for a terminal: at most ten lines."""
    points = made.curve[::-1][::2][::-1] if len(made.curve) > 10 else made.curve
    most = max(Decimal(points[-1][1]), Decimal("0.001"))
    return [(str(mark), value, "█" * max(1, round(_BAR * Decimal(value) / most))) for mark, value in points]


def _lifetime(often: Repeats) -> str:
    """How many such studies fit a lifetime, beside what adding epsilons up would give."""
    counts = {order: f"{count} at order {order}" for order, count in often.filtered}
    more = "or more" if often.summed >= MOST_REPEATS - 1 else "only"
    return (
        f"A lifetime of (ε {LIFETIME_EPSILON}, δ {LIFETIME_DELTA}) holds this many studies like this one: "
        f"{', '.join(counts.values())}. If epsilons were added up it would be {often.summed} {more}."
    )


def draw(made: Claim, path: Path) -> None:
    """ε of tier 1 over the rounds, and what it comes to in tier 2, as a PNG file.

    Raises:
        ConsiliumError: there is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise ConsiliumError("There is no such folder", str(path.absolute().parent), "Make it, or name another.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    marks, values = [mark for mark, _ in made.curve], [float(value) for _, value in made.curve]
    axes.plot(marks, values, color="#0072B2", marker="o", markersize=4, linewidth=2.2, label="tier 1, binds (RDP)")
    last = made.promise("train", 1)
    axes.plot(marks[-1:], [float(last.epsilon_pld)], "D", color="#D55E00", label="tier 1, ideal (PLD)")
    axes.set_xlabel("rounds, those in reserve with them")
    axes.set_ylabel(f"ε of a training patient at δ = {made.delta}")
    broken = made.promise("train", 2).epsilon_rdp
    axes.set_title(f"ε {last.epsilon_rdp}; if secure sums were broken open {broken}", loc="left", fontsize=11)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(color="#D8D8D8", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    FigureCanvasAgg(figure)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=160)
