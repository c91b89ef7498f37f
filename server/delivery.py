"""Who has the finished model? Every site that approved is given the package; who is away gets it at a resume."""

from __future__ import annotations

from collections.abc import Callable

from privacy.errors import RefusalCode
from server.attempt import BUSY_PAUSE, FIRST_PAUSE, LOST_PAUSE, PASSING
from server.desk import Call, Desk, Said, words
from server.members import Members
from server.records import StudyRecord
from server.registry import Registry


def deliver(
    registry: Registry,
    record: StudyRecord,
    desk: Desk,
    members: Members,
    round_: int,
    package: str,
    obey: Callable[[], None],
) -> None:
    """Send the package to whoever has not got it yet, at most for the study's deadline, and note who has it.

    Args:
        round_: the published round.
        package: blob of the zip.
        obey: called about once a second; may raise.
    """
    course, path = registry.course(record.hash), registry.blobs.path(package)
    document = desk.sign(
        "deliver",
        cohort=record.study.sites,
        payload=path,
        payload_sha256=package,
        seconds=record.study.rounds.deadline_seconds,
        round_=round_,
    )
    call, trouble = Call.of(document, path), dict[str, str]()
    members.suppose_open()
    delivered = {line.site for line in course.deliveries() if line.state == "delivered"}
    todo = {site for site, state in members.decisions.items() if state == "approved"} - delivered

    def wanted() -> dict[str, Call]:
        return {site: members.preparation(site) or call for site in todo}

    def hear(said: Said) -> float:
        if said.lost:
            return LOST_PAUSE
        if said.call is call and said.answer is not None and said.answer.status == "done":
            todo.discard(said.site)
            course.delivery(said.site, "delivered")
            return 0.0
        code = said.code if said.call is call else members.hear(said)
        if not code:
            return 0.0
        members.undo(said.site, code)
        if code in {RefusalCode.BUSY, RefusalCode.SESSION_UNKNOWN}:
            return BUSY_PAUSE
        trouble[said.site] = said.reason or words(code)
        if code not in PASSING:
            todo.discard(said.site)
            course.delivery(said.site, "refused", trouble[said.site])
        return FIRST_PAUSE

    def done() -> bool:
        return all(desk.lost(site) or site in trouble for site in todo)

    desk.canvass(wanted, hear, done, record.study.rounds.deadline_seconds, obey)
    for site in sorted(todo):
        course.delivery(site, "waiting", trouble.get(site, "not connected"))
