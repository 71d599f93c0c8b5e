"""Reads token counts out of answers on their way to the client, without touching a byte of them."""

import contextlib

import msgspec

from tokenmill.engine.gateway.pipeline import Usage

#: The usage event is the last but `[DONE]` and short: this much of a stream's end always holds it.
TAIL_BYTES = 4096


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Tokens(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None


class _Holder(msgspec.Struct):
    usage: _Tokens | None = None


_HOLDER = msgspec.json.Decoder(_Holder)


def read_usage(body: bytes, usage: Usage) -> None:
    """Takes the counts of a JSON answer or event into `usage`; leaves it alone where there are none."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        tokens = _HOLDER.decode(body).usage
        if tokens is not None:
            usage.prompt = tokens.prompt_tokens
            usage.completion = tokens.completion_tokens or 0
            details = tokens.prompt_tokens_details
            usage.cached = (details.cached_tokens or 0) if details else 0
            usage.exact = True


class StreamUsage:
    """A tap on a stream of server-sent events: counts events, and at the end looks for the usage in its tail.

    Args:
        usage: Filled in; `completion` counts events while the stream runs, as a lower bound for streams cut short.
    """

    __slots__ = ("_tail", "_usage")

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Watches one chunk."""
        self._usage.completion += chunk.count(b"\n\n")
        self._tail = chunk if len(chunk) >= TAIL_BYTES else (self._tail + chunk)[-TAIL_BYTES:]

    def finish(self) -> None:
        """The stream has ended."""
        for line in reversed(self._tail.splitlines()):
            if line.startswith(b"data:") and b'"usage"' in line:
                read_usage(line[5:], self._usage)
                if self._usage.exact:
                    return
