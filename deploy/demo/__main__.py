"""Three hospitals train one classifier on this machine, through the commands that real ones would type.

    make demo                    drawn chest X-rays as DICOM, three scanners, a few broken files
    make demo DATA=folder        a real image set, dealt out to three hospitals by patient

Everything is real but the images of the first form: a Flower SuperLink over TLS, a connector and an agent for each
hospital, files of enrolment, a signed study, approvals. What remains is a page of pictures under build/demo/result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client.imaging import Cohort
from deploy.demo import alone, page
from deploy.demo.sets import Deal, deal
from deploy.federation import Federation
from privacy.errors import ConsiliumError
from privacy.study import Study
from privacy.terminal import ending, run
from server import console as view
from server.home import CoordinatorHome
from server.records import State
from server.registry import Registry

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
STUDY = "first-look"


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="An npz file, or a folder with an npz and an index.csv.")] = None,
    out: Annotated[Path, typer.Option(help="Where the demo works and leaves its result.")] = Path("build/demo"),
    rounds: Annotated[int, typer.Option(help="Rounds of training; 0 takes what suits the images.")] = 0,
) -> None:
    """Run three hospitals and a coordinator on this machine and leave a page of pictures.

    Anyone may run it: nothing leaves the machine, and every process it starts ends with it.

    Example: python -m deploy.demo --data ../chest_xray_pneumonia
    """
    for number in ending():
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script's background jobs start without
    console, begun = Console(), time.monotonic()
    _heading(console, "1", "The hospitals and their images")
    dealt = deal(data, out / "images", rounds)
    for name, source in dealt.sources.items():
        console.print(f"  {name:<12} {source.path}")
    if dealt.note:
        console.print(f"  {dealt.note}")
    home = out.resolve() / "run"
    shutil.rmtree(home, ignore_errors=True)
    with Federation(
        home, tuple(dealt.sources), env=_environment(), echo=lambda line: _shown(console, line)
    ) as federation:
        _heading(console, "2", "One consortium, three enrolments: files out, roster in")
        federation.create("alpine")
        _settle_splits(federation)
        _heading(console, "3", "The coordinator serves, the hospitals start their nodes and look at their images")
        federation.serve()
        federation.start()
        _connect(federation, dealt)
        _heading(console, "4", "The study: signed by the coordinator, approved by each hospital")
        study = _study(federation, dealt, home)
        _heading(console, "5", f"{study.rounds.count} rounds of {study.rounds.local_steps} steps at each hospital")
        _follow(federation, console)
        result = _export(federation, out)
        _models(federation, dealt, console)
    _heading(console, "6", "Each hospital by itself, with the same number of steps")
    where = _compare(federation, dealt, study, result, console)
    console.print(f"\n[bold green]Done in {time.monotonic() - begun:.0f} s.[/] Open [bold]{where}[/]")
    console.print(f"The model, its card, its curves and its figures are in {result}/\n")


def _connect(federation: Federation, dealt: Deal) -> None:
    for name, source in dealt.sources.items():
        federation.site(name, "data", "connect", "archive", *dealt.options(source))
        federation.site(name, "data", "check", "archive")


def _settle_splits(federation: Federation) -> None:
    """Give each made-up hospital the same secret key in every run, so that the same patients are tested each time."""
    for name in federation.sites:
        path = federation.site_home(name) / "agent" / "pseudonym.key"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(hashlib.sha256(f"consilium demo, {name}".encode()).digest())
        path.chmod(0o600)


def _study(federation: Federation, dealt: Deal, home: Path) -> Study:
    draft, signed = home / f"{STUDY}.toml", home / f"{STUDY}.study.json"
    draft.write_text(dealt.toml(STUDY), encoding="utf-8")
    federation.coordinator("study", "sign", str(draft), "--out", str(signed))
    federation.coordinator("study", "launch", STUDY)
    with Registry(CoordinatorHome(federation.coordinator_home)) as registry:
        record = registry.study(STUDY)
        federation.until(
            lambda: all(approval.state for approval in registry.approvals(record.hash)), "the study to reach every site"
        )
    for name in dealt.sources:
        federation.site(name, "study", "approve", STUDY)
    return record.study


def _follow(federation: Federation, console: Console) -> None:
    with Registry(CoordinatorHome(federation.coordinator_home)) as registry:
        state = view.watch(registry, STUDY, console)
        reason = registry.study(STUDY).reason
    if state is not State.FINISHED:
        raise ConsiliumError(f"The study ended as {state}", reason or STUDY, f"The logs say:\n{federation.logs()}")


def _export(federation: Federation, out: Path) -> Path:
    result = out / "result"
    shutil.rmtree(result, ignore_errors=True)
    federation.coordinator("models", "export", STUDY, "--out", str(result.resolve()))
    return result


def _models(federation: Federation, dealt: Deal, console: Console) -> None:
    for name in dealt.sources:
        federation.until(lambda name=name: _has_model(federation, name), f"the model to reach {name}", 60)  # type: ignore[misc]
    console.print("  every hospital holds the model, its card and its own test result")


def _has_model(federation: Federation, name: str) -> bool:
    models = federation.site_home(name) / "agent" / "models"
    return any(models.glob("*/model.safetensors"))


def _compare(federation: Federation, dealt: Deal, study: Study, result: Path, console: Console) -> Path:
    import torch

    torch.set_num_threads(1)  # these networks are small, and more threads get in each other's way
    cohorts: dict[str, Cohort] = {
        name: alone.cohort(study, source, federation.site_home(name) / "agent")
        for name, source in dealt.sources.items()
    }
    home = CoordinatorHome(federation.coordinator_home)
    with Registry(home) as registry:
        initial = registry.blobs.path(registry.study(STUDY).initial).read_bytes()
    columns = (TextColumn("  {task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=study.rounds.count) for name in cohorts}
        single = alone.train_alone(study, initial, cohorts, lambda name: progress.advance(bars[name]))
    together = alone.measure_file(study, result / "model.safetensors", cohorts)
    for name, metrics in {"together": together, **single}.items():
        console.print(
            f"  {name:<12} AUROC {metrics['auroc']:.3f}  balanced accuracy {metrics['balanced_accuracy']:.3f}"
        )
    figures = {"study": study.hash, "together": dict(together), "alone": {name: dict(m) for name, m in single.items()}}
    (result / "comparison.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    broken = {name: dict(Counter(item.reason.value for item in c.quarantine)) for name, c in cohorts.items()}
    facts = [
        ("hash", study.hash),
        ("network", study.network.name),
        ("training", f"{study.rounds.count} rounds × {study.rounds.local_steps} steps, {study.aggregation.strategy}"),
        ("hospitals", ", ".join(study.sites)),
        ("split", "by patient; the set's own split where it brings one"),
    ]
    return page.write(result, study, dealt.title, dealt.origin, cohorts, broken, together, single, facts)


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def _heading(console: Console, number: str, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{text}[/]")


def _shown(console: Console, line: str) -> None:
    console.print(f"  [dim]$ {line}[/]", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; bad input ends with a sentence."""
    return run(app, "python -m deploy.demo", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
