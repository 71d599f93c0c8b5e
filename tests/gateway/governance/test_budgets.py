"""Budgets hold under concurrency and kill -9; every reservation is settled once; rates slide."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gateway.running import wait_until
from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.governance import accounts, audit, books, keys, workers
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.budgets import Granted, Part, Rate, Refusal, Reservation, Spending
from tokenmill.engine.gateway.governance.workers import WorkerLock
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import InputError

SPENDER = Path(__file__).with_name("spender.py")
WORKERS = "SELECT id FROM workers"
NOW = 1_800_000_000_000


def key_with(store: Store, limits: Limits) -> str:
    """A key without limits in a team that has them."""
    store.write_now(lambda connection: accounts.create(connection, "team", "T", None, limits, "test", "team"))
    return store.write_now(lambda connection: keys.create(connection, "test", parent="team"))[0]


def ask(
    store: Store, key: str, call: str, amount: int = 1, tokens: int = 1, at: int | None = None, worker: str = "w"
) -> Refusal | None:
    """Reserves; a third of the tokens are the answer's."""
    chain = tuple(account.id for account in accounts.chain(store.reader, key))
    prompt, completion = tokens - tokens // 3, tokens // 3
    at = now_ms() if at is None else at
    wanted = Reservation(call, worker, chain, "r", "m", "t", amount, prompt, completion, at)
    answer = store.write_now(lambda connection: books.reserve(connection, wanted))
    return None if isinstance(answer, Granted) else answer


