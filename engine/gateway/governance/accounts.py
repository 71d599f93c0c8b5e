"""Organisations, teams, apps and keys as a tree of accounts: each may have a budget and rate limits of its own.

A request is charged to its key and to every account above it, and must be within the limits of all of them.
"""

import re
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson

from tokenmill.engine.gateway.database import Connection, now_ms, placeholders
from tokenmill.engine.gateway.governance import audit
from tokenmill.errors import InputError

Kind = Literal["organisation", "team", "app", "key"]
#: Which kinds may stand above each.
PARENTS: dict[Kind, tuple[Kind, ...]] = {
    "organisation": (),
    "team": ("organisation",),
    "app": ("team", "organisation"),
    "key": ("app", "team", "organisation"),
}
#: Longest name, in characters.
MOST_NAME = 200
#: The account that requests with the master key are charged to.
MASTER = "master"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
#: Largest value of a 64-bit column that is still added to.
_MOST = 2**53
#: The least value of each limit.
_LOWEST = (
    ("hard_limit", 0),
    ("soft_limit", 0),
    ("period_ms", 1),
    ("requests_per_minute", 0),
    ("tokens_per_minute", 0),
    ("requests_at_once", 0),
)


@dataclass(frozen=True)
class Limits:
    """What an account may use; None: no limit.

    Attributes:
        hard_limit: Micro-cents per period; requests that could exceed it are refused.
        soft_limit: Micro-cents per period; reaching it is recorded, and cheaper tiers are preferred from then on.
        period_ms: Length of the budget's period in milliseconds; None: the budget is for good.
        requests_per_minute: Requests in any 60 seconds.
        tokens_per_minute: Tokens, prompt and completion, in any 60 seconds.
        requests_at_once: Requests under way, over all gateways with this store.
    """

    hard_limit: int | None = None
    soft_limit: int | None = None
    period_ms: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_at_once: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in _LOWEST:
            value = getattr(self, name)
            if value is not None and not lowest <= value <= _MOST:
                raise InputError(f"{name}={value} is outside {lowest} to {_MOST}; give a value within, or none")


