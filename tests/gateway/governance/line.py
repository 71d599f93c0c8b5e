"""The line between a store and its database, which a test may cut."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from tokenmill.engine.gateway.database import Connection, StoreUnavailableError
from tokenmill.engine.gateway.store import Store


class Line:
    """Stands in for the way to the database of an open store.

    Args:
        store: The store.

    Attributes:
        cut: `before`: nothing arrives, as long as it says so; `within`: the next commit does not arrive; `after`: the
            answer to the next commit is lost.
        tried: Transactions that were begun.
    """

    def __init__(self, store: Store) -> None:
        self.cut: Literal["before", "within", "after"] | None = None
        self.tried = 0
        self._transaction = store._database.transaction
        store._database.transaction = self._cut  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _cut(self, connection: Connection, waits: bool = True) -> Iterator[None]:
        self.tried += 1
        if self.cut is not None and not waits:
            raise BlockingIOError("left to the thread")
        if self.cut == "before":
            raise StoreUnavailableError("cut")
        with self._transaction(connection, waits):
            yield
            if self.cut == "within":
                self.cut = None
                raise StoreUnavailableError("cut before the commit", perhaps_done=True)
        if self.cut == "after":
            self.cut = None
            raise StoreUnavailableError("cut before the answer", perhaps_done=True)
