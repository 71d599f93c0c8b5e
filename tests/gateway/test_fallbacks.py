"""Fallbacks after errors: which errors lead to which tier, what goes back when all fail, what none gets around."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.gateway.governance.governed import Governed, governing
from tests.gateway.running import RunningGateway, wait_until
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.balance import Balancer
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.breaker import RetryBudget
from tokenmill.engine.gateway.fallback import Failure, Trouble, Way, fitting, trouble_of
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import FALLBACK, Route, Target
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Settings

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
#: `small` falls back to `large`, for long prompts to `long`, for refused content to `lax`.
TIERS = ("small", "large", "long", "lax")
FALLBACKS = {
    "fallbacks": {"small": ("large",)},
    "context_window_fallbacks": {"small": ("long",)},
    "content_policy_fallbacks": {"small": ("lax",)},
}
TOO_LONG = "This model's maximum context length is 100 tokens. However, your messages resulted in 200 tokens."


@pytest.fixture(scope="module")
def upstreams() -> Iterator[dict[str, FakeUpstream]]:
    servers = {name: FakeUpstream((name,)).start() for name in TIERS}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture
def servers(upstreams: dict[str, FakeUpstream]) -> dict[str, FakeUpstream]:
    """The backends with empty books, one for each tier."""
    for server in upstreams.values():
        server.books = Books()
    return upstreams


@contextmanager
def running(servers: dict[str, FakeUpstream], key: str | None = "sk-gateway", **more: Any) -> Iterator[RunningGateway]:
    """A gateway of the four tiers."""
    backends = [Backend(name, server.url, name, (name,), api_key=key) for name, server in servers.items()]
    # No circuit opens here: what a single error leads to must not depend on those before it.
    settings = Settings(breaker_failures=10_000, read_timeout_s=0.5, **FALLBACKS)
    with RunningGateway(*backends, settings=settings, **more) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def gateway(upstreams: dict[str, FakeUpstream]) -> Iterator[RunningGateway]:
    with running(upstreams) as found:
        yield found


def error(status: int, message: str = "no", code: Any = None) -> dict[str, Any]:
    """What a backend is to do: answer with this error."""
    body = json.dumps({"error": {"message": message, "type": "t", "param": None, "code": code}})
    return {"status": status, "body": body, "headers": JSON}


def asked(servers: dict[str, FakeUpstream]) -> dict[str, int]:
    """How many requests each has seen, without those that have seen none."""
    return {name: len(server.books.requests) for name, server in servers.items() if server.books.requests}


@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 500, 501, 502, 503, 504, 529])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_first_tier_leads_to_the_second(
    gateway: RunningGateway, servers: dict[str, FakeUpstream], status: int, stream: bool
) -> None:
    body = {"model": "small", "stream": stream, "act": {"small": error(status), "large": {}}}
    got, headers, answer = gateway.post(CHAT, body)
    assert (got, headers["x-tokenmill-fallback"]) == (200, "large")
    assert b"[DONE]" in answer if stream else json.loads(answer)["model"] == "large"
    assert asked(servers) == {"small": 1, "large": 1}


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_the_requests_own_fault_goes_back(
    gateway: RunningGateway, servers: dict[str, FakeUpstream], status: int
) -> None:
    got, headers, _ = gateway.post(CHAT, {"model": "small", "act": {"small": error(status), "large": {}}})
    assert got == status
    assert "x-tokenmill-fallback" not in headers
    assert asked(servers) == {"small": 1}


def test_a_client_with_a_key_of_his_own_is_told_that_it_is_wrong(servers: dict[str, FakeUpstream]) -> None:
    with running(servers, key=None) as gateway:
        for status in (401, 403):
            assert gateway.post(CHAT, {"model": "small", "act": {"small": error(status)}})[0] == status
    assert asked(servers) == {"small": 2}


def test_a_thing_that_is_kept_at_a_backend_is_not_looked_for_elsewhere(
    gateway: RunningGateway, servers: dict[str, FakeUpstream]
) -> None:
    assert gateway.post("/v1/batches/b1/cancel", {"model": "small", "act": {"small": error(404)}})[0] == 404
    assert gateway.post("/v1/responses", {"model": "small", "act": {"small": error(404)}})[0] == 404
    assert asked(servers) == {"small": 2}


@pytest.mark.parametrize("last", [error(500, "other"), error(400, "other"), {"cut_after": 0}, {"delay_s": 5}])
def test_the_first_error_goes_back_untouched_when_all_fail(
    gateway: RunningGateway, servers: dict[str, FakeUpstream], last: dict[str, Any]
) -> None:
    first = error(502, "the first tier's own words", "its_code")
    status, headers, answer = gateway.post(CHAT, {"model": "small", "act": {"small": first, "large": last}})
    assert (status, answer) == (502, first["body"].encode())
    assert "x-tokenmill-fallback" not in headers
    assert asked(servers) == {"small": 1, "large": 1}
    metrics = gateway.get("/metrics")[2].decode()
    assert 'tier="large"' not in "".join(line for line in metrics.splitlines() if 'status="502"' in line)


def test_a_verdict_on_the_request_says_more_than_that_nobody_answered(
    gateway: RunningGateway, servers: dict[str, FakeUpstream]
) -> None:
    wrong = error(422, "this field is wrong")
    body = {"model": "small", "act": {"small": {"cut_after": 0}, "large": wrong}}
    status, _, answer = gateway.post(CHAT, body)
    assert (status, answer) == (422, wrong["body"].encode())
    body = {"model": "small", "act": {"small": {"cut_after": 0}, "large": error(500)}}
    status, _, answer = gateway.post(CHAT, body)
    assert (status, json.loads(answer)["error"]["code"]) == (503, "service_unavailable")
    assert asked(servers) == {"small": 2, "large": 2}


def test_silence_leads_to_another_tier_and_not_to_the_same_one(servers: dict[str, FakeUpstream]) -> None:
    backends = [Backend(f"s{number}", servers["small"].url, "small", ("small",)) for number in range(2)]
    backends.append(Backend("large", servers["large"].url, "large", ("large",)))
    settings = Settings(read_timeout_s=0.5, fallbacks={"small": ("large",)})
    with RunningGateway(*backends, settings=settings) as gateway:
        body = {"model": "small", "act": {"small": {"delay_s": 5}, "large": {}}}
        assert gateway.post(CHAT, body)[0] == 200
        assert asked(servers) == {"small": 1, "large": 1}
        # The silent one is hung up on: it may stop.
        wait_until(lambda: servers["small"].books.cancelled == 1)


def test_a_backend_may_be_silent_for_less_than_others(servers: dict[str, FakeUpstream]) -> None:
    backends = (
        Backend("small", servers["small"].url, "small", ("small",), read_timeout_s=0.3),
        Backend("patient", servers["small"].url, "patient", ("small2",), {"small2": "small"}),
        Backend("large", servers["large"].url, "large", ("large",)),
    )
    with RunningGateway(*backends, settings=Settings(fallbacks={"small": ("large",)})) as gateway:
        act = {"small": {"delay_s": 3}, "large": {}}
        assert gateway.post(CHAT, {"model": "small", "act": act})[1]["x-tokenmill-fallback"] == "large"
        assert gateway.post(CHAT, {"model": "small2", "act": act})[0] == 200
        act["large"] = error(500)
        assert b"was silent for 0.3 s" in gateway.post(CHAT, {"model": "small", "act": act})[2]


@pytest.mark.parametrize(
    "last", [{"delay_s": 5}, error(400, TOO_LONG), error(400, "filtered", "content_filter"), error(422)]
)
def test_a_fallback_is_not_asked_again_either_where_its_answer_says_so(
    servers: dict[str, FakeUpstream], last: dict[str, Any]
) -> None:
    backends = [Backend("small", servers["small"].url, "small", ("small",))]
    backends += [Backend(f"l{number}", servers["large"].url, "large", ("large",)) for number in range(3)]
    backends.append(Backend("long", servers["long"].url, "long", ("long",)))
    settings = Settings(read_timeout_s=0.5, retry_ratio=1.0, fallbacks={"small": ("large", "long")})
    with RunningGateway(*backends, settings=settings) as gateway:
        for _ in range(3):
            body = {"model": "small", "act": {"small": error(500), "large": last, "long": {}}}
            status, headers, _ = gateway.post(CHAT, body)
            assert (status, headers["x-tokenmill-fallback"]) == (200, "long")
    assert asked(servers) == {"small": 3, "large": 3, "long": 3}


def test_a_stream_that_has_begun_is_not_begun_elsewhere(
    gateway: RunningGateway, servers: dict[str, FakeUpstream]
) -> None:
    body = {"model": "small", "stream": True, "act": {"small": {"cut_after": 3}, "large": {}}}
    raw = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    answer = gateway.raw(head + str(len(raw)).encode() + b"\r\n\r\n" + raw)
    assert b"w2" in answer and b"upstream_cut" in answer and b"[DONE]" not in answer
    assert asked(servers) == {"small": 1}


@pytest.mark.parametrize(
    "said", [error(400, "x", "context_length_exceeded"), error(400, TOO_LONG, 400), error(413, "Prompt is too long: 9")]
)
def test_a_prompt_that_is_too_long_goes_where_it_fits(
    gateway: RunningGateway, servers: dict[str, FakeUpstream], said: dict[str, Any]
) -> None:
    # As many bytes as may be more tokens than the 4096 that the backend's own list says.
    talk = [{"role": "user", "content": "x" * 5000}]
    status, headers, _ = gateway.post(CHAT, {"model": "small", "messages": talk, "act": {"small": said, "long": {}}})
    assert (status, headers["x-tokenmill-fallback"]) == (200, "long")
    assert asked(servers) == {"small": 1, "long": 1}


@pytest.mark.parametrize("escalates", [False, True])
def test_of_auto_a_prompt_that_is_too_long_goes_to_the_tiers_ranked_below(
    servers: dict[str, FakeUpstream], escalates: bool
) -> None:
    names = ("small", "large", "long")
    backends = [
        Backend(name, servers[name].url, name, (name, "shared"), prices=Prices(price, price, price), quality=0.9,
                capabilities=("logprobs",))
        for price, name in enumerate(names, start=1)
    ]  # fmt: skip
    too_long = error(400, TOO_LONG, 400)
    escalation = EscalationSettings("small", "large", 0.5) if escalates else None
    with RunningGateway(*backends, routing=RoutingSettings(escalation=escalation)) as gateway:
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        status, headers, _ = gateway.post(CHAT, {**body, "act": {"small": too_long, "large": too_long, "long": {}}})
        assert (status, headers["x-tokenmill-tier"]) == (200, "long")
        assert headers["x-tokenmill-reason"].startswith("failed over from small")
        assert asked(servers) == {"small": 1, "large": 1, "long": 1}
        status, _, answer = gateway.post(CHAT, {**body, "act": too_long})
        assert (status, answer) == (400, too_long["body"].encode()), "the first tier's own words"
        for model in ("small", "shared"):
            for server in servers.values():
                server.books = Books()
            assert gateway.post(CHAT, {**body, "model": model, "act": too_long})[0] == 400
            assert sum(asked(servers).values()) == 1, "what is asked for by name goes nowhere else"


def test_a_prompt_that_cannot_fit_is_not_sent_first(servers: dict[str, FakeUpstream]) -> None:
    backends = [
        Backend("small", servers["small"].url, "small", ("small",), context_window=400),
        Backend("long", servers["long"].url, "long", ("long",), prices=Prices(10**6, 10**6, 10**6)),
    ]
    settings = Settings(context_window_fallbacks={"small": ("long",)})
    with RunningGateway(*backends, settings=settings) as gateway:
        for size, expected in ((100, "small"), (1200, "small"), (1700, "long")):
            body = {"model": "small", "messages": [{"role": "user", "content": "x" * size}], "max_tokens": 10}
            status, headers, answer = gateway.post(CHAT, body)
            assert (status, json.loads(answer)["model"]) == (200, expected)
            assert headers.get("x-tokenmill-fallback") == (None if expected == "small" else expected)
    assert asked(servers) == {"small": 2, "long": 1}


def test_refused_content_goes_only_where_that_is_meant(
    gateway: RunningGateway, servers: dict[str, FakeUpstream]
) -> None:
    refused = error(400, "filtered", "content_filter")
    status, headers, _ = gateway.post(CHAT, {"model": "small", "act": {"small": refused, "lax": {}}})
    assert (status, headers["x-tokenmill-fallback"]) == (200, "lax")
    status, _, answer = gateway.post(CHAT, {"model": "large", "act": {"large": refused}})
    assert (status, answer) == (400, refused["body"].encode())
    assert asked(servers) == {"small": 1, "lax": 1, "large": 1}


@pytest.mark.parametrize(
    ("status", "body", "trouble"),
    [
        (500, b"<html>", "failed"),
        (408, b"", "failed"),
        (429, b"", "failed"),
        (401, b"", "failed"),
        (404, b"<html>", "failed"),
        (400, b"<html>", "final"),
        (400, b"[]", "final"),
        (400, b'{"error": "no"}', "final"),
        (400, b'{"error": {"code": null, "message": null}}', "final"),
        (400, b'{"error": {"code": "context_length_exceeded"}}', "context"),
        (413, b'{"error": {"message": "Prompt is too long: 5 tokens"}}', "context"),
        (409, b'{"error": {"message": "Prompt is too long: 5 tokens"}}', "final"),
        (400, b'{"error": {"code": "content_filter"}}', "policy"),
        (503, b'{"error": {"code": "content_filter"}}', "failed"),
    ],
)
def test_what_an_error_means(status: int, body: bytes, trouble: Trouble) -> None:
    target = Target(Backend("small", "http://127.0.0.1:9", "small", ("small",), api_key="sk"), Settings())
    exchange = Exchange(CHAT, [], b"{}", body=None, model="small", request_id="r", forward=[])
    assert trouble_of(Reply(status, [], body), exchange, target) == trouble


@pytest.mark.parametrize(
    ("length", "after", "left"),
    [
        (10, "context", ["small"]),  # it fits for certain
        (800, "context", ["small", "long"]),
        (10_000, "context", ["long"]),  # it cannot fit
        # Where no other is meant for that, the backend itself says so.
        (10_000, "error", ["small", "long"]),
    ],
)
def test_where_a_long_prompt_goes_first(length: int, after: Any, left: list[str]) -> None:
    small, long = (
        Target(Backend(name, "http://127.0.0.1:9", name, (name,), context_window=window), Settings())
        for name, window in (("small", 500), ("long", 5000))
    )
    body = json.dumps({"messages": [{"role": "user", "content": "w " * (length // 2)}], "max_tokens": 10}).encode()
    exchange = Exchange(CHAT, [], body, body=Body(body), model="small", request_id="r", forward=[])
    routes = fitting([Route((small,), "small"), Route((long,), None, FALLBACK, after)], exchange)
    assert [target.backend.name for route in routes for target in route.targets] == left


@pytest.mark.parametrize(("trouble", "then"), [("failed", "large"), ("policy", None)])
def test_refused_content_is_no_error(trouble: Trouble, then: str | None) -> None:
    small, large = (
        Target(Backend(name, "http://127.0.0.1:9", name, (name,), health_path=None), Settings())
        for name in ("small", "large")
    )
    way = Way([Route((small,), "small"), Route((large,), None, FALLBACK, "error")], None, RetryBudget(1.0))
    exchange = Exchange(CHAT, [], b"{}", body=None, model="small", request_id="r", forward=[])
    assert way.next(exchange, Balancer()) is not None
    assert way.failed(Failure(small, Reply(400)), trouble)
    choice = way.next(exchange, Balancer())
    assert (choice and choice[1].backend.name) == then


def test_no_tier_is_asked_much_more_often_than_requests_come(servers: dict[str, FakeUpstream]) -> None:
    backends = [Backend(f"s{number}", servers["small"].url, "small", ("small",)) for number in range(3)]
    backends += [Backend(f"l{number}", servers["large"].url, "large", ("large",)) for number in range(3)]
    settings = Settings(breaker_failures=10_000, retry_ratio=0.1, fallbacks={"small": ("large",)})
    with RunningGateway(*backends, settings=settings) as gateway:
        for _ in range(150):
            assert gateway.post(CHAT, {"model": "small", "act": error(500)})[0] == 500
    assert max(asked(servers).values()) <= 150 * 1.1 + 10
    assert sum(asked(servers).values()) <= 150 * 2.1 + 10


def test_retries_are_counted_within_a_tier(servers: dict[str, FakeUpstream]) -> None:
    backends = [Backend(f"s{number}", servers["small"].url, "small", ("small",)) for number in range(3)]
    backends.append(Backend("large", servers["large"].url, "large", ("large",)))
    for most, expected in ((0, 1), (1, 2)):
        servers["small"].books, servers["large"].books = Books(), Books()
        settings = Settings(breaker_failures=10_000, most_retries=most, fallbacks={"small": ("large",)})
        with RunningGateway(*backends, settings=settings) as gateway:
            assert gateway.post(CHAT, {"model": "small", "act": {"small": error(500), "large": {}}})[0] == 200
        assert asked(servers) == {"small": expected, "large": 1}


@pytest.fixture(scope="module")
def governed(upstreams: dict[str, FakeUpstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    """`small` stands here and is cheap, `large` in the cloud and dear."""
    place = str(tmp_path_factory.mktemp("books") / "gateway.db")
    # Micro-cents a token, times a million.
    cheap, dear = Prices(10**6, 10**6, 10**6), Prices(10**9, 10**9, 10**9)
    small, large = upstreams["small"].url, upstreams["large"].url
    backends = (
        Backend("small", small, "small", ("small",), prices=cheap, context_window=4096),
        Backend("large", large, "large", ("large",), prices=dear, context_window=4096, zone="cloud"),
    )
    settings = Settings(breaker_failures=10_000, read_timeout_s=0.5, fallbacks={"small": ("large",)})
    sensitivity = SensitivitySettings(default="stay")
    with governing(place, *backends, settings=settings, sensitivity=sensitivity) as running:
        yield running


def ask(governed: Governed, key: str, content: str = "hello", small: Any = None) -> tuple[int, Any]:
    act = {"small": small or error(500), "large": {}}
    body = {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": 5, "act": act}
    status, _, answer = governed.ask(key, body)
    return status, json.loads(answer)


def test_personal_data_stays_whatever_fails(governed: Governed, servers: dict[str, FakeUpstream]) -> None:
    _, key = governed.key()
    for failing in (error(500), error(429), error(401), error(404), {"cut_after": 0}, error(400, TOO_LONG)):
        status, _ = ask(governed, key, "write to jane.doe@example.com", failing)
        assert status >= 400
        assert ask(governed, key, "write to nobody", failing)[0] == 200
    assert asked(servers)["large"] == 6
    assert all(b"jane" not in raw for _, _, raw in servers["large"].books.requests)


def test_a_key_falls_back_only_to_what_it_may_ask_for(governed: Governed, servers: dict[str, FakeUpstream]) -> None:
    _, key = governed.key(models=["small"])
    assert ask(governed, key)[0] == 500
    _, key = governed.key(models=["small", "large"])
    assert ask(governed, key)[0] == 200
    assert asked(servers) == {"small": 2, "large": 1}


def test_the_fallbacks_price_is_reserved_and_its_tokens_are_charged(
    governed: Governed, servers: dict[str, FakeUpstream]
) -> None:
    key_id, key = governed.key(Limits(hard_limit=10_000))
    assert ask(governed, key, small={"delay_s": 0})[0] == 200
    assert ask(governed, key)[0] == 500, "the dear fallback does not fit, and is not asked"
    assert asked(servers) == {"small": 2}
    _, key = governed.key(Limits(hard_limit=10))
    status, answer = ask(governed, key)
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")
    servers["small"].books = Books()
    key_id, key = governed.key()
    status, answer = ask(governed, key)
    assert status == 200
    wait_until(lambda: len(governed.ledger(key_id)) == 1)
    (row,) = governed.ledger(key_id)
    usage = answer["usage"]
    assert (row.backend, row.attempts, row.outcome) == ("large", 2, "ok")
    assert (row.prompt, row.completion) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert row.cost == 1000 * (row.prompt + row.completion) == governed.account(key_id).spent


def test_a_silent_backend_is_charged_beside_the_fallback_and_never_above_the_reservation(
    governed: Governed, servers: dict[str, FakeUpstream]
) -> None:
    key_id, key = governed.key(Limits(hard_limit=1_000_000))
    assert ask(governed, key, small={"delay_s": 5})[0] == 200
    wait_until(lambda: len(governed.ledger(key_id)) == 2)
    answer, silent = sorted(governed.ledger(key_id), key=lambda row: row.kind)
    assert (answer.kind, answer.tier, answer.exact, answer.attempts) == ("answer", "large", True, 2)
    assert (silent.kind, silent.tier, silent.exact, silent.completion) == ("failed", "small", False, 5)
    books = servers["large"].books
    assert (answer.prompt, answer.completion) == (books.prompt_tokens, books.completion_tokens)
    assert silent.cost + silent.excess == silent.prompt + silent.completion
    assert governed.account(key_id).spent == answer.cost + silent.cost


def test_budgets_hold_while_everything_falls_back(governed: Governed, servers: dict[str, FakeUpstream]) -> None:
    key_id, key = governed.key(Limits(hard_limit=1_500_000))
    statuses: list[int] = []

    def spend() -> None:
        for _ in range(20):
            statuses.append(ask(governed, key)[0])

    clients = [threading.Thread(target=spend) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wait_until(lambda: governed.account(key_id).reserved == 0)
    books = servers["large"].books
    assert set(statuses) == {200, 500}, "where the dear one does not fit any more, the cheap one's error goes back"
    assert governed.account(key_id).spent == 1000 * (books.prompt_tokens + books.completion_tokens) <= 1_500_000
