"""`tokenmill admin`: accounts, keys, canaries, ledger and audit trail, on the store itself; no gateway need run."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from tokenmill.engine.gateway.admin import books, canaries, keyring, roles, tables, views
from tokenmill.engine.gateway.admin.duration import milliseconds
from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.accounts import Kind, Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.money import dollars, micro_cents
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import CheckpointError, ConfigurationError, InputError

ACTOR = "admin command"
_Command = Callable[[Store, argparse.Namespace], "Answer"]


class Answer:
    """What a command found.

    Args:
        content: For `--json`.
        columns: Heading to the field of a row; None: the content is one thing.
        note: A line for people.
        status: Exit status.
    """

    def __init__(self, content: Any, columns: dict[str, str] | None = None, note: str = "", status: int = 0) -> None:
        self.content = content
        self.columns = columns
        self.note = note
        self.status = status


_ACCOUNT_COLUMNS = {
    "id": "id", "kind": "kind", "above": "parent", "name": "name", "spent $": "spent_dollars",
    "hard limit $": "limits.hard_limit_dollars", "soft limit $": "limits.soft_limit_dollars",
    "period": "limits.period", "requests/min": "limits.requests_per_minute", "tokens/min": "limits.tokens_per_minute",
    "at once": "limits.requests_at_once",
}  # fmt: skip
_KEY_COLUMNS = {
    "id": "id", "name": "name", "above": "parent", "state": "state", "role": "role", "models": "models",
    "spent $": "spent_dollars", "hard limit $": "limits.hard_limit_dollars", "expires": "expires_at",
}  # fmt: skip
#: Rows of the audit trail, and sums of the ledger, that are listed at most.
_MOST_ROWS = 1_000_000
_CANARY_COLUMNS = {"backend": "backend", "share": "share"}
_FOLLOWING = "Gateways with this store follow within a second; a name that none of their backends has changes nothing."
_ONCE = "This is the only time that the key is shown; it is kept as a hash."


def _make_account(kind: Kind, store: Store, options: argparse.Namespace) -> Answer:
    make = partial(
        accounts.create,
        kind=kind,
        name=options.name or options.id,
        parent=options.parent,
        limits=_limits(options, Limits()),
        actor=ACTOR,
        account=options.id,
    )
    identity = store.write_now(make)
    return Answer(views.account(accounts.find(store.reader, identity)))


def _list_accounts(kind: Kind, store: Store, _options: argparse.Namespace) -> Answer:
    found = [views.account(one) for one in accounts.every(store.reader) if one.kind == kind]
    return Answer(found, _ACCOUNT_COLUMNS)


def _set_limits(store: Store, options: argparse.Namespace) -> Answer:
    before = accounts.find(store.reader, options.account).limits
    limits = _limits(options, Limits() if options.replace else before)
    store.write_now(partial(accounts.set_limits, account=options.account, limits=limits, actor=ACTOR))
    return Answer(views.account(accounts.find(store.reader, options.account)))


def _make_key(store: Store, options: argparse.Namespace) -> Answer:
    def make(connection: Any) -> tuple[str, str]:
        identity, secret = keys.create(
            connection,
            ACTOR,
            name=options.name or "",
            parent=options.parent,
            models=options.model,
            limits=_limits(options, Limits()),
            lifetime_ms=None if options.duration is None else milliseconds(options.duration),
        )
        if options.role is not None:
            roles.give(connection, identity, options.role, ACTOR)
        return identity, secret

    identity, secret = store.write_now(make)
    shown = {**views.key(store.reader, keys.by_id(store.reader, identity)), "key": secret}
    return Answer(shown, note=_ONCE)


def _list_keys(store: Store, _options: argparse.Namespace) -> Answer:
    return Answer([views.key(store.reader, key) for key in keys.every(store.reader)], _KEY_COLUMNS)


def _revoke_key(store: Store, options: argparse.Namespace) -> Answer:
    found = keyring.named(store.reader, options.key)
    store.write_now(partial(keys.revoke, key=found.id, actor=ACTOR))
    return Answer(views.key(store.reader, keys.by_id(store.reader, found.id)))


def _rotate_key(store: Store, options: argparse.Namespace) -> Answer:
    found = keyring.named(store.reader, options.key)
    secret = store.write_now(partial(keyring.rotate, key=found.id, actor=ACTOR))
    shown = {**views.key(store.reader, keys.by_id(store.reader, found.id)), "key": secret}
    return Answer(shown, note=_ONCE)


def _ledger(store: Store, options: argparse.Namespace) -> Answer:
    by = [name for name in options.by.split(",") if name]
    unknown = [name for name in by if name not in books.COLUMNS]
    if unknown or len(set(by)) < len(by):
        raise InputError(f"--by {options.by!r}: take {', '.join(books.COLUMNS)}, each once, with commas between")
    since = None if options.last is None else now_ms() - milliseconds(options.last)
    rows = books.sums(store.reader, cast("list[books.Column]", by), books.Span(since), limit=_MOST_ROWS)
    shown = [{**row, "cost_dollars": dollars(row["cost"])} for row in rows]
    columns = {name: name for name in (*by, *books.SUM_NAMES[:-1])} | {"cost $": "cost_dollars"}
    return Answer(shown, columns)


def _list_audit(store: Store, options: argparse.Namespace) -> Answer:
    if not 1 <= options.limit <= _MOST_ROWS:
        raise InputError(f"--limit {options.limit} is outside 1 to {_MOST_ROWS}; give a number within")
    query = "SELECT sequence, at, actor, action, subject, details FROM audit ORDER BY sequence DESC LIMIT ?"
    names = ("sequence", "at", "actor", "action", "subject", "details")
    rows = [dict(zip(names, row, strict=True)) for row in store.reader.execute(query, (options.limit,))]
    shown = [{**row, "at": views.iso(row["at"]), "details": json.loads(row["details"])} for row in reversed(rows)]
    return Answer(shown, {name: name for name in names})


def _verify_audit(store: Store, options: argparse.Namespace) -> Answer:
    try:
        head = audit.verify(store.reader, options.expected)
    except CheckpointError as error:
        return Answer({"intact": False, "problem": str(error)}, note=str(error), status=1)
    return Answer(
        {"intact": True, "rows": head.sequence, "head": head.hash},
        note="Keep the head elsewhere and give it to a later check with --expected.",
    )


def _list_canaries(store: Store, _options: argparse.Namespace) -> Answer:
    found = sorted(canaries.shares(store.reader).items())
    return Answer([{"backend": backend, "share": share} for backend, share in found], _CANARY_COLUMNS)


def _put_canary(store: Store, options: argparse.Namespace) -> Answer:
    """Sets a share; None (`promote`): a backend like the others."""
    share = options.share
    if share is not None and not 0 <= share <= 1:
        raise InputError(f"a share of {share}: give a number from 0 (rolled back) to 1")
    store.write_now(partial(canaries.put, backend=options.backend, share=share, actor=ACTOR))
    return Answer({"backend": options.backend, "share": share}, note=_FOLLOWING)


def _clear_canary(store: Store, options: argparse.Namespace) -> Answer:
    if options.backend not in canaries.shares(store.reader):
        raise InputError(f"the share of {options.backend!r} is not changed; `canary list` has those that are")
    store.write_now(partial(canaries.clear, backend=options.backend, actor=ACTOR))
    return Answer({"backend": options.backend, "share": "as configured"}, note=_FOLLOWING)


def _limits(options: argparse.Namespace, base: Limits) -> Limits:
    """The limits that the command line names, the others as before."""

    def money(said: float | None, before: int | None) -> int | None:
        return before if said is None else micro_cents(said)

    return Limits(
        money(options.budget, base.hard_limit),
        money(options.soft_budget, base.soft_limit),
        base.period_ms if options.period is None else milliseconds(options.period),
        base.requests_per_minute if options.rpm is None else options.rpm,
        base.tokens_per_minute if options.tpm is None else options.tpm,
        base.requests_at_once if options.at_once is None else options.at_once,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="tokenmill admin", description=__doc__, epilog="Money is in dollars; periods are 1h, 30d, 2w, 1mo."
    )
    made.add_argument(
        "--store", metavar="PLACE", default="tokenmill.db", help="SQLite file or postgresql:// (default tokenmill.db)"
    )
    made.add_argument("--json", action="store_true", help="answer in JSON")
    made.add_argument("--create", action="store_true", help="make the store's file where it is missing")
    things = made.add_subparsers(metavar="THING", required=True)
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--budget", type=float, metavar="$", help="hard limit a period")
    limits.add_argument("--soft-budget", type=float, metavar="$", help="from here on cheaper tiers are preferred")
    limits.add_argument("--period", metavar="LENGTH", help="after which the budget begins anew")
    limits.add_argument("--rpm", type=int, metavar="N", help="requests per minute")
    limits.add_argument("--tpm", type=int, metavar="N", help="tokens per minute")
    limits.add_argument("--at-once", type=int, metavar="N", help="requests at once")

    kinds: tuple[tuple[str, Kind], ...] = (("org", "organisation"), ("team", "team"), ("app", "app"))
    for word, kind in kinds:
        actions = _thing(things, word, f"{kind}s")
        create = _action(actions, "create", f"make one {kind}", partial(_make_account, kind), limits)
        create.add_argument("id")
        create.add_argument("--name", help="for people; default: the id")
        create.add_argument("--parent", help="the account above it")
        _action(actions, "list", f"all {kind}s", partial(_list_accounts, kind))

    actions = _thing(things, "key", "API keys")
    create = _action(actions, "create", "make a key; it is shown once", _make_key, limits)
    create.add_argument("--name", help="for people")
    create.add_argument("--parent", help="the app, team or organisation above it")
    create.add_argument("--model", action="append", help="a model or tier that it may ask for; repeat; default: all")
    create.add_argument("--duration", metavar="LENGTH", help="how long it is valid; default: until revoked")
    create.add_argument("--role", choices=roles.ROLES, help="what it may do at the admin API and the dashboard")
    _action(actions, "list", "all keys, without their secrets", _list_keys)
    for word, text, run in (
        ("revoke", "make a key invalid for good", _revoke_key),
        ("rotate", "give a key a new secret; the old one is refused at once", _rotate_key),
    ):
        _action(actions, word, text, run).add_argument("key", help="its id, or the key itself")

    change = _action(things, "limits", "set an account's limits; what is not named stays", _set_limits, limits)
    change.add_argument("account", help="id of an organisation, team, app or key")
    change.add_argument("--replace", action="store_true", help="remove the limits that are not named")

    actions = _thing(things, "canary", "shares of canaries that differ from the configuration")
    _action(actions, "list", "all of them", _list_canaries)
    change = _action(actions, "set", "give a backend a share of its tier; 0 rolls it back", _put_canary)
    change.add_argument("backend", help="its name")
    change.add_argument("share", type=float, help="0 to 1")
    change = _action(actions, "promote", "make a canary a backend like the others", _put_canary)
    change.add_argument("backend", help="its name")
    change.set_defaults(share=None)
    _action(actions, "clear", "go back to the configured share", _clear_canary).add_argument("backend", help="its name")

    sums = _action(things, "ledger", "requests, tokens and cost, summed", _ledger)
    sums.add_argument("--by", default="team,app", metavar="COLUMNS", help=f"of {', '.join(books.COLUMNS)}")
    sums.add_argument("--last", metavar="LENGTH", help="only the last 1h, 30d, ...; default: all")

    actions = _thing(things, "audit", "the audit trail")
    _action(actions, "list", "its last rows", _list_audit).add_argument("--limit", type=int, default=20, metavar="N")
    _action(actions, "verify", "check its hash chain", _verify_audit).add_argument(
        "--expected", metavar="HASH", help="a head that was noted earlier and must be in it"
    )
    return made


def _thing(things: Any, word: str, text: str) -> Any:
    return things.add_parser(word, help=text).add_subparsers(metavar="ACTION", required=True)


def _action(
    actions: Any, word: str, text: str, run: _Command, parent: argparse.ArgumentParser | None = None
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(word, help=text, parents=[parent] if parent else [])
    made.set_defaults(run=run)
    return made


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns 0, or 1 when the audit trail was changed.

    Raises:
        ConfigurationError, InputError: The store or an argument is wrong.
    """
    for text in argv:
        # How Python shows bytes of a command line that are no text; no store keeps them.
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"the argument {ascii(text)[:80]} is not in UTF-8; write it so")
    options = parser().parse_args(argv)
    place = options.store if "://" in options.store else Path(options.store).expanduser()
    if isinstance(place, Path) and not place.exists() and not options.create:
        raise ConfigurationError(f"{place} does not exist; name the gateway's store with --store, or add --create")
    store = Store(place, SCHEMA)
    try:
        with store.usable():
            tables.prepare(store)
            answer = cast("_Command", options.run)(store, options)
    finally:
        store.close()
    if options.json:
        sys.stdout.write(json.dumps(answer.content, indent=2, default=str) + "\n")
    else:
        _show(answer)
    return answer.status


def _show(answer: Answer) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240, emoji=False)
    if answer.columns is not None:
        table = Table(box=None, pad_edge=False)
        for heading in answer.columns:
            table.add_column(heading, overflow="fold", no_wrap=heading == "id")
        for row in answer.content:
            table.add_row(*(_cell(_field(row, path)) for path in answer.columns.values()))
        console.print(table, markup=False)
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in answer.content.items():
            for inner, text in value.items() if name == "limits" else ((name, value),):
                table.add_row(inner, _cell(text))
        console.print(table, markup=False)
    if answer.note:
        console.print(answer.note, style="bold", markup=False)


def _field(row: Any, path: str) -> Any:
    for step in path.split("."):
        row = row[step]
    return row


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.8f}".rstrip("0").rstrip(".")
    if isinstance(value, dict):
        value = [f"{name}={inner}" for name, inner in value.items() if inner is not None]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text)
