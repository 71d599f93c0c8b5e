"""Organisations, teams, apps, keys, ledger, audit trail and canaries over JSON."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import orjson
from starlette.responses import Response

from tokenmill.engine.gateway.admin import books, canaries, keyring, roles, scope, views
from tokenmill.engine.gateway.admin.bodies import AccountBody, CanaryBody, KeyBody, LimitsBody, RoleBody
from tokenmill.engine.gateway.admin.duration import milliseconds
from tokenmill.engine.gateway.admin.endpoint import Call, Endpoint, Parameter
from tokenmill.engine.gateway.api_error import ApiError, quote
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.money import dollars
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.request import ON_HANGUP, ClientGoneError
from tokenmill.errors import CheckpointError

T = TypeVar("T")

#: Longest metadata of a key, as JSON, and how deep it may nest.
MOST_METADATA, DEEPEST_METADATA = 16 * 1024, 240
#: Answers and the audit trail put it some levels deeper still, and orjson writes 254.
_LEVELS_AROUND = 254 - DEEPEST_METADATA
#: Nobody on the way keeps an answer: it may hold a new key, or others' books.
NOT_KEPT = {"cache-control": "no-store"}
_WHOLE = {"type": "integer"}
_KINDS = ("organisation", "team", "app")


def checked_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Metadata that is not too long and can be kept as JSON.

    Raises:
        ApiError: 400 when it is or cannot.
    """
    metadata = metadata or {}
    nested: Any = metadata
    for _ in range(_LEVELS_AROUND):
        nested = [nested]
    try:
        written = orjson.dumps(nested)
    except orjson.JSONEncodeError as error:
        raise ApiError(
            400,
            f"`metadata` cannot be kept: {str(error).lower()}; its integers have at most 64 bits, its objects and "
            f"lists at most {DEEPEST_METADATA} levels.",
            param="metadata",
        ) from None
    if len(written) - 2 * _LEVELS_AROUND > MOST_METADATA:
        raise ApiError(400, f"`metadata` is longer than {MOST_METADATA} bytes as JSON.", param="metadata")
    return metadata


async def in_thread(call: Call, read: Callable[[Connection], T]) -> T:
    """A query, on a connection and in a thread of its own: requests to models go on."""

    def run() -> T:
        connection = call.governance.store.connect_reader()
        try:
            return read(connection)
        finally:
            connection.close()

    return await asyncio.to_thread(run)


async def long_read(call: Call, read: Callable[[Connection], T]) -> T:
    """A query over all of the books: see `LongReads`. It ends when the client hangs up."""
    reading = asyncio.ensure_future(call.governance.long_reads.run(read))
    call.request.scope[ON_HANGUP](reading.cancel)
    try:
        return await reading
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ClientGoneError from None


async def list_accounts(call: Call) -> Any:
    """All accounts but keys: there may be many thousands."""
    kind = call.query("kind")
    if kind is not None and kind not in _KINDS:
        raise ApiError(400, f"`kind` is one of {', '.join(_KINDS)}; not {quote(kind)}.", param="kind")

    def read(connection: Connection) -> list[dict[str, Any]]:
        seen = None if call.actor.scope is None else scope.below(connection, call.actor.scope)
        found = [one for one in accounts.every(connection) if seen is None or one.id in seen]
        return [views.account(one) for one in found if kind is None or one.kind == kind]

    return {"accounts": await in_thread(call, read)}


async def create_account(call: Call) -> Any:
    """A new account."""
    body: AccountBody = call.body
    store = call.governance.store
    identity = await store.write(
        lambda connection: accounts.create(
            connection, body.kind, body.name, body.parent, body.limits.limits(), call.by, body.id
        )
    )
    return views.account(accounts.find(store.reader, identity))


async def show_account(call: Call) -> Any:
    """One account."""
    return views.account(scope.account(call.governance.store.reader, call, call.path("account")))


async def set_limits(call: Call) -> Any:
    """Replaces an account's limits."""
    body: LimitsBody = call.body
    store, account = call.governance.store, call.path("account")
    await store.write(partial(accounts.set_limits, account=account, limits=body.limits(), actor=call.by))
    return views.account(accounts.find(store.reader, account))


async def list_keys(call: Call) -> Any:
    """All keys: there may be many thousands."""

    def read(connection: Connection) -> list[dict[str, Any]]:
        seen = None if call.actor.scope is None else scope.below(connection, call.actor.scope)
        return [views.key(connection, key) for key in keys.every(connection) if seen is None or key.id in seen]

    return {"keys": await in_thread(call, read)}


