"""How does a hospital connect its images and see what is in them? `data connect, check, list, show, forget`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.agent import agent_pb2 as pb
from client.agent_client import Local
from client.home import SiteHome
from privacy.errors import ConsiliumError
from privacy.files import FULL, write_atomically
from privacy.terminal import err, out, table, warn

LOOKED_AT = 200
"""So many files at most are looked at to guess a source's kind."""

NAME = Annotated[str, typer.Argument(help="The data source's name at this site.")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Connect images and look at what is in them. Only the agent reads them, and it has no network.",
)


@app.command()
def connect(
    context: typer.Context,
    name: NAME,
    path: Annotated[Path, typer.Argument(help="The folder of images, or the npz file.")],
    kind: Annotated[
        str, typer.Option(help="dicom, nifti, images (PNG, JPEG) or npz; guessed from the files if left out.")
    ] = "",
    labels: Annotated[Path | None, typer.Option(help="The label table, CSV with one header line.")] = None,
    image_column: Annotated[str, typer.Option(help="Column with the file name or UID.")] = "file",
    label_column: Annotated[str, typer.Option(help="Column with the label; several have ; between them.")] = "label",
    labels_column: Annotated[
        list[str] | None, typer.Option(help="Column of yes and no for one label; may be repeated.")
    ] = None,
    label_tag: Annotated[str, typer.Option(help="DICOM attribute that holds the label, in place of a table.")] = "",
    mask_column: Annotated[str, typer.Option(help="Column with the file of the mask (PNG, NIfTI).")] = "",
    masks: Annotated[
        Path | None, typer.Option(help="Folder below the images with a mask for each, under the same name.")
    ] = None,
    patient_column: Annotated[str, typer.Option(help="Column that names the patient; else the DICOM PatientID.")] = "",
    split_column: Annotated[str, typer.Option(help="Column with train, validation or test; not for DICOM.")] = "",
    match: Annotated[str, typer.Option(help="What the image column holds: file, instance or series.")] = "file",
    word: Annotated[
        list[str] | None, typer.Option("--class", help="Own word for a class, as WORD=CLASS; may be repeated.")
    ] = None,
    modality: Annotated[list[str] | None, typer.Option(help="DICOM modality to take; may be repeated.")] = None,
    one_image_per_patient: Annotated[
        bool, typer.Option("--one-image-per-patient", help="Declare that no patient has two images.")
    ] = False,
    placeholder_headers: Annotated[
        bool, typer.Option("--placeholder-headers", help="Declare that an anonymiser overwrote PatientID and UIDs.")
    ] = False,
    own_split: Annotated[bool, typer.Option(help="Honour the split that the file brings.")] = True,
) -> None:
    """Tell the agent where images are and who the patient is. Nothing is copied; nothing is sent.

    The site operator runs it; the node must be running, and the agent's user must be able to read the files.

    Example: consilium-site data connect archive /data/chest --kind dicom --labels /data/chest/labels.csv

    Example: consilium-site data connect brains /data/mr --masks /data/mr/labels --one-image-per-patient

    Example: consilium-site data connect public pneumonia.npz --one-image-per-patient
    """
    from client.imaging.source import Source

    home: SiteHome = context.obj
    if not kind:
        kind, path = _guessed(path, labels)
    columns = {
        "image": image_column,
        "label": label_column,
        "labels": tuple(labels_column or ()),
        "mask": mask_column,
        "patient": patient_column,
        "split": split_column,
    }
    source = Source.from_fields(
        {
            "kind": kind,
            "path": path.absolute(),
            "labels": labels.absolute() if labels is not None else None,
            "columns": {key: value for key, value in columns.items() if value},
            "label_tag": label_tag,
            "masks": masks.absolute() if masks is not None else None,
            "match": match,
            "classes": dict(_pair(item) for item in word or ()),
            "modalities": tuple(modality or ()),
            "one_image_per_patient": one_image_per_patient,
            "placeholder_headers": placeholder_headers,
            "own_split": own_split,
        },
        name,
    )
    source.check()
    with Local(home.local_socket) as door:
        door.connect(name, source.model_dump_json(exclude_defaults=True))
    console = out()
    console.print(f"[bold]{escape(name)}[/] is {escape(str(source.path))} ({source.kind}). {source.patient_rule}")
    console.print(f"Next: `consilium-site data check {escape(name)}`.")


