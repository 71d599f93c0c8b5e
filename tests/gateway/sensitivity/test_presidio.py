"""Presidio as a second opinion, with a blank spaCy pipeline, so without a model and without a network."""

import asyncio
import json
import sys

import pytest

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.sensitivity.detector import Detector
from tokenmill.engine.gateway.sensitivity.presidio import Presidio, kind_of
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