async def create_key(call: Call) -> Any:
    """A new key; the answer is the only place where it ever stands."""
    body: KeyBody = call.body
    metadata = checked_metadata(body.metadata)

    def make(connection: Connection) -> tuple[str, str]:
        models, kept = scope.restricted(connection, call, body.models, metadata, body.role)
        identity, secret = keys.create(
            connection,
            call.by,
            name=body.name,
            parent=scope.parent(connection, call, body.parent),
            models=models,
            limits=body.limits.limits(),
            lifetime_ms=None if body.duration is None else milliseconds(body.duration),
            metadata=kept,
        )
        if body.role is not None:
            roles.give(connection, identity, body.role, call.by)
        return identity, secret

    store = call.governance.store
    identity, secret = await store.write(make)
    return {**views.key(store.reader, keys.by_id(store.reader, identity)), "key": secret}


async def show_key(call: Call) -> Any:
    """One key."""
    reader = call.governance.store.reader
    return views.key(reader, scope.key(reader, call, call.path("key")))


async def revoke_key(call: Call) -> Any:
    """Revokes a key."""

    def run(connection: Connection) -> None:
        scope.revocable(connection, call, call.path("key"))
        keys.revoke(connection, call.path("key"), call.by)

    await call.governance.store.write(run)
    return await show_key(call)


async def rotate_key(call: Call) -> Any:
    """A new secret for a key; the old one is refused at once."""
    secret = await call.governance.store.write(partial(keyring.rotate, key=call.path("key"), actor=call.by))
    return {**await show_key(call), "key": secret}


async def set_role(call: Call) -> Any:
    """Gives or takes a role."""
    body: RoleBody = call.body
    await call.governance.store.write(partial(roles.give, key=call.path("key"), role=body.role, actor=call.by))
    return await show_key(call)


async def ledger(call: Call) -> Any:
    """Sums over the ledger, as JSON or CSV."""
    named = [name for name in (call.query("by") or "").split(",") if name]
    unknown = [name for name in named if name not in books.COLUMNS]
    if unknown or len(set(named)) < len(named):
        raise ApiError(
            400, f"`by` takes {', '.join(books.COLUMNS)}, each once; not {quote(','.join(named))}.", param="by"
        )
    by = cast("list[books.Column]", named)
    shape = call.query("format") or "json"
    if shape not in ("json", "csv"):
        raise ApiError(400, "`format` is json or csv.", param="format")
    conditions: dict[books.Column, str] = {
        column: value for column in books.COLUMNS if column != "day" and (value := call.query(column))
    }
    most = 2**53
    span = books.Span(call.number("since", None, 0, most), call.number("until", None, 0, most))
    limit = call.number("limit", 1000, 1, 10_000)
    assert limit is not None

    def read(connection: Connection) -> list[dict[str, Any]]:
        return books.sums(connection, by, span, scope.conditions(connection, call, conditions), limit)

    rows = await long_read(call, read)
    if shape == "csv":
        shown = [{**row, "cost_dollars": f"{dollars(row['cost']):.8f}"} for row in rows]
        text = books.as_csv(shown, (*by, *books.SUM_NAMES[:-1], "cost_dollars"))
        return Response(text, media_type="text/csv; charset=utf-8", headers=NOT_KEPT)
    return {"by": by, "rows": [{**row, "cost_dollars": dollars(row["cost"])} for row in rows]}


async def audit_rows(call: Call) -> Any:
    """Rows of the audit trail, the oldest first."""
    after = call.number("after", 0, 0, 2**53)
    limit = call.number("limit", 100, 1, 1000)
    query = (
        "SELECT sequence, at, actor, action, subject, details, hash FROM audit WHERE sequence > ? "
        "ORDER BY sequence LIMIT ?"
    )
    rows = await in_thread(call, lambda connection: connection.execute(query, (after, limit)).fetchall())
    return {
        "rows": [
            {
                "sequence": sequence,
                "at": views.iso(at),
                "actor": actor,
                "action": action,
                "subject": subject,
                "details": orjson.loads(details),
                "hash": hashed,
            }
            for sequence, at, actor, action, subject, details, hashed in rows
        ]
    }


async def audit_verify(call: Call) -> Any:
    """Checks the whole trail."""
    expected = call.query("expected")
    try:
        head = await long_read(call, lambda connection: audit.verify(connection, expected))
    except CheckpointError as error:
        return {"intact": False, "problem": str(error), "rows": None, "head": None}
    return {"intact": True, "problem": None, "rows": head.sequence, "head": head.hash}


async def settings(call: Call) -> Any:
    """What the configuration says about governance; secrets excepted."""
    options = call.governance.options
    return {
        "store": "postgresql" if "://" in options.store else "sqlite",
        "completion_bound": options.completion_bound,
        "retention_days": options.retention_days,
    }


