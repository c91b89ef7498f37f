"""What does patient-level privacy cost when the patients are at several hospitals, and how much of it do we win back?

    make bench-privacy
    .venv/bin/python -m tests.bench.privacy --set ham10000 --seeds 1 --show

Real chest X-rays and moles (`CONSILIUM_DATA`, chest_xray_pneumonia and ham10000), whose patients and lesions are known;
where they are absent a drawn stand-in takes the place of the X-rays, and every table says so. The arms and the recipe
that all of them share stand in `privacy_arms.py`. Each arm is run at ε = 2 and ε = 8 (δ = 10⁻⁴, below one in the
patients that train) from three first weights, and measured on the same test patients: exact AUROC of all pairs, and
balanced accuracy of the class with the highest score.

A seed fixes the first weights, the same for all arms; samples and noise are the operating system's, as in a hospital,
so a repeated run differs. ± is half the range over the seeds' runs, of a difference half the range of the paired ones.
Each run leaves a file below build/bench/privacy/, and a run whose file is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from client import dealing
from client.imaging import Cohort, Membership, Source, load
from models import plots
from privacy.accounting import events
from privacy.canonical import sha256
from privacy.claims import epsilon_rdp
from tests.bench.learning_sets import DATA, SETS
from tests.bench.privacy_arms import (
    ARMS,
    KEY,
    LOCAL_STEPS,
    RECIPES,
    SPLIT,
    Arm,
    Recipe,
    deal,
    measure,
    n8,
    noise_for,
    study,
    train,
)
from tests.bench.table import FOLDER, Line, show

ROOT = FOLDER / "privacy"
XRAYS, DRAWN = "chest_xray_pneumonia", "drawn stand-in"
EPSILONS = (2, 8)
SEEDS = 3
CLOSE, NEAR = 0.5, 1.5
"""Goals in points of AUROC: to pooled training with the noise of RULES N8, and to pooled training with all of σ."""
PAIRS = {"shared-5": "pooled-noise-of-5", "shared-10": "pooled-noise-of-10"}
ORDER = ("pooled", "pooled-noise-of-5", "shared-5", "pooled-noise-of-10", "shared-10", "per-site-5", "alone")
WORDS = {
    "pooled": "pooled, σ",
    "pooled-noise-of-5": f"pooled, {n8(5):.2f} σ",
    "pooled-noise-of-10": f"pooled, {n8(10):.2f} σ",
    "shared-5": "`shared`, 5 sites",
    "shared-10": "`shared`, 10 sites",
    "per-site-5": f"`per-site`, 5 sites, {LOCAL_STEPS} steps a round",
    "alone": "one of 5 sites alone",
}
Record = dict[str, Any]
Records = dict[tuple[str, int], list[Record]]


class Bench:
    """One set of images, and the runs on it that are done."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        real = (DATA / name).is_dir()
        self.name, self.recipe = name if real else DRAWN, recipe
        self._folder = ROOT / self.name.replace(" ", "-")
        self._folder.mkdir(parents=True, exist_ok=True)
        data = self._folder / "data"
        if not (data / "all" / dealing.DECLARATION).is_file():
            if name in SETS and real:
                _together(SETS[name].hospitals(self._folder / "own"), self._folder / "own", data / "all")
            else:
                dealing.deal(DATA / name if real else _drawn(self._folder / "drawn"), data, ("all",))
        self._source = Source.from_file(data / "all" / dealing.DECLARATION)
        self.cohort = self._prepared()
        self.patients = sum(map(len, deal(self.cohort, 1)))
        self.sigmas = {epsilon: noise_for(recipe, epsilon) for epsilon in EPSILONS}

    def _prepared(self) -> Cohort:
        """Everybody, split by keyed hash; prepared once, then from the disk."""
        cache = self._folder / "cache"
        cache.mkdir(exist_ok=True)
        spec = study(ARMS["pooled"], self.recipe, "1", 1000).spec()
        return load(self._source, spec["input"], self.recipe.classes, SPLIT, KEY, cache)

    def run(self, arm: Arm, epsilon: int, seed: int) -> None:
        """Train and measure, unless an earlier run did."""
        path = self._folder / f"{arm.name}-{epsilon}-{seed}.json"
        plan = self._digest(arm, epsilon)
        if path.is_file() and json.loads(path.read_text())["plan"] == plan:
            return
        begun, busy = time.monotonic(), time.process_time()
        network, _ = train(arm, self.recipe, self.sigmas[epsilon], self.cohort, seed)
        record: Record = {"plan": plan, **asdict(measure(network, self.cohort, Membership.TEST))}
        record |= {"seconds": round(time.monotonic() - begun, 1), "cpu": round(time.process_time() - busy, 1)}
        path.write_text(json.dumps(record, indent=1) + "\n")
        said = f"AUROC {record['auroc']:.4f} in {record['cpu']:.0f} s of processor"
        print(f"{self.name}, ε {epsilon}, seed {seed}, {arm.name}: {said}", flush=True)

    def known(self, seeds: int) -> Records:
        """Arms and ε of which all these seeds are done."""
        found: Records = {}
        for name, arm in ARMS.items():
            for epsilon in EPSILONS:
                paths = [self._folder / f"{name}-{epsilon}-{seed}.json" for seed in range(1, seeds + 1)]
                records = [json.loads(path.read_text()) for path in paths if path.is_file()]
                good = [record for record in records if record["plan"] == self._digest(arm, epsilon)]
                if len(good) == seeds:
                    found[name, epsilon] = good
        return found

    def notes(self, found: Records) -> list[str]:
        """What the figures are of."""
        cohort, recipe = self.cohort, self.recipe
        noise = ", ".join(f"σ {float(sigma):.3f} for ε {epsilon}" for epsilon, sigma in self.sigmas.items())
        made = [
            f"{self.name}: {self.patients} patients train, {len(cohort.groups(Membership.TEST))} with "
            f"{len(cohort.indices(Membership.TEST))} images test; {recipe.network}, {recipe.size[0]} × "
            f"{recipe.size[1]} px, {recipe.steps} steps, q {recipe.rate}, C {recipe.clip}, {noise}, δ {recipe.delta}",
            *(self._fallback(epsilon) for epsilon in EPSILONS),
        ]
        absent = [f"{name} at ε {e}" for name in ORDER for e in EPSILONS if (name, e) not in found]
        return [*made, f"not run for all seeds yet: {', '.join(absent)}"] if absent else made

    def _fallback(self, epsilon: int) -> str:
        """What `shared` still promises where nobody's noise but a site's own counts (tier two)."""
        found = []
        for name in PAIRS:
            plan = study(ARMS[name], self.recipe, format(float(self.sigmas[epsilon]), "f"), self.patients)
            claim = epsilon_rdp(events(plan, 2)["train"], Fraction(self.recipe.delta))
            found.append(f"{claim:.1f} with {ARMS[name].sites} sites")
        return f"  shared at ε {epsilon}, were secure aggregation wholly broken: ε {', '.join(found)}"

    def _digest(self, arm: Arm, epsilon: int) -> str:
        """What a run is a run of."""
        plan = study(arm, self.recipe, format(float(self.sigmas[epsilon]), "f"), self.patients)
        return sha256(f"{plan.hash} {arm} {self.recipe} {SPLIT}".encode())


