"""A LiteLLM proxy's file, served as it is by `tokenmill serve`, and used with LiteLLM's calls and OpenAI's client."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tests.supervisor.running import REAL, Running, until

MASTER_KEY = "sk-0123456789abcdef0123456789abcdef"
pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    first, second = FakeUpstream().start(), FakeUpstream(("spare",)).start()
    yield first, second
    first.stop()
    second.stop()


@pytest.fixture(scope="module")
def serving(
    upstreams: tuple[FakeUpstream, FakeUpstream], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("litellm")
    first, second = upstreams
    config = folder / "litellm.yaml"
    config.write_text(
        f"""
model_list:
  - model_name: chat/small
    litellm_params: {{model: openai/tiny, api_base: {first.url}, api_key: os.environ/FIRST_KEY, rpm: 1000}}
    model_info: {{input_cost_per_token: 0.001, output_cost_per_token: 0.001}}
  - model_name: backup
    litellm_params: {{model: hosted_vllm/spare, api_base: {second.url}, api_key: sk-literal}}
  - model_name: mapped
    litellm_params: {{model: openai/spare, api_base: {second.url}, api_key: sk-literal}}
router_settings:
  fallbacks: [{{chat/small: [backup]}}]
  context_window_fallbacks: [{{chat/small: [backup]}}]
  model_group_alias: {{gpt-4o: chat/small}}
  num_retries: 3
general_settings: {{master_key: os.environ/LITELLM_MASTER_KEY}}
litellm_settings: {{drop_params: true}}
""",
        encoding="utf-8",
    )
    prices = folder / "prices.json"
    entry = {"litellm_provider": "openai", "input_cost_per_token": 0.004, "output_cost_per_token": 0.004}
    prices.write_text(json.dumps({"spare": entry}), encoding="utf-8")
    command = [*REAL, str(config), "--port", "0", "--workers", "2"]
    running = Running(
        command,
        folder,
        FIRST_KEY="sk-upstream",
        LITELLM_MASTER_KEY=MASTER_KEY,
        TOKENMILL_LITELLM_PRICES=str(prices),
    )
    running.wait_ready()
    yield running
    running.close()


def call(serving: Running, method: str, path: str, body: Any = None, key: str = MASTER_KEY) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", serving.port, timeout=30)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def test_keys_models_aliases_and_budgets(serving: Running, upstreams: tuple[FakeUpstream, FakeUpstream]) -> None:
    assert "litellm_settings.drop_params: used for" in serving.text
    status, made = call(serving, "POST", "/key/generate", {"models": ["chat/small", "gpt-4o"], "max_budget": 1.0})
    assert status == 200
    with openai.OpenAI(base_url=f"http://127.0.0.1:{serving.port}/v1", api_key=made["key"], max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"chat/small", "gpt-4o"}
        for name in ("chat/small", "gpt-4o"):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=3
            )
            assert answer.usage is not None and answer.usage.completion_tokens == 3
        _, headers, _ = upstreams[0].books.requests[-1]
        assert headers["authorization"] == "Bearer sk-upstream"
        assert json.loads(upstreams[0].books.requests[-1][2])["model"] == "tiny"
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model="backup", messages=[])
        books = upstreams[0].books
        cost = pytest.approx(0.001 * (books.prompt_tokens + books.completion_tokens))
        # A request is settled after its answer has gone out.
        wait_until(lambda: call(serving, "GET", f"/key/info?key={made['key']}")[1]["info"]["spend"] == cost)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="chat/small", messages=[], max_tokens=5000)


def test_a_budget_stops_a_model_that_only_the_cost_map_prices(serving: Running) -> None:
    assert "no price of 'backup': they cost nothing, budgets do not bind" in serving.text
    _, made = call(serving, "POST", "/key/generate", {"max_budget": 1.0})

    def ask(model: str) -> tuple[int, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        return call(serving, "POST", "/v1/chat/completions", body, made["key"])

    def spent() -> float:
        return float(call(serving, "GET", f"/key/info?key={made['key']}")[1]["info"]["spend"])

    status, answer = ask("mapped")
    assert status == 200
    # A request is settled after its answer has gone out.
    wait_until(lambda: spent() == pytest.approx(0.004 * answer["usage"]["total_tokens"]))
    refused = next(found for found in (ask("mapped") for _ in range(200)) if found[0] != 200)
    assert refused[0] == 429 and "budget" in refused[1]["error"]["message"]
    assert spent() <= 1.0
    assert ask("backup")[0] == 200  # it costs nothing, as the start said


def test_a_backend_that_is_gone_falls_back(serving: Running, upstreams: tuple[FakeUpstream, FakeUpstream]) -> None:
    _, made = call(serving, "POST", "/key/generate", {})
    upstreams[0].pause()
    try:
        status, answer = call(serving, "POST", "/v1/chat/completions", {"model": "gpt-4o", "messages": []}, made["key"])
        assert (status, answer["model"]) == (200, "spare")
        assert upstreams[1].books.requests[-1][1]["authorization"] == "Bearer sk-literal"
    finally:
        upstreams[0].start()


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_backend_that_fails_falls_back(
    serving: Running, upstreams: tuple[FakeUpstream, FakeUpstream], status: int
) -> None:
    _, made = call(serving, "POST", "/key/generate", {})
    failing = {
        "status": status,
        "body": '{"error": {"message": "no"}}',
        "headers": {"content-type": "application/json"},
    }
    for act, expected in (({"tiny": failing, "spare": {}}, 200), (failing, status)):
        body = {"model": "chat/small", "messages": [], "act": act}
        got, answer = call(serving, "POST", "/v1/chat/completions", body, made["key"])
        assert got == expected
        assert answer.get("model") == "spare" if expected == 200 else answer == {"error": {"message": "no"}}


def test_a_store_that_cannot_be_written_is_the_reason_that_the_start_gives(tmp_path: Path) -> None:
    config = tmp_path / "litellm.yaml"
    config.write_text(
        "model_list: [{model_name: m, litellm_params: {model: openai/x, api_base: 'http://127.0.0.1:9/v1'}}]\n"
        f"general_settings: {{master_key: {MASTER_KEY}}}\n"
    )
    running = Running([*REAL, str(config), "--port", "0"], tmp_path, TOKENMILL_STORE="/proc/nowhere/books.db")
    try:
        until(lambda: "could not start" in running.text, 30, running.text)
        assert "ended with status 3: /proc/nowhere/books.db cannot be opened: " in running.text
    finally:
        running.close()
