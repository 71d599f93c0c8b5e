"""Keys and accounts: shown once, kept as hashes, refused when expired or revoked; wrong input is one line."""

import contextlib
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.governance import accounts, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.store import Store
from tokenmill.errors import ConfigurationError, InputError


def test_key_is_found_by_its_hash_and_kept_nowhere(store: Store) -> None:
    made = [store.write_now(lambda connection: keys.create(connection, "test", models=["tiny"])) for _ in range(3)]
    assert len({key for _, key in made}) == 3
    for identity, key in made:
        assert key.startswith("sk-") and len(key) > 40
        found = keys.by_hash(store.reader, keys.digest(key))
        assert found is not None and found.id == identity and found.models == ("tiny",)
    assert keys.by_hash(store.reader, keys.digest("sk-guessed")) is None
    tables = ("keys", "accounts", "audit")
    content = str([store.reader.execute(f"SELECT * FROM {table}").fetchall() for table in tables])  # noqa: S608
    for identity, key in made:
        assert identity in content
        assert key.removeprefix("sk-")[:12] not in content


def test_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "governance" / "gateway.db"
    opened = Store(path, SCHEMA)
    _, key = opened.write_now(lambda connection: keys.create(connection, "test"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    content = b"".join(one.read_bytes() for one in path.parent.iterdir() if one.is_file())
    assert key.removeprefix("sk-")[:12].encode() not in content
    opened.close()


def test_expired_and_revoked_keys_are_refused(store: Store) -> None:
    identity, _ = store.write_now(lambda connection: keys.create(connection, "test", lifetime_ms=50_000))
    assert keys.by_id(store.reader, identity).refusal(now_ms()) is None
    assert keys.by_id(store.reader, identity).refusal(now_ms() + 50_000) == "has expired"
    store.write_now(lambda connection: keys.revoke(connection, identity, "test"))
    first = keys.by_id(store.reader, identity)
    assert first.refusal(now_ms()) == "was revoked"
    store.write_now(lambda connection: keys.revoke(connection, identity, "test"))
    assert keys.by_id(store.reader, identity) == first


def test_accounts_form_a_tree(store: Store) -> None:
    def grow(connection: object) -> str:
        accounts.create(connection, "organisation", "Acme", None, Limits(), "test", "acme")  # type: ignore[arg-type]
        accounts.create(connection, "team", "Search", "acme", Limits(hard_limit=5), "test", "search")  # type: ignore[arg-type]
        return keys.create(connection, "test", parent="search")[0]  # type: ignore[arg-type]

    key = store.write_now(grow)
    assert [account.id for account in accounts.chain(store.reader, key)] == [key, "search", "acme"]
    assert [account.id for account in accounts.several(store.reader, ["acme", key])] == ["acme", key]
    with pytest.raises(InputError, match="no account 'gone'"):
        accounts.several(store.reader, ["acme", "gone", key])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda connection: keys.create(connection, "test", parent="nobody"), "no account 'nobody'"),
        (lambda connection: keys.create(connection, "test", lifetime_ms=0), "lifetime of 0"),
        (lambda connection: keys.revoke(connection, "key-none", "test"), "no key 'key-none'"),
        (lambda connection: accounts.create(connection, "team", "x", None, Limits(), "test", "a b"), "is no id"),
        (lambda _: Limits(hard_limit=-1), "hard_limit=-1"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_trace(store: Store, wrong: Callable[..., object], says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        store.write_now(wrong)
    assert "\n" not in str(raised.value)
    assert store.reader.execute("SELECT count(*) FROM accounts").fetchone() == (0,)
    assert store.write_now(lambda connection: keys.create(connection, "test"))[1].startswith("sk-")


def test_the_least_and_the_most_of_each_limit(store: Store) -> None:
    most = 2**53
    for limits in (Limits(0, 0, 1, 0, 0, 0), Limits(most, most, most, most, most, most)):
        store.write_now(
            lambda connection, limits=limits: accounts.create(connection, "team", "x" * 200, None, limits, "test")  # type: ignore[misc]
        )
    assert [account.limits.hard_limit for account in accounts.every(store.reader)] in ([0, most], [most, 0])
    for name in (
        "hard_limit", "soft_limit", "period_ms", "requests_per_minute", "tokens_per_minute", "requests_at_once"
    ):  # fmt: skip
        for value in (0 if name == "period_ms" else -1, most + 1):
            with pytest.raises(InputError, match=f"{name}={value} is outside"):
                Limits(**{name: value})
    with pytest.raises(InputError, match="201 characters is longer than 200"):
        store.write_now(lambda connection: accounts.create(connection, "team", "x" * 201, None, Limits(), "test"))


def test_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_text("no database at all, but long enough to be looked at" * 10, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Store(path, SCHEMA)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        (["CREATE TABLE keys (a)"], "table keys already exists"),
        (["CREATE TABLE schema_version (version TEXT)", "INSERT INTO schema_version VALUES ('a')"], "another program"),
        (["CREATE TABLE schema_version (id INTEGER)"], "no such column"),
    ],
)
def test_file_of_another_program_is_one_line(tmp_path: Path, tables: list[str], says: str) -> None:
    path = tmp_path / "x.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        for statement in tables:
            other.execute(statement)
        other.commit()
    with pytest.raises(ConfigurationError, match=says):
        Store(path, SCHEMA)
