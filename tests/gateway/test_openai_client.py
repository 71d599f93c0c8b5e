"""The official client against the gateway: it must not notice that there is one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import FakeUpstream

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0, timeout=20) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "org/nested/name"]
    assert client.models.retrieve("org/nested/name").id == "org/nested/name"


def test_chat_and_completion(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3)
    assert chat.choices[0].message.content == "word word word "
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 3
    completion = client.completions.create(model="tiny", prompt="hello", max_tokens=2)
    assert completion.choices[0].text == "word word "


def test_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == "w0 w1 w2 w3 w4 "
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 5


def test_many_at_once(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    def ask(index: int) -> str:
        body = {"act": {"until_open": 16}}
        answer = client.completions.create(model="tiny", prompt=f"{index}", max_tokens=index + 1, extra_body=body)
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == ["word " * (index + 1) for index in range(16)]
    assert upstream.books.most_open == 16


def test_cancelled_stream(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    body = {"act": {"chunks": 1000, "interval_s": 0.05}}
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, extra_body=body)
    next(iter(stream))
    stream.close()
    wait_until(lambda: upstream.books.open == 0 and upstream.books.cancelled == 1, timeout_s=10)


def test_broken_stream_raises(client: openai.OpenAI) -> None:
    body = {"act": {"cut_after": 2}}
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, extra_body=body)
    with pytest.raises(openai.APIError, match="broke off"):
        list(stream)


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    act = {"status": 400, "body": '{"error": {"message": "bad", "type": "t", "param": "n", "code": 400}}'}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"act": act})
    assert raised.value.param == "n"
