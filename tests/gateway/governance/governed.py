"""A gateway process with governance, its store opened beside it as a command would, and keys made in it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.gateway.running import RunningGateway
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.governance import accounts, keys
from tokenmill.engine.gateway.governance.accounts import Account, Limits
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store

MASTER_KEY = "a-master-key-for-tests"
CHAT = "/v1/chat/completions"


def options(place: str, **fields: Any) -> Options:
    """Governance in this store, with the tests' master key."""
    return Options(place, digest(MASTER_KEY), **fields)


@dataclass
class Row:
    """A row of the ledger."""

    prompt: int
    cached: int
    completion: int
    exact: bool
    cost: int
    excess: int
    outcome: str
    status: int
    backend: str
    attempts: int
    tier: str
    kind: str


@dataclass
class Governed:
    """The process and its store."""

    gateway: RunningGateway
    store: Store

    def key(self, limits: Limits | None = None, **fields: Any) -> tuple[str, str]:
        """A new key: (its id, the key)."""
        return self.store.write_now(lambda connection: keys.create(connection, "test", limits=limits, **fields))

    def team(self, limits: Limits) -> str:
        """A new team's id."""
        return self.store.write_now(lambda connection: accounts.create(connection, "team", "T", None, limits, "test"))

    def account(self, identity: str) -> Account:
        """An account as it stands."""
        return accounts.find(self.store.reader, identity)

    def ask(self, key: str, body: Any, path: str = CHAT) -> tuple[int, dict[str, str], bytes]:
        """One request with a key: (status, headers, body)."""
        return self.gateway.post(path, body, authorization=f"Bearer {key}")

    def ledger(self, key_id: str) -> list[Row]:
        """The key's rows, the oldest first."""
        rows = self.store.reader.execute(
            "SELECT prompt_tokens, cached_tokens, completion_tokens, exact, cost, excess, outcome, status, backend, "
            "attempts, tier, kind FROM ledger WHERE key_id = ? ORDER BY ended_at, call",
            (key_id,),
        )
        return [Row(*row[:3], bool(row[3]), *row[4:]) for row in rows]


@contextlib.contextmanager
def governing(place: str, *backends: Backend, **more: Any) -> Iterator[Governed]:
    """A gateway with these backends and its books in this store; `more` is told to `RunningGateway`."""
    with (
        RunningGateway(*backends, governance=options(place), key=MASTER_KEY, **more) as gateway,
        contextlib.closing(Store(place, SCHEMA)) as store,
    ):
        yield Governed(gateway, store)