def end(store: Store, call: str, cost: int, tokens: int = 0) -> bool:
    """Settles; a third of the tokens are the answer's."""
    spending = Spending("b", "t", tokens - tokens // 3, 0, tokens // 3, True, cost, "ok", 200, 1)
    return store.write_now(lambda connection: books.settle(connection, call, spending))


def test_reserved_counts_and_settling_twice_charges_once(store: Store) -> None:
    key = key_with(store, Limits(hard_limit=100, soft_limit=50))
    assert ask(store, key, "a", 60) is None
    refusal = ask(store, key, "b", 41)
    assert refusal is not None
    assert (refusal.limit, refusal.account.id, refusal.used, refusal.allowed) == ("budget", "team", 60, 100)
    assert end(store, "a", 50)
    assert not end(store, "a", 50)
    assert not end(store, "b", 41)
    assert ask(store, key, "c", 50) is None
    assert ask(store, key, "d", 1) is not None
    for account in accounts.chain(store.reader, key):
        assert (account.spent, account.reserved) == (50, 50)
    actions = [row[0] for row in store.reader.execute("SELECT action FROM audit ORDER BY sequence")]
    assert actions == ["team.create", "key.create", "budget.soft_limit"]


@pytest.mark.parametrize(
    ("reserved", "charged", "excess"), [(100, (30, 7, 50), (0, 0, 0)), (40, (30, 7, 3), (0, 0, 47))]
)
def test_every_call_is_a_row_of_its_own_and_no_more_is_charged_than_was_reserved(
    store: Store, reserved: int, charged: tuple[int, ...], excess: tuple[int, ...]
) -> None:
    key = key_with(store, Limits(hard_limit=1000, tokens_per_minute=1000))
    assert ask(store, key, "a", reserved, tokens=500) is None
    others = (
        Part("escalated-from", "b1", "utility", 20, 5, 10, True, 30, 200),
        Part("failed", "b2", "reasoning", 7, 0, 0, False, 7, 0),
    )
    spending = Spending("b3", "reasoning", 40, 0, 10, True, 50, "ok", 200, 4, others)
    for first in (True, False):
        assert store.write_now(lambda connection: books.settle(connection, "a", spending)) is first
    rows = store.reader.execute(
        "SELECT kind, backend, tier, prompt_tokens, completion_tokens, attempts, cost, excess, request_id, outcome "
        "FROM ledger ORDER BY backend"
    ).fetchall()
    assert [row[:6] for row in rows] == [
        ("escalated-from", "b1", "utility", 20, 10, 0),
        ("failed", "b2", "reasoning", 7, 0, 0),
        ("answer", "b3", "reasoning", 40, 10, 4),
    ]
    assert (tuple(row[6] for row in rows), tuple(row[7] for row in rows)) == (charged, excess)
    assert {row[8:] for row in rows} == {("r", "ok")}
    for account in accounts.chain(store.reader, key):
        assert (account.spent, account.reserved) == (sum(charged), 0)
    # The window of tokens holds what all calls used.
    assert ask(store, key, "b", 1, tokens=1000 - 87) is None
    assert ask(store, key, "c", 1, tokens=1) is not None


def test_revoked_key_reserves_nothing(store: Store) -> None:
    """Also where its revocation came after it was looked up, in the same transaction as its request."""
    key = key_with(store, Limits(hard_limit=100))
    assert ask(store, key, "a", 10) is None
    store.write_now(lambda connection: keys.revoke(connection, key, "test"))
    refusal = ask(store, key, "b", 10)
    assert refusal is not None
    assert refusal.limit == "revoked"
    assert end(store, "a", 5)
    assert (accounts.find(store.reader, key).spent, accounts.find(store.reader, key).reserved) == (5, 0)


def test_budget_starts_anew_with_its_period(store: Store) -> None:
    key = key_with(store, Limits(hard_limit=10, period_ms=1000))
    start = accounts.find(store.reader, "team").period_start
    assert ask(store, key, "a", 10, at=start) is None
    refusal = ask(store, key, "b", 1, at=start + 400)
    assert refusal is not None
    assert refusal.retry_ms == 600
    # What is under way is not forgotten.
    assert ask(store, key, "c", 1, at=start + 3500) is not None
    end(store, "a", 4)
    renewed = accounts.find(store.reader, "team")
    assert (renewed.spent, renewed.reserved) == (4, 0)
    assert renewed.period_start >= start + 3000


@pytest.mark.parametrize("later", [1000, 2000])
def test_what_ends_in_a_later_period_is_spent_in_that_one(
    store: Store, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_with(store, Limits(hard_limit=10, period_ms=1000))
    start = accounts.find(store.reader, "team").period_start
    assert ask(store, key, "a", 10, at=start) is None
    now = start + later
    monkeypatch.setattr(books, "now_ms", lambda: now)
    assert end(store, "a", 4)
    team = accounts.find(store.reader, "team")
    assert (team.period_start, team.spent, team.reserved) == (now, 4, 0)
    refusal = ask(store, key, "b", 7, at=now + 999)
    assert refusal is not None and (refusal.used, refusal.retry_ms) == (4, 1)
    assert ask(store, key, "c", 7, at=now + 1000) is None


HOUR = 3_600_000


@pytest.mark.parametrize(
    ("period", "began_h", "changed", "spent", "left_h"),
    [
        # A period is given to an account that is older than it: it begins now, and what was spent counts.
        (None, 1000, 24, 8, 24),
        (None, 10, 24, 8, 14),
        # The period that runs goes on; where it would be over, it begins now.
        (24, 10, 48, 8, 38),
        (24, 10, 2, 8, 2),
        (24, 10, 24, 8, 14),
        (24, 10, None, 8, None),
        # What is kept is of a period that is over.
        (24, 30, 48, 0, 42),
        (24, 30, 24, 0, 18),
        (24, 30, None, 0, None),
    ],
)
def test_a_changed_period_forgets_nothing_that_was_spent_in_the_one_that_runs(
    store: Store, period: int | None, began_h: int, changed: int | None, spent: int, left_h: int | None
) -> None:
    def limits(hours: int | None) -> Limits:
        return Limits(hard_limit=10, period_ms=None if hours is None else hours * HOUR)

    key = key_with(store, limits(period))
    began = now_ms() - began_h * HOUR
    store.write_now(lambda c: c.execute("UPDATE accounts SET period_start = ?, spent = 8 WHERE id = 'team'", (began,)))
    store.write_now(lambda c: accounts.set_limits(c, "team", limits(changed), "test"))
    now = now_ms()
    refusal = ask(store, key, "a", 10, at=now)
    if spent:
        assert refusal is not None
        assert refusal.used == spent
    else:
        assert refusal is None
    end(store, "a", 0)
    found = accounts.find(store.reader, "team")
    assert found.spent == spent
    left = None if found.period_end is None else (found.period_end - now) / HOUR
    assert left == (None if left_h is None else pytest.approx(left_h, abs=0.1))


def test_nothing_but_the_master_key_is_the_account_of_its_requests(store: Store) -> None:
    with pytest.raises(InputError, match="is the master key's"):
        store.write_now(lambda c: accounts.create(c, "organisation", "", None, Limits(), "test", "master"))


def test_rates_slide_and_count_what_was_used(store: Store) -> None:
    key = key_with(store, Limits(requests_per_minute=3, tokens_per_minute=100))
    now = now_ms() // 1000 * 1000
    assert ask(store, key, "a", tokens=80, at=now) is None
    refusal = ask(store, key, "b", tokens=30, at=now + 1000)
    assert refusal is not None
    assert refusal.limit == "tokens"
    end(store, "a", 1, tokens=10)
    assert ask(store, key, "b", tokens=30, at=now + 1000) is None
    assert ask(store, key, "c", tokens=30, at=now + 2000) is None
    refusal = ask(store, key, "d", at=now + 3000)
    assert refusal is not None
    assert (refusal.limit, refusal.retry_ms) == ("requests", 58_000)
    assert ask(store, key, "d", at=now + 60_999) is not None
    assert ask(store, key, "d", at=now + 61_000) is None
    too_much = ask(store, key, "e", tokens=101, at=now + 200_000)
    assert too_much is not None
    assert too_much.retry_ms is None


def test_the_limit_that_is_nearest_is_told(store: Store) -> None:
    """Of all that stand above each other; what was spent is the key's own."""
    key_with(store, Limits(requests_per_minute=5, tokens_per_minute=100))
    own = Limits(requests_per_minute=3, tokens_per_minute=1000)
    key = store.write_now(lambda connection: keys.create(connection, "test", parent="team", limits=own))[0]
    free = store.write_now(lambda connection: keys.create(connection, "test"))[0]
    assert ask(store, free, "paid", 7) is None
    assert end(store, "paid", 7)
    now = now_ms()

    def told(call: str, *identities: str) -> object:
        wanted = Reservation(call, "w", identities, "r", "m", "t", 1, 10, 5, now)
        return store.write_now(lambda connection: books.reserve(connection, wanted))

    assert told("a", key, "team") == Granted(0, Rate(3, 2), Rate(100, 85))
    assert told("b", key, "team") == Granted(0, Rate(3, 1), Rate(100, 70))
    assert told("c", free) == Granted(7, None, None)


def test_what_was_counted_in_a_minute_that_is_over_is_kept_nowhere(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_with(store, Limits(requests_per_minute=9))
    for at in (NOW, NOW + 180_000, NOW + 181_000, NOW + 420_000):
        monkeypatch.setattr(books, "now_ms", lambda at=at: at)
        assert ask(store, key, str(at), at=at) is None
        if at == NOW + 181_000:
            seconds = store.reader.execute("SELECT second FROM windows ORDER BY second").fetchall()
            assert seconds == [(NOW // 1000 + 180,), (NOW // 1000 + 181,)]
    assert store.reader.execute("SELECT second FROM windows").fetchall() == [(NOW // 1000 + 420,)]


def test_a_clock_that_is_ahead_frees_nobody_whose_clock_is_behind(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gateways whose clocks differ by a minute and a half: the limit holds at each."""
    key = key_with(store, Limits(requests_per_minute=2, tokens_per_minute=100))
    now = now_ms()

    def ask_at(at: int, call: str) -> Refusal | None:
        monkeypatch.setattr(books, "now_ms", lambda: at)
        return ask(store, key, call, at=at)

    for second in range(2):
        assert ask_at(now + 1000 * second, f"behind-{second}") is None
    assert ask_at(now + 90_000, "ahead") is None
    refusal = ask_at(now + 3000, "behind-3")
    assert refusal is not None and refusal.limit == "requests"


def test_a_clock_that_was_ahead_and_is_set_back_blocks_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may begin with its clock hours ahead: what it counted then is not of the last minute."""
    key = key_with(store, Limits(requests_per_minute=1, hard_limit=100, period_ms=HOUR))
    now = now_ms() // 1000 * 1000
    ahead = now + 8 * HOUR
    monkeypatch.setattr(books, "now_ms", lambda: ahead)
    assert ask(store, key, "a", 60, at=ahead) is None
    assert end(store, "a", 60)
    # A difference between two machines is nothing like that.
    monkeypatch.setattr(books, "now_ms", lambda: ahead - 60_000)
    assert ask(store, key, "b", at=ahead - 60_000) is not None
    monkeypatch.setattr(books, "now_ms", lambda: now)
    ask(store, key, "c", at=now)
    assert ask(store, key, "d", at=now + 61_000) is None
    # What was spent counts, for an hour from now.
    team = accounts.find(store.reader, "team")
    assert (team.spent, team.period_end) == (60, now + HOUR)
    refusal = ask(store, key, "e", 50, at=now + 122_000)
    assert refusal is not None and refusal.limit == "budget"


@pytest.mark.parametrize("trial", range(2))
def test_two_processes_and_kill_9_never_overspend(store: Store, tmp_path: Path, trial: int) -> None:
    """One of two spending processes is killed somewhere in the middle; a third takes over its books."""
    budget = 400_000
    key = key_with(store, Limits(hard_limit=budget))
    journal = tmp_path / "journal"
    spenders = [
        subprocess.Popen(
            [sys.executable, str(SPENDER), str(store.place), key, f"{journal}-{index}", str(trial * 2 + index)],
            stdout=subprocess.PIPE,
        )
        for index in range(2)
    ]
    for spender in spenders:
        assert spender.stdout is not None
        assert spender.stdout.readline() == b"ready\n"
    time.sleep(random.Random(trial).uniform(0.01, 0.15))
    spenders[0].kill()
    survivor = WorkerLock(store)
    assert spenders[0].wait(timeout=30) == -9
    workers.recover(store)
    assert spenders[1].wait(timeout=60) == 0
    wait_until(lambda: (workers.recover(store), store.reader.execute(WORKERS).fetchall())[1] == [(survivor.id,)])
    for spender in spenders:
        assert spender.stdout is not None
        spender.stdout.close()
    sent = dict(line.split() for path in tmp_path.glob("journal-*") for line in path.read_text("ascii").splitlines())
    rows = {
        call: (cost, outcome) for call, cost, outcome in store.reader.execute("SELECT call, cost, outcome FROM ledger")
    }
    # Nothing that was sent is missing; what was settled equals the other side's books, what was lost is above them.
    assert sent.keys() <= rows.keys()
    assert all(cost == int(sent[call]) for call, (cost, outcome) in rows.items() if outcome == "ok")
    assert all(cost >= int(sent.get(call, 0)) for call, (cost, outcome) in rows.items() if outcome == "lost")
    total = sum(cost for cost, _ in rows.values())
    assert sum(map(int, sent.values())) <= total <= budget
    for account in accounts.chain(store.reader, key):
        assert (account.spent, account.reserved) == (total, 0)
    assert store.reader.execute("SELECT count(*) FROM reservations").fetchone() == (0,)
    audit.verify(store.reader)
    survivor.close()
