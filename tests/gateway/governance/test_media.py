"""What is named by address or id counts for its tokens, however a body says it."""

import json
from typing import Any

import pytest

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.governance import bounds, media
from tokenmill.engine.gateway.governance.media import ENOUGH_TOKENS, IMAGE_TOKENS, UNSEEN_TOKENS, media_tokens
from tokenmill.engine.gateway.pipeline import Exchange


def body(part: Any, *, long: bool = False) -> bytes:
    """A chat with this part in its message."""
    if not isinstance(part, str):
        part = json.dumps(part)
    text = json.dumps({"type": "text", "text": "x, " * (5000 if long else 5)})
    return f'{{"model":"m","messages":[{{"role":"user","content":[{text},{part}]}}],"max_tokens":1}}'.encode()


@pytest.mark.parametrize(
    ("part", "images", "unseen"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x/a.png"}}, 1, 0),
        ({"type": "image_url", "image_url": {"detail": "low", "url": "https://x/a.png"}}, 1, 0),
        ({"image_url": "https://x/a.png"}, 1, 0),
        ({"type": "input_image", "image_url": "https://x/a.png"}, 1, 0),
        ({"type": "input_image", "file_id": "file-1"}, 1, 0),
        ({"type": "image", "source": {"type": "url", "url": "https://x/a.png"}}, 1, 0),
        ({"type": "picture", "image_url": {"url": "data:image/png;base64,AAAA"}}, 1, 0),
        ({"type": "image", "image": ["https://x/a.png", "https://x/b.png"]}, 2, 0),
        (r'{"type":"image\u005furl","image\u005Furl":{"\u0075rl":"https://x/a.png"}}', 1, 0),
        ({"type": "video_url", "video_url": {"url": "https://x/v.mp4"}}, 0, 1),
        ({"type": "video_url", "video_url": {"detail": "low", "url": "https://x/v.mp4"}}, 0, 1),
        ({"video_url": {"url": "https://x/v.mp4"}}, 0, 1),
        ('{"video_url" \n:\t"https://x/v.mp4"}', 0, 1),
        ({"type": "audio_url", "audio_url": "https://x/a.mp3"}, 0, 1),
        (r'{"type":"video\u005furl","video\u005furl":{"url":"https://x/v.mp4"}}', 0, 1),
        (r'{"\u0076ideo_url":{"url":"https://x/v.mp4"}}', 0, 1),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, 0, 0),
        (r'{"video_url":{"url":"\u0064ata:video/mp4;base64,AAAA"}}', 0, 0),
        ('{"video_url":{"url":"data:video/mp4;base64,AAAA","url":"https://x/v.mp4"}}', 0, 1),
        ({"type": "input_video", "video": "https://x/v.mp4"}, 0, 1),
        ({"type": "video", "video": ["https://x/1.png", "https://x/2.png"]}, 0, 2),
        ({"type": "audio", "audio": "UklGRg=="}, 0, 0),
        ({"role": "assistant", "audio": {"id": "audio_1"}}, 0, 1),
        ({"type": "file", "file": {"file_id": "f"}}, 0, 1),
        ({"type": "input_file", "file_id": "f"}, 0, 1),
        (r'{"type":"input_file","file\u005fid":"f"}', 0, 1),
        ({"type": "input_file", "file_url": "https://x/a.pdf"}, 0, 1),
        ({"type": "input_file", "file_data": "data:application/pdf;base64,AAAA"}, 0, 0),
        ({"type": "document", "source": {"type": "url", "url": "https://x/a.pdf"}}, 0, 1),
        ({"type": "document", "source": {"url": "https://x/a.pdf", "type": "url"}}, 0, 1),
        ({"type": "document", "source": {"type": "file", "file_id": "f"}}, 0, 1),
        ({"type": "document", "source": {"type": "base64", "data": "AAAA"}}, 0, 0),
        ({"type": "tool_result", "content": [{"type": "file", "file": {"file_id": "f"}}]}, 0, 1),
        ({"type": "text", "text": '"file_id": "f"'}, 0, 0),
        ({"type": "text", "text": "image_url video_url source file_id"}, 0, 0),
        ({"type": "tool_use", "input": {"properties": {"file_id": {"type": "string"}}}}, 0, 0),
        ({"type": "tool_use", "input": {"properties": {"image_url": {"type": "string"}, "source": {}}}}, 0, 0),
        ({"type": "search_result", "source": "https://x/", "content": []}, 0, 0),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_media_that_nobody_sees_are_bounded_high(part: Any, images: int, unseen: int, long: bool) -> None:
    raw = body(part, long=long)
    assert media_tokens(raw) == images * IMAGE_TOKENS + unseen * UNSEEN_TOKENS
    asked = bounds.asked(
        Exchange("/v1/chat/completions", [], raw, body=Body(raw), model="m", request_id="r", forward=[])
    )
    assert asked.prompt == len(raw) + bounds.TEMPLATE_TOKENS + media_tokens(raw)


def test_what_is_not_parsed_counts_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "https://x/a.png"}},
        {"type": "document", "source": {"type": "url", "url": "https://x/a.pdf"}},
    ]
    expected = IMAGE_TOKENS + UNSEEN_TOKENS
    assert media_tokens(body(parts)) == expected
    # Numbers, depths and sizes that some servers take.
    deep = "[" * 5000 + "]" * 5000
    for other in ("1e999", "9" * 5000, deep):
        assert media_tokens(body(f'{json.dumps(parts)},{{"x":{other}}}')) == expected
    listed = {"type": "image", "image": ["https://x/a.png", "https://x/b.png"]}
    for limit in ("_MOST_NAMES", "MOST_ITEMS"):
        with monkeypatch.context() as patched:
            patched.setattr(media, limit, 1)
            assert media_tokens(body(parts)) == expected
            inlined = {"type": "document", "source": {"type": "text", "data": "AAAA"}}
            assert media_tokens(body([parts[0], inlined])) == expected, "not looked into"
    monkeypatch.setattr(media, "MOST_ITEMS", 1)
    assert media_tokens(body(listed)) == ENOUGH_TOKENS, "nor how many"
    assert media_tokens(body({"image": [1, 2]})) == IMAGE_TOKENS


@pytest.mark.parametrize("part", [{"file_id": "f"}, {"image": "https://x"}])
def test_a_body_of_nothing_but_media_is_not_counted_to_its_end(part: dict[str, str]) -> None:
    assert ENOUGH_TOKENS <= media_tokens(body([part] * 200_000)) <= ENOUGH_TOKENS + UNSEEN_TOKENS
