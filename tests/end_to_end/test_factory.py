"""The main job of the gateway on real engines, driven by the official client: each request goes to the cheapest tier
that will do, within budget and policy, and every token is accounted for."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.end_to_end.factory import READY_SECONDS, Factory
from tests.supervisor.running import call, until
from tokenmill.engine.gateway.router.confidence import confidence

pytestmark = pytest.mark.end_to_end

EASY = "What does os.path.join do?"
HARD = (
    "Prove step by step that the derivative of x^2 is 2x, explain why the limit exists, compare the proof with the one "
    "by infinitesimals, and design an algorithm that must check it without floating point. "
)
CARD = "My card is 4111 1111 1111 1111."
THRESHOLD = 0.3
LIMIT = 0.004


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Factory]:
    running = Factory.start(tmp_path_factory.mktemp("factory"))
    try:
        yield running
        running.server.signal(signal.SIGTERM)
        assert running.server.wait_end(60) == 0, running.server.text
    finally:
        running.close()


def ask(client: openai.OpenAI, text: str = EASY, model: str = "auto", **more: Any) -> tuple[dict[str, str], Any]:
    """(the answer's headers, the answer)."""
    hints = {f"x-tokenmill-{name.replace('_', '-')}": str(value) for name, value in more.pop("hints", {}).items()}
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=more.pop("max_tokens", 8),
        temperature=0,
        extra_headers=hints,
        **more,
    )
    return dict(raw.headers), raw.parse()


def cost_bound(factory: Factory, key: str) -> tuple[float, float]:
    """(spent, hard limit) of a key in dollars."""
    account = factory.admin("GET", f"/admin/keys/{key}")
    return account["spent_dollars"], account["limits"]["hard_limit_dollars"]


def test_each_criterion_decides(factory: Factory) -> None:
    client = factory.client()
    decided = {}
    for name, text, hints in (
        ("complexity", HARD, {}),
        ("quality", EASY, {"quality": 0.95}),
        ("cost", HARD, {"quality": 0.97, "max_cost": 0.00001}),
        ("context", "word " * 500, {"quality": 0.1}),
        ("sensitivity", CARD, {"quality": 0.95}),
        ("latency", EASY, {"latency": "interactive"}),
    ):
        headers, answer = ask(client, text, hints=hints)
        assert answer.choices[0].message.content is not None
        assert f"{name}: " in headers["x-tokenmill-reason"], headers
        decided[name] = headers["x-tokenmill-tier"]
    assert decided["complexity"] != "utility"
    assert decided["quality"] == "frontier"
    assert decided["cost"] == "utility"
    assert decided["context"] == "reasoning"
    assert decided["sensitivity"] == "reasoning"


def test_who_is_not_sure_hands_over_and_shows_nothing_before(factory: Factory) -> None:
    client = factory.client()
    handed_over = []
    for text in (EASY, "Write the function add.", "Write the function __len__.", "Write the function __repr__."):
        _, first = ask(client, text, "tiny-draft", max_tokens=16, logprobs=True)
        sure = confidence([token.logprob for token in first.choices[0].logprobs.content], "mean")
        assert sure is not None
        _, then = ask(client, text, "tiny-target", max_tokens=16)
        headers, answer = ask(client, text, max_tokens=16)
        with client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": text}], max_tokens=16, temperature=0, stream=True
        ) as stream:
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        if abs(sure - THRESHOLD) < 0.02:
            continue  # sums in another order may fall on the other side
        escalated = sure < THRESHOLD
        wanted = (then if escalated else first).choices[0].message.content
        assert headers["x-tokenmill-tier"] == ("reasoning" if escalated else "utility")
        assert headers["x-tokenmill-reason"].startswith("escalated from utility") == escalated
        assert answer.choices[0].message.content == wanted
        assert answer.choices[0].logprobs is None
        assert streamed == wanted
        handed_over.append(escalated)
    assert set(handed_over) == {True, False}, handed_over


def test_another_tier_takes_over_when_an_engine_is_killed(factory: Factory) -> None:
    client = factory.client()
    (engine,) = [
        pid for pid, text in factory.server.processes().items() if "vllm.launch" in text and "tiny-draft" in text
    ]
    os.kill(engine, signal.SIGKILL)
    for _ in range(5):
        headers, answer = ask(client)
        assert answer.choices[0].message.content is not None
        assert headers["x-tokenmill-tier"] == "reasoning"
    until(lambda: call(factory.server.url + "/ready")[0] == 200, READY_SECONDS, "the killed engine is back")


