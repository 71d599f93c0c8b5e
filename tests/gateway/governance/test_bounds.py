"""What a request can use at most, from its body; and what it is charged when nobody counted."""

import json
from typing import Any

import pytest

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.governance import bounds, charges
from tokenmill.engine.gateway.governance.bounds import TEMPLATE_TOKENS, TOOL_TOKENS, Bound
from tokenmill.engine.gateway.governance.budgets import Spending
from tokenmill.engine.gateway.governance.media import ENOUGH_TOKENS, IMAGE_TOKENS, UNSEEN_TOKENS
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.pipeline import Call, Exchange, Usage
from tokenmill.engine.gateway.portfolio import Target
from tokenmill.engine.gateway.settings import Settings

CONFIGURED = 700
WINDOW = 1000


def exchange(endpoint: str, body: dict[str, Any]) -> Exchange:
    """A request that has just arrived."""
    raw = json.dumps(body).encode()
    return Exchange(endpoint, [], raw, body=Body(raw), model="m", request_id="r", forward=[])


def target(window: int | None = None, catalog: dict[str, dict[str, Any]] | None = None, **fields: Any) -> Target:
    """A backend."""
    made = Target(Backend("b", "http://b", "t", context_window=window, **fields), Settings())
    made.catalog = catalog
    return made


@pytest.mark.parametrize(
    ("endpoint", "body", "window", "completion"),
    [
        ("chat/completions", {"max_tokens": 5}, None, 5),
        ("chat/completions", {"max_completion_tokens": 6, "max_tokens": 5}, None, 6),
        ("chat/completions", {"max_tokens": 5, "n": 3}, None, 15),
        ("chat/completions", {"max_tokens": 5, "n_cmpl": 3}, None, 15),
        ("chat/completions", {"max_tokens": 5, "n": 1}, None, 5),
        ("chat/completions", {"max_tokens": 5, "n": 0}, None, 5),
        ("chat/completions", {"max_tokens": 5, "n": None}, None, 5),
        # However much is asked for, what it costs is no more than a 64-bit column holds.
        ("chat/completions", {"max_tokens": 10**12}, None, ENOUGH_TOKENS),
        ("chat/completions", {"max_tokens": 10**6, "n": 10**6}, None, ENOUGH_TOKENS),
        ("chat/completions", {}, None, CONFIGURED),
        ("chat/completions", {}, WINDOW, WINDOW),
        ("chat/completions", {"max_tokens": None}, WINDOW, WINDOW),
        ("chat/completions", {"max_tokens": 10**18}, WINDOW, WINDOW),
        ("chat/completions", {"max_tokens": -1}, None, CONFIGURED),
        ("chat/completions", {"max_tokens": 0}, None, CONFIGURED),
        # What bounds the answers of another path, or of no server that is known, is ignored by many servers.
        ("chat/completions", {"max_output_tokens": 1}, WINDOW, WINDOW),
        ("completions", {"prompt": "a", "max_completion_tokens": 1}, WINDOW, WINDOW),
        ("responses", {"input": "a", "max_tokens": 1}, WINDOW, WINDOW),
        ("messages", {"max_completion_tokens": 1}, WINDOW, WINDOW),
        ("messages", {"max_tokens": 5}, WINDOW, 5),
        ("another/path", {"max_tokens": 5}, WINDOW, WINDOW),
        # Some go by it first.
        ("chat/completions", {"max_tokens": 5, "n_predict": 500}, WINDOW, 500),
        ("chat/completions", {"max_tokens": 5, "n_predict": 500.0}, WINDOW, WINDOW),
        ("chat/completions", {"max_tokens": 5, "n_predict": -1}, WINDOW, WINDOW),
        ("chat/completions", {"max_tokens": 5, "n_predict": 2, "max_new_tokens": None}, WINDOW, 5),
        ("chat/completions", {"max_tokens": 5, "max_output_tokens": "x"}, WINDOW, WINDOW),
        ("completions", {"prompt": "a", "max_tokens": 5, "best_of": 4, "n": 2}, None, 20),
        ("completions", {"prompt": ["a", "b"], "max_tokens": 5}, None, 10),
        ("completions", {"prompt": [[1, 2], [3]], "max_tokens": 5, "n": 2}, None, 20),
        ("completions", {"prompt": [1, 2, 3], "max_tokens": 5}, None, 5),
        ("responses", {"input": "a", "max_output_tokens": 9}, None, 9),
        ("embeddings", {"input": "a"}, WINDOW, 0),
    ],
)
def test_completion_bound(endpoint: str, body: dict[str, Any], window: int | None, completion: int) -> None:
    asked = bounds.asked(exchange("/v1/" + endpoint, body))
    assert asked.at(target(window), CONFIGURED).completion == completion


