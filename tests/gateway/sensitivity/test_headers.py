"""Headers that hold personal data go to trusted zones alone, whatever becomes of the request."""

import json
from typing import Any

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.sensitivity.searching import exchange_of
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.sensitivity.detector import Detector
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings

#: They hold a name, or who knows what: no search says so.
OF_PEOPLE = {
    "cookie": "theme=dark",
    "x-forwarded-user": "anna schmidt",
    "x-forwarded-preferred-username": "aschmidt",
    "x-forwarded-client-cert": 'Hash=ab;Subject="CN=Anna Schmidt,O=Bank"',
    "x-auth-request-user": "aschmidt",
    "remote-user": "aschmidt",
    "x-ssl-client-s-dn": "CN=Anna Schmidt,O=Bank",
    "ssl-client-subject-dn": "CN=Anna Schmidt",
    "client-cert": ":TUlJ:",
    "x-ms-client-principal-name": "aschmidt",
    "x-user-id": "aschmidt",
}
HOLDING = {
    **OF_PEOPLE,
    "x-forwarded-for": "203.0.113.77, 10.0.0.9",
    "forwarded": 'for="[2001:db8:85a3::8a2e:370:7334]";proto=https',
    "baggage": "userId=anna%40example.com",
    "referer": "https://intra.example/patient?ssn=078-05-1120",
    "user-agent": "crawler/1.0 (+mailto:bob@example.com)",
    "x-phone": "0301234567",
    "x-long": "a " * 1500,
    "x-request-id": "anna@example.com",
}
ORDINARY = {
    "authorization": "Bearer sk-proj-abcdefghij0123456789",
    "content-type": "application/json",
    "openai-organization": "org-AbCdEf1234567890",
    "anthropic-beta": "prompt-caching-2024-07-31",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "idempotency-key": "stainless-python-retry-3fa0b1a8-9d0c-4c4e-8bd3-0d6a1c1b2f77",
    "x-stainless-runtime-version": "3.11.7",
    "x-forwarded-proto": "https",
    "x-forwarded-host": "models.example",
    "x-forwarded-port": "443",
    "x-client-name": "openai-python",
    "x-app-id": "billing",
    "x-title": "caf\u00e9",
}


def private(policy: SensitivitySettings, headers: dict[str, str]) -> set[str]:
    found = Detector(policy).headers(exchange_of(b"{}", **headers))
    return {name.decode() for name in found}


def test_what_holds_something_is_told_from_the_rest() -> None:
    for _ in range(2):
        assert private(SensitivitySettings(), {**HOLDING, **ORDINARY}) == set(HOLDING)
    # Of very many the first ones are searched.
    many = {f"x-{number}": f"{number} " * 500 for number in range(10)}
    assert private(SensitivitySettings(), many) == {"x-8", "x-9"}
    # The gateway's own id is none of the client's.
    own = [(b"x-request-id", b"0171 2345678 0301234567")]
    exchange = Exchange("/v1/completions", [], b"{}", body=None, model="m", request_id="r", forward=own)
    assert not Detector(SensitivitySettings()).headers(exchange)


def test_what_may_go_anywhere_is_not_looked_for() -> None:
    policy = SensitivitySettings({"ip_address": "allow", "email": "allow"})
    assert private(policy, HOLDING) == {"referer", "x-phone", "x-long", *OF_PEOPLE}
    assert not private(SensitivitySettings(default="allow"), HOLDING)


def test_headers_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.engine.gateway.sensitivity.headers._MOST_KNOWN", 10)
    detector = Detector(SensitivitySettings())
    for number in range(50):
        held = {"x-note": f"anna{number}@example.com", "x-other": f"note {number}"}
        assert detector.headers(exchange_of(b"{}", **held)) == {b"x-note"}
        assert detector._headers is not None
        assert len(detector._headers._known) <= 10


@pytest.mark.parametrize("text", ["hi", "write to bob@example.com"])
def test_none_of_them_reaches_the_cloud(text: str) -> None:
    near, far = FakeUpstream(("near",)).start(), FakeUpstream(("vast",)).start()
    backends = (
        Backend("near", near.url, "utility", ("near",)),
        Backend("far", far.url, "frontier", ("vast",), zone="cloud"),
    )
    ordinary = {name: value for name, value in ORDINARY.items() if value.isascii()}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    with RunningGateway(*backends, sensitivity=SensitivitySettings({"contact": "redact"})) as gateway:
        for model, upstream in (("near", near), ("vast", far)):
            raw = json.dumps({"model": model, **body}).encode()
            status, headers, _ = gateway.send("POST", "/v1/chat/completions", raw, {**HOLDING, **ordinary})
            assert (status, headers["x-request-id"]) == (200, "anna@example.com")
            seen = upstream.books.requests[-1][1]
            assert {name: seen.get(name) for name in ordinary} == ordinary
            assert {name for name in HOLDING if name in seen} == (set(HOLDING) if upstream is near else set())
    near.stop()
    far.stop()
