"""RULES S1, S2 and S7 as laws of the agent's memory, whatever the order of calls and restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.agent.rows import State
from client.agent.store import Store
from privacy.errors import ConsiliumError, Refusal

LIMIT = 5
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 3)),
        st.tuples(st.just("bind"), st.integers(0, 3), st.integers(0, LIMIT + 1), st.sampled_from("ab")),
        st.tuples(st.just("keep"), st.integers(0, LIMIT + 1), st.sampled_from("ab")),
        st.tuples(st.just("restart")),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_S1_S2_S7_hold_in_every_order(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple]) -> None:
    path = tmp_path_factory.mktemp("store") / "agent.db"
    store = Store(path)
    store.add_study("s", "tiny", b"document")
    store.decide("s", State.APPROVED, "archive")
    served: dict[int, str] = {}
    highest = session = 0
    for step, *values in steps:
        try:
            if step == "open":
                store.open_session("s", values[0])
            elif step == "bind":
                row = store.bind("s", values[0], values[1], values[2], "train", LIMIT)
                assert served.setdefault(row.slot, row.request) == values[2], "one request per slot, for ever"
                assert row.slot >= highest, "only the newest slot is served"
                assert (row.slot <= LIMIT, values[0]) == (True, session), "in the live session, up to T_max"
            elif step == "keep":
                store.keep_answer("s", values[0], values[1], f"{values}".encode(), "", 0)
                assert served[values[0]] == values[1]
                assert values[0] == highest, "what was superseded is never stored"
            else:
                store.close()
                store = Store(path)
        except Refusal:
            pass
        known = store.study("s")
        assert known is not None
        assert known.highest >= highest
        assert known.session >= session
        if known.session > session:
            assert store.stored() == set(), "a new session leaves nothing of the old one"
        highest, session = known.highest, known.session
        assert all(slot == highest for _, slot in store.stored())
        assert all(store.slot("s", slot) is not None for slot in served), "a tombstone is never removed"
    store.close()


def test_a_roster_never_goes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "agent.db")
    assert store.take_roster(4, b"four")
    assert not store.take_roster(3, b"three")
    assert not store.take_roster(4, b"another four")
    assert store.roster() == b"four"
    assert store.take_roster(5, b"five")


def test_records_that_are_no_database_are_named(tmp_path: Path) -> None:
    (tmp_path / "agent.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ConsiliumError, match="records cannot be read"):
        Store(tmp_path / "agent.db")


def test_records_of_a_newer_release_are_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "agent.db")
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(ConsiliumError, match="newer release"):
        Store(tmp_path / "agent.db")
