"""A scrape of real workers: what engines and GPUs say is in it once, and every family is documented and well named."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.observability.test_figures import VLLM
from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.gateway.workers import Workers
from tokenmill.engine.gateway.backends import Backend

DOCS = Path(__file__).resolve().parents[3] / "docs" / "gateway.md"
#: How names may end: base units and what is no unit (prometheus.io/docs/practices/naming).
UNITS = ("_requests", "_tokens", "_dollars", "_seconds", "_bytes", "_ratio", "_up", "_escalations")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    vllm, plain, cloud = (FakeUpstream((name,)).start() for name in ("vllm", "plain", "cloud"))
    vllm.metrics = cloud.metrics = VLLM
    backends = (
        Backend("vllm", vllm.url, "utility", ("vllm",)),
        Backend("plain", plain.url, "reasoning", ("plain",)),
        Backend("cloud", cloud.url, "reasoning", ("cloud",), zone="cloud"),
        Backend("gone", "http://127.0.0.1:9", "code", ("gone",)),
    )
    folder = tmp_path_factory.mktemp("scrape")
    with Workers(folder, *backends, count=2, wait_for=("utility", "reasoning")) as running:
        yield running
    for server in (vllm, plain, cloud):
        server.stop()


def scrape(workers: Workers) -> str:
    status, headers, body = workers.send("GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return body.decode()


def test_engines_are_told_as_they_tell_it(workers: Workers) -> None:
    found = re.findall(r"^(tokenmill_engine_\w+)\{(.*)\} (\S+)$", scrape(workers), re.MULTILINE)
    # Neither another kind of server, nor the cloud, nor one that is down has a series; nor what vLLM does not tell.
    assert {labels for _, labels, _ in found} == {'backend="vllm",tier="utility"'}
    assert {name: float(value) for name, _, value in found} == {
        "tokenmill_engine_running_requests": 4,
        "tokenmill_engine_waiting_requests": 2,
        "tokenmill_engine_kv_cache_usage_ratio": 0.5,
        "tokenmill_engine_prefix_cache_query_tokens_total": 200,
        "tokenmill_engine_prefix_cache_hit_tokens_total": 50,
        "tokenmill_engine_draft_tokens_total": 0,
    }


def test_waiting_is_told_by_team_app_and_tier(workers: Workers) -> None:
    workers.json("POST", "/admin/accounts", {"kind": "team", "id": "search"}, status=201)
    workers.json("POST", "/admin/accounts", {"kind": "app", "id": "bot", "parent": "search"}, status=201)
    key = workers.json("POST", "/admin/keys", {"parent": "bot"}, status=201)["key"]
    for _ in range(3):
        assert workers.chat(key, "plain", stream=True, act={"interval_s": 0.001})[0] == 200
    assert workers.chat(key, "plain")[0] == 200
    name, whose = r"tokenmill_account_(time_to_first|time_per_output)_token_seconds", 'team="search",tier="reasoning"'
    marks = rf'(count|sum|bucket)\{{app="bot",(?:le="\+Inf",)?{whose}\}}'

    def found() -> dict[tuple[str, str], float]:
        lines = re.findall(rf"^{name}_{marks} (\S+)$", scrape(workers), re.MULTILINE)
        return {(which, what): float(value) for which, what, value in lines}

    def all_are_counted() -> bool:
        seen = found()
        return len(seen) == 6 and all(value > 0 if what == "sum" else value == 3 for (_, what), value in seen.items())

    wait_until(all_are_counted)


def test_requests_that_nobody_can_read_are_counted(workers: Workers) -> None:
    workers.send("POST", "/v1/completions", b"{")
    workers.send("POST", "/v1/completions", b"x" * 100_000, key="nobody's")
    workers.send("POST", "/v1/files/x", {"model": "m" * 1025})

    def found() -> set[str]:
        return set(re.findall(r'^tokenmill_requests_total\{backend="",(.* 1\.0)$', scrape(workers), re.MULTILINE))

    refused = (("/v1/completions", 400), ("/v1/completions", 401), ("other", 404))
    expected = {f'endpoint="{path}",outcome="refused",status="{status}",tier=""}} 1.0' for path, status in refused}
    wait_until(lambda: found() == expected)


def test_every_family_is_well_named_and_documented(workers: Workers) -> None:
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", scrape(workers), re.MULTILINE))
    table = re.findall(r"^\| `(tokenmill_\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(kinds)
    for name, kind in kinds.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert name.removesuffix("_total").endswith(UNITS), name
