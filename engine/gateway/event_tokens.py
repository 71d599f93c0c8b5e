"""How many tokens an event of a stream holds: what a stream that was cut before its backend counted is charged by.

Many servers send an event for each token; one that speculates, or gathers (vLLM's `--stream-interval`), sends several
tokens in one. What it does shows in the streams that it did count.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from tokenmill.engine.gateway import sse

#: Events after which what was learned counts half: a server may be started anew with other settings.
_RECENT_EVENTS = 4096
#: Bytes of text that an event of one token holds at most, on average over a stream, and bytes of a token's text in
#: general; for a backend of which nothing is known yet.
_MOST_BYTES_OF_ONE, _BYTES_OF_A_TOKEN = 8, 4
#: Where the APIs' events have what was generated.
_TEXTS = frozenset({"content", "text", "reasoning_content", "reasoning", "refusal", "arguments", "delta"})


class EventTokens:
    """What is known of one model at one backend."""

    __slots__ = ("_events", "_tokens")

    def __init__(self) -> None:
        self._events = 0
        self._tokens = 0

    def learn(self, events: int, tokens: int) -> None:
        """Takes in a stream that its backend counted; `events`: those that may hold tokens."""
        if events <= 0:
            return
        self._events += events
        self._tokens += tokens
        while self._events >= _RECENT_EVENTS:
            self._events //= 2
            self._tokens //= 2

    def estimate(self, events: int, tail: bytes) -> int:
        """Tokens of a stream that nobody counted; at least one for each event.

        Args:
            events: How many were seen.
            tail: The end of the stream, for a backend of which nothing is known yet: its text says whether an event is
                more than a token.
        """
        if self._events:
            return max(events, -(-events * self._tokens // self._events))
        sizes = [size for event in tail.replace(b"\r\n", b"\n").split(b"\n\n") if (size := _text_bytes(event))]
        held = sum(sizes)
        if held <= _MOST_BYTES_OF_ONE * len(sizes):
            return events
        return -(-events * held // (_BYTES_OF_A_TOKEN * len(sizes)))


def _text_bytes(event: bytes) -> int:
    """Bytes of generated text in an event; 0 for what is none, or only the end of one."""
    try:
        content = msgspec.json.decode(sse.data_of(event) or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    return sum(len(text.encode("utf-8", "replace")) for text in _texts(content))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, list):
        for one in content:
            yield from _texts(one)
    elif isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, str):
                if name in _TEXTS:
                    yield value
            elif name != "logprobs":
                yield from _texts(value)
