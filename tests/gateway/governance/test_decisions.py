"""What policies decide is in the audit trail: each decision once, in order, and at little cost to anybody."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.gateway.governance.governed import MASTER_KEY
from tests.gateway.governance.line import Line
from tests.gateway.governance.test_at_once import reservation
from tests.gateway.governance.test_budgets import key_with
from tests.gateway.running import wait_until
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance import accounts, audit, books, identify, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.audit import Entry
from tokenmill.engine.gateway.governance.budgets import Granted
from tokenmill.engine.gateway.governance.guesses import Guesses
from tokenmill.engine.gateway.governance.identify import Identities
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.governance.pages import Kept
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.store import Store


def decide(store: Store, *subjects: str) -> None:
    """As the gateway has it written."""
    for subject in subjects:
        store.post_item(
            audit.extend,
            Entry("gateway", "sensitivity.confine", subject, {"zones": ["eu"]}),
            dispensable=True,
            beside=True,
        )


def decided(store: Store) -> list[str]:
    """Of which requests the trail tells, in its order."""
    query = "SELECT subject FROM audit WHERE action = 'sensitivity.confine' ORDER BY sequence"
    return [row[0] for row in store.reader.execute(query)]


@pytest.fixture
def other(store: Store) -> Iterator[Store]:
    """Another process's hold on the same database."""
    with contextlib.closing(Store(store.place, SCHEMA)) as opened:
        yield opened


@pytest.mark.parametrize("cut", ["before", "within", "after"])
def test_one_decision_is_one_row_however_often_it_is_tried(store: Store, other: Store, cut: Any) -> None:
    """Also where the answer to its commit was lost, others appended in between, and it is tried with new ones."""
    line = Line(store)

    async def main() -> None:
        decide(store, "a", "a", "b")
        store.hand_over()
        line.cut = cut
        decide(store, "c", "c", "d")
        store.hand_over()

    asyncio.run(main())
    wait_until(lambda: line.tried >= 3 if cut == "before" else line.cut is None)
    other.write_now(lambda connection: accounts.create(connection, "team", "T", None, Limits(), "t"))
    line.cut = None
    decide(store, "e")
    for _ in range(2):  # what was kept, and then what was taken of it
        store.write_now(lambda connection: connection.execute("SELECT 1"))
        wait_until(lambda: len(store._backlog) == 0)
    store.write_now(lambda connection: connection.execute("SELECT 1"))
    assert audit.verify(other.reader).sequence == 8
    assert sorted(decided(other)) == ["a", "a", "b", "c", "c", "d", "e"]
    assert audit.changes(other.reader) == 1


def test_requests_that_are_decided_upon_are_reserved_together_and_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loop where the store is a file; the pages in memory stay good, and nobody is told to look for changes."""
    monkeypatch.setattr("tokenmill.engine.gateway.store.SLOW_S", 60.0)
    key = key_with(store, Limits(hard_limit=1000))
    kept, runs = Kept(), list[tuple[str, int]]()

    def apply(connection: Connection, items: list[Any]) -> Any:
        known = dict(kept.pages)
        answers = books.apply(connection, items, kept=kept)
        runs.append((threading.current_thread().name, len(items)))
        assert len(runs) == 1 or not store.local or all(kept.pages[one] is page for one, page in known.items())
        return answers

    async def main() -> None:
        for turn in range(3):
            asked = []
            for number in range(5):
                call = f"{turn}/{number}"
                decide(store, call)
                asked.append(store.write_item(apply, reservation(key, call, 1)))
            assert all(isinstance(answer, Granted) for answer in await asyncio.gather(*asked))

    changes, news = audit.changes(store.reader), store.news()
    asyncio.run(main())
    here = threading.current_thread().name if store.local else "store-writer"
    assert runs == [(here, 5)] * 3
    assert kept.pages or not store.local
    assert (audit.changes(store.reader), store.news()) == (changes, news)
    assert decided(store) == [f"{turn}/{number}" for turn in range(3) for number in range(5)]
    audit.verify(store.reader)


def test_keys_stay_known_until_one_changes(store: Store, other: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision forgets none; one that another process revoked is refused."""
    monkeypatch.setattr(identify, "VERSION_KEPT_S", 0.0)
    looked_up: list[str] = []
    by_hash = keys.by_hash

    def counted(connection: Connection, hashed: str) -> Any:
        looked_up.append(hashed)
        return by_hash(connection, hashed)

    monkeypatch.setattr(keys, "by_hash", counted)
    governance = SimpleNamespace(store=store, guesses=Guesses(Options(str(store.place), digest(MASTER_KEY))))
    identities = Identities(cast("Governance", governance))
    make = partial(keys.create, actor="t")
    (first, secret), (_, second) = store.write_now(make), store.write_now(make)

    def known(key: str) -> str:
        return identities.of({b"authorization": f"Bearer {key}".encode()}).key

    for number in range(3):
        assert known(secret) == first
        known(second)
        decide(store if number else other, str(number))
        wait_until(lambda: len(decided(store)) == number + 1)  # noqa: B023 - it is called here
    assert looked_up == [digest(secret), digest(second)]
    other.write_now(lambda connection: keys.revoke(connection, first, "t"))
    with pytest.raises(ApiError, match="was revoked"):
        known(secret)
    known(second)
    assert len(looked_up) == 4
