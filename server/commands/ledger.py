"""What does the consortium's log say, and how does an officer get it? `consilium-coordinator ledger`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from privacy.checkpoint import Note, needed, witnesses_of
from privacy.errors import ConsiliumError, Refusal
from privacy.ledger import Account
from privacy.roster import Roster
from privacy.terminal import out, table
from server.commands.common import Force, group, open_registry
from server.ledger import Ledger
from server.records import StudyRecord
from server.registry import Registry
from server.spending import believed, entries, has_noise, standing

app = group("See what the consortium's log says of studies with noise, and write it to a file for the officers.")


@app.command("show")
def show(context: typer.Context) -> None:
    """Show what each study with noise reserved and used, and which head of the log the hospitals have cosigned.

    Anybody with access to the coordinator's folder may run it. The epsilons are those claimed at signing, of the whole
    plan: 1 against everyone who sees only sums, 2 if secure aggregation were wholly broken. A head is believed when
    more than (sites + colluding) / 2 hospitals have cosigned it.

    Example: `consilium-coordinator ledger show`
    """
    with open_registry(context) as registry:
        noised = _noised(registry)
        _, roster = registry.roster()
        with registry.ledger() as ledger:
            begun = [(record, account) for record in noised if (account := ledger.account(record.hash)) is not None]
            if not begun:
                raise _nothing(f"{len(noised)} signed, none begun")
            out().print(table(*_COLUMNS, rows=(_row(record, account) for record, account in begun)))
            out().print()
            for line in _heads(ledger, roster, _colluding(noised)):
                out().print(escape(line))


@app.command("export")
def export(
    context: typer.Context,
    target: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it.")],
    newest: Annotated[
        bool, typer.Option("--newest", help="Under the newest head, even if too few hospitals have cosigned it yet.")
    ] = False,
    force: Force = False,
) -> None:
    """Write the log to one file, which an officer checks with nothing but that file and the roster.

    The coordinator runs it whenever somebody asks. The file ends with the newest head that enough hospitals have
    cosigned, because no other is believed; entries behind that head come with the next export.

    Example: `consilium-coordinator ledger export --out ledger.jsonl`
    """
    with open_registry(context) as registry:
        noised = _noised(registry)
        _, roster = registry.roster()
        with registry.ledger() as ledger:
            if not ledger.size:
                raise _nothing(f"{len(noised)} signed, none begun")
            size = believed(ledger, roster, _colluding(noised))
            if size is None and not newest:
                raise ConsiliumError(
                    "No head of the ledger can be believed yet",
                    f"{ledger.size} entries",
                    "Hospitals cosign one every few slots while a study runs: try again then, or give --newest.",
                )
            if newest and _head(ledger) is None:
                raise ConsiliumError(
                    "The ledger has no head yet",
                    f"{ledger.size} entries",
                    "The coordinator signs one every few slots while a study runs: try again then.",
                )
            _free(target, force=force)
            count = ledger.export(target, None if newest else size)
            behind = ledger.size - count
    console = out()
    console.print(
        f"The ledger is in {escape(str(target))}: {count} entries" + (f", {behind} more since." if behind else ".")
    )
    console.print(f"Check it: consilium-officer verify roster.json STUDY.study.json {escape(str(target))}")
    console.print("The roster is written by `consilium-coordinator sites roster`, a study by `study export`.")


_COLUMNS = ("study", "hash", "slots used", "reserved", "ε 1", "ε 2", "δ", "entries", "state")


def _row(record: StudyRecord, account: Account) -> tuple[object, ...]:
    reserve = account.reserve
    return (
        record.name,
        record.hash[:12],
        account.slots_used,
        reserve.slots,
        reserve.epsilon_aggregate,
        reserve.epsilon_broken,
        reserve.delta,
        entries(account),
        standing(account),
    )


def _heads(ledger: Ledger, roster: Roster, colluding: int) -> Iterable[str]:
    """How far the log has been signed, and by whom."""
    witnesses = witnesses_of(roster)
    least = needed(len(witnesses), colluding)
    yield f"{ledger.size} entries in all."
    note = _head(ledger)
    if note is None:
        yield "No head is signed yet; the first comes within a few slots."
        return
    size, signed = note.checkpoint.size, note.cosigners(witnesses)
    names = ", ".join(sorted(name.rpartition("/")[2] for name in signed)) or "nobody"
    yield f"The newest head holds {size}, cosigned by {len(signed)} of {len(witnesses)} hospitals: {names}."
    found = believed(ledger, roster, colluding)
    if found is None:
        yield f"No head is believed yet: that takes {least} cosignatures, against {colluding} that collude."
        return
    yield f"The newest believed head holds {found}; {least} cosignatures are needed against {colluding} that collude."


def _head(ledger: Ledger) -> Note | None:
    """The newest head, if one was ever signed."""
    try:
        return ledger.note()
    except Refusal:
        raise
    except ConsiliumError:
        return None  # opening the ledger has found the newest head sound, so there is none


def _noised(registry: Registry) -> list[StudyRecord]:
    """The studies with noise, newest first.

    Raises:
        ConsiliumError: there is none.
    """
    found = [record for record in registry.studies() if has_noise(record.study)]
    if not found:
        raise _nothing("no study here has noise")
    return found


def _colluding(studies: Iterable[StudyRecord]) -> int:
    """The most hospitals that any of the studies lets collude: the head must stand for that one too."""
    return max(record.study.secagg.colluding for record in studies)


def _nothing(subject: str) -> ConsiliumError:
    return ConsiliumError(
        "The ledger is empty: no study with noise has begun",
        subject,
        "It begins with the first slot of one: `consilium-coordinator study plan` shows what noise promises.",
    )


def _free(path: Path, *, force: bool) -> None:
    """Refuse to write over a file, unless it is wanted."""
    if path.exists() and not force:
        raise ConsiliumError(
            "The file exists already", str(path), "Name another with --out, or write over it with --force."
        )
