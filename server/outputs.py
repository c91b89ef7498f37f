"""What does a finished study leave behind? A folder anyone can read, and the package each hospital receives.

`studies/<hash>/` holds metrics.csv, metrics.json, curves.png and the pictures of its task (roc.png, reliability.png,
confusion.png, dice.png), model.safetensors, MODEL_CARD.md, bundle/ (for MONAI), study.json (signed), approvals/*.json
and delivery.zip. The same inputs give the same files, so that
publishing again after a crash changes nothing. Needs no torch: frozen tensors are copied out of the initial state and
the trainable ones out of the flat vector, a piece at a time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from models import additive, bundle, card, tasks
from models.weights import Layout
from privacy.errors import ConsiliumError
from privacy.files import replacing, write_atomically
from privacy.grants import Claims
from privacy.identity import Document
from privacy.study import APPROVAL, Study
from server.blobs import PIECE, Blobs
from server.home import CoordinatorHome
from server.records import Evaluation, StudyRecord
from server.registry import Registry
from server.samples import overlays

MODEL, CARD, METRICS, STUDY, DELIVERY = (
    "model.safetensors",
    "MODEL_CARD.md",
    "metrics.json",
    "study.json",
    "delivery.zip",
)
OVERLAYS = "overlays.png"
DELIVERED = (MODEL, CARD, METRICS, STUDY)
VERSIONS = ("consilium", "flwr", "torch", "monai", "numpy")
_OWN_NORMS = {
    "normalisation": "trained and kept at each hospital; this file has the first weights', and alone is of little use"
}
_EPOCH = (1980, 1, 1, 0, 0, 0)

Publisher = Callable[[StudyRecord, int, Path, list[Evaluation], Evaluation | None], Path]


def publisher(home: CoordinatorHome, registry: Registry) -> Publisher:
    """How the round loop publishes: (study, round, weights, history, test) -> path of the package for the sites.

    `weights` is a file with the flat little-endian float32 vector [d] of the published round; `history` holds the
    validation evaluations from round 0 (the initial weights) on; `test` is None when no site could be tested.
    """

    def publish(
        record: StudyRecord, round_: int, weights: Path, history: list[Evaluation], test: Evaluation | None
    ) -> Path:
        folder = home.study(record.hash)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        model = folder / MODEL
        assemble(registry.blobs.path(record.initial), weights, model)
        figures = _figures(record, round_, history, test, _training(registry, record.hash))
        write_atomically(folder / METRICS, json.dumps(figures, indent=2, sort_keys=True).encode() + b"\n", 0o644)
        write_atomically(folder / "metrics.csv", _table(figures["rounds"]).encode(), 0o644)
        write_atomically(folder / STUDY, record.document.encode() + b"\n", 0o644)
        _approvals(registry, record, folder / "approvals")
        _pictures(record, figures["rounds"], test, folder)
        facts = _facts(record, round_, history, test, model, _digest(model), _declared(registry, record))
        write_atomically(folder / CARD, card.write(facts).encode(), 0o644)
        bundle.write(folder / "bundle", record.study.spec(), model, facts)
        return _pack(folder)

    return publish


def assemble(initial: Path, weights: Path, out: Path) -> None:
    """Write the full model to `out`: the state `initial` with its trainable tensors replaced by the vector `weights`.

    Args:
        initial: safetensors, as `models.weights.state_bytes` writes it.
        weights: flat little-endian float32, in the order of the names.
        out: replaced as a whole, durably. No more than a few megabytes are held in memory.

    Raises:
        ConsiliumError: the vector has another length than the state's trainable part.
    """
    layout = Layout.of_state(initial)
    if weights.stat().st_size != 4 * layout.count:
        raise ConsiliumError(
            "The weights do not fit the study's network",
            f"{weights.stat().st_size // 4} numbers for {layout.count} parameters",
            "Restore the folder `blobs` from your backup.",
        )
    with open(initial, "rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        places = {
            name: entry["data_offsets"] for name, entry in json.loads(source.read(length)).items() if name[0] != "_"
        }
        source.seek(0)
        with replacing(out) as part, open(part, "wb") as file, open(weights, "rb") as vector:
            shutil.copyfileobj(source, file, PIECE)
            for name, trainable in zip(layout.names, layout.trainable, strict=True):
                if trainable:
                    start, stop = places[name]
                    file.seek(8 + length + start)
                    _pour(vector, file, stop - start)


def export(
    home: CoordinatorHome, registry: Registry, record: StudyRecord, out: Path, samples: Path | None = None
) -> list[Path]:
    """Copy a published study's files to the new or empty folder `out`, and say which.

    With a folder of images that anybody may see, `samples`, there is overlays.png besides: what the model says of them.

    Raises:
        ConsiliumError: nothing is published yet, the folder holds something, or a sample cannot be shown to the model.
        OSError: the disk is full or not writable; nothing remains in `out`.
    """
    package = next((m.package for m in registry.models() if m.study == record.hash), None)
    folder = home.study(record.hash)
    if package is None:
        raise ConsiliumError(
            "The study has no published model yet",
            f"{record.name} is {record.state.value}",
            f"It is published when the last round is done: `consilium-coordinator study status {record.name}`.",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConsiliumError("The folder is not empty", str(out), "Name a new folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        if (folder / MODEL).is_file():
            _copy(folder, out)
        else:
            _unpack(registry.blobs, package, out)
        if samples is not None:
            overlays(samples, record.study, out / MODEL, out / OVERLAYS)
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    return sorted(path for path in out.rglob("*") if path.is_file())


def _pour(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        piece = source.read(min(PIECE, count))
        target.write(piece)
        count -= len(piece)


def _training(registry: Registry, study: str) -> dict[int, dict[str, float]]:
    """What the loop noted of each round's training, by round."""
    found: dict[int, dict[str, float]] = {}
    after = 0
    while events := registry.events(study, after=after):
        after = events[-1].id
        for event in events:
            round_, noted = event.data.get("round"), event.data.get("metrics")
            if event.kind == "round" and isinstance(round_, int) and isinstance(noted, dict):
                found[round_] = {str(name).removeprefix("train_"): float(value) for name, value in noted.items()}
    return found


