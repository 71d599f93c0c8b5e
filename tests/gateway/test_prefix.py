"""A server whose models have a prefix here: what it lists is served under these names, and asked for by its own."""

import json
from collections.abc import Iterator

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.settings import Settings


@pytest.fixture(scope="module")
def prefixed(shared_upstream: FakeUpstream) -> Iterator[RunningGateway]:
    backend = Backend("a", shared_upstream.url, "all", prefix="openai/")
    with RunningGateway(backend, settings=Settings(probe_interval_s=0.1)) as gateway:
        yield gateway


def test_its_models_are_listed_with_the_prefix(prefixed: RunningGateway) -> None:
    listed = json.loads(prefixed.get("/v1/models")[2])["data"]
    assert [model["id"] for model in listed] == ["openai/tiny", "openai/org/nested/name"]
    assert json.loads(prefixed.get("/v1/models/openai/tiny")[2]) == listed[0]


@pytest.mark.parametrize("name", ["tiny", "org/nested/name"])
def test_it_is_asked_by_its_own_names(prefixed: RunningGateway, upstream: FakeUpstream, name: str) -> None:
    assert prefixed.post("/v1/chat/completions", {"model": f"openai/{name}", "messages": []})[0] == 200
    assert json.loads(upstream.books.requests[0][2])["model"] == name
    assert prefixed.post("/v1/chat/completions", {"model": name, "messages": []})[0] == 404


def test_a_tier_is_asked_for_its_first_model(prefixed: RunningGateway, upstream: FakeUpstream) -> None:
    assert prefixed.post("/v1/chat/completions", {"model": "all", "messages": []})[0] == 200
    assert json.loads(upstream.books.requests[0][2])["model"] == "tiny"
