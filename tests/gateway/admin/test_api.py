"""The admin API against real workers: accounts, keys, roles, ledger, audit trail, canaries."""

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import wait_until
from tests.gateway.workers import MASTER_KEY, Workers
from tokenmill.engine.gateway.backends import Backend


def make_team(workers: Workers, name: str, **limits: Any) -> str:
    body = {"kind": "team", "id": name, "name": name.title(), "limits": limits}
    return str(workers.json("POST", "/admin/accounts", body, status=201)["id"])


def make_key(workers: Workers, **fields: Any) -> tuple[str, str]:
    made = workers.json("POST", "/admin/keys", fields, status=201)
    return made["id"], made["key"]


def test_nobody_gets_in_without_a_role(workers: Workers) -> None:
    _, plain = make_key(workers)
    for key, status in ((None, 401), ("sk-guessed", 401), (plain, 403)):
        for path in ("/admin/accounts", "/admin/ledger", "/admin/audit", "/admin/backends"):
            found, headers, body = workers.send("GET", path, key=key)
            assert found == status, body
            assert json.loads(body)["error"]["message"]
            assert headers["cache-control"] == "no-store"
    assert workers.send("POST", "/key/generate", {}, key=plain)[0] == 403


def test_an_auditor_looks_but_does_not_touch(workers: Workers) -> None:
    identity, auditor = make_key(workers, role="auditor")
    assert workers.send("GET", "/admin/keys", key=auditor)[0] == 200
    assert workers.send("POST", "/admin/keys", {}, key=auditor)[0] == 403
    assert workers.json("PUT", f"/admin/keys/{identity}/role", {"role": "admin"})["role"] == "admin"
    assert workers.send("POST", "/admin/keys", {}, key=auditor)[0] == 201
    workers.json("DELETE", f"/admin/keys/{identity}")
    assert workers.send("GET", "/admin/keys", key=auditor)[0] == 401


def test_accounts_form_a_tree_with_limits(workers: Workers) -> None:
    workers.json("POST", "/admin/accounts", {"kind": "organisation", "id": "acme"}, status=201)
    limits = {"hard_limit_dollars": 12.5, "period": "30d", "requests_per_minute": 60, "requests_at_once": 8}
    body = {"kind": "team", "id": "search", "parent": "acme", "name": "Search", "limits": limits}
    made = workers.json("POST", "/admin/accounts", body, status=201)
    assert made["limits"] == {**limits, "soft_limit_dollars": None, "tokens_per_minute": None}
    assert made["spent_dollars"] == 0
    changed = workers.json("PUT", "/admin/accounts/search/limits", {"soft_limit_dollars": 1})
    assert changed["limits"]["hard_limit_dollars"] is None
    assert changed["limits"]["soft_limit_dollars"] == 1
    assert [one["id"] for one in workers.json("GET", "/admin/accounts?kind=organisation")["accounts"]] == ["acme"]
    _, _, again = workers.send("POST", "/admin/accounts", body)
    assert "exists" in json.loads(again)["error"]["message"]
    assert workers.send("GET", "/admin/accounts/nobody")[0] == 404


def test_a_key_is_shown_once_rotated_and_revoked_in_every_worker(workers: Workers) -> None:
    identity, first = make_key(workers, name="app", models=["tiny"], limits={"hard_limit_dollars": 100})
    assert "key" not in workers.json("GET", f"/admin/keys/{identity}")
    assert all("key" not in one for one in workers.json("GET", "/admin/keys")["keys"])
    assert first.encode() not in workers.store.read_bytes()
    assert workers.chat(first)[0] == 200

    def spent() -> float:
        return float(workers.json("GET", f"/admin/keys/{identity}")["spent_dollars"])

    wait_until(lambda: spent() > 0)  # a request is settled after its answer has gone out
    once = spent()
    second = workers.json("POST", f"/admin/keys/{identity}/rotate")["key"]
    assert second != first
    assert [workers.chat(first)[0] for _ in range(8)] == [401] * 8
    assert [workers.chat(second)[0] for _ in range(8)] == [200] * 8
    wait_until(lambda: spent() > once)
    assert workers.json("DELETE", f"/admin/keys/{identity}")["state"] == "was revoked"
    assert [workers.chat(second)[0] for _ in range(8)] == [401] * 8
    assert workers.send("POST", f"/admin/keys/{identity}/rotate")[0] == 400


def test_a_key_expires(workers: Workers) -> None:
    _, key = make_key(workers, duration="1s")
    assert workers.chat(key)[0] == 200
    wait_until(lambda: workers.chat(key)[0] == 401)


