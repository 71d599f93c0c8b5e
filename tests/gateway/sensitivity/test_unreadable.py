"""What no search can read stays on the premises: everything that is not known to be text."""

import json
from typing import Any

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.sensitivity.searching import clear
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.body import SLICE_BYTES
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings

POLICY = SensitivitySettings()
#: Makes a field so long that it is decoded piece by piece.
LONG = "word " * 20_000

PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    {"image_url": "https://example.com/a.png"},
    {"type": "input_image", "file_id": "file-123"},
    {"type": "input_file", "file_url": "https://example.com/a.pdf"},
    {"type": "input_file", "file_id": "file-123"},
    {"type": "file", "file": {"file_id": "f"}},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
    {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0x"}},
    {"type": "image_embeds", "image_embeds": "AAAA"},
    {"type": "audio_embeds", "audio_embeds": "AAAA"},
    {"type": "image_pil", "image_pil": "AAAA"},
    {"type": "input_video", "input_video": "AAAA"},
    {"type": "smell_of_tomorrow", "data": "AAAA"},
    {"type": ["text"], "text": "hi"},
    {"inline_data": {"mime_type": "image/png", "data": "AAAA"}},
    {"type": "text", "text": "hi", "encrypted_content": "AAAA"},
    {"type": "text", "text": "hi", "imageUrl": "https://example.com/a.png"},
    {"type": "text", "text": "hi", "inlineData": {"data": "AAAA"}},
    {"type": "text", "text": "hi", "PDFData": "AAAA"},
    {"type": "text", "text": "hi", "photo2": "AAAA"},
    {"type": "text", "text": "see data:image/png;base64,iVBORw0KGgo="},
]


def stays(fields: dict[str, Any]) -> bool:
    """Whether a request stays on the premises; refused by the wrong check it does not count."""
    clearance = clear(POLICY, json.dumps(fields).encode())
    if clearance.zones is None:
        return False
    assert "cannot be searched" in clearance.why
    allowed = clear(SensitivitySettings(unreadable="allow"), json.dumps(fields).encode())
    assert allowed.action == "allow"
    return clearance.zones == frozenset({"on-premises"})


@pytest.mark.parametrize("filler", ["", LONG])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.get("type")))
def test_parts_that_are_not_known_to_be_text(part: dict[str, Any], filler: str) -> None:
    text = {"type": "text", "text": "hi" + filler}
    assert stays({"messages": [{"role": "user", "content": [text, part]}]})
    assert stays({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [text, part]}]}]})
    assert stays({"input": [{"type": "message", "role": "user", "content": [part, {"x": filler}]}]})
    assert stays({"text_1": "x" + filler, "text_2": {"content": [part]}})
    assert stays({"queries": {"content": [part]}, "documents": "x" + filler})
    assert stays({"contents": [{"role": "user", "parts": [part, {"text": filler}]}]})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1, 2, 3]},
        {"prompt": [[1, 2, 3]]},
        {"prompt": ["a", [1, 2, 3]]},
        {"prompt": [[1, 2, 3], LONG]},
        {"prompt": [1, 2, 3] * 20_000},
        {"prompt": [0.123456789] * 20_000},
        {"input": [["a"], [1]]},
        {"tokens": [1, 2, 3]},
        {"token_ids": [1, 2, 3]},
        {"some_new_field": [[7]]},
        {"prompt": "", "prompt_embeds": "AAAA"},
        {"prompt": LONG, "image_data": "AAAA"},
        {"input": "hi", "previous_response_id": "resp_1"},
        {"input": "hi", "conversation": {"id": "conv_1"}},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"id": "msg_x"}]},
        {"input": [{"type": None, "id": "msg_x"}]},
        {"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot"}}]},
        {"input": {"type": "image", "source": {}}},
        {"messages": [{"role": "user", "content": {"type": "image", "source": {}}}]},
        {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
        {"audio": {"data": "AAAA", "format": "wav"}},
        {"video": {"format": "mp4"}},
        {"prompt": "x", "multi_modal_data": "AAAA"},
        {"prompt": "x", "mm_payload": "AAAA"},
        {"prompt": "x", "imageData": "AAAA"},
        {
            "prompt": {
                "id": "pmpt_1",
                "variables": {"a": "x", "b": {"type": "input_file", "url": "https://example.com"}},
            }
        },
        {"prompt": {"id": "pmpt_1", "variables": {"a": LONG, "b": {"type": "input_file", "x": LONG}}}},
        {"input": [{"inputImage": "AAAA"}]},
        {"input": [{"pdf": "JVBERi0xLjQK"}]},
        {"input": [{"document": "JVBERi0xLjQK"}]},
        {"input": [{"url": "https://example.com/a"}]},
        {"input": {"url": "https://example.com/a"}},
        {"query": "x", "documents": [{"url": "https://example.com/a", "title": "a"}]},
        {"query": "x", "documents": [{"pageUri": "https://example.com/a"}, LONG]},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_other_places(fields: dict[str, Any]) -> None:
    assert stays(fields)


@pytest.mark.parametrize("before", ["", LONG])
@pytest.mark.parametrize(
    "head",
    [
        "Content-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: base64\r\n\r\n",
        "content-transfer-encoding:BASE64\nContent-Type: text/plain;\n charset=utf-8\n\n",
    ],
)
def test_a_mails_part_in_base64(before: str, head: str) -> None:
    part = head + "SGVsbG8sIG15IGNhcmQgaXMgNDExMSAxMTExIDExMTEgMTExMQ=="
    assert stays({"messages": [{"role": "user", "content": f"{before}--b\r\n{part}"}]})
    spoken_of = "The line Content-Transfer-Encoding: base64\n\nsays that a part is in base64."
    assert clear(POLICY, json.dumps({"prompt": before + spoken_of}).encode()).zones is None


@pytest.mark.parametrize("before", ["", " ", "hello\n", LONG])
@pytest.mark.parametrize(
    "url",
    [
        "data:text/plain;base64,U1NOIDA3OC0wNS0xMTIw",
        "DATA:Text/Plain;Charset=utf-8;BASE64,U1NOIDA3OC0wNS0xMTIw",
        "data:;base64,\n/9j/4AAQSkZJRg==",
    ],
)
def test_a_file_may_stand_anywhere_in_a_text(before: str, url: str) -> None:
    assert stays({"input": [before + url]})
    assert stays({"messages": [{"role": "user", "content": f"{before}{url} what is it?"}]})


def test_a_file_is_seen_where_slices_of_a_text_meet() -> None:
    url = "data:image/png;base64,iVBORw0KGgo="
    for at in range(len(url)):
        assert stays({"prompt": "a" * (SLICE_BYTES - len("prompt: ") - at) + url})


def test_code_that_makes_such_an_address_is_text() -> None:
    for code in (
        'f"data:image/png;base64,{encoded}"',
        "`data:image/png;base64,${data}`",
        "1;64,12345678",
        "base64, ok",
    ):
        assert clear(POLICY, json.dumps({"prompt": code}).encode()).zones is None


SCHEMA = {
    "type": "object",
    "properties": {"image": {"type": "string"}, "kind": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
    "enum": [1, 2],
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"file": [1]})}}