def test_overflow_goes_to_the_cloud_unless_the_data_must_stay(factory: Factory) -> None:
    client = factory.client()
    hold = threading.Event()

    def occupy() -> None:
        with client.chat.completions.create(
            model="tiny-target",
            messages=[{"role": "user", "content": HARD}],
            max_tokens=1500,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            for _ in stream:
                if hold.is_set():
                    return

    occupants = [threading.Thread(target=occupy) for _ in range(2)]
    try:
        for occupant in occupants:
            occupant.start()
        until(lambda: busy(factory, "reasoning") == 2, 30, "both places of the local engine taken")
        headers, _ = ask(client, model="reasoning")
        assert headers["x-tokenmill-backend"] == "burst"
        seen = len(factory.burst.books.requests)
        with pytest.raises(openai.RateLimitError):
            ask(client, CARD, "reasoning")
        assert len(factory.burst.books.requests) == seen
    finally:
        hold.set()
        for occupant in occupants:
            occupant.join(60)
    assert not any(b"4111" in raw for _, _, raw in factory.burst.books.requests)


def busy(factory: Factory, backend: str) -> int:
    """Requests open at a backend."""
    (found,) = [one for one in factory.admin("GET", "/admin/backends")["backends"] if one["name"] == backend]
    return int(found["outstanding"])


def test_what_must_stay_is_refused_rather_than_sent(factory: Factory) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="on-premises"):
        ask(factory.client(), CARD, "vast")
    assert not any(b"4111" in raw for _, _, raw in factory.frontier.books.requests)
    until(lambda: factory.audited("residency.refuse"), 5, "the refusal in the audit trail")


def test_a_budget_ends_in_the_middle_of_traffic_and_is_never_passed(factory: Factory) -> None:
    team = factory.admin("POST", "/admin/accounts", {"kind": "team", "limits": {"hard_limit_dollars": LIMIT}})["id"]
    identity, secret = factory.new_key(parent=team)
    client = factory.client(secret)
    refusals: list[openai.RateLimitError] = []

    def work(number: int) -> None:
        for _ in range(12):
            try:
                if number % 2:
                    ask(client, model="reasoning", max_tokens=8)
                else:
                    for _chunk in client.chat.completions.create(
                        model="reasoning", messages=[{"role": "user", "content": EASY}], max_tokens=8, stream=True
                    ):
                        pass
            except openai.RateLimitError as error:
                refusals.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert any(error.code == "insufficient_quota" for error in refusals), refusals[:1]
    until(lambda: factory.admin("GET", f"/admin/accounts/{team}")["reserved_dollars"] == 0, 10, "everything settled")
    spent = factory.admin("GET", f"/admin/accounts/{team}")["spent_dollars"]
    rows = factory.ledger(key=identity)
    assert 0 < spent <= LIMIT
    assert sum(row["cost_dollars"] for row in rows) == pytest.approx(spent, abs=1e-12)
    assert factory.admin("GET", "/admin/audit/verify")["intact"]


def test_a_revoked_key_ends_at_once(factory: Factory) -> None:
    identity, secret = factory.new_key(models=["tiny-draft"])
    client = factory.client(secret)
    assert [model.id for model in client.models.list()] == ["tiny-draft"]
    ask(client, model="tiny-draft")
    with pytest.raises(openai.PermissionDeniedError):
        ask(client, model="tiny-target")
    factory.admin("DELETE", f"/admin/keys/{identity}")
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        ask(client, model="tiny-draft")


def test_a_new_version_gets_its_share_and_is_rolled_back_without_a_restart(factory: Factory) -> None:
    client = factory.client()
    factory.admin("PUT", "/admin/backends/next/canary", {"share": 1.0})
    until(lambda: ask(client, model="reasoning")[0]["x-tokenmill-backend"] == "next", 10, "the canary's share")
    factory.admin("PUT", "/admin/backends/next/canary", {"share": 0})
    until(lambda: ask(client, model="reasoning")[0]["x-tokenmill-backend"] != "next", 10, "the rollback")
    seen = len(factory.next.books.requests)
    for _ in range(10):
        assert ask(client, model="reasoning")[0]["x-tokenmill-backend"] == "reasoning"
    assert len(factory.next.books.requests) == seen


def test_the_books_hold_every_token_of_a_stream_that_the_client_left(factory: Factory) -> None:
    identity, secret = factory.new_key()
    client = factory.client(secret)
    stream = client.chat.completions.create(
        model="tiny-target",
        messages=[{"role": "user", "content": HARD}],
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for number, _ in enumerate(stream):
        if number == 10:
            break
    stream.close()
    time.sleep(0.1)
    (row,) = until(lambda: factory.ledger(key=identity), 10, "the row of the stream")
    assert row["outcome"] == "gone", row
    assert 10 <= row["completion_tokens"] < 1000
    assert row["prompt_tokens"] > 0
    assert row["cost_dollars"] > 0
