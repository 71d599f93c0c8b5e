"""LiteLLM's key endpoints with LiteLLM's fields."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.gateway.running import wait_until
from tests.gateway.workers import Workers


def generate(workers: Workers, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = workers.json("POST", "/key/generate", fields)
    return made


def test_generate_takes_litellms_fields_and_they_hold(workers: Workers) -> None:
    workers.json("POST", "/admin/accounts", {"kind": "team", "id": "team-x"}, status=201)
    made = generate(
        workers,
        models=["tiny"],
        max_budget=0.5,
        soft_budget=0.4,
        budget_duration="30d",
        duration="1h",
        tpm_limit=100_000,
        rpm_limit=2,
        max_parallel_requests=1,
        team_id="team-x",
        key_alias="app one",
        user_id="u-1",
        metadata={"app": "one"},
    )
    assert made["key"].startswith("sk-")
    expires = datetime.fromisoformat(made["expires"])
    assert timedelta(minutes=59) < expires - datetime.now(UTC) < timedelta(minutes=61)
    shown = workers.json("GET", f"/key/info?key={made['key']}")
    assert shown["key"] == made["token"] != made["key"]
    info = shown["info"]
    expected = {
        "models": ["tiny"],
        "max_budget": 0.5,
        "soft_budget": 0.4,
        "budget_duration": "30d",
        "tpm_limit": 100_000,
        "rpm_limit": 2,
        "max_parallel_requests": 1,
        "team_id": "team-x",
        "key_alias": "app one",
        "user_id": "u-1",
        "metadata": {"app": "one"},
        "spend": 0,
    }
    assert {name: info[name] for name in expected} == expected
    assert "key" not in info
    assert workers.json("GET", "/key/info", key=made["key"])["info"] == info
    assert [workers.chat(made["key"], max_tokens=1)[0] for _ in range(3)] == [200, 200, 429]
    assert workers.chat(made["key"], "utility")[0] == 403


def test_an_empty_list_of_models_means_all(workers: Workers) -> None:
    for models in ([], ["all-proxy-models"], ["*"], ["nothing", "*"]):
        assert workers.chat(generate(workers, models=models)["key"], "utility")[0] == 200


def test_a_name_of_models_may_be_a_wildcard(workers: Workers) -> None:
    made = generate(workers, models=["ti*"])
    assert made["models"] == ["ti*"]
    assert (workers.chat(made["key"])[0], workers.chat(made["key"], "utility")[0]) == (200, 403)
    listed = workers.json("GET", "/models", key=made["key"])
    assert [model["id"] for model in listed["data"]] == ["tiny"]


def test_a_budget_stops(workers: Workers) -> None:
    key = generate(workers, max_budget=0.0001)["key"]
    assert workers.chat(key)[0] == 429
    assert workers.json("POST", "/key/update", {"key": key, "max_budget": None})["max_budget"] is None
    assert workers.chat(key)[0] == 200


def test_update_changes_what_is_named_and_nothing_else(workers: Workers) -> None:
    limits = {"max_budget": 5, "rpm_limit": 7, "max_parallel_requests": 0}
    made = generate(workers, models=["tiny"], **limits, key_alias="before", metadata={"a": 1})
    changed = workers.json("POST", "/key/update", {"key": made["key"], "models": ["utility"], "key_alias": "after"})
    assert changed["models"] == ["utility"]
    assert changed["key_alias"] == "after"
    assert {name: changed[name] for name in (*limits, "metadata")} == {**limits, "metadata": {"a": 1}}
    assert workers.chat(made["key"])[0] == 403
    assert workers.chat(made["key"], "utility")[0] == 429
    changed = workers.json("POST", "/key/update", {"key": made["key"], "max_parallel_requests": None})
    assert (changed["rpm_limit"], changed["max_parallel_requests"]) == (7, None)
    assert workers.chat(made["key"], "utility")[0] == 200
    workers.json("POST", "/key/update", {"key": made["key"], "duration": "1s", "models": []})
    assert workers.json("GET", f"/key/info?key={made['token']}")["info"]["expires"] is not None


def test_delete_by_key_token_and_alias(workers: Workers) -> None:
    first, second, third = (generate(workers, key_alias=f"gone-{number}") for number in range(3))
    # As LiteLLM's own client does: with null for what was not given.
    asked = {"keys": [first["key"], second["token"]], "key_aliases": None}
    assert workers.json("POST", "/key/delete", asked) == {"deleted_keys": asked["keys"]}
    asked = {"keys": None, "key_aliases": ["gone-2"]}
    assert workers.json("POST", "/key/delete", asked) == {"deleted_keys": asked["key_aliases"]}
    assert [workers.chat(made["key"])[0] for made in (first, second, third)] == [401, 401, 401]
    assert workers.send("POST", "/key/delete", {"keys": ["sk-unknown"]})[0] == 404
    assert workers.send("POST", "/key/delete", {})[0] == 400
    assert workers.send("POST", "/key/delete", {"keys": None, "key_aliases": []})[0] == 400


def test_an_alias_names_one_key(workers: Workers) -> None:
    first = generate(workers, key_alias="only one")
    other = generate(workers, key_alias="another one")
    for path, fields in (("/key/generate", {}), ("/key/update", {"key": other["key"]})):
        status, _, body = workers.send("POST", path, {"key_alias": "only one", **fields})
        error = json.loads(body)["error"]
        assert (status, error["param"]) == (400, "key_alias")
        assert error["message"].startswith("A key with the alias `only one` exists already")
    assert (
        workers.json("POST", "/key/update", {"key": first["key"], "key_alias": "only one"})["key_alias"] == "only one"
    )
    workers.json("POST", "/key/delete", {"key_aliases": ["only one"]})
    status, _, body = workers.send("POST", "/key/delete", {"key_aliases": ["only one"]})
    assert (status, b"no key with the alias `only one`" in body) == (404, True)
    assert generate(workers, key_alias="only one")["key_alias"] == "only one"


def test_deleting_by_an_alias_deletes_all_or_nothing(workers: Workers) -> None:
    """Names that the admin API gave may repeat; an empty one is no alias."""
    named = [workers.json("POST", "/admin/keys", {"name": "twice"}, status=201) for _ in range(2)]
    unnamed, good = generate(workers), generate(workers, key_alias="good")
    for aliases, expected in ((["good", "twice"], 400), (["good", "nobody"], 404), (["good", ""], 404)):
        status, _, body = workers.send("POST", "/key/delete", {"key_aliases": aliases})
        assert (status, json.loads(body)["error"]["param"]) == (expected, "key_aliases")
        if expected == 400:
            assert named[0]["id"] in body.decode() and named[1]["id"] in body.decode()
    for identity in (named[0]["id"], named[1]["id"], unnamed["token_id"], good["token_id"]):
        assert workers.json("GET", f"/admin/keys/{identity}")["state"] == "valid"


@pytest.mark.parametrize(
    "field",
    [
        {"model_max_budget": {"tiny": {"max_budget": 1}}},
        {"permissions": {"x": True}},
        {"key": "sk-1234"},
        {"blocked": True},
        {"key_type": "read_only"},
        {"budget_limits": [{"budget_duration": "1d", "max_budget": 1}]},
        {"auto_rotate": True, "rotation_interval": "30d"},
        {"rotation_interval": "30d"},
        {"allowed_passthrough_routes": ["/x"]},
        {"allowed_ips": ["10.0.0.1"]},
        {"organization_id": "o"},
        {"aliases": {"gpt-4": "tiny"}},
        {"spend": 3},
        {"a_restriction_of_tomorrow": 1},
    ],
    ids=str,
)
def test_a_restriction_that_is_not_kept_here_is_refused_and_not_lost(workers: Workers, field: dict[str, Any]) -> None:
    status, _, body = workers.send("POST", "/key/generate", field)
    assert status == 400
    assert json.loads(body)["error"]["param"] == next(iter(field))
    key = generate(workers)["key"]
    if "key" not in field:
        assert workers.send("POST", "/key/update", {"key": key, **field})[0] == 400


def test_fields_that_litellms_clients_send_empty_are_no_restrictions(workers: Workers) -> None:
    empty = {
        "aliases": {},
        "allowed_cache_controls": [],
        "auto_rotate": False,
        "blocked": False,
        "budget_limits": None,
        "key_type": "llm_api",
        "max_budget": "",
        "organization_id": "",
        "permissions": {},
        "rpm_limit_type": "best_effort_throughput",
        "spend": 0,
        "team_id": "",
        "user_id": "",
    }
    made = generate(workers, **empty)
    assert (made["max_budget"], made["team_id"], made["user_id"]) == (None, None, None)
    assert workers.chat(made["key"])[0] == 200
    # What a new key has is no news; that an old one has spent nothing would be.
    assert workers.send("POST", "/key/update", {"key": made["key"], "spend": 0})[0] == 400


def test_expires_ends_a_key_as_duration_does(workers: Workers) -> None:
    assert generate(workers, expires="2091-12-31T23:59:59Z")["expires"] == "2091-12-31T23:59:59.000Z"
    soon = generate(workers, expires=(datetime.now(UTC) + timedelta(seconds=1.5)).isoformat())["key"]
    assert workers.chat(soon)[0] == 200
    wait_until(lambda: workers.chat(soon)[0] == 401, 10)
    made = generate(workers, duration="-1")
    assert made["expires"] is None
    for said in ("2020-01-01T00:00:00Z", "never", "9999-12-31T23:59:59-23:59", "1e9"):
        for path, more in (("/key/generate", {}), ("/key/update", {"key": made["key"]})):
            status, _, body = workers.send("POST", path, {"expires": said, **more})
            assert status == 400, said
            assert said in json.loads(body)["error"]["message"]
    for path, more in (("/key/generate", {}), ("/key/update", {"key": made["key"]})):
        both = {"duration": "1h", "expires": "2091-12-31T23:59:59Z", **more}
        assert workers.send("POST", path, both)[0] == 400

    def updated(**fields: Any) -> Any:
        return workers.json("POST", "/key/update", {"key": made["key"], **fields})["expires"]

    assert updated(expires="2091-12-31 23:59") == "2091-12-31T23:59:00.000Z"
    assert updated(key_alias="x", duration="") == "2091-12-31T23:59:00.000Z"
    assert updated(expires=None) is None


def test_an_update_keeps_the_user_and_the_team(workers: Workers) -> None:
    for team in ("team-kept", "team-other"):
        workers.json("POST", "/admin/accounts", {"kind": "team", "id": team}, status=201)
    made = generate(workers, team_id="team-kept", user_id="u-1", metadata={"a": 1})
    changed = workers.json("POST", "/key/update", {"key": made["key"], "team_id": "team-kept", "metadata": {"b": 2}})
    assert (changed["user_id"], changed["metadata"]) == ("u-1", {"b": 2})
    changed = workers.json("POST", "/key/update", {"key": made["key"], "user_id": "u-2"})
    assert (changed["user_id"], changed["metadata"], changed["team_id"]) == ("u-2", {"b": 2}, "team-kept")
    changed = workers.json("POST", "/key/update", {"key": made["key"], "user_id": None})
    assert (changed["user_id"], changed["metadata"]) == (None, {"b": 2})
    status, _, body = workers.send("POST", "/key/update", {"key": made["key"], "team_id": "team-other"})
    assert (status, json.loads(body)["error"]["param"]) == (400, "team_id")


def test_a_key_asks_about_itself_alone(workers: Workers) -> None:
    made = generate(workers)
    own, other = made["key"], generate(workers)["key"]
    for name in (own, made["token"], made["token_id"]):
        assert workers.json("GET", f"/key/info?key={name}", key=own)["key"] == made["token"]
    admin = workers.json("POST", "/admin/keys", {"role": "admin"}, status=201)
    assert workers.json("GET", "/key/info", key=admin["key"])["info"]["token_id"] == admin["id"]
    assert workers.send("GET", f"/key/info?key={other}", key=own)[0] == 403
    assert workers.send("GET", "/key/info", key="sk-nobody")[0] == 401
    assert workers.send("GET", "/key/info")[0] == 400
