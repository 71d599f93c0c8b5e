"""A team's administrator: keys and books of his own account and below, and nothing else by whatever path."""

import json
import re
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.gateway.running import lowered, wait_until
from tests.gateway.workers import MASTER_KEY, Workers
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.router.settings import RoutingSettings

#: What a team's administrator may call; everything else in the API's own document is refused.
HIS = {
    ("GET", "/admin/accounts"),
    ("GET", "/admin/accounts/{account}"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("GET", "/admin/keys/{key}"),
    ("DELETE", "/admin/keys/{key}"),
    ("GET", "/admin/ledger"),
    ("GET", "/key/info"),
}


@dataclass
class Teams:
    """Two teams of one organisation, an app in the first, a key in each of them; the first's administrator."""

    workers: Workers
    admin: str
    secret: str
    keys: dict[str, str]
    secrets: dict[str, str]

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """As the administrator."""
        status, _, answer = self.workers.send(method, path, body, self.secret)
        return status, json.loads(answer)


def made(workers: Workers, key: str = MASTER_KEY, **fields: Any) -> tuple[str, str]:
    answer = workers.json("POST", "/admin/keys", fields, key, status=201)
    return answer["id"], answer["key"]


@pytest.fixture(scope="module")
def teams(workers: Workers) -> Teams:
    for kind, identity, parent in (
        ("organisation", "acme", None),
        ("team", "search", "acme"),
        ("team", "mail", "acme"),
        ("app", "ranking", "search"),
    ):
        workers.json("POST", "/admin/accounts", {"kind": kind, "id": identity, "parent": parent}, status=201)
    admin, secret = made(workers, parent="search", role="team-admin")
    keys, secrets = {}, {}
    for account in ("acme", "search", "mail", "ranking"):
        keys[account], secrets[account] = made(workers, parent=account)
        assert workers.chat(secrets[account], max_tokens=3)[0] == 200
    wait_until(lambda: workers.json("GET", "/admin/ledger?organisation=acme")["rows"][0]["requests"] == 4)
    return Teams(workers, admin, secret, keys, secrets)


def test_he_sees_his_own_account_and_below(teams: Teams) -> None:
    assert {one["id"] for one in teams.send("GET", "/admin/accounts")[1]["accounts"]} == {"search", "ranking"}
    listed = {one["id"] for one in teams.send("GET", "/admin/keys")[1]["keys"]}
    assert {teams.admin, teams.keys["search"], teams.keys["ranking"]} <= listed
    assert not listed & {teams.keys["acme"], teams.keys["mail"]}
    for account in ("search", "ranking", teams.keys["ranking"]):
        assert teams.send("GET", f"/admin/accounts/{account}")[0] == 200
    for account in ("acme", "mail", teams.keys["mail"], "nobody"):
        status, answer = teams.send("GET", f"/admin/accounts/{account}")
        assert (status, answer["error"]["message"]) == (404, f"there is no account {account!r}; create it first.")
    assert teams.send("GET", f"/admin/keys/{teams.keys['ranking']}")[0] == 200
    for account in ("acme", "mail"):
        outside, missing = teams.keys[account], "key-000000000000"
        status, answer = teams.send("GET", f"/admin/keys/{outside}")
        said = teams.send("GET", f"/admin/keys/{missing}")[1]["error"]["message"]
        assert (status, answer["error"]["message"].replace(outside, missing)) == (404, said)


def test_he_sees_his_own_books_whatever_he_asks_for(teams: Teams) -> None:
    def requests(**asked: str) -> int:
        status, answer = teams.send("GET", f"/admin/ledger?{urlencode(asked)}")
        assert status == 200, answer
        return sum(row["requests"] for row in answer["rows"])

    # By key, as the other tests ask in his team, too.
    seen = {account: requests(key=key) for account, key in teams.keys.items()}
    assert seen == {"acme": 0, "search": 1, "mail": 0, "ranking": 1}
    assert requests() >= 2 and requests(app="ranking") >= 1 and requests(organisation="acme") >= 2
    assert requests(organisation="other") == 0
    assert {row["team"] for row in teams.send("GET", "/admin/ledger?by=team")[1]["rows"]} == {"search"}
    status, answer = teams.send("GET", "/admin/ledger?team=mail")
    assert (status, answer["error"]["code"]) == (403, "forbidden")
    _, _, text = teams.workers.send("GET", "/admin/ledger?by=team,key&format=csv", key=teams.secret)
    assert b"search" in text and b"mail" not in text and teams.keys["acme"].encode() not in text


def test_he_makes_and_revokes_keys_below_his_account(teams: Teams) -> None:
    for parent in (None, "search", "ranking"):
        fields = {} if parent is None else {"parent": parent}
        identity, secret = made(teams.workers, teams.secret, **fields)
        assert teams.workers.json("GET", f"/admin/keys/{identity}")["parent"] == (parent or "search")
        assert teams.workers.chat(secret)[0] == 200
        assert teams.send("DELETE", f"/admin/keys/{identity}")[0] == 200
        assert teams.workers.chat(secret)[0] == 401
    for parent in ("acme", "mail", teams.keys["search"]):
        assert teams.send("POST", "/admin/keys", {"parent": parent})[0] in (400, 404)
    for account in ("acme", "mail"):
        assert teams.send("DELETE", f"/admin/keys/{teams.keys[account]}")[0] == 404
        assert teams.workers.chat(teams.secrets[account])[0] == 200
    actors = [row["actor"] for row in teams.workers.json("GET", "/admin/audit?limit=1000")["rows"]]
    assert actors.count(f"admin api: {teams.admin}") == 6


def test_he_gives_no_role_and_touches_no_key_with_one(teams: Teams) -> None:
    for role in ("admin", "auditor", "team-admin"):
        assert teams.send("POST", "/admin/keys", {"role": role})[0] == 403
        identity, secret = made(teams.workers, parent="search", role=role)
        assert teams.send("DELETE", f"/admin/keys/{identity}")[0] == 403
        assert teams.send("POST", f"/admin/keys/{identity}/rotate")[0] == 403
        assert teams.workers.send("GET", "/admin/keys", key=secret)[0] == 200


def test_his_keys_may_do_no_more_than_his_own(teams: Teams) -> None:
    own = {"parent": "search", "role": "team-admin", "models": ["tiny"], "metadata": {"zones": ["edge"], "x": 1}}
    _, secret = made(teams.workers, **own)
    answer = teams.workers.json("POST", "/admin/keys", {"metadata": {"y": 2}}, secret, status=201)
    assert (answer["models"], answer["metadata"]) == (["tiny"], {"zones": ["edge"], "y": 2})
    for more in (
        {"models": ["tiny", "utility"]},
        {"models": ["*"]},
        {"models": ["tiny*"]},
        {"metadata": {"zones": ["edge", "cloud"]}},
    ):
        assert teams.workers.send("POST", "/admin/keys", more, secret)[0] == 403
    _, secret = made(teams.workers, **{**own, "models": ["ti*"]})
    for models, status in ((["tiny", "tin*"], 201), (["*"], 403), (["*i*"], 403), (["utility"], 403)):
        assert teams.workers.send("POST", "/admin/keys", {"models": models}, secret)[0] == status


def test_a_key_for_the_router_alone_is_made_by_who_has_every_tier(tmp_path: Path) -> None:
    # Alone, the router's name opens every tier; beside others those. No request is sent: nobody has to be there.
    backend = Backend("a", "http://127.0.0.1:9", "utility", models=("tiny",), health_path=None)
    with Workers(tmp_path, backend, routing=RoutingSettings()) as workers:
        workers.json("POST", "/admin/accounts", {"kind": "team", "id": "search"}, status=201)
        for own, status in (
            (["auto", "utility"], 403),
            (["auto", "*"], 201),
            (["auto"], 201),
            (None, 201),
        ):
            _, secret = made(workers, parent="search", role="team-admin", models=own)
            assert workers.send("POST", "/admin/keys", {"models": ["auto"]}, secret)[0] == status, own
            assert own is None or workers.send("POST", "/admin/keys", {"models": own}, secret)[0] == 201, own


def test_every_other_path_is_refused(teams: Teams) -> None:
    document = teams.workers.json("GET", "/admin/openapi.json", key=None)
    others = [
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method in methods
        if (method.upper(), path) not in HIS
    ]
    assert len(others) > 12
    for method, path in others:
        filled = path.replace("{account}", "search").replace("{key}", teams.keys["search"]).replace("{backend}", "a")
        assert "{" not in filled
        status, answer = teams.send(method, filled, {} if method in ("POST", "PUT") else None)
        assert (status, answer["error"]["code"]) == (403, "forbidden"), (method, path)
    status, answer = teams.send("GET", f"/key/info?key={teams.keys['ranking']}")
    assert status == 403, answer
    assert teams.send("GET", "/key/info")[0] == 200


def test_the_dashboard_which_shows_everything_is_not_for_him(teams: Teams) -> None:
    def login(key: str) -> tuple[int, dict[str, str]]:
        connection = HTTPConnection("127.0.0.1", teams.workers.port, timeout=30)
        connection.request("POST", "/dashboard/login", urlencode({"key": key}),
                           {"content-type": "application/x-www-form-urlencoded"})  # fmt: skip
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status, lowered(response.headers)

    assert login(teams.secret)[0] == 403
    # A session that was begun with a greater role ends with it.
    identity, secret = made(teams.workers, parent="search", role="auditor")
    status, headers = login(secret)
    assert status == 303
    cookie = re.split(";", headers["set-cookie"])[0]
    assert teams.workers.send("GET", "/dashboard", key=None, cookie=cookie)[0] == 200
    teams.workers.json("PUT", f"/admin/keys/{identity}/role", {"role": "team-admin"})
    assert teams.workers.send("GET", "/dashboard", key=None, cookie=cookie)[0] == 303


def test_a_key_of_nobody_looks_after_nothing(teams: Teams) -> None:
    status, _, answer = teams.workers.send("POST", "/admin/keys", {"role": "team-admin"})
    assert status == 400 and b"belongs to no team" in answer
    identity, _ = made(teams.workers)
    assert teams.workers.send("PUT", f"/admin/keys/{identity}/role", {"role": "team-admin"})[0] == 400
