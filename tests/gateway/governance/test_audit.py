"""Any change to the audit trail is found: edits, deletions, exchanges, insertions, a cut end."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.gateway.database import Connection, Cursor
from tokenmill.engine.gateway.governance import audit
from tokenmill.engine.gateway.governance.schema import AUDIT, AUDIT_HEAD
from tokenmill.engine.gateway.sqlite import SqliteConnection
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import CheckpointError

ROWS = 8
COLUMNS = ("at", "actor", "action", "subject", "details", "hash")


def trail(rows: int = ROWS) -> SqliteConnection:
    """A trail in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None, factory=SqliteConnection)
    connection.prepare(-1)
    connection.execute(AUDIT)
    connection.execute(AUDIT_HEAD)
    for index in range(rows):
        audit.append(connection, "test", f"action-{index}", f"subject-{index}", {"index": index})
    return connection


def test_untouched_trail_is_good_and_continues() -> None:
    connection = trail(0)
    empty = audit.verify(connection)
    assert empty.sequence == 0
    audit.append(connection, "test", "a", "b", {})
    assert audit.verify(connection, empty.hash).sequence == 1
    noted = audit.verify(connection)
    audit.append(connection, "test", "a", "b", {})
    assert audit.verify(connection, noted.hash).sequence == 2
    with pytest.raises(CheckpointError, match="noted"):
        audit.verify(connection, "0" * 64)
    connection.close()


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.tuples(st.just("edit"), st.integers(1, ROWS), st.sampled_from(COLUMNS), st.text(max_size=8)),
        st.tuples(st.just("delete"), st.integers(1, ROWS), st.booleans(), st.just("")),
        st.tuples(st.just("swap"), st.integers(1, ROWS - 1), st.integers(1, ROWS - 1), st.just("")),
    )
)
def test_every_change_is_found(change: tuple[str, int, object, str]) -> None:
    kind, row, how, text = change
    connection = trail()
    if kind == "edit":
        connection.execute(f"UPDATE audit SET {how} = ? || {how} WHERE sequence = ?", (text + "x", row))  # noqa: S608
    elif kind == "delete":
        connection.execute("DELETE FROM audit WHERE sequence = ?", (row,))
        if how:  # close the gap
            for later in range(row + 1, ROWS + 1):
                connection.execute("UPDATE audit SET sequence = ? WHERE sequence = ?", (later - 1, later))
    else:
        assert isinstance(how, int)
        other = row % ROWS + 1 if how == row else how
        for old, new in ((row, -1), (other, row), (-1, other)):
            connection.execute("UPDATE audit SET sequence = ? WHERE sequence = ?", (new, old))
    with pytest.raises(CheckpointError, match="audit trail"):
        audit.verify(connection)
    connection.close()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("UPDATE audit SET details = x'00ff' WHERE sequence = 3", "row 3 was changed"),
        (
            "INSERT INTO audit SELECT 0, at, actor, action, subject, details, hash FROM audit WHERE sequence = 1",
            "row 1 is missing",
        ),
        (
            "INSERT INTO audit SELECT 9, at, actor, action, subject, details, hash FROM audit WHERE sequence = 8",
            "row 9 was changed",
        ),
        ("DELETE FROM audit WHERE sequence = 4", "row 4 is missing"),
        ("DELETE FROM audit WHERE sequence = 8", "ends at row 7, its head says 8"),
        ("DELETE FROM audit_head", "ends at row 8, its head says 0"),
        ("DELETE FROM audit", "ends at row 0, its head says 8"),
    ],
)
def test_odd_changes_are_found(edit: str, says: str) -> None:
    connection = trail()
    connection.execute(edit)
    with pytest.raises(CheckpointError, match=f"audit trail: .*{says}"):
        audit.verify(connection)
    connection.close()


@pytest.mark.parametrize("at_once", [3, 1000])
def test_a_trail_that_grows_while_it_is_checked_is_good(
    store: Store, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateways go on appending: each answer of the database is older than the next one."""
    monkeypatch.setattr(audit, "_READ_AT_ONCE", at_once, raising=False)

    def append(connection: Connection) -> None:
        audit.append(connection, "test", "a", "b", {})

    for _ in range(ROWS):
        store.write_now(append)
    reader = store.connect_reader()
    grows = Growing(reader, lambda: store.write_now(append), times=5)
    assert audit.verify(grows).sequence == ROWS + 5  # type: ignore[arg-type]
    reader.close()


class Growing:
    """A connection after each of whose first answers the trail has grown."""

    def __init__(self, reader: Connection, grow: Callable[[], None], times: int) -> None:
        self._reader = reader
        self._grow = grow
        self._times = times

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Answers, and lets the trail grow."""
        answer = self._reader.execute(statement, parameters).fetchall()
        if self._times:
            self._times -= 1
            self._grow()
        return Answered(answer)


class Answered:
    """Rows that were fetched."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def fetchone(self) -> Any:
        """See `store.Cursor`."""
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[Any]:
        """See `store.Cursor`."""
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


def test_a_last_row_whose_hash_was_worked_out_anew_is_found() -> None:
    connection = trail()
    query = "SELECT sequence, at, actor, action, subject, details, hash FROM audit WHERE sequence = ?"
    before = connection.execute(query, (ROWS - 1,)).fetchone()
    last = connection.execute(query, (ROWS,)).fetchone()
    row = (*last[:2], "nobody", *last[3:6])
    connection.execute(
        "UPDATE audit SET actor = ?, hash = ? WHERE sequence = ?", ("nobody", audit._digest(before[6], row), ROWS)
    )
    with pytest.raises(CheckpointError, match="its head says"):
        audit.verify(connection)
    connection.close()
