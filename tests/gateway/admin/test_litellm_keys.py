"""LiteLLM's key endpoints with LiteLLM's fields."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

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
    for models in ([], ["all-proxy-models"]):
        assert workers.chat(generate(workers, models=models)["key"], "utility")[0] == 200


def test_a_budget_stops(workers: Workers) -> None:
    key = generate(workers, max_budget=0.0001)["key"]
    assert workers.chat(key)[0] == 429
    assert workers.json("POST", "/key/update", {"key": key, "max_budget": None})["max_budget"] is None
    assert workers.chat(key)[0] == 200


def test_update_changes_what_is_named_and_nothing_else(workers: Workers) -> None:
    made = generate(workers, models=["tiny"], max_budget=5, rpm_limit=7, key_alias="before", metadata={"a": 1})
    changed = workers.json("POST", "/key/update", {"key": made["key"], "models": ["utility"], "key_alias": "after"})
    assert changed["models"] == ["utility"]
    assert changed["key_alias"] == "after"
    assert (changed["max_budget"], changed["rpm_limit"], changed["metadata"]) == (5, 7, {"a": 1})
    assert workers.chat(made["key"])[0] == 403
    workers.json("POST", "/key/update", {"key": made["key"], "duration": "1s", "models": []})
    assert workers.json("GET", f"/key/info?key={made['token']}")["info"]["expires"] is not None


def test_delete_by_key_token_and_alias(workers: Workers) -> None:
    first, second, third = (generate(workers, key_alias=f"gone-{number}") for number in range(3))
    asked = {"keys": [first["key"], second["token"]]}
    assert workers.json("POST", "/key/delete", asked) == {"deleted_keys": asked["keys"]}
    workers.json("POST", "/key/delete", {"key_aliases": ["gone-2"]})
    assert [workers.chat(made["key"])[0] for made in (first, second, third)] == [401, 401, 401]
    assert workers.send("POST", "/key/delete", {"keys": ["sk-unknown"]})[0] == 404
    assert workers.send("POST", "/key/delete", {})[0] == 400


@pytest.mark.parametrize(
    "field",
    [
        {"max_parallel_requests": 3},
        {"model_max_budget": {"tiny": {"max_budget": 1}}},
        {"permissions": {"x": True}},
        {"key": "sk-1234"},
        {"blocked": True},
    ],
    ids=str,
)
def test_a_restriction_that_is_not_kept_here_is_refused_and_not_lost(workers: Workers, field: dict[str, Any]) -> None:
    status, _, body = workers.send("POST", "/key/generate", field)
    assert status == 400
    assert json.loads(body)["error"]["param"] == next(iter(field))


def test_a_key_asks_about_itself_alone(workers: Workers) -> None:
    own, other = generate(workers)["key"], generate(workers)["key"]
    assert workers.send("GET", f"/key/info?key={other}", key=own)[0] == 403
    assert workers.send("GET", "/key/info", key="sk-nobody")[0] == 401
    assert workers.send("GET", "/key/info")[0] == 400