@pytest.mark.parametrize("filler", ["hi", LONG])
def test_text_and_settings_go_anywhere(filler: str) -> None:
    for fields in (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": filler, "cache_control": {"type": "x"}}]},
                {"role": "assistant", "content": None, "audio": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": [{"text": "done"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "description": filler}},
                {"type": "function", "function": {"name": "g", "parameters": {
                    "properties": {"image": {"type": "string"}, "x": {"type": "string", "description": filler}}}}},
            ],
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "stop_token_ids": [1, 2],
            "modalities": ["text", "audio"],
            "audio": {"voice": "alloy", "format": "wav"},
            "stream_options": {"include_usage": True},
            "metadata": {"image": "a name"},
            "images": [],
            "extra": {"file": "", "x": filler, "images": [], "use_audio": True, "video": None,
                      "flags": [True, False]},
            "logit_bias": {"50256": -100},
            "vllm_xargs": {"a": [1, 2]},
            "search_parameters": {"mode": "on", "sources": [{"type": "web", "url": "https://example.com"}]},
            "mm_processor_kwargs": {"max_pixels": 5},
            "prediction": {"type": "content", "content": filler},
            "max_tokens": 5,
        },
        {
            "system": [{"type": "text", "text": filler}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "messages": [
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "AAAA"}]},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "t", "name": "f",
                     "input": {"file": "a.txt", "rows": [1, 2], "x": [{"type": "y"}], "text": filler}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]}]},
            ],
        },
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": filler}]},
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}],
                 "encrypted_content": None},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
                {"type": "message", "role": "assistant", "content": [
                    {"type": "output_text", "text": "x",
                     "annotations": [{"type": "url_citation", "url": "https://example.com/a", "title": "a"}],
                     "logprobs": [{"token": "x", "bytes": [120], "logprob": -0.1, "top_logprobs": []}]}]},
            ],
            "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "reasoning": {"effort": "low"},
        },
        {"query": "q", "documents": ["a", {"title": "b", "text": filler}], "top_n": 3},
        {"query": "q", "documents": ["https://example.com/a", {"url": "https://example.com/a", "text": filler}]},
        {"input": [filler], "embedding_type": "float", "embedding_types": ["float"]},
        {"messages": [{"role": "assistant", "content": [
            {"type": "text", "text": filler, "citations": [
                {"type": "char_location", "cited_text": "x", "document_index": 1, "document_title": "a"}]}]}]},
        {"prompt": ["a", filler], "n": 2, "best_of": 3},
        {"prompt": {"id": "pmpt_1", "variables": {"a": filler, "b": {"type": "input_text", "text": filler}}}},
    ):  # fmt: skip
        clearance = clear(POLICY, json.dumps(fields).encode())
        assert clearance.zones is None, clearance.why


def test_texts_beside_token_ids_are_searched() -> None:
    settings = SensitivitySettings(unreadable="allow")
    for prompt in ([[1, 2], "card 4111 1111 1111 1111"], [[1] * 60_000, ["card 4111 1111 1111 1111"]]):
        assert clear(settings, json.dumps({"prompt": prompt}).encode()).kinds == {"credit_card": 1}
    assert clear(settings, json.dumps({"zzz": [1] * 60_000 + [4111111111111111]}).encode()).kinds == {"credit_card": 1}


def test_none_of_it_reaches_the_cloud() -> None:
    far = FakeUpstream(("vast",)).start()
    backend = Backend("far", far.url, "frontier", ("vast",), zone="cloud", quality=0.99)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    with RunningGateway(backend, sensitivity=POLICY) as gateway:
        for path, fields in (
            ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [image]}]}),
            ("/v1/responses", {"input": "hi", "previous_response_id": "resp_1"}),
            ("/v1/completions", {"prompt": "", "prompt_embeds": "AAAA"}),
            ("/score", {"data_1": "x", "data_2": {"content": [PARTS[0]]}}),
            ("/detokenize", {"tokens": [1, 2, 3]}),
        ):
            status, _, body = gateway.post(path, {"model": "vast", **fields})
            assert (status, json.loads(body)["error"]["code"]) == (403, "residency")
        assert not far.books.requests
    far.stop()
