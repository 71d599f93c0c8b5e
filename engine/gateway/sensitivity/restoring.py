"""Puts the values back into an answer, whole or streamed, wherever a placeholder may be split.

A stream's text arrives in pieces: a piece that ends with what may be the beginning of a placeholder keeps that end back
until the next piece decides, or the event that ends the text. Events without text or placeholders pass byte for byte,
and so do events of a form that no API has; of others everything but the strings that change. Where a text's end has to
go out in an event of its own, the numbers of those behind it, which the Responses API's have, go up by one. Where the
client asked for JSON, the answer stays JSON.
"""

import codecs
import copy
import json
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any, NamedTuple

import msgspec
import orjson

from tokenmill.engine.gateway.api_error import EVENT_STREAM_TYPE
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import JSON_TEXTS, Redaction
from tokenmill.engine.gateway.sensitivity.respelling import respelled
from tokenmill.engine.gateway.sse import Events, data_of, event

#: Members of a streamed choice (or of its delta) that continue from event to event.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "text")
#: The same of a block of Anthropic's.
_BLOCK_TEXTS = ("text", "thinking", "partial_json")
#: Members with a text that is JSON where the client asked for that: of an answer, not of what was thought before it.
_ANSWERS = frozenset({"content", "text"})
#: Fields that say so.
_SAY_JSON = frozenset(
    {"response_format", "output_format", "text", "output_config", "guided_json", "structured_outputs"}
)
#: Begins the types of parts and events that hold an answer's reasoning, or a refusal.
_PROSE = ("reasoning", "summary", "thinking", "refusal", "response.reasoning", "response.refusal")

#: Types of the events after which no text comes.
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop", "error"})

#: Texts of a stream of which an end is kept back: no request has so many answers, and a server may go on for ever.
_MOST_TEXTS = 256

#: Which text of a stream: what it belongs to (a choice, a block, an item's text) first.
_Key = tuple[Any, ...]


class _Piece(NamedTuple):
    """A piece of a streamed text in an event.

    Attributes:
        key: Which text.
        holder: The object that holds it.
        name: Its name in there.
        is_json: The text is JSON.
    """

    key: _Key
    holder: dict[str, Any]
    name: str
    is_json: bool


def restore(reply: Reply, redaction: Redaction, asked: Body) -> None:
    """Makes the reply hold the values; `asked` is the request that it answers."""
    json_texts = JSON_TEXTS | _ANSWERS if _wants_json(asked) else JSON_TEXTS
    if reply.chunks is not None:
        kind = next((value for name, value in reply.headers if name == b"content-type"), EVENT_STREAM_TYPE).lower()
        if kind.startswith(EVENT_STREAM_TYPE):
            reply.chunks = _stream(reply.chunks, redaction, json_texts)
        else:
            reply.chunks = _running(reply.chunks, redaction, is_json=b"json" in kind)
    elif reply.body and redaction.may_be_in(reply.body):
        try:
            content = _decoded(reply.body)
            restored = _whole(content, redaction, json_texts)
            if restored != content:
                reply.body = respelled(reply.body, restored, redaction)
        except (ValueError, RecursionError):
            reply.body = redaction.restore(reply.body.decode("utf-8", "surrogateescape")).encode(
                "utf-8", "surrogateescape"
            )


def _decoded(raw: bytes) -> Any:
    """What a JSON text says; Python's servers also write NaN, and halves of characters.

    Raises:
        ValueError: It is none.
        RecursionError: It is nested too deeply.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return json.loads(raw)


def _wants_json(asked: Body) -> bool:
    """Whether the answer is to be JSON: as chat, the Responses API, Anthropic's Messages or vLLM have it said."""
    said = {name: msgspec.json.decode(asked.raw_field(name) or b"null") for name in asked.those_of(_SAY_JSON)}
    formats = [said.get("response_format"), said.get("output_format")]
    formats += [_object(said.get(name)).get("format") for name in ("text", "output_config")]
    if any(_object(one).get("type") in ("json_object", "json_schema") for one in formats):
        return True
    structured = _object(said.get("structured_outputs"))
    return bool(said.get("guided_json") or structured.get("json") or structured.get("json_object"))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _of(value: dict[str, Any], json_texts: frozenset[str]) -> frozenset[str]:
    """Which members of an object, and of what is in it, are JSON: of reasoning only the arguments of tools."""
    kind = value.get("type")
    return JSON_TEXTS if isinstance(kind, str) and kind.startswith(_PROSE) else json_texts