@dataclass(frozen=True)
class Account:
    """One account as it stands.

    Attributes:
        spent, reserved: Micro-cents of this period: settled, and held by requests under way.
        period_start: When the period began, in milliseconds.
        soft_reached_at: When the soft limit was reached in this period.
        under_way: Requests that hold a reservation; to be trusted where `requests_at_once` is set.
    """

    id: str
    kind: Kind
    parent: str | None
    name: str
    limits: Limits
    period_start: int
    spent: int
    reserved: int
    soft_reached_at: int | None
    under_way: int = 0

    def renewed(self, now: int) -> bool:
        """Whether its period is over and a new one has begun."""
        return self.limits.period_ms is not None and now >= self.period_start + self.limits.period_ms

    @property
    def period_end(self) -> int | None:
        """When its budget starts anew, in milliseconds; None: never."""
        return None if self.limits.period_ms is None else self.period_start + self.limits.period_ms

    def runs_until(self, now: int) -> int | None:
        """When the period that runs at `now` ends, also where no request has begun it yet."""
        length = self.limits.period_ms
        if length is None:
            return None
        return self.period_start + (max(now - self.period_start, 0) // length + 1) * length


_COLUMNS = (
    "id, kind, parent, name, hard_limit, soft_limit, period_ms, requests_per_minute, tokens_per_minute, "
    "requests_at_once, period_start, spent, reserved, soft_reached_at, under_way"
)


def _account(row: Sequence[Any]) -> Account:
    identity, kind, parent, name = row[:4]
    return Account(identity, kind, parent, name, Limits(*row[4:10]), *row[10:])


def find(connection: Connection, account: str) -> Account:
    """One account.

    Raises:
        InputError: There is none with this id.
    """
    row = connection.execute(f"SELECT {_COLUMNS} FROM accounts WHERE id = ?", (account,)).fetchone()  # noqa: S608
    if row is None:
        raise InputError(missing(account))
    return _account(row)


def missing(account: str) -> str:
    """What is said about an account that does not exist."""
    return f"there is no account {account[:80]!r}; create it first"


def every(connection: Connection) -> list[Account]:
    """All accounts but keys, by kind and id."""
    query = f"SELECT {_COLUMNS} FROM accounts WHERE kind <> 'key' ORDER BY kind, id"  # noqa: S608
    return [_account(row) for row in connection.execute(query)]


def chain(connection: Connection, account: str) -> list[Account]:
    """The account and all above it, the account first."""
    found = [find(connection, account)]
    while (parent := found[-1].parent) is not None:
        found.append(find(connection, parent))
    return found


def create(
    connection: Connection,
    kind: Kind,
    name: str,
    parent: str | None,
    limits: Limits,
    actor: str,
    account: str | None = None,
) -> str:
    """Adds an account and returns its id.

    Args:
        connection: The writer's.
        kind: What it is.
        name: For people.
        parent: The account above it, if any.
        limits: Its limits.
        actor: For the audit trail.
        account: Its id; None: a new one.

    Raises:
        InputError: The id is taken or no id, the name is too long, the parent does not exist or cannot stand above this
            kind.
    """
    account = account if account is not None else f"{kind}-{uuid.uuid4().hex[:12]}"
    if len(name) > MOST_NAME:
        raise InputError(f"a name of {len(name)} characters is longer than {MOST_NAME}; give a shorter one")
    if account == MASTER and kind != "key":
        raise InputError(f"the id {MASTER!r} is the master key's; choose another id")
    if not _ID.fullmatch(account):
        raise InputError(f"{account[:80]!r} is no id; use letters, digits, '.', '_' and '-', at most 63")
    if connection.execute("SELECT 1 FROM accounts WHERE id = ?", (account,)).fetchone():
        raise InputError(f"the account {account!r} exists; choose another id")
    if parent is not None and (above := find(connection, parent).kind) not in PARENTS[kind]:
        allowed = " or ".join(PARENTS[kind]) or "nothing"
        raise InputError(f"{parent!r} is a {above}; above a {kind} stands {allowed}")
    now = now_ms()
    connection.execute(
        "INSERT INTO accounts (id, kind, parent, name, hard_limit, soft_limit, period_ms, requests_per_minute, "
        "tokens_per_minute, requests_at_once, period_start, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (account, kind, parent, name, *asdict(limits).values(), now, now),
    )
    audit.append(connection, actor, f"{kind}.create", account, {"parent": parent, "name": name, **asdict(limits)})
    return account


def set_limits(connection: Connection, account: str, limits: Limits, actor: str) -> None:
    """Replaces an account's limits; what it has spent stays.

    A period of another length began when the one before did; where it would be over already, it begins now.

    Raises:
        InputError: There is no such account.
    """
    found, now = find(connection, account), now_ms()
    before, start, spent = found.limits, found.period_start, found.spent
    if before.period_ms is not None and found.renewed(now):
        # Nobody has asked for anything since: what is kept is of a period that is over.
        start, spent = start + (now - start) // before.period_ms * before.period_ms, 0
    length = limits.period_ms
    if length is not None and now >= start + length:
        start = now
    connection.execute(
        "UPDATE accounts SET hard_limit = ?, soft_limit = ?, period_ms = ?, requests_per_minute = ?, "
        "tokens_per_minute = ?, requests_at_once = ?, period_start = ?, spent = ?, soft_reached_at = NULL WHERE id = ?",
        (*asdict(limits).values(), start, spent, account),
    )
    if limits.requests_at_once is not None:
        count_anew(connection, account)
    audit.append(connection, actor, "limits.set", account, {"before": asdict(before), "after": asdict(limits)})


def count_anew(connection: Connection, account: str | None = None) -> None:
    """Counts requests under way from their reservations: gateways of versions before that free them and do not count.

    Args:
        connection: The writer's, in a transaction.
        account: Whose; None: all whose limit asks for it.
    """
    found: Counter[str] = Counter()
    for chain, count in connection.execute("SELECT chain, count(*) FROM reservations GROUP BY chain"):
        found.update({identity: count for identity, _ in orjson.loads(chain)})
    query = "SELECT id, under_way FROM accounts WHERE requests_at_once IS NOT NULL AND (id = ? OR ?)"
    rows = connection.execute(query, (account or "", account is None)).fetchall()
    wrong = [(found[identity], identity) for identity, count in rows if count != found[identity]]
    connection.executemany("UPDATE accounts SET under_way = ? WHERE id = ?", wrong)


def several(connection: Connection, identities: Sequence[str]) -> list[Account]:
    """These accounts, in this order; one statement.

    Raises:
        InputError: There is none with one of these ids.
    """
    query = f"SELECT {_COLUMNS} FROM accounts WHERE id IN {placeholders(len(identities))}"  # noqa: S608
    found = {row[0]: _account(row) for row in connection.execute(query, identities)}
    if len(found) != len(identities):
        raise InputError(missing(next(identity for identity in identities if identity not in found)))
    return [found[identity] for identity in identities]
