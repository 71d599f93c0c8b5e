"""Health, readiness, metrics and the documentation."""

import json
import re

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices

CHAT = "/v1/chat/completions"


def sample(text: bytes, name: str) -> float:
    """The value of one series; 0 where there is none."""
    found = re.search(rb"^" + re.escape(name).encode() + rb" (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def test_metrics_count_what_passed(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    where = 'backend="a",{}tier="utility"'
    names = {
        "requests": 'tokenmill_requests_total{backend="a",endpoint="/v1/chat/completions",outcome="ok",'
        'status="200",tier="utility"}',
        "prompt": "tokenmill_tokens_total{" + where.format('kind="prompt",') + "}",
        "completion": "tokenmill_tokens_total{" + where.format('kind="completion",') + "}",
        "first": "tokenmill_time_to_first_token_seconds_count{" + where.format("") + "}",
    }

    def read() -> dict[str, float]:
        text = gateway.get("/metrics")[2]
        return {short: sample(text, name) for short, name in names.items()}

    before = read()
    for stream in (False, True):
        gateway.post(CHAT, {"model": "tiny", "stream": stream, "stream_options": {"include_usage": True}})
    books = upstream.books

    def counted() -> bool:
        change = {short: value - before[short] for short, value in read().items()}
        wanted = {"requests": 2, "prompt": books.prompt_tokens, "completion": books.completion_tokens, "first": 1}
        return change == wanted

    wait_until(counted, timeout_s=20)


def test_unknown_paths_and_models_make_no_new_series(gateway: RunningGateway) -> None:
    for index in range(5):
        gateway.post(f"/v1/invented-{index}", {"model": "tiny"})
        gateway.post(CHAT, {"model": f"invented-{index}"})
    wait_until(lambda: b'endpoint="other"' in gateway.get("/metrics")[2])
    assert b"invented" not in gateway.get("/metrics")[2]


def test_documentation_is_self_contained(gateway: RunningGateway) -> None:
    status, headers, body = gateway.get("/openapi.json")
    document = json.loads(body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert document["openapi"].startswith("3.1")
    assert {CHAT, "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/metrics"} <= set(
        document["paths"]
    )
    status, headers, page = gateway.get("/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    for path in document["paths"]:
        assert path.encode() in page
    assert not re.search(rb'(src|href)="(https?:)?//', page)


def test_ready_and_models_follow_the_backends() -> None:
    first, second = FakeUpstream(("one",)).start(), FakeUpstream(("two",)).start()
    try:
        backends = Backend("a", first.url, "utility"), Backend("b", second.url, "reasoning", models=("two",))
        with RunningGateway(*backends) as gateway:
            assert [model["id"] for model in json.loads(gateway.get("/v1/models")[2])["data"]] == ["one", "two"]
            status, _, body = gateway.post(CHAT, b'{"messages": []}')
            assert (status, json.loads(body)["error"]["param"]) == (400, "model")

            second.pause()
            wait_until(lambda: gateway.get("/ready")[0] == 503)
            status, headers, body = gateway.get("/ready")
            assert json.loads(body)["tiers"] == {"reasoning": "b: connection refused"}
            assert gateway.get("/health")[0] == 200
            assert [gateway.get(f"/health/{end}")[0] for end in ("liveliness", "liveness", "readiness")] == [
                200,
                200,
                503,
            ]
            status, headers, body = gateway.post(CHAT, {"model": "two"})
            assert (status, json.loads(body)["error"]["code"]) == (503, "service_unavailable")
            assert int(headers["retry-after"]) >= 1
            assert gateway.post(CHAT, {"model": "one"})[0] == 200

            second.start()
            wait_until(lambda: gateway.get("/ready")[0] == 200)
            assert gateway.post(CHAT, {"model": "two"})[0] == 200
            assert gateway.post(CHAT, {"model": "reasoning"})[0] == 200
    finally:
        first.stop()
        second.stop()


def test_litellms_clients_read_what_models_are(upstream: FakeUpstream) -> None:
    prices = Prices(250_000_000, 125_000_000, 1_000_000_000, 300_000_000, 500_000_000)
    one = Backend(
        *("a", upstream.url, "utility"),
        models=("chat/one",),
        model_names={"chat/one": "tiny"},
        api_key="sk-secret",
        prices=prices,
        context_window=8192,
        max_output_tokens=1024,
        capabilities=("tools", "vision"),
        info={"description": "fast", "mode": "other"},
    )
    other = Backend("b", upstream.url, "other", models=("embed",), capabilities=("embeddings",))
    with RunningGateway(one, other) as gateway:
        status, _, body = gateway.get("/model/info")
        assert (status, gateway.get("/v1/model/info")[2]) == (200, body)
        assert gateway.post("/model/info", {})[0] == 405
    assert b"secret" not in body and upstream.url.encode() not in body
    first, second = json.loads(body)["data"]
    assert (first["model_name"], first["litellm_params"]) == ("chat/one", {"model": "openai/tiny"})
    info = first["model_info"]
    assert (info["max_input_tokens"], info["max_output_tokens"], info["max_tokens"]) == (8192, 1024, 1024)
    assert (info["input_cost_per_token"], info["output_cost_per_token"]) == (2.5e-6, 1e-5)
    assert info["cache_read_input_token_cost"] == 1.25e-6
    assert info["cache_creation_input_token_cost"] == 3e-6
    assert info["cache_creation_input_token_cost_above_1hr"] == 5e-6
    assert not any("cache" in name for name in second["model_info"])
    assert info["description"] == "fast"
    assert (info["supports_vision"], info["supports_function_calling"], info["mode"]) == (True, True, "other")
    assert (second["model_name"], second["model_info"]["mode"]) == ("embed", "embedding")
    assert (second["model_info"]["max_input_tokens"], second["model_info"]["max_output_tokens"]) == (
        4096,
        None,
    )  # listed


def test_models_not_known_yet_are_no_404() -> None:
    backend = FakeUpstream().start()
    backend.pause()
    try:
        with_nobody = RunningGateway(Backend("a", backend.url, "utility"))
        wait_until(lambda: with_nobody.get("/health")[0] == 200)
        status, headers, _ = with_nobody.post(CHAT, {"model": "tiny"})
        assert (status, "retry-after" in headers) == (503, True)
        backend.start()
        with with_nobody:
            assert with_nobody.post(CHAT, {"model": "tiny"})[0] == 200
    finally:
        backend.stop()
