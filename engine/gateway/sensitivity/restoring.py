"""Puts the values back into an answer, whole or streamed, wherever a placeholder may be split.

A stream's text arrives in pieces: a piece that ends with what may be the beginning of a placeholder keeps that end back
until the next piece decides. Events without text or placeholders pass byte for byte.
"""

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import orjson

from tokenmill.engine.gateway.pipeline import Reply
from tokenmill.engine.gateway.sensitivity.redaction import Redaction, mapped
from tokenmill.engine.gateway.sse import Events, data_of, event

#: Members of a streamed choice (or of its delta) that continue from event to event.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "text")
#: Such members whose text is JSON.
_JSON_TEXTS = frozenset({"arguments"})


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
        self._kept: dict[tuple[Any, ...], str] = {}
        self._last: dict[tuple[Any, ...], Any] = {}

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
        before = b""
        changed = False
        streamed = list(_streamed(content))
        for key, holder, name in streamed:
            text = self._kept.pop(key, "") + holder[name]
            keep = self._redaction.held_back(text)
            whole, kept = text[: len(text) - keep], text[len(text) - keep :]
            restored = self._restored(whole, name)
            if kept:
                self._kept[key] = kept
            if restored != holder[name]:
                holder[name], changed = restored, True
            self._last[key] = content
        for key in _finished(content, self._kept):
            # The text ends here: what was kept back is no placeholder.
            before += self._ending(key)
        others = {id(holder) for _, holder, _ in streamed}
        if b"[" in data and self._others(content, others):
            changed = True
        return before + (event(orjson.dumps(content), raw) if changed else raw)

    def flush(self) -> bytes:
        """What is still kept back, each in an event like the last one of its text."""
        return b"".join(self._ending(key) for key in list(self._kept))

    def _ending(self, key: tuple[Any, ...]) -> bytes:
        text = self._kept.pop(key)
        like = orjson.loads(orjson.dumps(self._last[key]))
        for other, holder, name in _streamed(like):
            holder[name] = text if other == key else ""
        for choice in like.get("choices") or ():
            choice["finish_reason"] = None
        return b"data: " + orjson.dumps(like) + b"\n\n"

    def _restored(self, text: str, name: str) -> str:
        return self._redaction.restore_json(text) if name in _JSON_TEXTS else self._redaction.restore(text)

    def _others(self, content: dict[str, Any], streamed: set[int]) -> bool:
        """Restores the strings that stand whole in one event, in place."""
        changed = False
        for name, member in content.items():
            if isinstance(member, dict):
                changed = self._others(member, streamed) or changed
            elif isinstance(member, (str, list)) and id(content) not in streamed:
                if isinstance(member, list) and any(isinstance(item, dict) for item in member):
                    for item in member:
                        if isinstance(item, dict):
                            changed = self._others(item, streamed) or changed
                    continue
                restored = mapped(member, self._redaction.restore)
                if restored != member:
                    content[name], changed = restored, True
        return changed


def _streamed(content: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], str]]:
    """(which text, the object that holds a piece of it, under which name) of each piece in an event."""
    kind = content.get("type")
    if isinstance(kind, str) and kind.endswith(".delta") and isinstance(content.get("delta"), str):
        place = (content.get("item_id"), content.get("output_index"), content.get("content_index"))
        yield (kind.removesuffix(".delta"), *place), content, "delta"
    for choice in content.get("choices") or ():
        if not isinstance(choice, dict):
            continue
        index = choice.get("index", 0)
        delta = choice.get("delta")
        for holder in (choice, delta if isinstance(delta, dict) else {}):
            for name in _TEXTS:
                if isinstance(holder.get(name), str):
                    yield (index, name), holder, name
        if isinstance(delta, dict):
            for call in [*(delta.get("tool_calls") or ()), {"function": delta.get("function_call")}]:
                function = call.get("function") if isinstance(call, dict) else None
                if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                    yield (index, "tool", call.get("index", 0)), function, "arguments"


def _finished(content: dict[str, Any], kept: dict[tuple[Any, ...], str]) -> list[tuple[Any, ...]]:
    """The texts with something kept back that end with this event."""
    if not kept:
        return []
    ended = {choice.get("index", 0) for choice in content.get("choices") or () if choice.get("finish_reason")}
    kind = content.get("type")
    done = kind.removesuffix(".done") if isinstance(kind, str) and kind.endswith(".done") else None
    return [key for key in kept if key[0] in ended or (done is not None and key[0] == done)]
