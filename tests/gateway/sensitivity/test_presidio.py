"""Presidio as a second opinion, with a blank spaCy pipeline, so without a model and without a network."""

import asyncio
import json
import re
import sys
from collections.abc import Sequence

import pytest

from tests.gateway.sensitivity.searching import exchange_of
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.sensitivity import detector
from tokenmill.engine.gateway.sensitivity.clearance import Clearance
from tokenmill.engine.gateway.sensitivity.detector import Detector
from tokenmill.engine.gateway.sensitivity.presidio import Presidio, kind_of
from tokenmill.engine.gateway.sensitivity.scanner import Finding
from tokenmill.engine.gateway.sensitivity.settings import PresidioSettings, SensitivitySettings
from tokenmill.errors import ConfigurationError, MissingDependencyError


@pytest.fixture(scope="module")
def presidio() -> Presidio:
    pytest.importorskip("presidio_analyzer", reason='needs Presidio: pip install "tokenmill[presidio]"')
    return Presidio(PresidioSettings(entities=("EMAIL_ADDRESS", "CREDIT_CARD", "CRYPTO")))


@pytest.mark.filterwarnings("ignore")
def test_it_finds_what_it_is_asked_for(presidio: Presidio) -> None:
    text = "mail bob@example.com, card 4111 1111 1111 1111, wallet 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ, +49 30 1234567"

    async def twice() -> None:
        first = await presidio.find(text)
        assert {(one.kind, text[one.start : one.end]) for one in first} == {
            ("email", "bob@example.com"),
            ("credit_card", "4111 1111 1111 1111"),
            ("crypto", "16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ"),
        }
        assert await presidio.find(text) is first

    asyncio.run(twice())


@pytest.mark.filterwarnings("ignore")
def test_the_policy_hears_it() -> None:
    pytest.importorskip("presidio_analyzer", reason='needs Presidio: pip install "tokenmill[presidio]"')
    asked = PresidioSettings(entities=("CRYPTO",))
    settings = SensitivitySettings({"email": "allow"}, presidio=asked)
    raw = json.dumps({"prompt": "to 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ, bob@example.com"}).encode()
    exchange = Exchange("/v1/completions", [], raw, body=Body(raw), model="m", request_id="r", forward=[])
    clearance = asyncio.run(Detector(settings).clear(exchange))
    assert clearance.kinds == {"crypto": 1}
    assert clearance.zones == frozenset({"on-premises"})


def test_its_absence_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(MissingDependencyError, match=r"tokenmill\[presidio\]"):
        Presidio(PresidioSettings())


@pytest.mark.filterwarnings("ignore")
def test_a_missing_model_is_named() -> None:
    pytest.importorskip("presidio_analyzer", reason='needs Presidio: pip install "tokenmill[presidio]"')
    with pytest.raises(ConfigurationError, match="no_such_model"):
        Presidio(PresidioSettings(model="no_such_model"))


def test_names_of_kinds() -> None:
    assert (kind_of("PERSON"), kind_of("CRYPTO")) == ("name", "crypto")


class Names:
    """Knows Anna, and what stands behind her."""

    def __init__(self, _: PresidioSettings) -> None: ...

    async def find(self, text: str) -> tuple[Finding, ...]:
        return tuple(Finding("name", *one.span()) for one in re.finditer("Anna( [0-9]{4})?", text))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "Presidio", Names)


def told(text: str) -> Clearance:
    settings = SensitivitySettings(default="redact", presidio=PresidioSettings())
    return asyncio.run(Detector(settings).clear(exchange_of(json.dumps({"prompt": text}).encode())))


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("before", ["", "Anna, " * 300, "word " * 2000, "word " * 815])
def test_names_that_overlap_numbers_are_one_with_them(before: str) -> None:
    clearance = told(before + "pays Anna 4111 1111 1111 1111 today")
    assert clearance.hidden is not None
    assert re.search(r"pays \[NAME_[0-9]\] today$", json.loads(clearance.hidden.raw)["prompt"])


@pytest.mark.usefixtures("names")
def test_each_name_is_looked_at_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every window: of a long text that would be the square of its length."""
    looked = 0
    original = detector._Found.add

    def add(self: detector._Found, text: str, findings: Sequence[Finding], begin: int = 0) -> None:
        nonlocal looked
        looked += len(findings)
        original(self, text, findings, begin)

    monkeypatch.setattr(detector._Found, "add", add)
    text = "Anna and bob@example.com. " * 5000
    assert told(text).action == "redact"
    assert looked < 4 * 5000
