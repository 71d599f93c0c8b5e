"""Trials: many clients spend one budget through two gateway workers, which are killed at random moments.

Every trial has a team with a budget and keys of its own; clients ask until each has asked its share, over plain,
streamed, retried, escalated and abandoned requests. Workers get SIGKILL and are started again. Afterwards, the team's
account, the ledger, the audit trail and the backend's own books must agree; `Trials.check` says on what.

    python -m tests.gateway.governance.trial --trials 200 --clients 512 [--store postgresql://...]
"""

import argparse
import asyncio
import json
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
from typing import Any

import aiohttp

from tests.gateway.governance.governed import options
from tests.gateway.running import wait_until
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


@dataclass
class Outcome:
    """What one trial came to."""

    budget: int
    spent: int
    statuses: Counter[int]
    rows: Counter[str]
    escalated: int
    kills: int


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
        * Every request that was answered with 200 has one row; every one that the backend counted has one, too.
        * Requests that ended well have the backends' own counts, and cost what these cost at each backend.
        * Requests that were lost with their worker are charged no less than that.
        * Nothing is reserved any more; the audit trail is whole.
        """
        with urllib.request.urlopen(self._books_url) as answer:  # noqa: S310
            books: dict[str, list[list[int]]] = json.load(answer)
        reader = self.store.reader
        rows = reader.execute(
            "SELECT request_id, key_id, prompt_tokens, completion_tokens, exact, cost, excess, outcome "
            "FROM ledger WHERE team = ?",
            (team,),
        ).fetchall()
        account = accounts.find(reader, team)
        assert account.spent <= budget, f"{account.spent} spent of {budget}"
        assert account.reserved == 0
        assert account.spent == sum(row[5] for row in rows)
        for key_id in key_ids:
            one = accounts.find(reader, key_id)
            assert (one.spent, one.reserved) == (sum(row[5] for row in rows if row[1] == key_id), 0)
        by_id = {row[0]: row for row in rows}
        assert len(by_id) == len(rows), "a request has two rows"
        answered = {identity for identity, status in statuses.items() if status == 200}
        assert answered <= by_id.keys(), "an answered request has no row"
        assert books.keys() <= by_id.keys(), "a counted request has no row"
        escalated = 0
        for identity, _, prompt, completion, exact, cost, excess, outcome in rows:
            assert excess == 0
            counted = books.get(identity, [])
            used = (sum(one[1] for one in counted), sum(one[2] for one in counted))
            true_cost = sum(self._prices[port].cost(prompt, 0, completion) for port, prompt, completion in counted)
            if outcome == "ok":
                assert exact
                assert (prompt, completion) == used, f"{identity}: {(prompt, completion)} is not {used}"
                assert cost == true_cost, f"{identity}: {cost} is not {true_cost}"
                escalated += len(counted) > 1
            elif outcome == "lost":
                assert prompt >= used[0] and completion >= used[1] and cost >= true_cost
        audit.verify(reader)
        outcomes = Counter(row[7] for row in rows)
        return Outcome(budget, account.spent, Counter(statuses.values()), outcomes, escalated, kills)


def main() -> None:
    """As many trials as asked for; one line each, and a sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a trial")
    parser.add_argument("--store", help="a PostgreSQL URL; default: an SQLite file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new trial after this time")
    asked = parser.parse_args()
    begun = time.monotonic()
    done, kills, escalated, rows = 0, 0, 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(asked.store or f"{folder}/gateway.db")
        try:
            for seed in range(asked.seed, asked.seed + asked.trials):
                if time.monotonic() - begun > asked.seconds:
                    break
                outcome = trials.run(seed, asked.clients, asked.requests, random.Random(seed).randint(1, 3))
                done, kills, rows = done + 1, kills + outcome.kills, rows + outcome.rows
                escalated += outcome.escalated
                print(f"{seed}: {outcome}", flush=True)
        finally:
            trials.close()
    print(
        f"{done} trials, {kills} kills, {rows.total()} requests settled {dict(rows)}, {escalated} escalated; "
        "no budget exceeded"
    )


if __name__ == "__main__":
    main()
