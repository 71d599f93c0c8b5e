"""What the admin API does to the store, on SQLite and on a real PostgreSQL server."""

import asyncio
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tokenmill import cli
from tokenmill.engine.gateway.admin import books, canaries, endpoints, keyring, roles, tables, views
from tokenmill.engine.gateway.admin.endpoint import Call
from tokenmill.engine.gateway.admin.roles import Actor
from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.accounts import Account, Limits
from tokenmill.engine.gateway.governance.guesses import Guesses
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import InputError

if TYPE_CHECKING:
    from starlette.requests import Request

    from tokenmill.engine.gateway.governance.service import Governance


@pytest.fixture
def administered(store: Store) -> Store:
    """A store of each kind with the tables of administration."""
    tables.prepare(store)
    tables.prepare(store)  # every worker does
    return store


def test_roles_rotation_and_changes(administered: Store) -> None:
    write, reader = administered.write_now, administered.reader
    identity, first = write(lambda c: keys.create(c, "test", name="a", models=["m"]))
    guesses = Guesses(Options("unused", digest("the-master-key-of-tests")))
    write(lambda c: roles.give(c, identity, "auditor", "test"))
    assert roles.identify(reader, guesses, first) == roles.Actor(identity, "auditor")
    second = write(lambda c: keyring.rotate(c, identity, "test"))
    assert roles.identify(reader, guesses, first) is None
    assert keyring.named(reader, second).id == identity == keyring.named(reader, digest(second)).id
    write(lambda c: keyring.change(c, identity, "test", name="b", models=None, metadata={"x": 1}, expires_at=now_ms()))
    changed = keys.by_id(reader, identity)
    assert (changed.models, changed.metadata, changed.refusal(now_ms())) == (None, {"x": 1}, "has expired")
    assert keyring.aliased(reader, "b") == [identity]
    with pytest.raises(InputError, match="has expired"):
        write(lambda c: keyring.rotate(c, identity, "test"))
    assert audit.verify(reader).sequence == 4


def test_period_that_is_over_is_followed_by_the_one_that_runs(administered: Store) -> None:
    """No request has come since: what is kept is of the old period."""
    hour, began = 3_600_000, now_ms() - 3_600_000 * 5 // 2
    identity, _ = administered.write_now(lambda c: keys.create(c, "test", limits=Limits(hard_limit=9, period_ms=hour)))
    update = "UPDATE accounts SET period_start = ?, spent = 7, soft_reached_at = 1 WHERE id = ?"
    administered.write_now(lambda c: c.execute(update, (began, identity)))
    account = accounts.find(administered.reader, identity)
    shown = views.account(account)
    assert (shown["period_end"], shown["spent_dollars"]) == (views.iso(began + 3 * hour), 0)
    assert shown["soft_limit_reached_at"] is None
    seen = views.litellm_key(administered.reader, keys.by_id(administered.reader, identity))
    assert seen["budget_reset_at"] == shown["period_end"]
    ends = [account.runs_until(began + after) for after in (-1, 0, hour - 1, hour)]
    assert ends == [began + hour, began + hour, began + hour, began + 2 * hour]


def test_canaries(administered: Store) -> None:
    administered.write_now(lambda c: canaries.put(c, "b", 0.25, "test"))
    administered.write_now(lambda c: canaries.put(c, "c", None, "test"))
    assert canaries.shares(administered.reader) == {"b": 0.25, "c": None}
    administered.write_now(lambda c: canaries.clear(c, "b", "test"))
    assert canaries.shares(administered.reader) == {"c": None}


def test_questions_to_an_empty_ledger(administered: Store) -> None:
    reader = administered.reader
    assert books.sums(reader, ())[0]["requests"] == 0
    assert books.sums(reader, ("team", "day")) == []
    assert len(books.minutes(reader, 60, now_ms())) == 60
    assert books.latencies(reader, 0) == {}


@pytest.mark.parametrize("limit", ["-1", "0", str(10**30)])
def test_the_command_lists_so_many_rows(administered: Store, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    assert cli.main(["admin", "--store", str(administered.place), "audit", "list", "--limit", limit]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--limit {limit} is outside 1 to 1000000" in line


def test_the_command_takes_either(administered: Store, capsys: pytest.CaptureFixture[str]) -> None:
    administered.write_now(lambda c: accounts.create(c, "team", "T", None, Limits(), "test", "t-1"))
    assert cli.main(["admin", "--store", str(administered.place), "team", "list"]) == 0
    assert "t-1" in capsys.readouterr().out


def test_keys_and_accounts_are_listed_beside_the_event_loop(
    administered: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thousands, each with its account and role, it takes long."""
    team = administered.write_now(lambda c: accounts.create(c, "team", "", None, Limits(), "test"))
    key = administered.write_now(lambda c: keys.create(c, "test"))[0]
    threads: list[int] = []
    shown = views.account

    def show(found: Account) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return shown(found)

    monkeypatch.setattr(views, "account", show)
    governance = cast("Governance", SimpleNamespace(store=administered))
    request = cast("Request", SimpleNamespace(query_params={}))
    call = Call(Actor("master", "admin"), governance, request)
    assert [one["id"] for one in asyncio.run(endpoints.list_keys(call))["keys"]] == [key]
    assert [one["id"] for one in asyncio.run(endpoints.list_accounts(call))["accounts"]] == [team]
    assert len(threads) == 2 and threading.get_ident() not in threads
