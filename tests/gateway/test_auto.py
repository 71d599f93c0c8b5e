"""`auto` where nothing is routed: the one tier that makes text, if there is but one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.governance.governed import governing
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend

CHAT = "/v1/chat/completions"
AUTO = {"model": "auto", "messages": []}


@pytest.fixture(scope="module")
def other() -> Iterator[FakeUpstream]:
    server = FakeUpstream(("other",)).start()
    yield server
    server.stop()


def asked_for(upstream: FakeUpstream) -> list[str]:
    """The models that a backend was asked for."""
    return [json.loads(raw)["model"] for _, _, raw in upstream.books.requests]


def test_auto_is_the_sole_tier(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    assert gateway.post(CHAT, AUTO)[0] == 200
    assert asked_for(upstream) == ["tiny"]
    listed = json.loads(gateway.get("/v1/models")[2])["data"]
    assert "auto" not in [model["id"] for model in listed]


def test_a_tier_that_makes_no_text_is_no_choice(upstream: FakeUpstream, other: FakeUpstream) -> None:
    vectors = Backend("v", other.url, "vectors", ("other",), capabilities=("embeddings",))
    with RunningGateway(vectors, Backend("a", upstream.url, "utility")) as gateway:
        assert gateway.post(CHAT, AUTO)[0] == 200
        assert asked_for(upstream) == ["tiny"]


def test_among_several_tiers_nobody_chooses(upstream: FakeUpstream, other: FakeUpstream) -> None:
    with RunningGateway(Backend("a", upstream.url, "t"), Backend("b", other.url, "u")) as gateway:
        status, _, raw = gateway.post(CHAT, AUTO)
        assert (status, json.loads(raw)["error"]["code"]) == (404, "model_not_found")
    assert upstream.books.requests == []


def test_a_model_of_this_name_is_itself(upstream: FakeUpstream) -> None:
    backend = Backend("a", upstream.url, "t", ("first", "auto"))
    with RunningGateway(backend) as gateway:
        assert gateway.post(CHAT, AUTO)[0] == 200
    assert asked_for(upstream) == ["auto"]


def test_a_backend_whose_models_are_not_known_is_not_asked(other: FakeUpstream) -> None:
    with RunningGateway(Backend("b", "http://127.0.0.1:9/v1", "t"), Backend("a", other.url, "t")) as gateway:
        assert gateway.post(CHAT, AUTO)[0] == 200
    assert asked_for(other)[-1] == "other"


@pytest.mark.parametrize(
    ("models", "status", "asked"),
    [
        (None, 200, ["tiny"]),
        (["auto"], 200, ["tiny"]),
        (["auto", "org/nested/name"], 200, ["org/nested/name"]),
        (["org/*", "auto"], 200, ["org/nested/name"]),
        (["auto", "utility"], 200, ["tiny"]),
        (["auto", "elsewhere"], 404, []),
        (["tiny"], 403, []),
    ],
)
def test_auto_gives_a_key_no_model_that_it_may_not_ask_for(
    upstream: FakeUpstream, tmp_path: Path, models: list[str] | None, status: int, asked: list[str]
) -> None:
    with governing(str(tmp_path / "books"), Backend("a", upstream.url, "utility")) as governed:
        _, key = governed.key(models=models)
        assert governed.ask(key, AUTO)[0] == status
    assert asked_for(upstream) == asked