def test_ledger_sums_agree_and_come_as_csv(workers: Workers) -> None:
    team = make_team(workers, "books")
    _, key = make_key(workers, parent=team)
    for tokens in (3, 4):
        assert workers.chat(key, max_tokens=tokens)[0] == 200
    rows: list[Any] = []

    def settled() -> bool:
        rows[:] = workers.json("GET", f"/admin/ledger?by=team,tier,model,day&team={team}")["rows"]
        return bool(rows) and rows[0]["requests"] == 2

    wait_until(settled)
    (row,) = rows
    assert (row["team"], row["tier"], row["model"], row["completion_tokens"]) == (team, "utility", "tiny", 7)
    assert row["cost"] == 100_000 * (row["prompt_tokens"] + 7)
    assert row["day"] == time.strftime("%Y-%m-%d", time.gmtime())
    total = workers.json("GET", f"/admin/ledger?team={team}")["rows"][0]
    assert {name: total[name] for name in total} == {name: row[name] for name in total}
    status, headers, text = workers.send("GET", f"/admin/ledger?by=team&team={team}&format=csv")
    assert (status, headers["content-type"]) == (200, "text/csv; charset=utf-8")
    assert headers["cache-control"] == "no-store"
    (line,) = csv.DictReader(io.StringIO(text.decode()))
    assert float(line["cost_dollars"]) == pytest.approx(row["cost_dollars"])
    assert workers.json("GET", "/admin/ledger?until=1")["rows"][0]["requests"] == 0
    for wrong in ("by=colour", "by=team,team", "since=x", "since=-1", "limit=0", "format=xml", "since=9" + "9" * 20):
        assert workers.send("GET", f"/admin/ledger?{wrong}")[0] == 400, wrong


def test_every_change_is_in_the_audit_trail(workers: Workers) -> None:
    before = workers.json("GET", "/admin/audit/verify")
    team = make_team(workers, "audited")
    identity, secret = make_key(workers, parent=team)
    workers.json("PUT", f"/admin/accounts/{team}/limits", {"requests_per_minute": 7})
    for role in ("auditor", None):
        workers.json("PUT", f"/admin/keys/{identity}/role", {"role": role})
    workers.json("POST", "/key/update", {"key": secret, "models": ["tiny"]})
    workers.json("POST", f"/admin/keys/{identity}/rotate")
    for share in (0.5, 0):
        workers.json("PUT", "/admin/backends/b/canary", {"share": share})
    workers.json("DELETE", "/admin/backends/b/canary")
    workers.json("DELETE", f"/admin/keys/{identity}")
    rows = workers.json("GET", f"/admin/audit?after={before['rows']}")["rows"]
    assert {row["actor"] for row in rows} == {"admin api: master"}
    assert [(row["action"], row["subject"]) for row in rows] == [
        ("team.create", team),
        ("key.create", identity),
        ("limits.set", team),
        ("role.set", identity),
        ("role.set", identity),
        ("key.change", identity),
        ("key.rotate", identity),
        ("canary.set", "b"),
        ("canary.set", "b"),
        ("canary.clear", "b"),
        ("key.revoke", identity),
    ]
    changes = [(row["details"]["before"], row["details"]["after"]) for row in rows if "after" in row["details"]]
    limits, first_role, second_role, key, first_share, second_share = changes
    assert [one["requests_per_minute"] for one in limits] == [None, 7]
    assert (first_role, second_role) == ((None, "auditor"), ("auditor", None))
    assert [one["models"] for one in key] == [None, ["tiny"]]
    assert (first_share, second_share) == ((None, 0.5), (0.5, 0))
    assert secret not in json.dumps(rows)
    after = workers.json("GET", f"/admin/audit/verify?expected={before['head']}")
    assert after["intact"] and after["rows"] == before["rows"] + len(rows)
    assert not workers.json("GET", "/admin/audit/verify?expected=" + "0" * 64)["intact"]


def test_a_canary_is_set_and_rolled_back_in_every_worker_without_a_restart(workers: Workers) -> None:
    identity, key = make_key(workers)

    def served() -> set[str]:
        """The backends of the next ten requests."""
        since = int(time.time() * 1000)
        time.sleep(0.01)
        for _ in range(10):
            assert workers.chat(key)[0] == 200
        rows: list[Any] = []

        def settled() -> bool:
            rows[:] = workers.json("GET", f"/admin/ledger?by=backend&since={since}&key={identity}")["rows"]
            return sum(row["requests"] for row in rows) >= 10

        wait_until(settled)
        return {row["backend"] for row in rows}

    assert served() == {"a"}
    shown = workers.json("PUT", "/admin/backends/b/canary", {"share": 1.0})
    assert [one["canary"] for one in shown["backends"]] == [None, 1.0]
    time.sleep(1.2)  # each worker looks once a second
    assert served() == {"b"}
    workers.json("PUT", "/admin/backends/b/canary", {"share": 0})
    time.sleep(1.2)
    assert served() == {"a"}
    workers.json("DELETE", "/admin/backends/b/canary")
    assert workers.send("PUT", "/admin/backends/c/canary", {"share": 0})[0] == 404


