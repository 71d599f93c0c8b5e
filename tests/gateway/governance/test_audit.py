"""Any change to the audit trail is found: edits, deletions, exchanges, insertions, a cut end."""

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.gateway.governance import audit
from tokenmill.engine.gateway.governance.schema import AUDIT, AUDIT_HEAD
from tokenmill.engine.gateway.sqlite import SqliteConnection
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
    assert audit.verify(connection).sequence == 0
    audit.append(connection, "test", "a", "b", {})
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