@pytest.mark.parametrize(
    ("body", "window", "completion"),
    [
        ({}, None, 300),
        ({}, WINDOW, 300),
        ({}, 200, 200),
        ({"max_tokens": 5}, None, 5),
        ({"max_tokens": 900}, None, 300),
    ],
)
def test_a_backends_longest_answer_bounds_each(body: dict[str, Any], window: int | None, completion: int) -> None:
    asked = bounds.asked(exchange("/v1/chat/completions", body | {"n": 2}))
    assert asked.at(target(window, max_output_tokens=300), CONFIGURED).completion == 2 * completion


def test_a_backends_longest_answer_may_be_above_the_configured_bound() -> None:
    asked = bounds.asked(exchange("/v1/chat/completions", {}))
    assert asked.at(target(max_output_tokens=CONFIGURED + 1), CONFIGURED).completion == CONFIGURED + 1
    form = Exchange("/v1/audio/transcriptions", [], b"--a", body=None, model="m", request_id="r", forward=[])
    assert bounds.asked(form).at(target(), CONFIGURED) == Bound(3 + TEMPLATE_TOKENS, CONFIGURED)


@pytest.mark.parametrize(
    ("endpoint", "body", "beyond"),
    [
        ("chat/completions", {"messages": []}, 0),
        ("chat/completions", {"messages": [], "functions": []}, TOOL_TOKENS),
        # Another path's names for what was said before are nothing here.
        ("completions", {"prompt": "a"}, 0),
        ("chat/completions", {"messages": [], "conversation": "c"}, 0),
        ("responses", {"input": "a", "conversation": None}, 0),
        ("responses", {"input": "a", "conversation": "c", "previous_response_id": "r"}, 2 * UNSEEN_TOKENS),
        ("embeddings", {"input": "a"}, 0),
        ("embeddings", {"input": ["a", "b", "c"]}, 2 * TEMPLATE_TOKENS),
    ],
)
def test_a_prompt_is_bounded_by_its_bytes_and_what_is_added_to_them(
    endpoint: str, body: dict[str, Any], beyond: int
) -> None:
    asked = bounds.asked(exchange(f"/v1/{endpoint}", body))
    assert asked.prompt == len(json.dumps(body)) + TEMPLATE_TOKENS + beyond


def test_prompt_bound_is_above_every_byte_level_count() -> None:
    body = {"messages": [{"role": "user", "content": "ü€😀" * 50}], "max_tokens": 1}
    asked = bounds.asked(exchange("/v1/chat/completions", body))
    assert asked.prompt >= len(("ü€😀" * 50).encode()) + TEMPLATE_TOKENS
    assert bounds.asked(exchange("/v1/chat/completions", {**body, "tools": []})).prompt > asked.prompt + TOOL_TOKENS
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    pictured = {"messages": [{"role": "user", "content": [image]}]}
    assert bounds.asked(exchange("/v1/chat/completions", pictured)).prompt > IMAGE_TOKENS
    assert asked.at(target(100), CONFIGURED).prompt == 100
    assert bounds.asked(exchange("/tokenize", body)).at(target(), CONFIGURED) == Bound(0, 0)


TEXT = "word " * 40


