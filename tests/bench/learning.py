"""What do real hospitals learn together, alone, and as if all images lay in one place?

    make bench-learning
    .venv/bin/python -m tests.bench.learning --set ham10000 --set lgg-mri --seeds 3

Sets, hospitals, networks, sizes, rounds and steps are fixed in `learning_sets.py`. Every arm runs in the simulation,
that is in the agents and the round loop of a real study, at equal compute (`server.arms`), and every model is measured
on the test images of all hospitals together. Each run leaves a file under build/bench/learning/, and a run whose file
is there is not repeated, so the bench may be broken off and started again.

Differences are paired: both models of one seed start from the same weights, see the same split, and draw alike. Their
interval is Student's over the seeds; the interval of a figure itself is that of its test images (`models.intervals`),
its ends averaged over the seeds. A set is shown as soon as its first seed is complete, with the seeds that are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models import plots, tasks
from privacy.canonical import canonical, sha256
from privacy.study import Study
from server import arms
from server.simulation import POOLED, Simulation
from tests.bench.learning_sets import SETS, Bench
from tests.bench.table import FOLDER, Line, show

ROOT = FOLDER / "learning"
TOGETHER, IN_ONE_PLACE = "federated", "pooled"
HEAD = (
    "| set | seeds | alone, each | mean | together | pooled (95 %) | together − alone | together − pooled | goals |",
    f"|{'---|' * 9}",
)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % quantile of Student's t for so many seeds."""


@dataclass(frozen=True)
class Figures:
    """One set over its seeds, in points (hundredths) of the set's metric; lists have one number for each seed."""

    federated: list[float]
    pooled: list[float]
    local: dict[str, list[float]]
    low: float
    high: float

    @property
    def alone(self) -> list[float]:
        """The mean of the hospitals' own models, for each seed."""
        return [statistics.fmean(values) for values in zip(*self.local.values(), strict=True)]


def study(bench: Bench, sites: Sequence[str], seed: int) -> Study:
    """The set's study at its hospitals, repeatable under one seed."""
    text = bench.plan.replace("[rounds]\n", f"[rounds]\nseed = {seed}\n")
    listed = ", ".join(f'"{site}"' for site in sites)
    return Study.from_toml(f"sites = [{listed}]\n{text}[initial]\nseed = {seed}\n")


def plans(draft: Study, sites: Sequence[str]) -> dict[str, Study]:
    """The study of each arm."""
    alone = {f"local {site}": arms.alone(draft, sites, site) for site in sites}
    return {TOGETHER: arms.together(draft, sites), IN_ONE_PLACE: arms.pooled(draft, POOLED, len(sites)), **alone}


def measure(name: str, seeds: int) -> None:
    """Run what of a set has not been run yet."""
    bench = SETS[name]
    sites = bench.hospitals(ROOT / "data" / name)
    todo = [
        (seed, arm, plan)
        for seed in range(1, seeds + 1)
        for arm, plan in plans(study(bench, sites, seed), sites).items()
        if not _done(name, arm, seed, plan)
    ]
    if not todo:
        return
    with Simulation(ROOT / "data" / name, sites, pooled=True, threads=1) as simulation:
        for seed, arm, plan in todo:
            begun = time.monotonic()
            named = plan.model_copy(
                update={"study": plan.study.model_copy(update={"name": f"{plan.study.name[:30]}-s{seed}"})}
            )
            model = simulation.run(named)
            sums = simulation.measure(model, sites)
            task, whole = tasks.get(plan.spec()), np.sum(list(sums.values()), axis=0)
            record = {
                "plan": _digest(plan),
                "seconds": round(time.monotonic() - begun, 1),
                "primary": task.primary,
                "metrics": task.metrics(whole),
                "intervals": task.intervals(whole),
                "own": {site: task.metrics(found) for site, found in sums.items()},
            }
            _file(name, arm, seed).write_text(json.dumps(record, indent=1) + "\n")
            figure = task.metrics(whole)[task.primary]
            print(f"{name}, seed {seed}, {arm}: {task.primary} {figure:.4f} in {record['seconds']} s", flush=True)


def figures(name: str, seeds: int) -> Figures | None:
    """What was measured of a set, up to the first seed that is not complete; None when that is seed 1."""
    bench = SETS[name]
    sites = bench.hospitals(ROOT / "data" / name)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(1, seeds + 1):
        arms_of_seed = plans(study(bench, sites, seed), sites)
        if not all(_done(name, arm, seed, plan) for arm, plan in arms_of_seed.items()):
            break
        for arm in arms_of_seed:
            found.setdefault(arm, []).append(json.loads(_file(name, arm, seed).read_text()))
    if not found:
        return None
    points = {arm: [100 * record["metrics"][record["primary"]] for record in records] for arm, records in found.items()}
    ends = [record["intervals"][record["primary"]] for record in found[IN_ONE_PLACE]]
    return Figures(
        points[TOGETHER],
        points[IN_ONE_PLACE],
        {arm.removeprefix("local "): values for arm, values in points.items() if arm.startswith("local ")},
        100 * statistics.fmean(low for low, _ in ends),
        100 * statistics.fmean(high for _, high in ends),
    )


