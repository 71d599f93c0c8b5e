"""What a request names by address or id instead of holding it: pictures, videos, recordings and files.

Its bytes say nothing about its length, so each counts for a fixed number of tokens, however the JSON is written:
members in any order, names with escapes, parts without a type. A body without such a name is not looked at further.

Of pictures and recordings that a message holds itself, the base64 is no text: a picture counts by its size
(`pictures`), a recording or video as if it were named at most. Base64 anywhere else may be read as text, and counts.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec
import re2

from tokenmill.engine.gateway.body import MOST_ITEMS
from tokenmill.engine.gateway.governance import pictures

#: Tokens of an image whose size is not known.
IMAGE_TOKENS = pictures.MOST_TOKENS
#: Tokens of a video, recording or file.
UNSEEN_TOKENS = 131_072
#: From so many tokens on nobody counts further.
ENOUGH_TOKENS = 100_000_000
#: Bodies with more names of media, or more commas, are not parsed, which takes milliseconds: all that the names could
#: stand for counts.
_MOST_NAMES = 1000

_IMAGE_TYPES = ("image", "input_image")
_IMAGES = frozenset({"image_url", "image"})
#: Members that hold an address.
_ADDRESSED = frozenset({"video_url", "audio_url", "file_url"})
#: Members that hold an address or the bytes themselves.
_HELD = frozenset({"video", "audio"})
_UNSEEN = _ADDRESSED | _HELD | {"file_id", "source"}
_ALL = _IMAGES | _UNSEEN


def members(names: frozenset[str], then: bytes = b"") -> Any:
    """Finds members of these names, spelled in any way that JSON allows, before what matches `then`."""
    spelled = [b"".join([b"(?:%c|\\\\u00(?i:%02x))" % (char, char) for char in name.encode()]) for name in names]
    return re2.compile(b'"(?:' + b"|".join(spelled) + b')"[ \t\r\n]*:' + then)


#: Type of a message's part to its member that holds base64, or a `data:` URL of it, and the name of that in there.
_BASE64 = {
    "image_url": ("image_url", "url"),
    "input_image": ("image_url", "url"),
    "image": ("source", "data"),
    "video_url": ("video_url", "url"),
    "audio_url": ("audio_url", "url"),
    "input_audio": ("input_audio", "data"),
}

_ANY_NAME, _IMAGE_NAME, _UNSEEN_NAME = members(_ALL), members(_IMAGES), members(_UNSEEN)
#: Several under one name.
_LISTED = members(_IMAGES | _ADDRESSED | _HELD, rb"[ \t\r\n]*\[[ \t\r\n]*[\"{]")


def media_tokens(payload: bytes) -> int:
    """The most tokens that the media of a JSON body stand for, beside its bytes; below 0: its bytes are too many."""
    if _ANY_NAME.search(payload) is None and b'"input_audio"' not in payload:
        return 0
    if _count(_ANY_NAME, payload, _MOST_NAMES + 1) <= _MOST_NAMES and payload.count(b",") <= MOST_ITEMS:
        try:
            tree = msgspec.json.decode(payload)
            return _tokens_of(tree) - sum(map(_surplus, _parts(tree)))
        except (msgspec.MsgspecError, RecursionError):
            pass  # for one, a number that only some servers take
    if _LISTED.search(payload) is not None:
        return ENOUGH_TOKENS
    images = IMAGE_TOKENS * _count(_IMAGE_NAME, payload, ENOUGH_TOKENS // IMAGE_TOKENS + 1)
    return images + UNSEEN_TOKENS * _count(_UNSEEN_NAME, payload, ENOUGH_TOKENS // UNSEEN_TOKENS + 1)


def _count(name: Any, payload: bytes, most: int) -> int:
    return sum(1 for _ in islice(name.finditer(payload), most))


def _tokens_of(tree: Any) -> int:
    images = unseen = 0
    left = [tree]
    while left:
        node = left.pop()
        if type(node) is list:
            left += node
        elif type(node) is dict:
            left += node.values()
            if not _ALL.isdisjoint(node):
                pictures, others = _named_by(node)
                images += pictures
                unseen += others
    return images * IMAGE_TOKENS + unseen * UNSEEN_TOKENS


def _named_by(node: dict[str, Any]) -> tuple[int, int]:
    """(images, other media) that an object names itself, without what is named by objects in it."""
    images = sum([_addresses(node.get(name), lambda _: True) for name in _IMAGES])
    unseen = sum([_addresses(node.get(name), lambda text: not text.startswith("data:")) for name in _ADDRESSED])
    unseen += sum([_addresses(node.get(name), lambda text: "://" in text) for name in _HELD])
    audio, source = node.get("audio"), node.get("source")
    # An answer of the assistant's own that was spoken.
    unseen += isinstance(audio, dict) and isinstance(audio.get("id"), str)
    by_id = isinstance(node.get("file_id"), str)
    by_address = isinstance(source, dict) and isinstance(source.get("url"), str)
    if node.get("type") in _IMAGE_TYPES:
        return images or 1, unseen
    return images, unseen + by_id + by_address


def _addresses(value: Any, counts: Callable[[str], bool]) -> int:
    """How many texts a member holds that count: itself one, or an object with a `url`, or a list of either."""
    texts = [
        one.get("url") if isinstance(one, dict) else one for one in (value if isinstance(value, list) else [value])
    ]
    return sum([isinstance(text, str) and counts(text) for text in texts])


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """The parts of a request's messages, and of the results of tools in them: what no server reads as it stands."""
    if not isinstance(tree, dict):
        return
    left = [message for name in ("messages", "input") if isinstance(said := tree.get(name), list) for message in said]
    while left:
        holder = left.pop()
        if isinstance(holder, dict):
            for name in ("content", "output"):
                listed = holder.get(name)
                if isinstance(listed, list):
                    yield from (part for part in listed if isinstance(part, dict))
                    left += [part for part in listed if isinstance(part, dict) and part.get("type") == "tool_result"]


def _surplus(part: dict[str, Any]) -> int:
    """How many tokens too many a part of a message counts for that holds a picture or recording itself."""
    kind = part.get("type")
    member, name = _BASE64.get(kind, ("", "")) if isinstance(kind, str) else ("", "")
    held = part.get(member)
    encoded = held.get(name) if isinstance(held, dict) else held
    if not isinstance(encoded, str) or not (name == "data" or encoded.startswith("data:")):
        return 0
    if member in ("image_url", "source"):
        # One and no more was counted for it.
        return len(encoded) + IMAGE_TOKENS - pictures.picture_tokens(encoded) if _named_by(part) == (1, 0) else 0
    return max(len(encoded) - UNSEEN_TOKENS, 0)
