"""How does a coordinator see a study? Tables of its sites and rounds, and a live view while it runs.

Everything shown here is read from the registry; nothing is asked of a running process, so any number of people may
watch, and watching disturbs nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from models import tasks
from privacy.roster import parse_timestamp
from privacy.study_text import S8
from privacy.terminal import out, table
from server.ledger import Ledger
from server.records import LIVE, Evaluation, Outcome, OutcomeState, SlotRecord, State, StudyRecord
from server.registry import Registry
from server.spending import aborted, has_noise, section

GOING = LIVE | {State.REQUESTED}
LOOK_EVERY = 0.5
COLOURS = {
    State.FINISHED: "green",
    State.RUNNING: "cyan",
    State.WAITING: "yellow",
    State.FAILED: "red",
    State.INTERRUPTED: "red",
    OutcomeState.IN: "green",
    OutcomeState.WAITING: "cyan",
    OutcomeState.LATE: "yellow",
    OutcomeState.REFUSED: "red",
    OutcomeState.LOST: "red",
}
_BARS = "▁▂▃▄▅▆▇█"
_MINUTE = 60
ABORTED = "It was aborted, and a plan that was aborted never runs again; draft a new study."


def studies_table(records: Iterable[StudyRecord]) -> Table:
    """One line per study."""
    rows = [
        (record.name, record.hash[:12], record.state.value, _when(record.updated), record.reason) for record in records
    ]
    return table("study", "hash", "state", "since", "why", rows=rows)


def status(registry: Registry, study: str, now: datetime | None = None, ledger: Ledger | None = None) -> Group:
    """One study: state and reason, how far it is, per site what it said and what became of it, and its budget.

    Args:
        ledger: the consortium's log, for a study with noise; left out, it is opened and closed again.
    """
    record = registry.study(study)
    if ledger is None and has_noise(record.study):
        with registry.ledger() as opened:
            return status(registry, study, now, opened)
    course = registry.course(study)
    slots = course.slots()
    validation = course.evaluations("validation")
    parts: list[RenderableType] = [_head(record), _progress(record, slots), Text(_seen(record), style="dim")]
    if sites := _sites(registry, record, slots, now or datetime.now(UTC)):
        parts += ["", sites]
    if validation:
        parts += ["", _trend(record, list(validation.values()))]
    if test := list(course.evaluations("test").values()):
        parts.append(Text(f"test on {len(test[-1].sites)} sites: {_metrics(record, test[-1].metrics)}"))
    if ledger is not None:
        parts += ["", *section(record.study, study, slots, ledger, registry.roster()[1])]
    if hint := ABORTED if ledger is not None and aborted(ledger.account(study)) else _hint(record):
        parts += ["", Text(hint)]
    return Group(*parts)


def rounds_table(registry: Registry, study: str) -> Table:
    """One line per slot and, below each, the sites that were not in, with the reason."""
    course = registry.course(study)
    rows = []
    for slot in course.slots():
        outcomes = course.outcomes(slot.slot)
        inside = [o for o in outcomes if o.state is OutcomeState.IN]
        missing = "; ".join(
            f"{o.site} {o.state.value}{f' ({o.reason})' if o.reason else ''}" for o in outcomes if o not in inside
        )
        slowest = max((o.seconds for o in inside), default=0.0)
        rows.append(
            (
                slot.slot,
                _what(slot),
                slot.state.value,
                f"{len(inside)} of {len(outcomes)}",
                _took(slowest),
                missing or slot.reason,
            )
        )
    return table("slot", "what", "state", "in", "slowest", "not in, and why", rows=rows)


def watch(
    registry: Registry, study: str, console: Console | None = None, pause: Callable[[float], None] = time.sleep
) -> State:
    """Show a study until it is no longer going on, and return the state it ended in.

    At a terminal the view renews itself; into a file or a pipe each event becomes one line.
    """
    shown = console or out()
    if shown.is_terminal:
        with ExitStack() as stack:
            noised = has_noise(registry.study(study).study)
            ledger = stack.enter_context(registry.ledger()) if noised else None  # once: opening it reads all of it
            first = status(registry, study, ledger=ledger)
            live = stack.enter_context(Live(first, console=shown, refresh_per_second=4, transient=False))
            while (record := registry.study(study)).state in GOING:
                live.update(status(registry, study, ledger=ledger))
                pause(LOOK_EVERY)
            live.update(status(registry, study, ledger=ledger))
        return record.state
    after = max((event.id for event in registry.events(study)), default=0)
    shown.print(_head(registry.study(study)))
    while True:
        state = registry.study(study).state  # read before the events, so that none of the last is missed
        for event in registry.events(study, after=after):
            after = event.id
            shown.print(f"{event.at}  {escape(event.text)}")
        if state not in GOING:
            return state
        pause(LOOK_EVERY)


def _head(record: StudyRecord) -> Text:
    text = Text()
    text.append(record.name, style="bold")
    text.append(f"  {record.hash[:12]}  ")
    text.append(record.state.value, style=COLOURS.get(record.state, ""))
    if record.request:
        text.append(f", {record.request} asked for")
    if record.reason:
        text.append(f": {record.reason}")
    return text


def _progress(record: StudyRecord, slots: list[SlotRecord]) -> Table:
    rounds = record.study.rounds.count
    done = max((slot.round for slot in slots if slot.kind == "train" and slot.state == "done"), default=0)
    used = len(slots)
    now = f", now {_what(slots[-1])}" if slots and slots[-1].state == "open" else ""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(
        ProgressBar(total=rounds, completed=done, width=30),
        Text(f"{done} of {rounds} rounds{now}; {used} of {record.study.slots} slots used"),
    )
    return grid


def _seen(record: StudyRecord) -> str:
    """What this coordinator can see of one hospital; for a study without noise in the words of RULES S8."""
    noised = has_noise(record.study)
    if record.study.secagg.mode == "off":
        return f"secure aggregation off: this coordinator sees each hospital's {'noisy ' if noised else ''}update"
    if noised:
        return "secure aggregation on: this coordinator sees noisy sums over hospitals only"
    return f"secure aggregation on: this coordinator sees sums over hospitals only. {S8}"


def _sites(registry: Registry, record: StudyRecord, slots: list[SlotRecord], now: datetime) -> Table:
    course = registry.course(record.hash)
    last = slots[-1] if slots else None
    outcomes = {o.site: o for o in course.outcomes(last.slot)} if last else {}
    deliveries = {d.site: d for d in course.deliveries()}
    result = table("site", "approval", _what(last) if last else "round", "took", "note")
    for approval in registry.approvals(record.hash):
        outcome = outcomes.get(approval.site)
        delivery = deliveries.get(approval.site)
        note = outcome.reason if outcome else ""
        if delivery is not None:
            note = f"model {delivery.state}{f': {delivery.reason}' if delivery.reason else ''}"
        state = outcome.state.value if outcome else ("not in this round" if last else "")
        result.add_row(
            escape(approval.site),
            approval.state or "not asked yet",
            Text(state, style=COLOURS.get(outcome.state, "") if outcome else ""),
            _duration(outcome, last, now),
            Text(note),
        )
    return result


def _duration(outcome: Outcome | None, slot: SlotRecord | None, now: datetime) -> str:
    if outcome is None or slot is None:
        return ""
    if outcome.state is OutcomeState.WAITING and slot.state == "open":
        return f"{_took((now - parse_timestamp(slot.opened)).total_seconds())} so far"
    return _took(outcome.seconds)


def _trend(record: StudyRecord, history: list[Evaluation]) -> Text:
    primary = _primary(record)
    values = [e.metrics[primary] for e in history if primary in e.metrics]
    if not values:
        noised = record.study.privacy.mode != "none" and any("images" in e.metrics for e in history)
        return Text(f"validation: {primary} {'cannot be told under the noise' if noised else 'is not known yet'}")
    recent = values[-40:]
    low, span = min(recent), (max(recent) - min(recent)) or 1.0
    bars = "".join(_BARS[min(7, int(8 * (value - low) / span))] for value in recent)
    best = max(values)
    return Text(f"validation {primary} {bars} {values[-1]:.3f} after round {history[-1].round}, best {best:.3f}")


def _hint(record: StudyRecord) -> str:
    name = record.name
    return {
        State.SIGNED: f"Launch it: consilium-coordinator study launch {name}",
        State.WAITING: "Sites decide with `consilium-site study review` and `consilium-site study approve`.",
        State.PAUSED: f"Go on: consilium-coordinator study resume {name}",
        State.INTERRUPTED: f"Go on: consilium-coordinator study resume {name}",
        State.STOPPED: f"Begin again: consilium-coordinator study launch {name}",
        State.FAILED: f"Begin again: consilium-coordinator study launch {name}",
        State.FINISHED: f"Its model and card: consilium-coordinator models show {name}",
    }.get(record.state, "")


def _what(slot: SlotRecord) -> str:
    again = f" (try {slot.attempt})" if slot.attempt > 1 else ""
    words = {"train": f"round {slot.round}", "validate": f"validation after round {slot.round}", "test": "test"}
    return words.get(slot.kind, slot.kind) + again


def _primary(record: StudyRecord) -> str:
    return tasks.get(record.study.spec()).primary


def _metrics(record: StudyRecord, metrics: object) -> str:
    values = dict(metrics) if isinstance(metrics, dict) else {}
    order = [name for name in (_primary(record), "accuracy", "loss", "images") if name in values]
    noised = record.study.privacy.mode != "none"
    names = {"images": "patients"} if noised else {}  # with noise each patient's images were averaged first
    figures = [f"{names.get(name, name)} {values[name]:{',.0f' if name == 'images' else '.3f'}}" for name in order]
    return ", ".join(figures) + ("; all of it with noise" if noised and figures else "")


def _took(seconds: float) -> str:
    if seconds <= 0:
        return ""
    return f"{seconds:.1f} s" if seconds < 2 * _MINUTE else f"{int(seconds // _MINUTE)} min {int(seconds % _MINUTE)} s"


def _when(stamp: str) -> str:
    return stamp.replace("T", " ").removesuffix("Z")[:16]
