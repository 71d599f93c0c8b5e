"""What the event loop writes itself: order, what it must not wait for, and what it may remember in between."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.governance.conftest import KINDS, new_place
from tests.gateway.governance.test_budgets import NOW, end, key_with
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance import accounts, books, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.budgets import WINDOW_S, Granted, Reservation, Settlement, Spending
from tokenmill.engine.gateway.governance.pages import Kept, Window
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import TIDY_AFTER, Store


def where(_connection: Connection, items: list[Any]) -> list[str]:
    """Says which thread does it; fails on a negative item."""
    if min(items) < 0:
        raise ValueError("negative")
    return [threading.current_thread().name] * len(items)


def reservation(key: str, call: str, amount: int, at: int = NOW) -> Reservation:
    """One of a key in a team."""
    return Reservation(call, "w", (key, "team"), "r", "m", "t", amount, 1, 0, at)


def settlement(call: str, cost: int) -> Settlement:
    """The end of a request."""
    return Settlement(call, Spending("b", "t", 1, 0, 0, True, cost, "ok", 200, 1))


@pytest.fixture
def other(store: Store) -> Iterator[Store]:
    """Another process's hold on the same database."""
    with contextlib.closing(Store(store.place, SCHEMA)) as opened:
        yield opened


def test_loop_writes_itself_unless_it_would_wait(store: Store, other: Store) -> None:
    """To a file; what a server does is waited for by the thread. Nothing overtakes what the thread has to do."""

    async def main() -> list[str]:
        alone = await store.write_item(where, 0)
        begun, release = threading.Event(), threading.Event()

        def hold(_connection: Connection) -> None:
            begun.set()
            assert release.wait(20)

        held = other.submit(hold)
        await asyncio.to_thread(begun.wait, 20)
        waiting = asyncio.ensure_future(store.write_item(where, 1))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        later = asyncio.ensure_future(store.write_item(where, 2))
        await asyncio.sleep(0)
        release.set()
        await asyncio.wrap_future(held)
        return [alone, await waiting, await later]

    here = threading.current_thread().name if store.local else "store-writer"
    assert asyncio.run(main()) == [here, "store-writer", "store-writer"]


def test_log_of_a_file_is_copied_back_while_requests_go_on(store: Store) -> None:
    if not store.local:
        pytest.skip("a server does that itself")
    key = key_with(store, Limits())
    apply = partial(books.apply, kept=Kept())
    log, most_bytes = Path(f"{store.place}-wal"), 32 * 2**20

    def header() -> bytes:
        """Other each time that the log begins anew: its salt (sqlite.org/fileformat2.html#walformat)."""
        with log.open("rb") as opened:
            return opened.read(24)[16:]

    async def main() -> int:
        begun = {header()}
        for call in range(100 * TIDY_AFTER):
            await store.write_item(apply, reservation(key, str(call), 1))
            if call % 100 == 0:
                begun.add(header())
                assert log.stat().st_size < most_bytes
                await asyncio.sleep(0.01)  # as between requests: the thread needs some of the core, too
            if len(begun) == 4:
                return call + 1
        raise AssertionError(f"the log never began anew in {100 * TIDY_AFTER} transactions")

    count = asyncio.run(main())
    assert accounts.find(store.reader, key).reserved == count


def test_what_is_kept_is_forgotten_when_somebody_else_writes(store: Store, other: Store) -> None:
    """A request settled, a limit lowered, a key revoked elsewhere: the next request knows."""
    key = key_with(store, Limits(hard_limit=100, requests_per_minute=1000))
    apply = partial(books.apply, kept=Kept())

    def do(item: Reservation | Settlement) -> Any:
        async def main() -> Any:
            return await store.write_item(apply, item)

        return asyncio.run(main())

    assert isinstance(do(reservation(key, "a", 30)), Granted)
    assert isinstance(do(reservation(key, "b", 30)), Granted)
    assert end(other, "a", 20)
    assert do(settlement("a", 20)) is False
    assert isinstance(do(reservation(key, "c", 50)), Granted)
    assert do(reservation(key, "d", 1)).used == 100
    assert do(settlement("c", 1)) is True
    other.write_now(lambda connection: accounts.set_limits(connection, "team", Limits(hard_limit=51), "t"))
    assert do(reservation(key, "e", 1)).allowed == 51
    other.write_now(lambda connection: keys.revoke(connection, key, "t"))
    assert do(reservation(key, "f", 0)).limit == "revoked"
    found = accounts.find(store.reader, "team")
    assert (found.spent, found.reserved) == (21, 30)
    assert store.reader.execute("SELECT call FROM reservations").fetchall() == [("b",)]


def test_what_was_rolled_back_is_not_kept(store: Store) -> None:
    key = key_with(store, Limits(hard_limit=100))
    apply = partial(books.apply, kept=Kept())

    async def main() -> list[Any]:
        first = await store.write_item(apply, reservation(key, "a", 10))
        together = (
            store.write_item(apply, reservation(key, "b", 10)),
            store.write_item(where, -1),
            store.write_item(apply, reservation(key, "c", 90)),
        )
        second, failed, refused = await asyncio.gather(*together, return_exceptions=True)
        settled = [await store.write_item(apply, settlement("b", 4)) for _ in range(2)]
        return [first, second, failed, refused, *settled]

    first, second, failed, refused, *settled = asyncio.run(main())
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert isinstance(failed, ValueError)
    assert refused.used == 20
    assert settled == [True, False]
    for account in accounts.chain(store.reader, key):
        assert (account.spent, account.reserved) == (4, 10)