@app.command()
def check(
    context: typer.Context,
    name: NAME,
    study: Annotated[str, typer.Option(help="The study to read them for; see above for the choice without it.")] = "",
    report: Annotated[
        Path | None, typer.Option(help="Where to put a copy of the report; the agent's own stays in the site's folder.")
    ] = None,
) -> None:
    """Read every image once and show counts, classes, scanners, duplicates, and what is left out and why.

    The site operator runs it after `connect`; figures and report stay at the site. One bad file never stops the rest,
    and what was read once is not read again until it changes. Images are read as a study asks for them: the one named
    with `--study`, or that was approved with them, or that waits for approval where no other data is connected. Else
    they are read without a study.

    Example: consilium-site data check archive --report archive.html

    Example: consilium-site data check archive --study chest
    """
    home: SiteHome = context.obj
    summary = ""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Local(home.local_socket) as door, Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        for event in door.check(name, study):
            progress.update(task, completed=event.done, total=event.total or None)
            summary = event.summary or summary
    _summarised(out(), name, summary)
    if report is not None:
        _copied(str(_json(summary).get("report", "")), report)
    found = _json(summary)
    if not found.get("images"):
        asked = f"{name}, for the study {found['study']}" if found.get("study") else name
        raise ConsiliumError(
            "The source holds no usable image", asked, "Put right what is named above, then check it again."
        )


@app.command("list")
def list_sources(context: typer.Context) -> None:
    """Show the connected data sources.

    The site operator runs it; the node must be running.

    Example: consilium-site data list
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        sources = list(door.status().data)
    console = out()
    if not sources:
        console.print("No images connected yet: `consilium-site data connect NAME PATH`.")
        return
    console.print(lines(sources))


@app.command()
def show(context: typer.Context, name: NAME) -> None:
    """Show one data source: its declaration, and the figures of the last check.

    The site operator runs it; no image is read.

    Example: consilium-site data show archive
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        sources = list(door.status().data)
    found = next((line for line in sources if line.name == name), None)
    if found is None:
        known = ", ".join(line.name for line in sources) or "none yet"
        raise ConsiliumError("There is no such data source", name, f"Connected: {known}.")
    console = out()
    console.print(table("entry", "value", rows=sorted(_flat(_json(found.source)).items())))
    _summarised(console, name, found.summary)


@app.command()
def forget(context: typer.Context, name: NAME) -> None:
    """Disconnect a data source. No image is touched; studies that use it answer that there is no data.

    The site operator runs it.

    Example: consilium-site data forget archive
    """
    home: SiteHome = context.obj
    with Local(home.local_socket) as door:
        door.disconnect(name)
    out().print(f"{escape(name)} is disconnected.")


def lines(sources: Sequence[pb.DataLine]) -> Any:
    """The data sources as a table."""
    rows = []
    for line in sources:
        source, summary = _json(line.source), _json(line.summary)
        figures = (
            (summary.get("images", "?"), summary.get("patients", "?"), summary.get("quarantined", 0))
            if summary
            else ("not checked", "", "")
        )
        rows.append((line.name, source.get("kind", ""), source.get("path", ""), *figures))
    return table("data", "kind", "path", "images", "patients", "left out", rows=rows)