def _whole(value: Any, redaction: Redaction, json_texts: frozenset[str] = JSON_TEXTS, name: str = "") -> Any:
    """A value with all of its strings restored."""
    if isinstance(value, str):
        return redaction.restore_json(value) if name in json_texts else redaction.restore(value)
    if isinstance(value, dict):
        json_texts = _of(value, json_texts)
        return {key: _whole(member, redaction, json_texts, key) for key, member in value.items()}
    if isinstance(value, list):
        return [_whole(item, redaction, json_texts, name) for item in value]
    return value


async def _stream(
    chunks: AsyncGenerator[bytes, None], redaction: Redaction, json_texts: frozenset[str]
) -> AsyncGenerator[bytes, None]:
    events, restorer = Events(), _Restorer(redaction, json_texts)
    try:
        async for chunk in chunks:
            out = b"".join(restorer.feed(raw) for raw in events.feed(chunk))
            if out:
                yield out
        # The last event may have no empty line behind it.
        last = events.rest()
        rest = restorer.feed(last) if last else b""
        ending = restorer.flush()
        if rest and ending and not rest.endswith((b"\n\n", b"\r\n\r\n")):
            rest += b"\n\n"
        if rest or ending:
            yield rest + ending
    finally:
        await chunks.aclose()


async def _running(
    chunks: AsyncGenerator[bytes, None], redaction: Redaction, *, is_json: bool
) -> AsyncGenerator[bytes, None]:
    """The same for a stream without events: one text, or lines of JSON."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    restored = redaction.restore_json if is_json else redaction.restore
    kept = ""
    try:
        async for chunk in chunks:
            text = kept + decoder.decode(chunk)
            until = len(text) - redaction.held_back(text)
            kept = text[until:]
            if until:
                yield restored(text[:until]).encode("utf-8", "surrogateescape")
        text = kept + decoder.decode(b"", final=True)
        if text:
            yield restored(text).encode("utf-8", "surrogateescape")
    finally:
        await chunks.aclose()


class _Restorer:
    """The state of one stream: by text, what is kept back and the event it came in last."""

    def __init__(self, redaction: Redaction, json_texts: frozenset[str] = JSON_TEXTS) -> None:
        self._redaction, self._json_texts = redaction, json_texts
        self._kept: dict[_Key, str] = {}
        self._last: dict[_Key, tuple[Any, bytes]] = {}
        #: How many events were added, and the number that the next one to go out has.
        self._added = self._next = 0

    def feed(self, raw: bytes) -> bytes:
        """One event in, the bytes to send out."""
        data = data_of(raw)
        if data is None:
            return raw
        try:
            content = _decoded(data)
        except (ValueError, RecursionError):  # `[DONE]`, or nothing of ours
            return self.flush() + raw
        if not isinstance(content, dict):
            return raw
        number = _number(content)
        if number is not None:
            self._next = number + self._added
        # What was kept back would come too late after the last event, or after an error.
        before = self.flush() if content.get("error") or _id(content.get("type")) in _LAST else b""
        ended = _ended(content)
        changed = False
        pieces = list(_pieces(content, self._json_texts))
        for key, holder, name, is_json in pieces:
            text = self._kept.pop(key, "") + holder[name]
            self._last.pop(key, None)
            # What an event ends goes out with it: afterwards would be too late, before it out of order.
            keep = 0 if key[0] in ended or len(self._kept) >= _MOST_TEXTS else self._redaction.held_back(text)
            if keep:
                self._kept[key] = text[len(text) - keep :]
                self._last[key] = content, raw
                text = text[: len(text) - keep]
            restored = self._redaction.restore_json(text) if is_json else self._redaction.restore(text)
            if restored != holder[name]:
                holder[name], changed = restored, True
        # Texts that end without a last piece: what was kept back is no placeholder.
        before += b"".join([self._ending(key) for key in list(self._kept) if key[0] in ended])
        if b"[" in data and self._others(
            content, {(id(piece.holder), piece.name) for piece in pieces}, self._json_texts
        ):
            changed = True
        after = event(respelled(data, content, self._redaction), raw) if changed else raw
        if number is not None:
            after = _renumbered(after, number, self._next)
            self._next += 1
        return before + after

    def flush(self) -> bytes:
        """What is still kept back, each in an event like the last one of its text."""
        return b"".join([self._ending(key) for key in list(self._kept)])

    def _ending(self, key: _Key) -> bytes:
        text = self._kept.pop(key)
        content, raw = self._last.pop(key)
        like = copy.deepcopy(content)
        for other, holder, name, _ in _pieces(like, self._json_texts):
            holder[name], text = (text, "") if other == key else ("", text)
        for choice in _items(like.get("choices")):
            if isinstance(choice, dict):
                choice["finish_reason"] = None
        added = event(respelled(data_of(raw) or b"", like, self._redaction), raw)
        if (number := _number(content)) is not None:
            added = _renumbered(added, number, self._next)
            self._added += 1
            self._next += 1
        return added

    def _others(self, content: dict[str, Any], streamed: set[tuple[int, str]], json_texts: frozenset[str]) -> bool:
        """Restores, in place, the strings that stand whole in one event: all but pieces of texts."""
        changed = False
        json_texts = _of(content, json_texts)
        for name, member in content.items():
            if (id(content), name) in streamed:
                continue
            if isinstance(member, dict):
                changed = self._others(member, streamed, json_texts) or changed
            elif isinstance(member, list) and any(isinstance(item, dict) for item in member):
                for item in member:
                    if isinstance(item, dict):
                        changed = self._others(item, streamed, json_texts) or changed
            elif isinstance(member, (str, list)):
                restored = _whole(member, self._redaction, json_texts, name)
                if restored != member:
                    content[name], changed = restored, True
        return changed


def _pieces(content: dict[str, Any], json_texts: frozenset[str]) -> Iterator[_Piece]:
    """Each piece of a text in an event: of chat and completions, the Responses API and Anthropic's Messages."""
    kind, delta = content.get("type"), content.get("delta")
    if isinstance(kind, str) and isinstance(delta, str) and kind.endswith(".delta"):
        text = kind.removesuffix(".delta")
        is_json = text.endswith("_arguments") or (text == "response.output_text" and "text" in json_texts)
        place = _id(content.get("output_index")), _id(content.get("content_index"))
        yield _Piece(((text, _id(content.get("item_id"))), *place), content, "delta", is_json)
    elif kind == "content_block_delta" and isinstance(delta, dict):
        for name in _BLOCK_TEXTS:
            if isinstance(delta.get(name), str):
                yield _Piece((("block", _id(content.get("index"))), name), delta, name, name in json_texts)
    for choice in _items(content.get("choices")):
        if isinstance(choice, dict):
            yield from _of_choice(choice, json_texts)


