"""Prompts with personal data through a real worker: none of it reaches a backend outside the allowed zones.

Every request names a value of its own. The backends keep what they were sent, and are asked afterwards: a fallback, a
retry, an escalation, a burst, a canary, a concrete model, a tier and `auto` all had their chance to leak it.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.sensitivity.generator import MAKERS, body_with, text_with
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.router.settings import EscalationSettings, RoutingSettings
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Settings

#: Requests in flight: more than the nearer backends may have open, so that some overflow.
IN_FLIGHT = 24
#: What the nearer backends are told to do; each sends the request elsewhere if anything may.
TROUBLES = (
    {},
    {"small": {"status": 503, "body": "busy"}, "large": {}},
    {"small": {"status": 429, "body": "slow down"}, "large": {"status": 503, "body": "busy"}},
    {"small": {"cut_after": 0}, "large": {}},
    {"small": {"logprob": -5.0}, "large": {"status": 503, "body": "busy"}},
    {"small": {"logprob": -5.0}, "large": {}},
    {"small": {"delay_s": 0.02}, "large": {"delay_s": 0.02}},
    {"small": {"status": 500, "body": "broken"}, "large": {"status": 500, "body": "broken"}},
)


@dataclass
class Site:
    """Two tiers, each with a backend here and one in the cloud."""

    near: tuple[FakeUpstream, FakeUpstream]
    far: tuple[FakeUpstream, FakeUpstream]
    gateway: RunningGateway


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    near = FakeUpstream(("small",)).start(), FakeUpstream(("large",)).start()
    far = FakeUpstream(("small",)).start(), FakeUpstream(("large",)).start()
    able = ("logprobs", "tools")
    cheap, dear = Prices(10_000, 10_000, 10_000), Prices(1_000_000, 1_000_000, 1_000_000)
    running = RunningGateway(
        Backend("small", near[0].url, "utility", ("small",), quality=0.6, prices=cheap, max_concurrency=10,
                capabilities=able),
        Backend("small-cloud", far[0].url, "utility", ("small",), quality=0.6, prices=cheap, zone="cloud",
                capabilities=able),
        Backend("large", near[1].url, "reasoning", ("large",), quality=0.9, prices=dear, max_concurrency=10,
                capabilities=able),
        Backend("large-cloud", far[1].url, "reasoning", ("large",), quality=0.9, prices=dear, zone="cloud",
                canary=0.2, capabilities=able),
        settings=Settings(probe_interval_s=0.1, breaker_failures=10**6, fallbacks={"utility": ("reasoning",)}),
        routing=RoutingSettings(escalation=EscalationSettings("utility", "reasoning", 0.5)),
        sensitivity=SensitivitySettings(),
    )  # fmt: skip
    with running:
        yield Site(near, far, running)
    for upstream in (*near, *far):
        upstream.stop()


def marked(value: str) -> str:
    """A value as it is looked for in what backends saw: letters and digits alone, nothing else can hide it."""
    return "".join(character for character in value if character.isalnum()).lower()


async def send_all(site: Site, count: int, seed: int) -> tuple[Counter[str], Counter[int], list[tuple[str, str, str]]]:
    """(requests by kind, answers by status, (kind, value, name) of each request)."""
    kinds: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    sent: list[tuple[str, str, str]] = []
    numbers = iter(range(count))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            dice = random.Random(f"{seed} {number}")
            kind = dice.choice(list(MAKERS)) if number % 8 else "none"
            value = MAKERS[kind](dice) if kind != "none" else "nothing"
            text = text_with(dice, value)
            path, _, raw = body_with(dice, text, value)
            model = dice.choice(["auto", "auto", "utility", "small", "reasoning", "large"])
            name = f"request-{number}"
            more = json.dumps(
                {"model": model, "user": name, "act": dice.choice(TROUBLES), "stream": dice.random() < 0.4}
            )
            body = more.encode()[:-1] + b"," + raw[1:]
            hints = {"x-tokenmill-quality": dice.choice(["0.1", "0.9"])} if dice.random() < 0.5 else {}
            headers = {"content-type": "application/json", **hints}
            async with session.post(site.gateway.url + path, data=body, headers=headers) as answer:
                await answer.read()
                statuses[answer.status] += 1
            kinds[kind] += 1
            sent.append((kind, value, name))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(IN_FLIGHT)))
    return kinds, statuses, sent


def seen_by(upstream: FakeUpstream) -> list[str]:
    """Everything that a backend was sent, decoded, letters and digits alone."""
    return [marked(json.dumps(json.loads(raw), ensure_ascii=False)) for _, _, raw in upstream.books.requests]


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_nothing_leaves(site: Site, count: int) -> None:
    for upstream in (*site.near, *site.far):
        upstream.books = Books()
    kinds, statuses, sent = asyncio.run(send_all(site, count, seed=count))
    outside = [text for upstream in site.far for text in seen_by(upstream)]
    inside = [text for upstream in site.near for text in seen_by(upstream)]
    values = {marked(value) for kind, value, _ in sent if kind != "none"}
    leaked = [value for value in values if any(value in text for text in outside)]
    print(
        f"{count} requests, {sum(kinds.values()) - kinds['none']} with data of {len(kinds) - 1} kinds: statuses "
        f"{dict(statuses)}; {len(inside)} calls on the premises, {len(outside)} in the cloud, {len(leaked)} leaked"
    )
    assert not leaked, leaked[:5]
    names = {json.loads(raw)["user"] for upstream in site.far for _, _, raw in upstream.books.requests}
    assert names <= {name for kind, _, name in sent if kind == "none"}, "no other request may go to the cloud"
    assert len(names) > kinds["none"] / 10, "requests without data must reach the cloud, or this shows nothing"
    assert len(inside) > count / 3
    assert statuses[200] > count / 5
    assert len(values) > 0.9 * (count - kinds["none"])


def test_a_model_that_is_only_elsewhere_is_refused(site: Site) -> None:
    far = FakeUpstream(("vast",)).start()
    backend = Backend("far", far.url, "frontier", ("vast",), zone="cloud", quality=0.99)
    with RunningGateway(backend, sensitivity=SensitivitySettings()) as gateway:
        ask = {"model": "vast", "messages": [{"role": "user", "content": "IBAN DE89 3704 0044 0532 0130 00"}]}
        for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/anything/else"):
            status, _, body = gateway.post(path, ask)
            error = json.loads(body)["error"]
            assert (status, error["code"]) == (403, "residency")
            assert "holds iban" in error["message"]
            assert "DE89" not in error["message"]
        picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2000}}]
        status, _, body = gateway.post(
            "/v1/chat/completions", {"model": "vast", "messages": [{"role": "user", "content": picture}]}
        )
        assert status == 403
        assert "cannot be searched" in json.loads(body)["error"]["message"]
        assert gateway.post("/v1/embeddings", {"model": "vast", "input": [[1, 2, 3]]})[0] == 403
        assert gateway.post("/v1/completions?note=bob%40example.com", {"model": "vast", "prompt": "hi"})[0] == 403
        assert not far.books.requests
        assert gateway.post("/v1/completions", {"model": "vast", "prompt": "hi"})[0] == 200
    far.stop()
