"""Trials: many clients spend one budget through two gateway workers, which are killed at random moments.

Every trial has a team with a budget and keys of its own; clients ask until each has asked its share, over plain,
streamed, retried, escalated and abandoned requests. Workers get SIGKILL and are started again. Afterwards, the team's
account, the ledger, the audit trail and the backend's own books must agree; `Trials.check` says on what.

    python -m tests.gateway.governance.trial --trials 200 --clients 512 [--store postgresql://... | --postgres]

With `--out`, every trial is a row of a file, and those that are there already are not run again.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from tests.gateway.governance.governed import options
from tests.gateway.governance.postgres_server import PostgresServer
from tests.gateway.running import wait_until
from tokenmill.bench.rows import RowFile, facts, identity, read_rows, source_digest
from tokenmill.engine.gateway.admin import books as admin_books
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings
from tokenmill.engine.gateway.settings import Document, Settings
from tokenmill.engine.gateway.store import Store

UPSTREAM = Path(__file__).with_name("counting_upstream.py")
#: Micro-cents per million tokens, of two backends of one tier and of the tier that takes over from it.
PRICES = (
    Prices(30_000_000, 10_000_000, 70_000_000),
    Prices(10_000_000, 5_000_000, 25_000_000),
    Prices(60_000_000, 20_000_000, 150_000_000),
)
TIERS = ("utility", "utility", "reasoning")
#: Tokens that a client asks for at most, and gets at most.
MOST_TOKENS = 8
KEYS = 4
MODULE = "tests.gateway.governance.trial"
#: What decides about the outcome.
SOURCES = ("engine/gateway", "tests/gateway/governance")


@dataclass
class Outcome:
    """What one trial came to."""

    budget: int
    spent: int
    statuses: Counter[int]
    rows: Counter[str]
    escalated: int
    kills: int
    calls: int


class Row(NamedTuple):
    """A row of the ledger."""

    request_id: str
    key_id: str
    backend: str
    kind: str
    prompt: int
    completion: int
    exact: int
    cost: int
    excess: int
    outcome: str


class Trials:
    """Two workers, a backend process and a store; close it at the end.

    Args:
        place: The store.
        workers: Gateway processes.
    """

    def __init__(self, place: str, workers: int = 2) -> None:
        self._upstream = subprocess.Popen(
            [sys.executable, str(UPSTREAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._upstream.stdout is not None
        ports = [int(port) for port in self._upstream.stdout.readline().split()]
        self._books_url = f"http://127.0.0.1:{ports[0]}/books"
        # One of two backends is dear, one cheap: reserved is the dearest, charged is the one that answered.
        backends = [
            Backend(
                f"b{port}",
                f"http://127.0.0.1:{port}",
                tier,
                (f"of-{tier}",),
                prices=prices,
                context_window=4096,
                quality=0.9 if tier == "utility" else 0.95,
                capabilities=("logprobs",),
            )
            for port, tier, prices in zip(ports, TIERS, PRICES, strict=True)
        ]
        self._prices = dict(zip(ports, PRICES, strict=True))
        self._document = Document(
            tuple(backends),
            Settings(retry_ratio=1.0, breaker_failures=1_000_000),
            governance=options(place),
            routing=RoutingSettings(escalation=EscalationSettings("utility", "reasoning", 0.5)),
        ).to_json()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._workers = [self._start() for _ in range(workers)]
        wait_until(lambda: urllib.request.urlopen(self.url + "/ready").status == 200, 30)  # noqa: S310
        self.store = Store(place, SCHEMA)

    def _start(self) -> "subprocess.Popen[bytes]":
        descriptor = self._listener.fileno()
        command = [sys.executable, "-m", "tokenmill.engine.gateway.worker", "--fd", str(descriptor)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[descriptor])
        assert process.stdin is not None
        process.stdin.write(self._document)
        process.stdin.close()
        return process

    def kill_one(self, generator: random.Random) -> None:
        """SIGKILL for a worker, and a new one in its place."""
        index = generator.randrange(len(self._workers))
        self._workers[index].kill()
        self._workers[index].wait()
        self._workers[index] = self._start()

    def close(self) -> None:
        """Ends every process."""
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.wait(timeout=60)
        self._listener.close()
        self.store.close()
        assert self._upstream.stdin is not None and self._upstream.stdout is not None
        self._upstream.stdin.close()
        self._upstream.wait(timeout=30)
        self._upstream.stdout.close()

    def run(self, seed: int, clients: int, requests: int, kills: int) -> Outcome:
        """One trial.

        Args:
            seed: For everything that is random.
            clients: At once.
            requests: Of each client.
            kills: How often a worker is killed.
        """
        generator = random.Random(seed)
        # Between a tenth and nine tenths of what all requests would cost.
        budget = int(clients * requests * 8_000 * generator.uniform(0.1, 0.9)) + generator.randrange(1000)
        team = self.store.write_now(
            lambda connection: accounts.create(connection, "team", "T", None, Limits(hard_limit=budget), "trial")
        )
        made = [
            self.store.write_now(lambda connection: keys.create(connection, "trial", parent=team)) for _ in range(KEYS)
        ]
        statuses = asyncio.run(self._traffic(generator, [key for _, key in made], clients, requests, kills))
        # The living settle at once, the dead are buried by the living within a second or two.
        wait_until(lambda: self._left(team) == 0, 60)
        return self.check(team, [key_id for key_id, _ in made], budget, statuses, kills)

    def _left(self, team: str) -> int:
        rows = self.store.reader.execute("SELECT chain FROM reservations").fetchall()
        return sum(team in chain for (chain,) in rows)

    async def _traffic(
        self, generator: random.Random, made: list[str], clients: int, requests: int, kills: int
    ) -> dict[str, int]:
        statuses: dict[str, int] = {}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [
                asyncio.create_task(
                    self._client(session, random.Random(generator.random()), made[number % KEYS], requests, statuses)
                )
                for number in range(clients)
            ]
            total = clients * requests
            for mark in sorted(generator.uniform(0.02, 0.8) for _ in range(kills)):
                while len(statuses) < mark * total and not all(task.done() for task in tasks):
                    await asyncio.sleep(0.005)
                # In this thread: a worker ends with the thread that started it.
                self.kill_one(generator)
            await asyncio.gather(*tasks)
        return statuses

    async def _client(
        self,
        session: aiohttp.ClientSession,
        generator: random.Random,
        key: str,
        requests: int,
        statuses: dict[str, int],
    ) -> None:
        for _ in range(requests):
            identity = f"r{generator.getrandbits(96):024x}"
            asked: dict[str, Any] = {
                "model": generator.choice(["auto", "of-utility"]),
                "messages": [{"role": "user", "content": "word " * generator.randint(1, 20)}],
                "max_tokens": MOST_TOKENS,
                "tokens": generator.randint(1, MOST_TOKENS),
                "stream": generator.random() < 0.4,
                "act": generator.choice(["", "", "unsure", "unsure", "refuse", "break"]),
                "pause_s": generator.uniform(0, 0.03),
            }
            # A few clients are gone before their answer can be.
            patience = 0.01 if generator.random() < 0.05 else 60.0
            headers = {"authorization": f"Bearer {key}", "x-request-id": identity}
            try:
                async with asyncio.timeout(patience):
                    async with session.post(f"{self.url}/v1/chat/completions", json=asked, headers=headers) as answer:
                        await answer.read()
                        statuses[identity] = answer.status
            except (aiohttp.ClientError, TimeoutError):
                statuses[identity] = 0

    def check(self, team: str, key_ids: list[str], budget: int, statuses: dict[str, int], kills: int) -> Outcome:
        """Asserts that all books agree.

        * The team spent at most its budget, exactly what its rows in the ledger say, and so did its keys.
        * Every request that was answered with 200 has one row of the kind `answer`; so has every one that the backends
          counted.
        * Calls of requests that ended well have the backend's own counts, each at its backend, and cost what these
          cost there; so has every other call of which the gateway says that it was counted.
        * Requests that were lost with their worker are charged no less than that.
        * Sums by tier, backend, key, outcome and kind are the sum of all.
        * Nothing is reserved or under way any more; the audit trail is whole.
        """
        with urllib.request.urlopen(self._books_url) as answer:  # noqa: S310
            books: dict[str, list[list[int]]] = json.load(answer)
        reader = self.store.reader
        rows = [
            Row(*row)
            for row in reader.execute(
                "SELECT request_id, key_id, backend, kind, prompt_tokens, completion_tokens, exact, cost, excess, "
                "outcome FROM ledger WHERE team = ?",
                (team,),
            )
        ]
        account = accounts.find(reader, team)
        assert account.spent <= budget, f"{account.spent} spent of {budget}"
        assert (account.reserved, account.under_way) == (0, 0)
        assert account.spent == sum(row.cost for row in rows)
        for key_id in key_ids:
            one = accounts.find(reader, key_id)
            spent = sum(row.cost for row in rows if row.key_id == key_id)
            assert (one.spent, one.reserved, one.under_way) == (spent, 0, 0)
        by_id: dict[str, list[Row]] = {}
        for row in rows:
            by_id.setdefault(row.request_id, []).append(row)
        assert all(sum(row.kind == "answer" for row in found) == 1 for found in by_id.values()), "not one answer"
        answered = {identity for identity, status in statuses.items() if status == 200}
        assert answered <= by_id.keys(), "an answered request has no row"
        assert books.keys() <= by_id.keys(), "a counted request has no row"
        escalated = sum(self._check_calls(found, books.get(identity, [])) for identity, found in by_id.items())
        self._check_sums(team, rows, len(by_id))
        audit.verify(reader)
        outcomes = Counter(found[0].outcome for found in by_id.values())
        return Outcome(budget, account.spent, Counter(statuses.values()), outcomes, escalated, kills, len(rows))

    def _check_calls(self, rows: list[Row], counted: list[list[int]]) -> bool:
        """One request's rows against what the backends counted of it; returns whether it was escalated."""
        told = Counter((f"b{port}", prompt, completion) for port, prompt, completion in counted)
        exact = Counter((row.backend, row.prompt, row.completion) for row in rows if row.exact and row.backend)
        # An answer without tokens is a call that failed or was never sent: no backend counts that.
        exact = Counter({call: times for call, times in exact.items() if call[1] or call[2]})
        assert not exact - told, f"{rows[0].request_id}: {exact} is not in {told}"
        assert all(row.excess == 0 for row in rows)
        for row in rows:
            if row.exact and row.backend:
                assert row.cost == self._prices[int(row.backend[1:])].cost(row.prompt, 0, row.completion)
        outcome = rows[0].outcome
        if outcome == "ok":
            assert exact == told, f"{rows[0].request_id}: {exact} is not {told}"
        elif outcome == "lost":
            used = [sum(one[column] for one in counted) for column in (1, 2)]
            true_cost = sum(self._prices[port].cost(prompt, 0, completion) for port, prompt, completion in counted)
            (row,) = rows
            assert row.prompt >= used[0] and row.completion >= used[1] and row.cost >= true_cost
        return any(row.kind == "escalated-from" for row in rows)

    def _check_sums(self, team: str, rows: list[Row], requests: int) -> None:
        expected = (
            requests,
            sum(row.prompt for row in rows),
            sum(row.completion for row in rows),
            sum(row.cost for row in rows),
        )
        columns: tuple[admin_books.Column, ...] = ("team", "tier", "backend", "key", "outcome", "kind")
        for column in columns:
            found = admin_books.sums(self.store.reader, (column,), conditions={"team": team})
            names = ("requests", "prompt_tokens", "completion_tokens", "cost")
            assert tuple(sum(one[name] for one in found) for name in names) == expected, f"sums by {column} differ"