def _of_choice(choice: dict[str, Any], json_texts: frozenset[str]) -> Iterator[_Piece]:
    index, delta = _id(choice.get("index", 0)), _object(choice.get("delta"))
    for holder in (choice, delta):
        for name in _TEXTS:
            text = holder.get(name)
            if isinstance(text, str):
                yield _Piece((index, name), holder, name, name in json_texts)
            elif isinstance(text, list):
                yield from _of_parts(text, (index, name), name in json_texts)
    spoken = _object(delta.get("audio"))
    if isinstance(spoken.get("transcript"), str):
        yield _Piece((index, "transcript"), spoken, "transcript", False)
    for call in [*_items(delta.get("tool_calls")), {"function": delta.get("function_call")}]:
        function = _object(_object(call).get("function"))
        if isinstance(function.get("arguments"), str):
            yield _Piece((index, "tool", _id(call.get("index", 0))), function, "arguments", True)


def _of_parts(parts: list[Any], key: _Key, is_json: bool) -> Iterator[_Piece]:
    """The texts of a content that is a list: all of its parts together are one text, what was thought another."""
    for part in parts:
        text, thought = _object(part).get("text"), _object(part).get("thinking")
        if isinstance(text, str):
            yield _Piece(key, part, "text", is_json)
        if isinstance(thought, str):
            yield _Piece((key[0], "thinking"), part, "thinking", False)
        elif isinstance(thought, list):
            yield from _of_parts(thought, (key[0], "thinking"), False)


def _ended(content: dict[str, Any]) -> set[Any]:
    """What ends with this event: the first of the keys of its texts."""
    ended: set[Any] = {
        _id(choice.get("index", 0))
        for choice in _items(content.get("choices"))
        if isinstance(choice, dict) and choice.get("finish_reason")
    }
    kind = content.get("type")
    if isinstance(kind, str):
        if kind.endswith(".done"):
            ended.add((kind.removesuffix(".done"), _id(content.get("item_id"))))
        elif kind == "content_block_stop":
            ended.add(("block", _id(content.get("index"))))
    return ended


def _number(content: dict[str, Any]) -> int | None:
    """Which event of its stream it is; None: it does not say."""
    number = content.get("sequence_number")
    return number if isinstance(number, int) else None


def _renumbered(raw: bytes, before: int, after: int) -> bytes:
    """An event with another number; all else stays as it is spelt."""
    if before == after:
        return raw
    return re.sub(rb'("sequence_number"\s*:\s*)%d\b' % before, rb"\g<1>%d" % after, raw, count=1)


def _id(value: Any) -> Any:
    """An index or a name as it may stand in a key; no API has an object or a list there."""
    return repr(value) if isinstance(value, (dict, list)) else value
