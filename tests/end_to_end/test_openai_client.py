"""The official client against the whole stack: gateway, vLLM with our hooks, the bundled pair with speculation."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.end_to_end.asking import PROMPTS, metric
from tests.supervisor.running import Running, call, until

pytestmark = pytest.mark.end_to_end
#: Tokens that a request asks for when it is going to be cancelled: several seconds' worth.
LONG = {"max_tokens": 1900, "n": 8, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=120) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"tiny-target", "tiny-pair", "embedder"}
    assert client.models.retrieve("tiny-target").id == "tiny-target"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_chat_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny-target",
        messages=[{"role": "user", "content": "Write the function add."}],
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip()
    assert sum(bool(chunk.choices) for chunk in chunks) > 3
    assert chunks[-1].usage is not None
    assert 0 < chunks[-1].usage.completion_tokens <= 40
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] != []


def test_completion_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny-target", prompt="def add(a, b):\n", max_tokens=8, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    for token, chosen, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen is not None
        assert chosen <= 0
        assert max(top, key=lambda key: top[key]) == token  # greedy


def test_a_tier_is_a_model_name(client: openai.OpenAI) -> None:
    assert client.completions.create(model="text", prompt="x", max_tokens=2).choices[0].text is not None


def test_sixteen_at_once(client: openai.OpenAI) -> None:
    def ask(number: int) -> int:
        answer = client.chat.completions.create(
            model="tiny-target",
            messages=[{"role": "user", "content": f"Write function number {number}."}],
            max_tokens=32,
            temperature=number % 3 / 2,
            seed=number,
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(ask, range(16)))
    assert len(counts) == 16
    assert all(0 < count <= 32 for count in counts)


def test_embeddings_and_rerank(client: openai.OpenAI, server: Running) -> None:
    answer = client.embeddings.create(model="embedder", input=["a list of numbers", "a list of integers", "def f():"])
    vectors = [entry.embedding for entry in answer.data]
    assert [len(vector) for vector in vectors] == [256] * 3
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)
    body = {"model": "embedder", "query": "a list of numbers", "documents": ["def f():", "a list of numbers"]}
    status, _, ranked = call(server.url + "/v1/rerank", body)
    assert status == 200, ranked
    assert ranked["results"][0]["index"] == 1


def requests_running(server: Running) -> float:
    return metric(server, "vllm:num_requests_running") + metric(server, "vllm:num_requests_waiting")


def generated(server: Running) -> float:
    return metric(server, "vllm:generation_tokens_total")


def assert_freed(server: Running, before: float) -> None:
    until(lambda: requests_running(server) == 0, 5, "the engine's slots are free")
    time.sleep(0.3)
    assert requests_running(server) == 0
    assert generated(server) - before < 8 * 1900 / 2  # it did not just run to its end


def test_a_cancelled_stream_frees_the_engine(client: openai.OpenAI, server: Running) -> None:
    before = generated(server)
    stream = client.completions.create(model="tiny-target", prompt=PROMPTS[0], stream=True, **LONG)  # type: ignore[call-overload]
    for _ in range(5):
        next(stream)
    assert requests_running(server) > 0
    stream.close()
    assert_freed(server, before)


def test_a_cancelled_plain_request_frees_the_engine(client: openai.OpenAI, server: Running) -> None:
    before = generated(server)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="tiny-target", prompt=PROMPTS[1], timeout=0.7, **LONG)  # type: ignore[call-overload]
    assert_freed(server, before)
