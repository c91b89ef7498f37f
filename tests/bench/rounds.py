"""What does a round cost, beside the learning? Seconds and memory, ours beside stock Flower and NVFLARE's simulator.

    make bench-rounds                                   everything: 4 MB, 100 MB, 1 GB
    python -m tests.bench.rounds --quick                4 MB, five rounds
    python -m tests.bench.rounds --size 100mb --only ours --only flower

Three sites on loopback train the same network with next to no work: one step of SGD on two images of 16 x 16 pixels,
and a look at the received model on two more. The work is the same for all, so that what differs is the carrying.
NVFLARE is measured when its virtual environment is there (`--with-nvflare` makes it).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from privacy.errors import ConsiliumError
from privacy.study import Study
from privacy.terminal import run as run_command
from tests.bench import measured, nvflare_peer, ours, stock_flower
from tests.bench.measured import SITES, SIZES, Measured, Size
from tests.bench.memory import MIB
from tests.bench.table import FOLDER, Line, show

WORK = FOLDER / "run"
LIMIT_SECONDS = {"4mb": 600.0, "100mb": 1200.0, "1gb": 1800.0}
QUICK_ROUNDS = 5
SHARE = {"4mb": 0.25, "100mb": 0.8}
"""The part of stock Flower's seconds that a round may take."""
SERVER_MODELS = 4
CAP_MODELS = 4
ROOM_MODELS, ROOM_MODELS_PER_SITE = 6, 5
"""What 1 GB takes of this machine, in models: ServerApp and SuperLink, and each site with its messages in flight."""
AIM_SECONDS = {"4mb": 1.0, "100mb": 9.0}
AIM_SECURE = 2.0
SECAGG_ROUNDS = 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Who(StrEnum):
    """One of those measured."""

    OURS = "ours"
    SECURE = "secure"
    FLOWER = "flower"
    SECAGG = "flower-secagg"
    BARE = "flower-bare"
    SQLITE = "flower-sqlite"
    NVFLARE = "nvflare"

    @property
    def label(self) -> str:
        """As the table names it."""
        return TITLES[self]


TITLES = {
    Who.OURS: "ours",
    Who.SECURE: "ours, secure sums",
    Who.FLOWER: "stock Flower",
    Who.SECAGG: "stock, SecAgg+",
    Who.BARE: "stock, no work",
    Who.SQLITE: "stock, SQLite",
    Who.NVFLARE: "NVFLARE",
}


SUMS = frozenset({Who.SECURE, Who.SECAGG})


