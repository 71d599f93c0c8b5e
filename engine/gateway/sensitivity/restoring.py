"""Puts the values back into an answer, whole or streamed, wherever a placeholder may be split.

A stream's text arrives in pieces: a piece that ends with what may be the beginning of a placeholder keeps that end back
until the next piece decides, or the event that ends the text. Events without text or placeholders pass byte for byte.
"""

from collections.abc import AsyncGenerator, Iterator
from typing import Any, NamedTuple

import orjson

from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import Redaction
from tokenmill.engine.gateway.sse import Events, data_of, event

#: Members of a streamed choice (or of its delta) that continue from event to event.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "text")
#: The same of a block of Anthropic's.
_BLOCK_TEXTS = ("text", "thinking", "partial_json")
#: Such members whose text is JSON.
_JSON_TEXTS = frozenset({"arguments", "partial_json"})

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


def restore(reply: Reply, redaction: Redaction) -> None:
    """Makes the reply hold the values."""
    if reply.chunks is not None:
        reply.chunks = _stream(reply.chunks, redaction)
    elif reply.body and b"[" in reply.body:
        try:
            content = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            reply.body = redaction.restore(reply.body.decode("utf-8", "surrogateescape")).encode(
                "utf-8", "surrogateescape"
            )
        else:
            restored = _whole(content, redaction)
            if restored != content:
                reply.body = orjson.dumps(restored)


def _whole(value: Any, redaction: Redaction, name: str = "") -> Any:
    """A value with all of its strings restored."""
    if isinstance(value, str):
        return redaction.restore_json(value) if name in _JSON_TEXTS else redaction.restore(value)
    if isinstance(value, dict):
        return {key: _whole(member, redaction, key) for key, member in value.items()}
    if isinstance(value, list):
        return [_whole(item, redaction, name) for item in value]
    return value


async def _stream(chunks: AsyncGenerator[bytes, None], redaction: Redaction) -> AsyncGenerator[bytes, None]:
    events, restorer = Events(), _Restorer(redaction)
    try:
        async for chunk in chunks:
            out = b"".join(restorer.feed(raw) for raw in events.feed(chunk))
            if out:
                yield out
        rest = events.rest() + restorer.flush()
        if rest:
            yield rest
    finally:
        await chunks.aclose()


class _Restorer:
    """The state of one stream: by text, what is kept back and the event it came in last."""

    def __init__(self, redaction: Redaction) -> None:
        self._redaction = redaction
        self._kept: dict[_Key, str] = {}
        self._last: dict[_Key, tuple[Any, bytes]] = {}

    def feed(self, raw: bytes) -> bytes:
        """One event in, the bytes to send out."""
        data = data_of(raw)
        if data is None:
            return raw
        try:
            content = orjson.loads(data)
        except orjson.JSONDecodeError:  # `[DONE]`, or nothing of ours
            return self.flush() + raw
        if not isinstance(content, dict):
            return raw
        ended = _ended(content)
        changed = False
        pieces = list(_pieces(content))
        for key, holder, name, is_json in pieces:
            text = self._kept.pop(key, "") + holder[name]
            # What an event ends goes out with it: afterwards would be too late, before it out of order.
            keep = 0 if key[0] in ended else self._redaction.held_back(text)
            if keep:
                self._kept[key] = text[len(text) - keep :]
                text = text[: len(text) - keep]
            restored = self._redaction.restore_json(text) if is_json else self._redaction.restore(text)
            if restored != holder[name]:
                holder[name], changed = restored, True
            self._last[key] = content, raw
        # Texts that end without a last piece: what was kept back is no placeholder.
        before = b"".join([self._ending(key) for key in list(self._kept) if key[0] in ended])
        if b"[" in data and self._others(content, {(id(piece.holder), piece.name) for piece in pieces}):
            changed = True
        return before + (event(orjson.dumps(content), raw) if changed else raw)

    def flush(self) -> bytes:
        """What is still kept back, each in an event like the last one of its text."""
        return b"".join([self._ending(key) for key in list(self._kept)])

    def _ending(self, key: _Key) -> bytes:
        text = self._kept.pop(key)
        content, raw = self._last[key]
        like = orjson.loads(orjson.dumps(content))
        for other, holder, name, _ in _pieces(like):
            holder[name] = text if other == key else ""
        for choice in like.get("choices") or ():
            choice["finish_reason"] = None
        return event(orjson.dumps(like), raw)

    def _others(self, content: dict[str, Any], streamed: set[tuple[int, str]]) -> bool:
        """Restores, in place, the strings that stand whole in one event: all but pieces of texts."""
        changed = False
        for name, member in content.items():
            if (id(content), name) in streamed:
                continue
            if isinstance(member, dict):
                changed = self._others(member, streamed) or changed
            elif isinstance(member, list) and any(isinstance(item, dict) for item in member):
                for item in member:
                    if isinstance(item, dict):
                        changed = self._others(item, streamed) or changed
            elif isinstance(member, (str, list)):
                restored = _whole(member, self._redaction, name)
                if restored != member:
                    content[name], changed = restored, True
        return changed


def _pieces(content: dict[str, Any]) -> Iterator[_Piece]:
    """Each piece of a text in an event: of chat and completions, the Responses API and Anthropic's Messages."""
    kind, delta = content.get("type"), content.get("delta")
    if isinstance(kind, str) and isinstance(delta, str) and kind.endswith(".delta"):
        text = kind.removesuffix(".delta")
        key = (text, content.get("item_id")), content.get("output_index"), content.get("content_index")
        yield _Piece(key, content, "delta", text.endswith("_arguments"))
    elif kind == "content_block_delta" and isinstance(delta, dict):
        for name in _BLOCK_TEXTS:
            if isinstance(delta.get(name), str):
                yield _Piece((("block", content.get("index")), name), delta, name, name in _JSON_TEXTS)
    for choice in content.get("choices") or ():
        if isinstance(choice, dict):
            yield from _of_choice(choice)


def _of_choice(choice: dict[str, Any]) -> Iterator[_Piece]:
    index, delta = choice.get("index", 0), choice.get("delta")
    for holder in (choice, delta if isinstance(delta, dict) else {}):
        for name in _TEXTS:
            if isinstance(holder.get(name), str):
                yield _Piece((index, name), holder, name, False)
    if isinstance(delta, dict):
        for call in [*(delta.get("tool_calls") or ()), {"function": delta.get("function_call")}]:
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                yield _Piece((index, "tool", call.get("index", 0)), function, "arguments", True)


def _ended(content: dict[str, Any]) -> set[Any]:
    """What ends with this event: the first of the keys of its texts."""
    ended: set[Any] = {
        choice.get("index", 0)
        for choice in content.get("choices") or ()
        if isinstance(choice, dict) and choice.get("finish_reason")
    }
    kind = content.get("type")
    if isinstance(kind, str):
        if kind.endswith(".done"):
            ended.add((kind.removesuffix(".done"), content.get("item_id")))
        elif kind == "content_block_stop":
            ended.add(("block", content.get("index")))
    return ended
