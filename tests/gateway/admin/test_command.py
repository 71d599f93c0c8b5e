"""`tokenmill admin` on a store's file, alone and beside a gateway that serves."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.workers import Workers
from tokenmill import cli


class Admin:
    """The command on one store."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._store = store
        self._capsys = capsys

    def shown(self, *arguments: str, status: int = 0, json_too: bool = False) -> str:
        """What it prints on both streams."""
        more = ["--json"] if json_too else []
        assert cli.main(["admin", "--store", str(self._store), *more, *arguments]) == status
        captured = self._capsys.readouterr()
        return captured.out + captured.err

    def json(self, *arguments: str, status: int = 0) -> Any:
        """Its answer in JSON."""
        return json.loads(self.shown(*arguments, status=status, json_too=True))


@pytest.fixture
def admin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Admin:
    made = Admin(tmp_path / "books.db", capsys)
    made.shown("--create", "org", "create", "acme", "--budget", "100", "--period", "30d")
    return made


def test_accounts_keys_and_limits(admin: Admin) -> None:
    made = admin.json("team", "create", "search", "--parent", "acme", "--budget", "5", "--rpm", "60")
    assert (made["parent"], made["limits"]["hard_limit_dollars"]) == ("acme", 5)
    key = admin.json("key", "create", "--parent", "search", "--model", "a", "--model", "b", "--role", "auditor")
    assert (key["models"], key["role"], key["parent"]) == (["a", "b"], "auditor", "search")
    assert admin.json("limits", "search", "--tpm", "9")["limits"] == {**made["limits"], "tokens_per_minute": 9}
    assert admin.json("limits", "search", "--at-once", "3")["limits"]["requests_at_once"] == 3
    assert "at once" in admin.shown("team", "list")
    assert admin.json("limits", "search", "--replace", "--rpm", "1")["limits"]["hard_limit_dollars"] is None
    rotated = admin.json("key", "rotate", key["key"])
    assert rotated["id"] == key["id"] and rotated["key"] != key["key"]
    assert admin.json("key", "revoke", key["id"])["state"] == "was revoked"
    assert [one["id"] for one in admin.json("key", "list")] == [key["id"]]
    assert [one["id"] for one in admin.json("org", "list")] == ["acme"]


def test_tables_are_for_people(admin: Admin) -> None:
    key = admin.shown("key", "create", "--name", "bot")
    assert "sk-" in key and "only time" in key
    listed = admin.shown("key", "list")
    assert "bot" in listed and "sk-" not in listed
    admin.shown("org", "create", "odd", "--name", "[red]a:key:b[/red] \x1b[31m\u202e")
    assert "  [red]a:key:b[/red] ?[31m?  " in admin.shown("org", "list")
    assert "requests" in admin.shown("ledger", "--by", "team,day", "--last", "30d")
    assert "organisation.create" in admin.shown("audit", "list")


def test_canaries_are_set_promoted_and_cleared(admin: Admin) -> None:
    assert admin.json("canary", "list") == []
    assert admin.json("canary", "set", "next", "0.25") == {"backend": "next", "share": 0.25}
    assert admin.json("canary", "set", "new", "0")["share"] == 0
    assert admin.json("canary", "promote", "next") == {"backend": "next", "share": None}
    assert admin.json("canary", "list") == [{"backend": "new", "share": 0}, {"backend": "next", "share": None}]
    assert "within a second" in admin.shown("canary", "clear", "new")
    assert "next" in admin.shown("canary", "list")
    assert "canary.clear" in admin.shown("audit", "list")


def test_no_sum_of_the_ledger_is_left_out(admin: Admin, tmp_path: Path) -> None:
    """As of many keys by the day."""
    rows = [(str(number), f"m{number}") for number in range(10_001)]
    with contextlib.closing(sqlite3.connect(tmp_path / "books.db")) as connection:
        connection.executemany(
            "INSERT INTO ledger VALUES (?, 'r', 'k', NULL, NULL, NULL, 't', 'b', ?, 1, 0, 1, 1, 1, 0, 'ok', 200, 1, 0, "
            "0, 'answer', 0, 0)",
            rows,
        )
        connection.commit()
    assert len(admin.json("ledger", "--by", "model")) == len(rows)


def test_audit_trail_is_verified(admin: Admin, tmp_path: Path) -> None:
    head = admin.json("audit", "verify")
    assert head["intact"]
    admin.shown("app", "create", "bot")
    assert admin.json("audit", "verify", "--expected", head["head"])["rows"] == head["rows"] + 1
    assert not admin.json("audit", "verify", "--expected", "0" * 64, status=1)["intact"]
    with sqlite3.connect(tmp_path / "books.db") as connection:
        connection.execute("UPDATE audit SET subject = 'other' WHERE sequence = 1")
    connection.close()
    assert "row 1 was changed" in admin.shown("audit", "verify", status=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["team", "create", "x", "--parent", "nobody"], "no account 'nobody'"),
        (["org", "create", "acme"], "exists"),
        (["org", "create", "../x"], "is no id"),
        (["team", "create", "x", "--budget", "nan"], "nan dollars"),
        (["team", "create", "x", "--period", "soon"], "no duration"),
        (["key", "revoke", "none"], "no key 'none'"),
        (["ledger", "--by", "colour"], "'colour'"),
        (["canary", "set", "a", "1.5"], "share of 1.5"),
        (["canary", "set", "a", "nan"], "share of nan"),
        (["canary", "clear", "a"], "'a' is not changed"),
        (["key", "create", "--model", ""], "name is empty"),
        (["key", "create", "--name", "x" * 100_000], "name of 100000 characters"),
        (["key", "create", "--name", "\udcff"], "'\\udcff' is not in UTF-8"),
        (["key", "create", "--model", "\udcff"], "'\\udcff' is not in UTF-8"),
        (["key", "revoke", "\udcff"], "'\\udcff' is not in UTF-8"),
    ],
)
def test_wrong_input_is_one_line(admin: Admin, arguments: list[str], says: str) -> None:
    said = admin.shown(*arguments, status=2)
    assert says in said and said.count("\n") == 1


def test_a_store_is_not_made_by_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in Admin(tmp_path / "none.db", capsys).shown("key", "list", status=2)
    assert not (tmp_path / "none.db").exists()


def test_a_damaged_file_is_one_line(admin: Admin, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "books.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'accounts'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with (tmp_path / "books.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    for arguments in (["org", "list"], ["org", "create", "other"]):
        said = admin.shown(*arguments, status=2)
        assert "malformed" in said and said.count("\n") == 1


def test_an_address_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg")
    for address in ("mysql://me:secret@host/x", "postgresql://me:secret@[host/x"):
        assert cli.main(["admin", "--store", address, "org", "list"]) == 2
        said = capsys.readouterr().err
        assert "no postgresql://" in said and "secret" not in said and said.count("\n") == 1


def test_a_serving_gateway_obeys_at_once(workers: Workers, capsys: pytest.CaptureFixture[str]) -> None:
    admin = Admin(workers.store, capsys)
    key = admin.json("key", "create", "--rpm", "100")
    assert [workers.chat(key["key"])[0] for _ in range(4)] == [200] * 4
    admin.shown("key", "revoke", key["id"])
    assert [workers.chat(key["key"])[0] for _ in range(8)] == [401] * 8
    admin.shown("canary", "set", "b", "0.5")
    shown = {one["name"]: one["canary"] for one in workers.json("GET", "/admin/backends")["backends"]}
    assert shown["b"] == 0.5
    admin.shown("canary", "clear", "b")
    assert admin.json("audit", "verify")["intact"]