@pytest.mark.parametrize(
    ("endpoint", "body", "tokens"),
    [
        # A reranker reads the query, and what it was told, with each document.
        ("/v1/rerank", {"query": TEXT, "documents": ["a"] * 50}, 50 * len(TEXT)),
        ("/v2/rerank", {"query": "a", "documents": ["b"] * 50, "instruction": TEXT}, 50 * len(TEXT)),
        ("/rerank", {"query": TEXT, "texts": ["a"] * 50}, 50 * len(TEXT)),
        ("/v1/rerank", {"query": {"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
                        "documents": ["a"] * 50}, 50 * IMAGE_TOKENS),
        ("/score", {"text_1": TEXT, "text_2": ["a"] * 50}, 50 * len(TEXT)),
        ("/v1/score", {"queries": [TEXT], "documents": ["a"] * 50}, 50 * len(TEXT)),
        # What is read before, and stands elsewhere.
        ("/v1/responses", {"input": "a", "previous_response_id": "r", "max_output_tokens": 1}, UNSEEN_TOKENS),
        ("/v1/responses", {"input": "a", "conversation": {"id": "c"}, "max_output_tokens": 1}, UNSEEN_TOKENS),
        ("/v1/chat/completions", {"messages": [], "chat_template": "{% for _ in range(10 ** 6) %}a{% endfor %}"},
         UNSEEN_TOKENS),
        ("/v1/responses", {"prompt": {"id": "p"}, "max_output_tokens": 1}, UNSEEN_TOKENS),
    ],
)  # fmt: skip
def test_prompt_bound_holds_for_what_is_read_more_than_once_or_stands_elsewhere(
    endpoint: str, body: dict[str, Any], tokens: int
) -> None:
    bound = bounds.asked(exchange(endpoint, body)).at(target(UNSEEN_TOKENS), CONFIGURED).prompt
    assert tokens <= bound < 2 * tokens + 51 * TEMPLATE_TOKENS + len(json.dumps(body))


@pytest.mark.parametrize("texts", [[TEXT] * 50, [[12] * 60] * 50, [[{"role": "user", "content": TEXT}]] * 50])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify", "/v1/moderations", "/pooling"])
def test_a_window_bounds_each_text_and_not_all_of_them(path: str, texts: list[Any]) -> None:
    asked = bounds.asked(exchange(path, {"input": texts}))
    assert asked.at(target(1000), CONFIGURED).prompt >= len(json.dumps(texts))
    assert asked.at(target(100), CONFIGURED).prompt == 100 * len(texts)
    one = bounds.asked(exchange(path, {"input": "a" * 1000}))
    assert one.at(target(100), CONFIGURED).prompt == 100


def test_however_much_is_named_no_bound_is_negative() -> None:
    for count in (500, 760, 800, 1000, 1001):
        documents = [{"video_url": "http://x/y"}] * count
        assert bounds.asked(exchange("/v1/rerank", {"query": "a", "documents": documents})).prompt > 60_000_000
    pictures = {"query": "a" + "," * 40_000, "documents": [{"image": ["http://x"] * 30_000}, "b"]}
    assert bounds.asked(exchange("/v1/rerank", pictures)).prompt > 80_000


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/embeddings", {"input": ["a"] * 50_000}, 50_000),
        ("/v1/embeddings", {"input": [["a"]] * 50_000}, 50_000),
        ("/v1/embeddings", {"input": list(range(50_000))}, 1),
        ("/v1/embeddings", {"input": [{}] * 50_000}, 50_000),
        ("/v1/completions", {"prompt": ["a"] * 50_000}, 50_000),
        ("/v1/rerank", {"query": "b", "documents": ["a"] * 50_000}, 50_000),
    ],
)
def test_long_lists_are_counted_without_decoding_them(
    path: str, body: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(bounds, "MOST_ITEMS", 100)
    asked = exchange(path, body)
    original = Body.get
    monkeypatch.setattr(Body, "get", lambda self, name, kind: refuse() if name in body else original(self, name, kind))
    assert bounds.asked(asked).prompts == count


def test_commas_in_a_text_part_no_prompts() -> None:
    text = "a, b" * 40_000
    for body in ({"prompt": [text]}, {"prompt": [text, text]}):
        assert bounds.asked(exchange("/v1/completions", body)).prompts == len(body["prompt"])


def test_documents_that_are_paired_are_read_once() -> None:
    both = {"text_1": [TEXT] * 50, "text_2": [TEXT] * 50}
    once = len(json.dumps(both))
    assert once < bounds.asked(exchange("/score", both)).prompt < once + 50 * (3 * TEMPLATE_TOKENS)
    images = {"query": "a", "documents": [{"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}] * 50}
    assert 50 * IMAGE_TOKENS < bounds.asked(exchange("/rerank", images)).prompt < 60 * IMAGE_TOKENS


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_counting_tokens_costs_nothing(path: str) -> None:
    assert bounds.asked(exchange(path, {"messages": [], "max_tokens": 5})).at(target(), CONFIGURED) == Bound(0, 0)


def test_window_is_read_from_the_backends_list() -> None:
    assert target(None, {"a": {"max_model_len": 64}, "b": {"max_model_len": 32}}).context_window == 64
    assert target(None, {"a": {"max_model_len": 64}, "b": {}}).context_window is None
    assert target(7, {"a": {"max_model_len": 64}}).context_window == 7


@pytest.mark.parametrize("field", ["max_tokens", "n", "best_of"])
def test_wrong_type_names_the_field(field: str) -> None:
    with pytest.raises(ApiError) as raised:
        bounds.asked(exchange("/v1/completions", {field: "x"}))
    assert raised.value.param == field


BOUND = Bound(100, 50)


@pytest.mark.parametrize(
    ("call", "charged"),
    [
        (Call(target(), "m", Usage(3, 1, 2, exact=True), 200, taken=True), Usage(3, 1, 2, exact=True)),
        (Call(target(), "m", Usage(completion=7), 200, taken=True), Usage(100, 0, 7)),
        (Call(target(), "m", Usage(completion=70), 200, taken=True), Usage(100, 0, 50)),
        (Call(target(), "m", Usage(), 200, taken=True), Usage(100, 0, 50)),
        (Call(target(), "m", Usage(), 0, taken=True), Usage(100, 0, 50)),
        (Call(target(), "m", Usage(), 500, taken=True), Usage(exact=True)),
        (Call(target(), "m", Usage(), 0, taken=False), Usage(exact=True)),
    ],
)
def test_what_one_call_is_charged(call: Call, charged: Usage) -> None:
    assert charges.used(call, BOUND) == charged


def test_a_request_that_nobody_was_asked_for_cost_nothing() -> None:
    unasked = exchange("/v1/completions", {})
    unasked.outcome, unasked.status = "failed", 503
    nothing = Spending("", "", 0, 0, 0, True, 0, "failed", 503, 0)
    assert charges.spending(unasked, lambda _: BOUND) == nothing
    # Its client may be gone by the time that its answer is.
    unasked.outcome, unasked.status = "gone", 499
    assert charges.ended(nothing, unasked) == nothing._replace(outcome="gone", status=499)


def test_each_call_is_charged_at_its_own_backends_prices() -> None:
    ended = exchange("/v1/completions", {})
    dear = target(prices=Prices(5_000_000, 1_000_000, 9_000_000))
    cheap = target(prices=Prices(1_000_000, 1_000_000, 1_000_000))
    ended.calls += [
        Call(cheap, "m", Usage(10, 0, 20, exact=True), 200, taken=True),
        Call(cheap, "m", Usage(), 503, taken=True),
        Call(dear, "m", Usage(10, 4, 20, exact=True), 200, taken=True),
    ]
    spent = charges.spending(ended, lambda _: BOUND)
    assert (spent.cost, spent.prompt, spent.cached, spent.completion) == (6 * 5 + 4 + 20 * 9, 10, 4, 20)
    assert (spent.exact, spent.attempts, spent.total) == (True, 3, 30 + 6 * 5 + 4 + 20 * 9)
    (other,) = spent.others
    assert (other.kind, other.cost, other.prompt, other.completion) == ("failed", 30, 10, 20)
    # A call that cost nothing has no row.
    two = exchange("/v1/completions", {})
    two.calls += [ended.calls[0], ended.calls[2]]
    assert charges.spending(two, lambda _: BOUND) == spent._replace(attempts=2)
    # The answer may be an earlier call's: that of the backend that the exchange names.
    ended.target, ended.notes["escalation"] = cheap, {"escalated": True}
    spent = charges.spending(ended, lambda _: BOUND)
    assert (spent.status, [part.kind for part in spent.others]) == (0, ["escalated-from", "escalated-from"])