def main() -> None:
    """As many trials as asked for; one line each, and a sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a trial")
    store = parser.add_mutually_exclusive_group()
    store.add_argument("--store", help="a PostgreSQL URL; default: an SQLite file")
    store.add_argument("--postgres", action="store_true", help="start a PostgreSQL server and use it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new trial after this time")
    parser.add_argument("--out", type=Path, help="file that gets a row for each trial")
    asked = parser.parse_args()
    kind = "postgresql" if asked.store or asked.postgres else "sqlite"
    done = _seeds_done(asked, kind)
    left = [seed for seed in range(asked.seed, asked.seed + asked.trials) if seed not in done]
    with contextlib.ExitStack() as stack:
        place = asked.store or f"{stack.enter_context(tempfile.TemporaryDirectory())}/gateway.db"
        if asked.postgres:
            place = stack.enter_context(PostgresServer()).new_database()
        _run(asked, left, kind, place)


def _seeds_done(asked: argparse.Namespace, kind: str) -> set[int]:
    """The trials of the same size, store and code that stand in the file."""
    if asked.out is None or not asked.out.exists():
        return set()
    same = ("trial", kind, asked.clients, asked.requests, source_digest(SOURCES))
    found = read_rows([asked.out])
    return {row["seed"] for row in found if identity(row, ("op", "store", "clients", "requests", "source")) == same}


def _run(asked: argparse.Namespace, seeds: list[int], kind: str, place: str) -> None:
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    rows = None if asked.out is None else RowFile(asked.out)
    about = facts(["python", "-m", MODULE, *sys.argv[1:]], sources=SOURCES)
    trials = Trials(place)
    try:
        for seed in seeds:
            if time.monotonic() - begun > asked.seconds:
                break
            started = time.monotonic()
            outcome = trials.run(seed, asked.clients, asked.requests, random.Random(seed).randint(1, 3))
            outcomes.append(outcome)
            print(f"{seed}: {outcome}", flush=True)
            if rows is not None:
                row = {"op": "trial", "store": kind, "clients": asked.clients, "requests": asked.requests, "seed": seed}
                took = {"seconds": round(time.monotonic() - started, 1), "load_average": os.getloadavg()[0]}
                rows.append([{**row, **vars(outcome), **took, "time": int(time.time()), **about}])
    finally:
        trials.close()
    requests = sum((outcome.rows for outcome in outcomes), Counter[str]())
    print(
        f"{len(outcomes)} trials, {sum(one.kills for one in outcomes)} kills, {requests.total()} requests settled "
        f"{dict(requests)}, {sum(one.escalated for one in outcomes)} escalated; no budget exceeded"
    )


if __name__ == "__main__":
    main()
