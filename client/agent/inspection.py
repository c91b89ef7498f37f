"""Are a hospital's images, and the machine they are on, fit for a study? What the operator's door looks at."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from client.agent import agent_pb2 as pb
from client.agent.cautions import cautions
from client.agent.core import Agent
from client.agent.rows import SourceRow, State
from client.agent.seal import networked
from client.imaging import Cohort, Source, load, pool, report
from client.imaging.labels import unlike
from client.imaging.loading import READERS, NothingUsable, given_up, index_file, pictures, wanted_of
from client.imaging.near import Doubles
from client.imaging.records import Quarantined
from client.imaging.unasked import question
from privacy.errors import ConsiliumError
from privacy.identity import fingerprint
from privacy.roster import timestamp
from privacy.study import Study

SAMPLE = 8
LISTED = 20
MODELS_ON_DISK = 6
LEAST_FREE = 1 << 30

Progress = Callable[[int, int], None]


def source(agent: Agent, name: str) -> SourceRow:
    """A connected data source.

    Raises:
        ConsiliumError: there is none of that name.
    """
    rows = agent.store.sources()
    for row in rows:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in rows) or "none yet"
    raise ConsiliumError("There is no such data source", name, f"Connected: {known}.")


def check(agent: Agent, name: str, progress: Progress | None = None, study: Study | None = None) -> str:
    """Read every image of a source once and keep the summary (JSON, for the operator's eyes).

    Images are prepared for the study, so that they are warm when it starts: the one named, or else the one that the
    source is meant for. Without a study they are read and counted. Where nothing is usable the summary counts no image
    and names what was left out.

    Raises:
        ConsiliumError: the source cannot be read as it is declared; whatever `progress` raises.
    """
    row = source(agent, name)
    study = study or _meant(agent, name)
    try:
        cohort = agent.desk.cohort(study, row, progress) if study is not None else _read(agent, row, progress)
    except NothingUsable as nothing:
        cohort = nothing.cohort
    summary = cohort.summary()
    for side in summary["split"].values():
        side["classes"] = {label: count for label, count in side["classes"].items() if study is not None or count}
    summary["checked"] = timestamp(datetime.now(UTC))
    summary["study"] = study.study.name if study is not None else ""
    summary["study_hash"] = study.hash if study is not None else ""
    summary["cautions"] = cautions(study, _declared(row), summary["patients"]) if study is not None else []
    if not len(cohort) and (hint := unlike(cohort.quarantine)):
        summary["cautions"].append(hint)
    pairs = cohort.duplicates()
    summary["on_two_sides"] = pairs.count
    summary["report"] = _reported(agent, row, cohort, pairs, summary)
    summary["examples_left_out"] = [f"{item.path}: {item.text}" for item in cohort.quarantine[:LISTED]]
    text = json.dumps(summary)
    agent.store.put_source(name, row.source, text)
    return text


def _reported(agent: Agent, row: SourceRow, cohort: Cohort, pairs: Doubles, summary: dict[str, Any]) -> str:
    """Write the page about a source; its path, or "" where there is no room for it."""
    declared = _declared(row)
    facts = {
        "Source": f"{declared.path} ({declared.kind})",
        "Checked": str(summary["checked"]),
        "Prepared for the study": str(summary["study"]),
    }
    try:
        return str(report.write(agent.home.reports / f"{row.name}.html", row.name, cohort, pairs, facts))
    except OSError:
        return ""


def require_training_images(agent: Agent, study: Study, name: str) -> list[str]:
    """Whether a source has images to train this study on; read now unless a check of the same study is on record.

    Returns:
        What the operator should know of them, in words.

    Raises:
        ConsiliumError: it has none.
    """
    row = source(agent, name)
    summary: dict[str, Any] = json.loads(row.summary) if row.summary else {}
    if summary.get("study_hash") == study.hash:
        images, patients = int(summary["split"]["train"]["images"]), int(summary["patients"])
    else:
        cohort = agent.desk.cohort(study, row)
        images, patients = len(cohort.indices("train")), len(set(cohort.patients))
    if images == 0:
        raise ConsiliumError(
            "The source has no image to train this study on",
            name,
            "See `consilium-site data check`: are the classes and the split the study's?",
        )
    return cautions(study, _declared(row), patients)


def preflight(agent: Agent) -> list[pb.Finding]:
    """Device, threads, network, disk, and a sample of every source's images."""
    device, cores = agent.desk.device(), os.cpu_count() or 1
    threads = agent.config.threads
    findings = [
        pb.Finding(name="device", ok=True, detail=device),
        pb.Finding(
            name="threads",
            ok=threads <= cores,
            detail=f"{threads or 'torch decides'} of {cores} cores",
            remedy="" if threads <= cores else "Lower `threads` in site.toml to the number of cores.",
        ),
        pb.Finding(
            name="network",
            ok=not networked(),
            detail="the agent can reach one" if networked() else "the agent has none",
            remedy="Run the agent in a container without a network." if networked() else "",
        ),
        _disk(agent),
    ]
    rows = agent.store.sources()
    if not rows:
        remedy = "`consilium-site data connect NAME PATH`."
        findings.append(pb.Finding(name="images", ok=False, detail="none connected", remedy=remedy))
    return [*findings, *_peers(agent), *(_sample(agent, row) for row in rows)]


def _meant(agent: Agent, name: str) -> Study | None:
    """The newest study that was approved with a source, or that waits for approval where there is no other source."""
    alone = len(agent.store.sources()) == 1
    for row in reversed(agent.store.studies()):
        if (row.state is State.APPROVED and row.data == name) or (row.state is State.PENDING and alone):
            return agent.study(row.hash)
    return None


def _peers(agent: Agent) -> list[pb.Finding]:
    """Whose keys secure sums rely on: pinned with the approval, before that as the newest roster has them."""
    found = []
    for row in agent.store.studies():
        study = agent.study(row.hash)
        if study is None or study.secagg.mode == "off" or row.state not in {State.PENDING, State.APPROVED}:
            continue
        newest = agent.identities(study)
        keys = agent.store.rings.pins(row.hash) or newest
        others = [f"{site} {fingerprint(key)}" for site, key in sorted(keys.items()) if site != agent.site.name]
        changed = sorted(site for site, key in newest.items() if keys.get(site, key) != key)
        missing = sorted(set(study.sites) - set(keys))
        remedy = ""
        if changed:
            remedy = (
                f"The roster has another key for {', '.join(changed)}: ask that site, then approve the study again."
            )
        elif missing:
            remedy = f"{', '.join(missing)} is not enrolled; approve the study again once it is."
        detail = f"compare by telephone: {'; '.join(others)}"
        found.append(pb.Finding(name=f"keys of {row.name}", ok=not remedy, detail=detail, remedy=remedy))
    return found


def _disk(agent: Agent) -> pb.Finding:
    """Models in and out, and the prepared images, must fit."""
    free, needed = shutil.disk_usage(agent.home.agent).free, LEAST_FREE
    for row in agent.store.studies():
        study = agent.study(row.hash)
        if study is not None and row.state in {State.PENDING, State.APPROVED}:
            needed += MODELS_ON_DISK * agent.desk.sizes(study).state
            for line in agent.store.sources():
                images = json.loads(line.summary).get("images", 0) if line.summary else 0
                needed += 4 * images * study.input.channels * int(np.prod(study.input.size))
    return pb.Finding(
        name="disk",
        ok=free >= needed,
        detail=f"{free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed",
        remedy="" if free >= needed else f"Free space on the file system of {agent.home.agent}.",
    )


def _sample(agent: Agent, row: SourceRow) -> pb.Finding:
    """Decode a few images, spread over the source."""
    name = f"images: {row.name}"
    try:
        declared = _declared(row)
        reader = READERS[declared.kind](declared)
        reader.survey(lambda: None, index_file(agent.home.agent / "cache", declared, agent.desk.key))
        asked = question(declared, reader)
        wanted = wanted_of(asked.input, asked.classes, asked.target)
        listing = reader.index(wanted)
        records, failed = listing.records, []
        places = np.linspace(0, len(records) - 1, min(SAMPLE, len(records)))
        chosen = [records[int(place)] for place in places]
        work = partial(pictures, reader.opener, wanted)
        for result in pool.each(work, chosen, given_up, int(listing.isolate), 1):
            if isinstance(result, Quarantined):
                failed.append(result.reason.value)
    except ConsiliumError as error:
        return pb.Finding(name=name, ok=False, detail=f"{error.what}: {error.subject}", remedy=error.remedy)
    good = len(chosen) - len(failed)
    detail = f"{len(records)} listed, {len(listing.quarantine)} left out; {good} of {len(chosen)} tried can be read"
    remedy = "" if good else f"`consilium-site data check {row.name}` names the reasons."
    return pb.Finding(name=name, ok=good > 0, detail=detail, remedy=remedy)


def _declared(row: SourceRow) -> Source:
    return Source.from_fields(json.loads(row.source), row.name)


def _read(agent: Agent, row: SourceRow, progress: Progress | None) -> Cohort:
    """The cohort without a study: every image decoded and kept small, for the report."""
    agent.desk.libraries()  # two threads that load MONAI at once meet it half loaded
    declared = _declared(row)
    cache = agent.home.agent / "cache"
    reader, done = READERS[declared.kind](declared), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, 2 * reader.size())

    reader.survey(tick, index_file(cache, declared, agent.desk.key))
    asked = question(declared, reader)
    return load(declared, asked.input, asked.classes, {}, agent.desk.key, cache, progress, target=asked.target)