def test_what_failed_before_anything_was_written_is_not_kept(store: Store) -> None:
    """The accounts in memory were changed by then, and nothing in the database says so."""
    key = key_with(store, Limits(hard_limit=100))
    kept = Kept()

    def do(*items: Reservation) -> Any:
        return store.write_now(lambda connection: books.apply(connection, items, kept=kept))

    assert isinstance(do(reservation(key, "a", 10))[0], Granted)
    with pytest.raises(TypeError):
        do(reservation(key, "b", 20), reservation(key, "c", None))  # type: ignore[arg-type]
    assert isinstance(do(reservation(key, "d", 90))[0], Granted)
    assert do(reservation(key, "e", 1))[0].used == 100


def test_changes_to_keys_are_news_and_money_is_not(store: Store, other: Store) -> None:
    key = key_with(store, Limits(hard_limit=100))
    before = store.news()
    if not store.local:
        assert before is None
        return
    assert end(other, "nothing", 1) is False
    assert store.news() == before == other.news()
    other.write_now(lambda connection: keys.revoke(connection, key, "t"))
    after = store.news()
    assert after == other.news() != before
    with pytest.raises(ZeroDivisionError):
        other.write_now(lambda _: 1 / 0)
    assert store.news() == after


def test_lonely_write_is_done_before_the_loop_goes_on(store: Store) -> None:
    async def main() -> bool:
        return store.write_item(where, 0, alone=True).done()

    assert asyncio.run(main()) is store.local


def test_what_is_posted_is_written_though_nobody_asks_for_anything(store: Store) -> None:
    written = threading.Event()

    def note(_connection: Connection, items: list[Any]) -> list[None]:
        written.set()
        return [None] * len(items)

    async def main() -> None:
        store.post_item(note, 1)
        assert await asyncio.to_thread(written.wait, 20)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_posted_last_is_written_before_the_store_is_closed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(new_place(kind, tmp_path, request), SCHEMA)
    key = key_with(store, Limits())

    async def main() -> None:
        store.post_item(partial(books.apply, kept=Kept()), reservation(key, "a", 5))

    asyncio.run(main())
    store.close()
    assert caplog.records == []
    with contextlib.closing(Store(store.place, SCHEMA)) as opened:
        assert accounts.find(opened.reader, key).reserved == 5


def test_window_slides_as_if_it_were_counted_anew() -> None:
    """Whatever the order of seconds; seconds that were dropped are not counted any more."""
    rows = {100: [1, 10], 130: [2, 20]}
    window = Window([(second, *pair) for second, pair in rows.items()])
    for second, tokens in ((150, 5), (159, 7), (161, 1), (158, 2), (191, 3), (260, 4)):
        window.move(second)
        window.add(second, 1, tokens)
        pair = rows.setdefault(second, [0, 0])
        pair[0] += 1
        pair[1] += tokens
        anew = [pair for at, pair in rows.items() if at >= second - WINDOW_S]
        assert (window.requests, window.tokens) == (sum(p[0] for p in anew), sum(p[1] for p in anew)), second
    window.move(300)
    assert window.oldest() == 260
    assert window.drop_outside(261, 400) == (260, None)
    window.move(310)
    assert (window.requests, window.tokens) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_window_counts_like_one_that_keeps_every_second(seed: int) -> None:
    """Requests and settlements of any second, forgetting and writing down in between, against plain counts."""
    draw = random.Random(seed)
    rows: dict[int, list[int]] = {}
    window, now, written = Window([]), 1000, dict[int, tuple[int, int]]()
    last = now
    for _ in range(400):
        now += draw.choice((0, 0, 0, 0, 1, 2, 30, 70))
        action = draw.random()
        if action < 0.5:
            window.move(now)
            window.add(now, 1, 5)
            last = now
            pair = rows.setdefault(now, [0, 0])
            pair[0], pair[1] = pair[0] + 1, pair[1] + 5
        elif action < 0.8:
            second = draw.choice((now, now, now - 1, now - 3, now - 59, now - 61, now - 80, last))
            window.add(second, 0, -2)
            if second in rows:
                rows[second][1] -= 2
        elif action < 0.9:
            window.drop_outside(now - WINDOW_S, now)
            rows = {second: pair for second, pair in rows.items() if second >= now - WINDOW_S}
            written = {second: pair for second, pair in written.items() if second in rows}
        else:
            written |= {second: (requests, tokens) for second, requests, tokens in window.changed()}
            assert written == {second: tuple(pair) for second, pair in rows.items()}
        if draw.random() < 0.5:
            continue  # nobody asks, so nothing has moved or put down what came
        window.move(now)
        anew = [pair for second, pair in rows.items() if second >= now - WINDOW_S]
        assert (window.requests, window.tokens) == (sum(p[0] for p in anew), sum(p[1] for p in anew))
        assert window.oldest() == min((second for second in rows if second >= now - WINDOW_S), default=None)
