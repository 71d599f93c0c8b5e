"""A request is searched as a model will read it: parts of a message in one, names beside their values."""

import json
from typing import Any

import pytest

from tests.gateway.sensitivity.searching import clear
from tokenmill.engine.gateway.sensitivity import texts
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings

POLICY = SensitivitySettings()
CARD, MAIL = ("card 4111 1111 ", "1111 1111"), ("mail john.doe@exam", "ple.com")
#: Makes a field so long that it is decoded piece by piece.
LONG = "word " * 20_000


def found(fields: dict[str, Any]) -> set[str]:
    return set(clear(POLICY, json.dumps(fields).encode()).kinds)


@pytest.mark.parametrize("filler", ["", LONG])
@pytest.mark.parametrize(("halves", "kind"), [(CARD, "credit_card"), (MAIL, "email")])
def test_lists_in_parts_do_not_part_them(halves: tuple[str, str], kind: str, filler: str) -> None:
    for extra in (
        {"annotations": []},
        {"annotations": [{"type": "url_citation", "url": "https://example.com", "start_index": 1}]},
        {"citations": [{"type": "char_location", "cited_text": "x"}], "x": [["y"]]},
        {"logprobs": [{"token": "a", "bytes": [97], "top_logprobs": [{"token": "b"}]}]},
        {"annotations": ["a" * 50_000]},
    ):
        first, second = ({"type": "output_text", "text": half, **extra} for half in halves)
        rest = {"type": "text", "text": filler}
        assert found({"input": [{"type": "message", "content": [first, second, rest]}]}) == {kind}
        assert found({"messages": [{"role": "user", "content": [first, second], "x": filler}]}) == {kind}


def test_lists_of_parts_are_read_in_their_place() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": CARD[0]}]}
    after = {"type": "text", "text": CARD[1]}
    assert found({"messages": [{"role": "user", "content": [result, after]}]}) == {"credit_card"}
    empty = {"type": "tool_result", "tool_use_id": "t", "content": []}
    before = {"type": "text", "text": CARD[0]}
    assert found({"messages": [{"role": "user", "content": [before, empty, after]}]}) == {"credit_card"}
    messages = [{"role": "user", "content": [part]} for part in (before, after)]
    assert found({"messages": messages}) == set()


@pytest.mark.parametrize("filler", ["", LONG])
def test_parts_are_read_as_lines_too(filler: str) -> None:
    for pieces in (("4111 1111", "1111 1111"), ("4111", "1111", "1111", "1111")):
        parts = [{"type": "text", "text": piece} for piece in pieces]
        assert found({"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": filler}]}]}) == {
            "credit_card"
        }
    parts = [{"type": "thinking", "thinking": "4111 1111"}, {"type": "text", "text": "1111 1111"}]
    assert found({"messages": [{"role": "user", "content": parts}], "x": filler}) == {"credit_card"}


@pytest.mark.parametrize("filler", ["", LONG])
def test_strings_in_a_list_of_contents_are_parts(filler: str) -> None:
    for halves, kind in ((CARD, "credit_card"), (MAIL, "email"), (("4111 1111", "1111 1111"), "credit_card")):
        assert found({"messages": [{"role": "user", "content": [*halves, filler]}]}) == {kind}
        assert found({"input": [*halves, filler]}) == set()


@pytest.mark.parametrize("length", [0, 510, 5_000, 300_000])
def test_names_are_read_beside_values_of_any_length(length: int) -> None:
    assert found({"metadata": {"ssn": "078051120" + " " * length}}) == {"us_ssn"}
    assert found({"metadata": {"note": "078051120" + " " * length}}) == set()


@pytest.mark.parametrize("value", ["x", 1, None, ["x"], {"x": 1}])
def test_zeros_in_names_part_nothing(value: Any) -> None:
    assert found({"metadata": {"4111 1111\0 1111 1111": value}}) == {"credit_card"}


def test_what_python_cannot_walk_through_cannot_be_searched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From Python 3.12 on its decoder goes deeper than its functions."""

    def walk(*_: Any, **__: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(texts.Texts, "walk", walk)
    clearance = clear(POLICY, b'{"metadata": {"a": []}}')
    assert (clearance.action, clearance.kinds) == ("stay", {})
    assert "the field metadata cannot be decoded" in clearance.why
    assert not caplog.records


def test_of_a_list_of_numbers_the_name_and_the_long_ones_are_searched() -> None:
    assert found({"metadata": {"4111 1111 1111 1111": [1, 2]}}) == {"credit_card"}
    assert found({"metadata": {"a": [[1, 4111111111111111], -4.5]}}) == {"credit_card"}
    assert found({"metadata": {"a": [4111, 1111, 1111, 1111]}}) == set()


@pytest.mark.parametrize("filler", ["", LONG])
def test_a_models_name_is_not_searched_whatever_it_looks_like(filler: str) -> None:
    assert found({"model": "john.doe@example.com", "prompt": filler}) == set()
    assert found({"prompt": filler, "user": "john.doe@example.com"}) == {"email"}