class Choice(StrEnum):
    """A size of model."""

    SMALL = "4mb"
    MIDDLE = "100mb"
    LARGE = "1gb"


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    runs: int
    rounds: int
    only: tuple[Who, ...]


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="4 MB only, five rounds.")] = False,
    size: Annotated[list[Choice] | None, typer.Option(help="Only this size; may be repeated.")] = None,
    only: Annotated[list[Who] | None, typer.Option(help="Only these; may be repeated.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs at 4 MB; all their rounds count.")] = 2,
    with_nvflare: Annotated[bool, typer.Option("--with-nvflare", help="Make NVFLARE's environment (1.1 GB).")] = False,
    skip_1gb: Annotated[bool, typer.Option("--skip-1gb", help="Leave the largest size out.")] = False,
) -> None:
    """Measure the rounds and print one table; the figures are kept in build/bench/rounds.json.

    Example: python -m tests.bench.rounds --quick
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if with_nvflare and not nvflare_peer.installed():
        nvflare_peer.install()
    chosen = size or ([Choice.SMALL] if quick else list(Choice))
    if skip_1gb:
        chosen = [choice for choice in chosen if choice is not Choice.LARGE]
    options = Options(1 if quick else runs, QUICK_ROUNDS if quick else 0, tuple(only or Who))
    console, lines, notes = Console(), list[Line](), [f"{_machine()}; load when started {_load()}"]
    for choice in chosen:
        found, more = _large(console) if choice is Choice.LARGE else _compared(choice.value, options, console)
        lines += found
        notes += [*more, f"load after {SIZES[choice.value].name}: {_load()}"]
        show("rounds", "What a round costs beside the learning", lines, notes)
    shutil.rmtree(WORK, ignore_errors=True)
    if any(line.met is False for line in lines):
        raise typer.Exit(1)


def _compared(key: str, options: Options, console: Console) -> tuple[list[Line], list[str]]:
    """One size, all who are there."""
    size = SIZES[key]
    rounds = options.rounds or size.rounds
    runs = options.runs if key == "4mb" else 1
    model = _parameters(size) * 4 / MIB
    how: dict[Who, Callable[[Path], Measured]] = {
        Who.OURS: lambda folder: ours.measure(folder, size, rounds, LIMIT_SECONDS[key]),
        Who.SECURE: lambda folder: ours.measure(folder, size, rounds, LIMIT_SECONDS[key], secure=True),
        Who.SECAGG: lambda folder: stock_flower.measure(folder, size, SECAGG_ROUNDS, LIMIT_SECONDS[key], secagg=True),
        Who.FLOWER: lambda folder: stock_flower.measure(folder, size, rounds, LIMIT_SECONDS[key]),
        Who.BARE: lambda folder: stock_flower.measure(folder, size, rounds, LIMIT_SECONDS[key], work=False),
        Who.SQLITE: lambda folder: stock_flower.measure(folder, size, rounds, LIMIT_SECONDS[key], sqlite=True),
        Who.NVFLARE: lambda folder: nvflare_peer.measure(folder, size, rounds, LIMIT_SECONDS[key]),
    }
    results: dict[Who, Measured] = {}
    notes = []
    for who, measure in how.items():
        if who not in options.only or (who is Who.NVFLARE and not nvflare_peer.installed()):
            continue
        if who in {Who.SECURE, Who.SECAGG} and key != "4mb":
            continue
        found = []
        for number in range(1 if who in {Who.BARE, Who.SQLITE, Who.SECAGG} else runs):
            console.print(f"[dim]{size.name}: {who.label}, {rounds} rounds, run {number + 1}, load {_load()}[/]")
            found.append(measure((WORK / who.name.lower()).absolute()))
        results[who] = measured.pooled(found)
        notes.append(f"{size.name}, {who.label}: {results[who].words()}")
    return _lines(key, size, model, results), notes


def _lines(key: str, size: Size, model: float, results: Mapping[Who, Measured]) -> list[Line]:
    mine, stock, nvflare = (results.get(who) for who in (Who.OURS, Who.FLOWER, Who.NVFLARE))

    def line(what: str, unit: str, of: Callable[[Measured], float], goal: float | None = None, rule: str = "") -> Line:
        beside = {who.label: of(found) for who, found in results.items() if who not in {Who.OURS, *SUMS}}
        return Line(f"{size.name}: {what}", unit, of(mine) if mine else None, beside, goal, rule)

    share = SHARE[key]
    lines = [
        line(
            "a round, median",
            "s",
            lambda m: m.median,
            share * stock.median if stock else None,
            f"{share} of stock Flower; aim {AIM_SECONDS[key]:.0f} s",
        ),
        line("a round, slowest", "s", lambda m: max(m.seconds)),
        line("processor time of a round", "s", lambda m: sum(m.cpu.values())),
        line("memory of everything, peak", "MiB", lambda m: m.peak, nvflare.peak if nvflare else None, "NVFLARE's"),
    ]
    if secure := results.get(Who.SECURE):
        beside = {who.label: results[who].median for who in (Who.OURS, Who.SECAGG) if who in results}
        words = f"{AIM_SECURE:.0f} s; keys are exchanged once in 100 slots, before the first round"
        lines.append(Line(f"{size.name}: a secure round, median", "s", secure.median, beside, AIM_SECURE, words))
        lines.append(Line(f"{size.name}: a secure round, slowest", "s", max(secure.seconds)))
    if mine and key != "4mb":  # at 4 MB the libraries that the first message loads outweigh the models
        idle = mine.extra["ServerApp idle"]
        lines.append(
            Line(
                f"{size.name}: memory of the ServerApp, peak",
                "MiB",
                mine.largest.get("ServerApp", 0.0),
                {Who.FLOWER.label: stock.largest.get("ServerApp", 0.0)} if stock else {},
                idle + SERVER_MODELS * model,
                f"{SERVER_MODELS} models above its idle {idle:,.0f}",
            )
        )
    return lines


def _large(console: Console) -> tuple[list[Line], list[str]]:
    """1 GB: one agent may have little more than its models. As many of the sites as the machine's memory holds."""
    size = SIZES["1gb"]
    bytes_ = _parameters(size) * 4
    room = psutil.virtual_memory().available // bytes_
    count = max(1, min(len(SITES), (room - ROOM_MODELS) // ROOM_MODELS_PER_SITE))
    console.print(f"[dim]{size.name}: ours, {size.rounds} rounds, {count} site(s), load {_load()}[/]")
    found = ours.measure(
        (WORK / "ours").absolute(), size, size.rounds, LIMIT_SECONDS["1gb"], SITES[:count], CAP_MODELS * bytes_
    )
    model, name = bytes_ / MIB, f"{size.name}, {count} site(s)"
    lines = [
        Line(f"{name}: a round, one agent under a cap", "s", found.median),
        Line(f"{name}: memory of everything, peak", "MiB", found.peak),
        *(
            Line(
                f"{name}: memory of the {role} above idle, peak",
                "models",
                (found.largest[role] - found.extra[f"{role} idle"]) / model,
                {},
                most,
                rule,
            )
            for role, most, rule in (
                ("agent", CAP_MODELS, "the cap"),
                ("ServerApp", SERVER_MODELS, "at any number of sites"),
            )
        ),
        Line(f"{name}: memory of the SuperLink above idle, peak", "models", found.extra["SuperLink"] / model),
    ]
    return lines, [
        f"{name}: {found.words()}",
        f"{name}: the cap is {found.extra['cap']:,.0f} MiB of private writable memory (RLIMIT_DATA, set by prlimit): "
        f"what the idle agent had, and {CAP_MODELS} models: weights, received weights, gradient, and what torch's "
        "convolutions need for the largest layer, 0.6 of this model",
    ]


def _parameters(size: Size) -> int:
    """How many parameters our network has; counted in a process that ends, so that none of ours shares torch with us.

    Raises:
        ConsiliumError: the peers' network has another number.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        count, theirs = pool.submit(_count, size).result()
    if theirs != count:
        raise ConsiliumError("The networks differ", f"ours {count}, the peers' {theirs}", "Mend tests/bench/peer.")
    return count


def _count(size: Size) -> tuple[int, int]:
    from models import weights

    sys.path.insert(0, str(stock_flower.PEER))
    from network import PlainCNN

    spec = Study.from_toml(ours.draft(size, 1, SITES)).spec()
    return weights.trainable_count(spec), sum(parameter.numel() for parameter in PlainCNN(size.width).parameters())


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, loopback"


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


if __name__ == "__main__":
    raise SystemExit(run_command(app, "python -m tests.bench.rounds"))
