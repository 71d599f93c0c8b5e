"""Names with `*`: what they stand for, in keys' lists of models and wherever else those lists are read."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.wildcard import Wildcard


@given(st.text("ab*", max_size=6), st.text("ab*", max_size=8))
def test_it_stands_for_what_a_regular_expression_would(pattern: str, name: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None
    assert Wildcard(pattern).matches(name) == expected


def test_it_is_quick_whatever_is_asked() -> None:
    assert not Wildcard("*a" * 100 + "*b").matches("a" * 1_000_000)


@pytest.mark.parametrize(
    ("models", "may", "may_not"),
    [
        (("gpt-4*",), ["gpt-4", "gpt-4o", "gpt-4*"], ["gpt-3", "my-gpt-4", "", "*", None]),
        (("openai/*", "tiny"), ["openai/gpt-4o", "openai/", "tiny"], ["openai", "tiny2", "anthropic/openai/x"]),
        (("*",), ["anything", ""], [None]),
        ((), [], ["tiny", "", None]),
        (("a.c",), ["a.c"], ["abc"]),
    ],
)
def test_a_key_may_ask_for_what_its_names_stand_for(
    models: tuple[str, ...], may: list[str], may_not: list[str | None]
) -> None:
    principal = Principal("k", models=models)
    assert [name for name in may if not principal.may_ask_for(name)] == []
    assert [name for name in may_not if principal.may_ask_for(name)] == []


def test_what_falls_back_is_what_the_key_may_ask_for() -> None:
    settings = Settings(fallbacks={"one": ("two",)})
    portfolio = Portfolio(
        [
            Backend("a", "http://h/v1", "one", models=("gpt-4o",)),
            Backend("b", "http://h/v1", "two", models=("llama", "gpt-4.1")),
        ],
        settings,
    )
    routes = portfolio.routes("gpt-4o", Principal("k", models=("gpt-*",)))
    assert [route.model for route in routes] == ["gpt-4o", "gpt-4.1"]
    routes = portfolio.routes("gpt-4o", Principal("k", models=("gpt-*", "tw*")))
    assert [route.model for route in routes] == ["gpt-4o", None]