def nested(levels: int) -> Any:
    """Lists in lists."""
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


@pytest.mark.parametrize("metadata", [{"a": -(2**63), "b": 2**64 - 1}, {"a": nested(239)}])
def test_what_can_be_kept_is_kept(workers: Workers, metadata: dict[str, Any]) -> None:
    """Also where it is shown and written down inside of something else."""
    made = workers.json("POST", "/admin/keys", {"name": "a\\u0000b", "metadata": metadata}, status=201)
    assert (made["name"], made["metadata"]) == ("a\\u0000b", metadata)
    changed = {"key": made["id"], "metadata": {**metadata, "more": 1}}
    assert workers.json("POST", "/key/update", changed)["metadata"] == changed["metadata"]
    assert workers.send("GET", "/admin/keys")[0] == 200
    assert workers.send("GET", "/admin/audit?limit=1000")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/accounts", b"", 400),
        ("POST", "/admin/accounts", b"\xff", 400),
        ("POST", "/admin/accounts", b"[" * 100_000, 400),
        ("POST", "/admin/accounts", b"3", 400),
        ("POST", "/admin/accounts", {"kind": "key"}, 400),
        ("POST", "/admin/accounts", {"kind": "team", "colour": "red"}, 400),
        ("POST", "/admin/accounts", {"kind": "team", "id": "../x"}, 400),
        ("POST", "/admin/accounts", {"kind": "team", "parent": "nobody"}, 404),
        ("POST", "/admin/accounts", {"kind": "team", "limits": {"hard_limit_dollars": -1}}, 400),
        ("POST", "/admin/accounts", {"kind": "team", "limits": {"period": "1y"}}, 400),
        ("POST", "/admin/keys", {"duration": "0d"}, 400),
        ("POST", "/admin/keys", {"metadata": {"x": "y" * 20_000}}, 400),
        ("POST", "/admin/keys", b'{"name": "' + b"x" * 300_000 + b'"}', 413),
        ("POST", "/admin/keys", {"url": "http://169.254.169.254/"}, 400),
        ("PUT", "/admin/keys/none/role", {"role": "admin"}, 404),
        ("PUT", "/admin/keys/none/role", {"role": "god"}, 400),
        ("PUT", "/admin/backends/a/canary", {"share": 2}, 400),
        ("PATCH", "/admin/keys", {}, 405),
        ("GET", "/admin/nothing", None, 404),
        ("GET", "/admin/keys/%2e%2e%2f%00", None, 404),
        ("GET", "/admin/keys/a%00", None, 400),
        ("GET", "/admin/ledger?team=a%00", None, 400),
        ("GET", "/admin/ledger?organization=acme", None, 400),
        ("GET", "/admin/accounts?kind=org", None, 400),
        ("GET", "/admin/ledger?team=a&team=b", None, 400),
        ("GET", "/admin/keys?parent=a", None, 400),
        ("GET", "/key/info?key=a%00", None, 400),
        ("POST", "/admin/keys", {"name": "a\0b"}, 400),
        ("POST", "/admin/keys", {"name": "a\\\0b"}, 400),
        ("POST", "/key/generate", {"key_alias": "a\0"}, 400),
        ("POST", "/key/generate", {"metadata": {"a": [2**64]}}, 400),
        ("POST", "/admin/keys", {"metadata": {"a": nested(240)}}, 400),
        ("POST", "/admin/keys", {"metadata": {"a": nested(900)}}, 400),
    ],
)
def test_bad_requests_are_refused(workers: Workers, method: str, path: str, body: Any, status: int) -> None:
    found, _, answer = workers.send(method, path, body)
    assert found == status, answer
    assert MASTER_KEY.encode() not in answer


def test_no_answer_of_a_model_endpoint_depends_on_a_url_of_the_client(workers: Workers) -> None:
    """Backends come from the configuration alone: fields of a request that name another server stay text."""
    _, key = make_key(workers, metadata={"api_base": "http://169.254.169.254/"})
    status, _, _ = workers.chat(key, api_base="http://169.254.169.254/", base_url="http://[::1]:1/")
    assert status == 200


def test_metrics_may_be_for_keys_with_a_role_alone(workers: Workers, tmp_path: Path) -> None:
    _, auditor = make_key(workers, role="auditor")
    _, plain = make_key(workers)
    status, headers, body = workers.send("GET", "/admin/metrics", key=auditor)
    assert status == 200 and headers["content-type"].startswith("text/plain") and b"tokenmill_requests" in body
    assert workers.send("GET", "/admin/metrics", key=plain)[0] == 403
    with Workers(
        tmp_path, Backend("a", "http://127.0.0.1:9", "t", models=("m",), health_path=None), open_metrics=False
    ) as closed:
        assert closed.send("GET", "/metrics")[0] == 403
        assert closed.send("GET", "/admin/metrics")[0] == 200