def lines(name: str, found: Figures) -> list[Line]:
    """A set in the table: the figures, and the two gaps that have a goal."""
    bench = SETS[name]
    metric = "AUROC" if '"classification"' in bench.plan else "Dice"
    federated, pooled, alone = (statistics.fmean(v) for v in (found.federated, found.pooled, found.alone))
    gap, room = paired(found.pooled, found.federated)
    gain, space = paired(found.alone, found.federated)
    allowed = max(bench.margin, pooled - found.low)
    beside = {"alone, mean": alone, "pooled": pooled}
    interval, rule = f"{found.low:.1f} to {found.high:.1f}", f"within pooled's interval or {bench.margin:g}"
    made = [
        Line(f"{name}: federated {metric}, {_seeds(found)}", "points", federated, beside),
        Line(f"  pooled ({interval}) above federated{_give(room)}", "points", gap, {}, allowed, rule),
        Line(f"  mean alone above federated{_give(space)}", "points", gain, {}, 0.0, "above the mean alone"),
    ]
    if bench.published:
        for which, value in ((TOGETHER, federated), (IN_ONE_PLACE, pooled)):
            rule = f"{which} ≥ {bench.published}"
            made.append(Line(f"  published, above {which}", "points", bench.published - value, {}, 0.0, rule))
    return made


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of first − second over the seeds, and half its 95 % interval (NaN for one seed)."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) not in STUDENT:
        return statistics.fmean(differences), math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), STUDENT[len(differences)] * error


def _seeds(found: Figures) -> str:
    count = len(found.federated)
    return f"{count} seed{'s' if count > 1 else ''}"


def _give(half: float) -> str:
    return f", ± {half:.1f}" if math.isfinite(half) else ""


def picture(all_found: dict[str, Figures], path: Path) -> None:
    """All sets in one plot: on the left the figures, on the right the paired differences with their intervals."""
    figure = Figure(figsize=(11.0, 1.8 + 0.55 * len(all_found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row, found in enumerate(all_found.values()):
        each = [statistics.fmean(values) for values in found.local.values()]
        said = row == 0  # the legend names everything once
        left.plot([found.low, found.high], [row, row], color=plots.FAINT, linewidth=9, zorder=1)
        for values, colour, marker, label in (
            (each, plots.GREEN, "^", "one hospital alone"),
            ([statistics.fmean(found.pooled)], plots.VERMILION, "s", "pooled, with its interval"),
            ([statistics.fmean(found.federated)], plots.BLUE, "o", "federated"),
        ):
            left.scatter(
                values, [row] * len(values), s=42, c=colour, marker=marker, label=label if said else None, zorder=2
            )
        for other, colour, marker, label, shift in (
            (found.alone, plots.GREEN, "^", "federated − mean alone", -0.14),
            (found.pooled, plots.VERMILION, "s", "federated − pooled", 0.14),
        ):
            mean, half = paired(found.federated, other)
            ends = half if math.isfinite(half) else 0.0
            name = label if said else None
            right.errorbar(mean, row + shift, xerr=ends, color=colour, marker=marker, capsize=3, label=name)
    right.axvline(0.0, color=plots.INK, linewidth=0.8)
    left.set_yticks(range(len(all_found)), [f"{n}, {_seeds(f)}" for n, f in all_found.items()])
    left.invert_yaxis()
    left.set(xlabel="AUROC or Dice, points", title="On the test images of all hospitals")
    right.set(xlabel="points; whiskers: 95 % over the seeds", title="Paired differences")
    for axes in (left, right):
        axes.legend(loc="best", fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160)


def markdown(name: str, found: Figures) -> str:
    """A set as a row of the table in docs/benchmarks.md."""
    mean = statistics.fmean
    each = " · ".join(f"{mean(values):.1f}" for values in found.local.values())
    gain, gap = paired(found.federated, found.alone), paired(found.federated, found.pooled)
    cells = [
        name,
        str(len(found.federated)),
        each,
        f"{mean(found.alone):.1f}",
        f"**{mean(found.federated):.1f}**",
        f"{mean(found.pooled):.1f} ({found.low:.1f}–{found.high:.1f})",
        *(f"{difference:+.1f}{_give(half)}".replace(",", "") for difference, half in (gain, gap)),
        "; ".join(f"{line.rule}: {'met' if line.met else 'missed'}" for line in lines(name, found) if line.rule),
    ]
    return f"| {' | '.join(cells)} |"


def _file(name: str, arm: str, seed: int) -> Path:
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{arm.replace(' ', '-')}-{seed}.json"


def _digest(plan: Study) -> str:
    """What a plan asks for beyond the defaults: a run need not be repeated because a study gained an option."""
    return sha256(canonical(plan.model_dump(mode="json", exclude_defaults=True)))


def _done(name: str, arm: str, seed: int, plan: Study) -> bool:
    path = _file(name, arm, seed)
    return path.is_file() and json.loads(path.read_text())["plan"] == _digest(plan)


def main() -> None:
    """Measure, and show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=list(SETS), help="only these sets; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    chosen = parser.parse_args()
    found, notes, table = {}, [], []
    for name in chosen.set or SETS:
        if not SETS[name].there:
            notes.append(f"{name}: the images are not on this machine (CONSILIUM_DATA)")
            continue
        if not chosen.show:
            measure(name, chosen.seeds)
        one = figures(name, chosen.seeds)
        if one is None:
            notes.append(f"{name}: not measured to the end yet")
            continue
        found[name] = one
        table += lines(name, one)
    show("learning", "Alone, together, pooled", table, notes)
    if found:
        picture(found, FOLDER / "learning.png")
        rows = [markdown(name, one) for name, one in found.items()]
        (FOLDER / "learning.md").write_text("\n".join([*HEAD, *rows]) + "\n", encoding="utf-8")
        print(f"  {FOLDER / 'learning.png'}\n  {FOLDER / 'learning.md'}")


if __name__ == "__main__":
    main()
