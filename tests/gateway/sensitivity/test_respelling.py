"""Answers differ from those of the backend only where the data are put back: numbers, blanks, escapes stay as spelt."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.sensitivity.test_redaction import chunk, run_through, texts
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import Redaction
from tokenmill.engine.gateway.sensitivity.restoring import restore

VALUE = '"jo\\hn d\u00f6e"@example.com'
#: As it stands in a string, and in a string of a string.
ONCE = json.dumps(VALUE, ensure_ascii=False)[1:-1]
TWICE = json.dumps(ONCE, ensure_ascii=False)[1:-1]
#: What re-encoding would spell in another way.
ODD = (
    '"n": [1e2, 1.50, -0, 123456789012345678901234567890, 1E-7, 0.1e1], "a" : "caf\\u00e9 \u00fc \\/ \\u0041", '
    '"twice": "first [NOTE_1] no", "twice": {"x":[{ }, [ ]]}, "z\\u0061": "\\ud83d\\ude00 \\ud800", "nan": NaN'
)


def restored(raw: str, asked: bytes = b"{}") -> str:
    reply = Reply(200, [], raw.encode())
    restore(reply, Redaction({VALUE: "note"}, b""), Body(asked))
    return (reply.body or b"").decode()


@pytest.mark.parametrize("nan", [True, False])
def test_an_answer_keeps_its_spelling(nan: bool) -> None:
    odd = ODD if nan else ODD.replace("NaN", "null").replace(" \\ud800", "")
    call = '{"function": {"arguments": "{\\"to\\" : \\"[NOTE_1]\\", \\"n\\": 1e2}"}}'
    message = f'"content": "caf\\u00e9 \u00fc [NOTE_1]\\/", "tool_calls": [{call}]'
    raw = f'{{ {odd}, "choices": [{{"message": {{{message}}}}}]}}\n'
    wanted = raw.replace("\u00fc [NOTE_1]", f"\u00fc {ONCE}").replace('\\"[NOTE_1]', f'\\"{TWICE}')
    assert restored(raw) == wanted
    as_json = raw.replace("caf\\u00e9 \u00fc [NOTE_1]\\/", '{\\"a\\": \\"[NOTE_1]\\"}')
    wanted = as_json.replace('\\"[NOTE_1]', f'\\"{TWICE}')
    assert restored(as_json, b'{"response_format": {"type": "json_object"}}') == wanted


def test_a_placeholder_that_is_escaped_itself_is_found() -> None:
    raw = '{"n": 1e2, "content": "\\u005bNOTE\\u005f1]"}'
    assert restored(raw) == f'{{"n": 1e2, "content": {json.dumps(VALUE)}}}'


def test_without_placeholders_it_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orjson.loads", None)
    raw = '{"choices": [1e2, "[1] [NOTES_1] [note_1]"]}'
    assert restored(raw) == raw


@pytest.mark.parametrize("cut", range(11))
def test_events_keep_their_spelling(cut: int) -> None:
    hidden = "[NOTE_1] caf\\u00e9 \u00fc"

    def event(text: str) -> bytes:
        return f'data: {{ {ODD}, "choices":[{{"index":0 ,"delta":{{"content": "{text}"}}, "p": 1e2}}]}}\n\n'.encode()

    redaction = Redaction({VALUE: "note"}, b"")
    out = asyncio.run(run_through([event(hidden[:cut]), event(hidden[cut:]), chunk({}, "stop")], redaction))
    assert texts(out.replace(b"NaN", b"0"), "content") == f"{VALUE} caf\u00e9 \u00fc"
    for line in out.decode("utf-8").split("\n\n")[:2]:
        begin, _, rest = line.partition('"delta":')
        assert begin == f'data: {{ {ODD}, "choices":[{{"index":0 ,'
        assert rest.endswith(', "p": 1e2}]}')


def test_halves_of_characters_end_no_answer() -> None:
    half = "\ud83d".encode("utf-8", "surrogatepass")
    raw = b'data: {"choices": [{"index": 0, "delta": {"content": "[NOTE_1] ' + half + b'"}}]}\n\n'
    redaction = Redaction({VALUE: "note"}, b"")
    assert asyncio.run(run_through([raw], redaction)) == raw.replace(b"[NOTE_1]", ONCE.encode())
    reply = Reply(200, [], raw[6:])
    restore(reply, redaction, Body(b"{}"))
    assert reply.body == raw[6:].replace(b"[NOTE_1]", ONCE.encode())


def test_what_is_kept_back_at_the_end_keeps_the_spelling_of_its_event() -> None:
    raw = b'data: {"n": 1e2, "choices": [{"index": 0, "delta": {"content": "a [NO"}, "finish_reason": null}]}\n\n'
    out = asyncio.run(run_through([raw], Redaction({VALUE: "note"}, b"")))
    assert out == raw.replace(b" [NO", b" ") + raw.replace(b"a [NO", b"[NO")


JSON = st.recursive(
    st.one_of(st.text(max_size=8), st.sampled_from(["[NOTE_1]", "x [NOTE_1]\u00fc", "\\[NOTE_1]", None, 10**30])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_any_json_means_the_same(value: Any, ascii_only: bool, indent: int | None) -> None:
    raw = json.dumps({"x": value}, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace").decode()
    expected = raw.replace("[NOTE_1]", ONCE)
    assert json.loads(restored(raw)) == json.loads(expected)
    assert restored(raw) == expected