def _summarised(console: Console, name: str, text: str) -> None:
    summary = _json(text)
    if not summary:
        console.print(f"Not checked yet: `consilium-site data check {escape(name)}`.")
        return
    images, patients = int(summary.get("images", 0)), int(summary.get("patients", 0))
    console.print(
        f"[bold]{escape(name)}[/]: {_counted(images, 'image')} of {_counted(patients, 'patient')}, "
        f"{summary.get('quarantined', 0)} left out. {escape(str(summary.get('patient_rule', '')))}"
    )
    split = summary.get("split")
    if isinstance(split, dict) and split:
        console.print(table("side", *split, rows=_by_class(split), title="Classes"))
        if not summary.get("study") and not any(split.get(side, {}).get("images") for side in ("validation", "test")):
            console.print("Read without a study, so all stand under train: each study splits the patients by itself.")
    for title, key, column in (("Scanners", "scanners", "scanner"), ("Left out", "quarantine", "reason")):
        counts = summary.get(key)
        if isinstance(counts, dict) and counts:
            console.print(table(column, "images", rows=[(_words(item), n) for item, n in counts.items()], title=title))
    examples = summary.get("examples_left_out")
    if isinstance(examples, list) and examples:
        console.print(table("the first that were left out", rows=[(item,) for item in examples]))
    if twice := summary.get("on_two_sides"):
        console.print(
            f"[bold]{_counted(twice, 'pair')}[/] of equal or nearly equal images "
            f"{'stands' if twice == 1 else 'stand'} on two sides of the split."
        )
    if summary.get("report"):
        console.print(f"Report, for this site only: {escape(str(summary['report']))}", soft_wrap=True)
    if patients == 1 < images:
        console.print(
            f"[yellow]Mind:[/] all {images} images count as one patient's, and a patient stands on one side only. If "
            "they are of several, name the patients and connect again: `--patient-column`, or "
            "`--one-image-per-patient` where that is so."
        )
    for caution in summary.get("cautions", []):
        console.print(f"[yellow]Mind:[/] {escape(str(caution))}")
    prepared = f", prepared for the study {summary['study']}" if summary.get("study") else ""
    console.print(f"Checked {escape(str(summary.get('checked', '')))}{escape(prepared)}.")


def _copied(made: str, wanted: Path) -> None:
    """Puts a copy of the agent's page where the operator asked for it, for this user's eyes only."""
    try:
        page = Path(made).read_bytes() if made else None
        if page is not None:
            write_atomically(wanted, page)
            return
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConsiliumError(
            "The report cannot be copied",
            str(wanted),
            f"Open the agent's own page {made}, or name a file that you may write ({type(error).__name__}).",
        ) from None
    raise ConsiliumError(
        "The agent could not write its report", str(wanted), "Make room in the site's folder and check again."
    )


def _guessed(path: Path, labels: Path | None) -> tuple[str, Path]:
    """The kind of a source by the endings of its first files, and the folder or file that it then is.

    Raises:
        ConsiliumError: several npz files, and no image of another kind.
    """
    if path.suffix == ".npz":
        return "npz", path
    if kind := _kind(path):
        return kind, path
    packed, tables = sorted(path.glob("*.npz")), sorted(path.glob("*.csv"))
    if len(packed) > 1:
        names = ", ".join(file.name for file in packed[:5])
        raise ConsiliumError("The folder holds several npz files", f"{path}: {names}", "Name one of them.")
    if packed:
        if tables and labels is None:
            warn(f"{tables[0].name} lies beside {packed[0].name} and is not used: name it with --labels if it should.")
        return "npz", packed[0]
    if path.is_dir():
        warn(f"No ending says what the files in {path} are: taken for DICOM. Say otherwise with --kind.")
    return "dicom", path


def _kind(path: Path) -> str:
    """The kind of a folder by the endings of its first files; "" when they say nothing, as of many DICOM files."""
    names = (name.lower() for _, _, files in os.walk(path) for name in files)
    for name in islice(names, LOOKED_AT):
        if name.endswith((".nii", ".nii.gz")):
            return "nifti"
        if name.endswith((".png", ".jpg", ".jpeg")):
            return "images"
        if name.endswith(".dcm"):
            return "dicom"
    return ""


def _by_class(split: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """A row for each figure and class, a column for each side: few columns, however many classes there are."""
    sides = list(split.values())
    classes = sorted({label for side in sides for label in side.get("classes", {})})
    return [
        *((word, *(side.get(word, 0) for side in sides)) for word in ("images", "patients")),
        *((name, *(_share(side.get("classes", {}), name) for side in sides)) for name in classes),
    ]


def _share(counts: Mapping[str, int], name: str) -> str:
    count, total = counts.get(name, 0), sum(counts.values())
    return f"{count} ({100 * count / total:.0f} %)" if total else "0"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _words(item: str) -> str:
    from client.imaging.records import WORDS, Reason

    try:
        return WORDS[Reason(item)]
    except ValueError:
        return item or "not named"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
    return found


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _pair(item: str) -> tuple[str, str]:
    own, equals, theirs = item.partition("=")
    if not own or not equals or not theirs:
        raise ConsiliumError("--class needs two words", item, "Write it as OWN-WORD=CLASS, such as pos=opacity.")
    return own, theirs