def _together(hospitals: Sequence[str], own: Path, folder: Path) -> None:
    """The images of several hospitals as those of one."""
    parts = [np.load(own / name / "images.npz") for name in hospitals]
    folder.mkdir(parents=True)
    np.savez(folder / "images.npz", **{key: np.concatenate([part[key] for part in parts]) for key in parts[0].files})
    (folder / dealing.DECLARATION).write_text(Source(kind="npz", path=Path("images.npz")).to_toml())


def _drawn(folder: Path, patients: int = 3000, side: int = 48) -> Path:
    """A stand-in of noise in which a blurred spot is the finding; tells whether the bench works and nothing else."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    who = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    ill = (rng.random(patients) < 0.6)[who]
    down, across = np.mgrid[:side, :side]
    images = rng.normal(110, 40, (len(who), side, side))
    for number in np.flatnonzero(ill):
        x, y = rng.uniform(10, side - 10, 2)
        images[number] += 35 * np.exp(-((across - x) ** 2 + (down - y) ** 2) / 40)
    np.savez(folder / "images.npz", images=images.clip(0, 255).astype(np.uint8))
    rows = [f"{int(has)},drawn-{number}" for number, has in zip(who, ill, strict=True)]
    (folder / "index.csv").write_text("\n".join(["label,patient", *rows]) + "\n")
    return folder


# ---- what the runs say ---------------------------------------------------------------------------------------


def points(records: Sequence[Record], figure: str = "auroc") -> list[float]:
    """A figure of each seed, in hundredths."""
    return [100 * record[figure] for record in records]


def spread(values: Sequence[float]) -> float:
    """Half the range."""
    return (max(values) - min(values)) / 2


def below(found: Records, name: str, other: str, epsilon: int) -> list[float] | None:
    """How many points an arm is below another, for each seed; None where one of the two was not run."""
    if (name, epsilon) not in found or (other, epsilon) not in found:
        return None
    pairs = zip(points(found[other, epsilon]), points(found[name, epsilon]), strict=True)
    return [theirs - ours for theirs, ours in pairs]


def lines(found: Records, of: str = "") -> list[Line]:
    """The table: every arm, and the gaps that have a goal. `of` stands before each line."""
    made = []
    for epsilon in EPSILONS:
        for name in ORDER:
            if (name, epsilon) not in found:
                continue
            records = found[name, epsilon]
            area, balanced = points(records), points(records, "balanced_accuracy")
            beside = {"±": spread(area), "balanced": statistics.fmean(balanced), "its ±": spread(balanced)}
            what = f"{of}ε {epsilon}, {WORDS[name]}: AUROC"
            made.append(Line(what, "points", statistics.fmean(area), beside))
        for name, twin in PAIRS.items():
            for other, goal in ((twin, CLOSE), ("pooled", NEAR)):
                gap = below(found, name, other, epsilon)
                if gap is not None:
                    what = f"  {of}ε {epsilon}, {WORDS[name]} below {WORDS[other]}"
                    rule = f"within {goal:g} points"
                    made.append(Line(what, "points", statistics.fmean(gap), {"±": spread(gap)}, goal, rule))
            gap = below(found, name, "per-site-5", epsilon)
            if gap is not None and name == "shared-5" and len(gap) > 1:
                what = f"  {of}ε {epsilon}, {WORDS[name]} below `per-site`"
                rule = "above by more than the spread"
                made.append(Line(what, "points", statistics.fmean(gap), {"±": spread(gap)}, -spread(gap), rule))
    return made


def markdown(found: Records, table: Sequence[Line]) -> str:
    """The tables of docs/benchmarks.md: the arms, and the goals."""
    rows = ["| arm | " + " | ".join(f"ε {e}: AUROC | balanced accuracy" for e in EPSILONS) + " |"]
    rows.append("|---|" + "---|" * (2 * len(EPSILONS)))
    for name in ORDER:
        cells = [WORDS[name]]
        for epsilon in EPSILONS:
            records = found.get((name, epsilon))
            for figure in ("auroc", "balanced_accuracy"):
                values = points(records, figure) if records else None
                cells.append(f"{statistics.fmean(values):.1f} ± {spread(values):.1f}" if values else "–")
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| AUROC, points | difference | goal |", "|---|---|---|"]
    for line in table:
        if line.goal is not None and line.ours is not None:
            difference = f"{line.ours:+.2f} ± {line.beside['±']:.2f}"
            rows.append(f"| {line.what.strip()} | {difference} | {line.rule}: {'met' if line.met else 'missed'} |")
    return "\n".join(rows) + "\n"


def picture(sets: Sequence[tuple[Bench, Records]], path: Path) -> None:
    """A row for each set, a panel for each ε: an arm in each line, every seed a mark, the mean a stroke."""
    figure = Figure(figsize=(11.0, 3.4 * len(sets) + 0.2), layout="constrained")
    colours = {"pooled": plots.VERMILION, "shared": plots.BLUE, "per-site": plots.GREEN, "alone": plots.INK}
    panels = figure.subplots(len(sets), len(EPSILONS), sharey=True, squeeze=False)
    for (bench, found), line in zip(sets, panels, strict=True):
        for axes, epsilon in zip(line, EPSILONS, strict=True):
            for row, name in enumerate(ORDER):
                if (name, epsilon) not in found:
                    continue
                values, colour = points(found[name, epsilon]), colours[ARMS[name].mode]
                axes.plot([min(values), max(values)], [row, row], color=plots.FAINT, linewidth=8, zorder=1)
                axes.scatter(values, [row] * len(values), 24, colour, zorder=2)
                axes.plot([statistics.fmean(values)] * 2, [row - 0.28, row + 0.28], color=colour, zorder=3)
            axes.set(title=f"{bench.name}: ε = {epsilon}, δ = {bench.recipe.delta}, per patient")
            axes.set(xlabel="AUROC on the test patients, points")
            axes.set_yticks(range(len(ORDER)), [WORDS[name].replace("`", "") for name in ORDER])
    panels[0][0].invert_yaxis()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Measure what is missing, and show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", choices=list(RECIPES), help="only this set; may be repeated")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 to this number")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="only this arm; may be repeated")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in chosen.set or RECIPES if (DATA / name).is_dir()]
    for name in set(chosen.set or RECIPES) - set(names):
        print(f"!!! NO REAL IMAGES: {DATA / name} is not there (CONSILIUM_DATA).")
    if not names:
        print(f"!!! What follows is of a {DRAWN}.")
    table, notes, pages, sets = [], [], [], []
    for bench in [Bench(name, RECIPES[name]) for name in names or [XRAYS]]:
        if not chosen.show:
            for seed in range(1, chosen.seeds + 1):
                for epsilon in reversed(EPSILONS):
                    for arm in chosen.arm or ORDER:
                        bench.run(ARMS[arm], epsilon, seed)
        found = bench.known(chosen.seeds)
        own = lines(found, f"{bench.name}: " if bench.name != DRAWN else "DRAWN STAND-IN: ")
        table, notes = table + own, notes + bench.notes(found)
        pages.append(f"{bench.name}\n\n{markdown(found, own)}")
        sets.append((bench, found))
    notes += [
        f"{chosen.seeds} seeds",
        "masks are left out: they cancel exactly; every other step is that of a study",
    ]
    title = "Patient-level privacy" if names else "DRAWN STAND-IN, NO REAL IMAGES: patient-level privacy"
    show("privacy", title, table, notes)
    if any(found for _, found in sets):
        picture(sets, FOLDER / "privacy.png")
        (FOLDER / "privacy.md").write_text("\n".join(pages), encoding="utf-8")
        print(f"  {FOLDER / 'privacy.png'}\n  {FOLDER / 'privacy.md'}")


if __name__ == "__main__":
    main()