class Backends:
    """What concerns the backends of a gateway.

    Args:
        portfolio: The backends as this worker sees them.
    """

    def __init__(self, portfolio: Portfolio) -> None:
        self._portfolio = portfolio

    def _shown(self, shares: dict[str, float | None]) -> list[dict[str, Any]]:
        return [
            {
                "name": target.backend.name,
                "tier": target.backend.tier,
                "up": target.ready,
                "reason": target.reason,
                "outstanding": target.outstanding,
                "version": target.backend.version,
                "zone": target.backend.zone,
                "canary": shares.get(target.backend.name, target.backend.canary),
                "configured_canary": target.backend.canary,
            }
            for target in self._portfolio.targets
        ]

    async def show(self, call: Call) -> Any:
        """All backends."""
        return {"backends": self._shown(canaries.shares(call.governance.store.reader))}

    async def set_canary(self, call: Call) -> Any:
        """Changes a share for every worker."""
        body: CanaryBody = call.body
        await call.governance.store.write(
            partial(canaries.put, backend=self._named(call), share=body.share, actor=call.by)
        )
        return await self.show(call)

    async def clear_canary(self, call: Call) -> Any:
        """Goes back to the configured share."""
        await call.governance.store.write(partial(canaries.clear, backend=self._named(call), actor=call.by))
        return await self.show(call)

    def _named(self, call: Call) -> str:
        name = call.path("backend")
        if name not in {target.backend.name for target in self._portfolio.targets}:
            raise ApiError(
                404, f"There is no backend `{quote(name)}`; GET /admin/backends lists them.", code="not_found"
            )
        return name

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Their part of the table."""
        canary = "/admin/backends/{backend}/canary"
        return (
            Endpoint("GET", "/admin/backends", "Every backend with its state and canary share.", self.show, "auditor"),
            Endpoint("PUT", canary, "Gives a backend a share of its tier, in every worker; 0 rolls it back.",
                     self.set_canary, body=CanaryBody),
            Endpoint("DELETE", canary, "Goes back to the configured share.", self.clear_canary),
        )  # fmt: skip


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/admin/accounts", "Organisations, teams and apps.", list_accounts, "auditor",
             query=(Parameter("kind", "Only these.", {"enum": list(_KINDS)}),), scoped=True),
    Endpoint("POST", "/admin/accounts", "Makes an organisation, team or app.", create_account, body=AccountBody,
             status=201),
    Endpoint("GET", "/admin/accounts/{account}", "One account, also a key's.", show_account, "auditor",
             scoped=True),
    Endpoint("PUT", "/admin/accounts/{account}/limits", "Replaces an account's limits.", set_limits, body=LimitsBody),
    Endpoint("GET", "/admin/keys", "All keys, without their secrets.", list_keys, "auditor", scoped=True),
    Endpoint("POST", "/admin/keys", "Makes a key; it is shown once.", create_key, body=KeyBody, status=201,
             scoped=True),
    Endpoint("GET", "/admin/keys/{key}", "One key.", show_key, "auditor", scoped=True),
    Endpoint("DELETE", "/admin/keys/{key}", "Revokes a key.", revoke_key, scoped=True),
    Endpoint("POST", "/admin/keys/{key}/rotate", "A new secret; the old one is refused at once.", rotate_key),
    Endpoint("PUT", "/admin/keys/{key}/role", "Gives a key a role, or takes it.", set_role, body=RoleBody),
    Endpoint("GET", "/admin/ledger", "Requests, tokens and cost, summed.", ledger, "auditor", scoped=True, query=(
        Parameter("by", "Columns to group by, comma-separated: " + ", ".join(books.COLUMNS)),
        Parameter("since", "Milliseconds since 1970; only what ended from then on.", _WHOLE),
        Parameter("until", "Milliseconds since 1970; only what ended before.", _WHOLE),
        Parameter("limit", "Most rows, the dearest first; by default 1000.", _WHOLE),
        Parameter("format", "`json` or `csv`.", {"enum": ["json", "csv"]}),
        *(Parameter(column, f"Only this {column}.") for column in books.COLUMNS if column != "day"),
    )),
    Endpoint("GET", "/admin/audit", "Rows of the audit trail, the oldest first.", audit_rows, "auditor", query=(
        Parameter("after", "Only rows behind this number.", _WHOLE),
        Parameter("limit", "Most rows.", _WHOLE),
    )),
    Endpoint("GET", "/admin/audit/verify", "Checks the audit trail's hash chain.", audit_verify, "auditor", query=(
        Parameter("expected", "A head that was noted earlier and must be in the trail."),
    )),
    Endpoint("GET", "/admin/settings", "How governance is configured.", settings, "auditor"),
)  # fmt: skip
