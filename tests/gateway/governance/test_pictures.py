"""What a message holds itself is no text: a picture counts by its size, as a client with a budget sees."""

import base64
import io
import json
import struct
from typing import Any

import pytest
from PIL import Image

from tests.gateway.governance.test_media import body
from tokenmill.engine.gateway.governance.media import IMAGE_TOKENS, UNSEEN_TOKENS, media_tokens
from tokenmill.engine.gateway.governance.pictures import LEAST_TOKENS, MOST_TOKENS, picture_tokens

SIZE = (2100, 1600)
#: 75 x 58 fields of 28 x 28 pixels.
TOKENS = 4350


def encoded(kind: str, size: tuple[int, int] = SIZE, **options: Any) -> str:
    """A picture in base64."""
    made = io.BytesIO()
    Image.new("RGB", size).save(made, kind, **options)
    return base64.b64encode(made.getvalue()).decode()


def jpeg(*segments: bytes) -> str:
    """The head of a JPEG in base64."""
    return base64.b64encode(b"\xff\xd8" + b"".join(segments)).decode()


def frame(width: int, height: int, kind: int = 0xC0) -> bytes:
    """The segment that says a JPEG's size."""
    return struct.pack(">BBHBHH", 0xFF, kind, 17, 8, height, width) + bytes(10)


def changed(picture: str, at: int, there: bytes, cut: int = 0) -> str:
    """A picture in base64 with other bytes in the place of so many, or between two."""
    raw = base64.b64decode(picture)
    return base64.b64encode(raw[:at] + there + raw[at + cut :]).decode()


@pytest.mark.parametrize(
    "picture",
    [
        encoded("PNG"),
        encoded("JPEG"),
        encoded("JPEG", progressive=True, exif=b"Exif\0\0" + bytes(60_000)),
        # Pillow takes the last of several sizes.
        changed(encoded("PNG"), 8, base64.b64decode(encoded("PNG", (1, 1)))[8:33]),
        encoded("GIF"),
        # Pillow enlarges the screen for a picture that has no place on it.
        changed(encoded("GIF"), 6, struct.pack("<HH", 1, 1), 4),
        # A block as long as the mark of a picture.
        encoded("GIF", comment=b"A" * 0x2C),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("WEBP", exif=b"Exif\0\0" + bytes(100)),
        # The larger of two, fill bytes and markers without a length; what is no frame.
        jpeg(b"\xff\xff\x01", b"\xff\xd0", frame(10, 10), frame(*SIZE), b"\xff\xda\0\x08", frame(9000, 9000)),
        jpeg(frame(9000, 9000, 0xC4), frame(*SIZE, 0xC2), b"\xff\xda\0\x08"),
    ],
)
def test_a_picture_counts_by_its_size(picture: str) -> None:
    for said in (picture, "data:image/whatever;base64," + picture):
        assert picture_tokens(said) == TOKENS


@pytest.mark.parametrize(
    ("picture", "tokens"),
    [
        (encoded("PNG", (1, 1)), LEAST_TOKENS),
        (encoded("PNG", (1024, 1024)), 64 * 65),  # of Pixtral's, with its marks
        (jpeg(frame(9000, 3000)), MOST_TOKENS),
        (encoded("BMP", (10, 10)), MOST_TOKENS),
        (encoded("PNG")[:20], MOST_TOKENS),
        (encoded("PNG")[:44], MOST_TOKENS),
        (encoded("GIF")[:24], MOST_TOKENS),
        (encoded("WEBP")[:28], MOST_TOKENS),
        (changed(encoded("WEBP", (9, 9)), 12, b"JUNK\4\0\0\0junk"), MOST_TOKENS),
        # Looking at each mark of a long head would hold up other requests.
        (jpeg(b"\xff\x01" * 1000, frame(10, 10)), MOST_TOKENS),
        (jpeg(frame(0, 10)), MOST_TOKENS),
        (jpeg(b"\xff\xe1\xff\xff"), MOST_TOKENS),
        ("", MOST_TOKENS),
        ("ÄÖÜ", MOST_TOKENS),
        ("A", MOST_TOKENS),
    ],
)
def test_what_is_not_known_counts_as_the_largest(picture: str, tokens: int) -> None:
    assert picture_tokens(picture) == tokens


PICTURE, LONG = encoded("PNG"), "A" * (UNSEEN_TOKENS + 1000)
URL = "data:image/png;base64," + PICTURE


@pytest.mark.parametrize(
    ("part", "surplus"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, len(URL) - TOKENS),
        ({"type": "image_url", "image_url": URL}, len(URL) - TOKENS),
        ({"type": "input_image", "image_url": URL}, len(URL) - TOKENS),
        ({"type": "image", "source": {"type": "base64", "data": PICTURE}}, len(PICTURE) - TOKENS),
        ({"type": "tool_result", "content": [{"type": "image", "source": {"data": PICTURE}}]}, len(PICTURE) - TOKENS),
        ({"type": "input_audio", "input_audio": {"data": LONG, "format": "wav"}}, 1000),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, 0),
        ({"type": "video_url", "video_url": {"url": "data:" + LONG}}, 1005),
        # Read as text somewhere, or by somebody.
        ({"type": "image_url", "image_url": {"url": PICTURE}}, -IMAGE_TOKENS),
        ({"type": "text", "image_url": {"url": URL}}, -IMAGE_TOKENS),
        ({"type": "image_url", "image_url": {"url": URL}, "image": PICTURE}, -2 * IMAGE_TOKENS),
        ({"type": "tool_use", "content": [{"type": "image_url", "image_url": {"url": URL}}]}, -IMAGE_TOKENS),
        ({"type": ["image_url"], "image_url": {"url": URL}}, -IMAGE_TOKENS),
        ({"type": "image_url", "image_url": {"url": 7}}, 0),
    ],
)
def test_what_a_message_holds_is_no_text(part: Any, surplus: int) -> None:
    raw = body(part)
    assert media_tokens(raw) == -surplus
    tools = json.dumps({"messages": [], "tools": [{"function": {"parameters": {"content": [part]}}}]}).encode()
    assert media_tokens(tools) >= 0, "a tool's description is read as it stands"
    asked = {"input": [{"role": "user", "content": [part]}, {"type": "function_call_output", "output": [part]}]}
    assert media_tokens(json.dumps(asked).encode()) == -2 * surplus