def _figures(
    record: StudyRecord,
    round_: int,
    history: Iterable[Evaluation],
    test: Evaluation | None,
    training: Mapping[int, Mapping[str, float]],
) -> dict[str, Any]:
    task, noised = tasks.get(record.study.spec()), record.study.privacy.mode != "none"
    sums = _sums(task, test)
    by_round = {evaluation.round: evaluation for evaluation in history}
    rounds = []
    for number in sorted({*by_round, *training}):
        entry: dict[str, Any] = {"round": number}
        if number in training:
            entry["train"] = dict(training[number])
        if number in by_round:
            entry["validation"] = dict(by_round[number].metrics)
        rounds.append(entry)
    return {
        "study": record.hash,
        "name": record.name,
        "published_round": round_,
        "test": dict(test.metrics) if test is not None else {},
        "test_intervals": {} if sums is None or noised else {k: list(v) for k, v in task.intervals(sums).items()},
        "test_sites": list(test.sites) if test is not None else [],
        "rounds": rounds,
    }


def _table(rounds: Iterable[Mapping[str, Any]]) -> str:
    """One line per round; columns such as `validation_auroc`."""
    rows = [
        {
            "round": entry["round"],
            **{f"{part}_{name}": value for part in entry if part != "round" for name, value in entry[part].items()},
        }
        for entry in rounds
    ]
    columns = list(dict.fromkeys(["round", *(name for row in rows for name in sorted(row))]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _approvals(registry: Registry, record: StudyRecord, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for approval in registry.approvals(record.hash):
        if approval.document:
            write_atomically(folder / f"{approval.site}.json", approval.document + b"\n", 0o644)


def _pictures(record: StudyRecord, rounds: list[dict[str, Any]], test: Evaluation | None, folder: Path) -> None:
    from models import plots  # matplotlib: heavy, and needed at the very end only

    task = tasks.get(record.study.spec())
    with replacing(folder / "curves.png") as part:
        plots.curves(rounds, part, task.primary)
    sums = _sums(task, test)
    if sums is None:
        return
    found = task.curves(sums)
    for name, draw in plots.drawings(found).items():
        with replacing(folder / name) as part:
            draw(found, part)


def _sums(task: tasks.Task, evaluation: Evaluation | None) -> npt.NDArray[np.float64] | None:
    """The task's sums of an evaluation; None when there is none, or when a site sent what no task can read."""
    if evaluation is None:
        return None
    sums = additive.task_sums(evaluation.statistics)
    try:
        task.metrics(sums)
    except ValueError:
        return None
    return sums


def _declared(registry: Registry, record: StudyRecord) -> list[str]:
    """The sites whose approval says that one image is one patient."""
    said = {a.site: Document.decode(a.document, APPROVAL).body for a in registry.approvals(record.hash) if a.document}
    return [site for site, body in said.items() if body.get("one_image_per_patient") is True]


def _facts(
    record: StudyRecord,
    round_: int,
    history: list[Evaluation],
    test: Evaluation | None,
    model: Path,
    digest: str,
    declared: Sequence[str],
) -> card.Facts:
    study, spec, noised = record.study, record.study.spec(), record.study.privacy.mode != "none"
    task = tasks.get(spec)
    chosen = "the last" if study.publish.choose == "last" else "the best on the validation images of all sites"
    if study.averaged:
        chosen = f"the moving average of the models until then (decay {study.aggregation.ema})"
    last = next((evaluation for evaluation in reversed(history) if evaluation.round == round_), None)
    shown = {"test": test, "validation": last}
    sums = {part: found for part, one in shown.items() if (found := _sums(task, one)) is not None}
    return card.Facts(
        name=study.study.name,
        title=study.study.title,
        purpose=study.study.purpose,
        contact=study.study.contact,
        spec=spec,
        sites=study.sites,
        trained={
            "rounds": f"{study.rounds.count} of {study.rounds.local_steps} steps at each site",
            "published round": f"{round_}, {chosen}",
            "aggregation": f"{study.aggregation.strategy}, sites weighted by {study.aggregation.weights}",
            **(_OWN_NORMS if study.local.norms == "local" else {}),
        },
        metrics={part: evaluation.metrics for part, evaluation in shown.items() if evaluation is not None},
        missing={part: task.missing(found) for part, found in sums.items()},
        intervals={} if noised else {part: task.intervals(found) for part, found in sums.items()},
        promise=_promise(study) if noised else (),
        one_image_per_patient=declared,
        parameters=Layout.of_state(model).count,
        hashes={"study": record.hash, "initial weights": study.initial.sha256, MODEL: digest},
        versions={name: metadata.version(name) for name in VERSIONS},
    )


def _promise(study: Study) -> list[str]:
    """What a study with noise promises each patient, in sentences; the same for every run of it."""
    from privacy import claims  # the accountants: seconds to load, and needed at the very end only

    asked = Claims.of(study)
    first = (
        f"**ε {asked.epsilon:f} at δ {study.privacy.delta}**, for a patient at one hospital with all of his images, "
        f"against everyone who sees the model and every opened sum; ε {asked.cap:f} if secure aggregation were wholly "
        f"broken. Claimed for all {study.slots} slots that the study may use."
    )
    return [first, *claims.words(study, claims.claim(study))]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(folder: Path) -> Path:
    """The package for the sites; equal files give equal bytes."""
    with replacing(folder / DELIVERY) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for name in DELIVERED:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.file_size = (folder / name).stat().st_size
            with open(folder / name, "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, PIECE)
    return folder / DELIVERY


def _copy(folder: Path, out: Path) -> None:
    for path in sorted(folder.rglob("*")):
        target = out / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif not path.name.endswith(".part"):
            with replacing(target) as part:
                shutil.copyfile(path, part)


def _unpack(blobs: Blobs, package: str, out: Path) -> None:
    with zipfile.ZipFile(blobs.path(package)) as archive:
        for name in DELIVERED:
            with replacing(out / name) as part, archive.open(name) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, PIECE)
