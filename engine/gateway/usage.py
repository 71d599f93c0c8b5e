"""Reads token counts out of answers on their way to the client."""

import contextlib
import json
import math
from typing import Any

import msgspec

from tokenmill.engine.gateway import sse
from tokenmill.engine.gateway.event_tokens import EventTokens
from tokenmill.engine.gateway.pipeline import Exchange, Usage

#: So much of a stream's end holds the events that are looked at, and what is begun there is kept whole.
TAIL_BYTES = 4096
#: What an event may end with that has ended already, or not yet.
_BREAKS = frozenset({b"\n", b"\r"})
#: What one count is taken for at most: a backend's nonsense must fit into sums.
_MOST_TOKENS = 100_000_000
#: Paths whose streams say what they used when `stream_options` asks for it; others say it anyhow, or never.
_COUNTED_ON_DEMAND = frozenset({"/v1/chat/completions", "/v1/completions"})


class _Kept(msgspec.Struct):
    """Anthropic's words for how long what was written into a cache is kept."""

    ephemeral_5m_input_tokens: int | None = 0
    ephemeral_1h_input_tokens: int | None = 0


class _Details(msgspec.Struct):
    """Of a prompt; what was written into a cache has one name at OpenAI, one at LiteLLM and one at Qwen."""

    cached_tokens: int | None = 0
    cache_write_tokens: int | None = 0
    cache_creation_tokens: int | None = 0
    cache_creation_input_tokens: int | None = 0
    cache_creation_token_details: _Kept | None = None


class _CompletionDetails(msgspec.Struct):
    """Of OpenAI's predicted outputs."""

    accepted_prediction_tokens: int | None = 0
    rejected_prediction_tokens: int | None = 0


class _Speculation(msgspec.Struct):
    """Of vLLM's draft model (`--per-request-spec-decode-metrics summary`)."""

    num_accepted_draft_tokens: int = 0
    num_draft_tokens: int = 0


class _Metrics(msgspec.Struct):
    speculative_decoding: _Speculation | None = None


class _Tokens(msgspec.Struct):
    """The counts of completions, of responses (`input_tokens`), and of messages, which count cached tokens apart."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _CompletionDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = 0
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = 0
    cache_creation_input_tokens: int | None = 0
    cache_creation: _Kept | None = None


class _Response(msgspec.Struct):
    usage: _Tokens | None = None


class _Holder(msgspec.Struct):
    usage: _Tokens | None = None
    response: _Response | None = None
    #: A word that other servers may use for something else.
    metrics: msgspec.Raw = msgspec.Raw()


class _Counts(msgspec.Struct):
    """The counts alone, of a server that says the rest in another shape; some servers count in floats."""

    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = 0
    input_tokens: int | float | None = None
    output_tokens: int | float | None = 0


class _PlainHolder(msgspec.Struct):
    usage: _Counts | None = None


class _Total(msgspec.Struct):
    total_tokens: int | None = None


class _Read(msgspec.Struct):
    """An answer for which nothing is generated."""

    usage: _Total
    data: msgspec.Raw = msgspec.Raw()
    results: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw]
    usage: dict[str, msgspec.Raw] | None = None


class _Message(msgspec.Struct):
    usage: dict[str, msgspec.Raw] | None = None


class _MessageEvent(_Message):
    """The Messages API's: `message_start` with the message, `message_delta` with the usage."""

    message: _Message | None = None


_HOLDER = msgspec.json.Decoder(_Holder)
_PLAIN = msgspec.json.Decoder(_PlainHolder)
_READ = msgspec.json.Decoder(_Read)
_CHUNK = msgspec.json.Decoder(_Chunk)
_METRICS = msgspec.json.Decoder(_Metrics)
_MESSAGE = msgspec.json.Decoder(_MessageEvent)


def read_usage(body: bytes, usage: Usage) -> None:
    """Takes the counts of a JSON answer or event into `usage`; leaves it alone where there are none."""
    try:
        holder = _HOLDER.decode(body)
    except msgspec.ValidationError:
        _read_plain(body, usage)
        return
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    tokens = holder.usage if holder.usage is not None or holder.response is None else holder.response.usage
    if tokens is None:
        return
    if tokens.prompt_tokens is not None:
        prompt, completion, details = tokens.prompt_tokens, tokens.completion_tokens, tokens.prompt_tokens_details
        cached = details.cached_tokens if details else 0
    elif tokens.input_tokens is not None:
        completion, details = tokens.output_tokens, tokens.input_tokens_details
        apart = tokens.cache_read_input_tokens or 0
        prompt = tokens.input_tokens + apart + (tokens.cache_creation_input_tokens or 0)
        cached = details.cached_tokens if details else apart
    else:
        _read_total(body, usage)
        return
    prompt, cached, completion = _count(prompt), _count(cached), _count(completion)
    if not prompt and not completion:
        return  # some servers say so of every answer: they do not count
    usage.prompt, usage.cached, usage.completion = prompt, cached if cached < prompt else prompt, completion
    usage.exact = True
    if details is not None or tokens.cache_creation_input_tokens:
        _read_written(tokens, details, usage)
    guessed = tokens.completion_tokens_details
    if guessed is not None:
        usage.accepted = _count(guessed.accepted_prediction_tokens)
        usage.rejected = _count(guessed.rejected_prediction_tokens)
    if holder.metrics:
        _read_speculation(holder.metrics, usage)


def read_prompt(event: bytes, usage: Usage) -> None:
    """Takes what `message_start`, the first event of the Messages API, says of the prompt; others say nothing of it.

    `usage.exact` stays false: how much is generated is not known yet.

    Args:
        event: Its data.
        usage: Filled in; its `completion` is 0 afterwards where the event says something.
    """
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = _MESSAGE.decode(event).message
        if message is not None and message.usage is not None:
            read_usage(msgspec.json.encode({"usage": message.usage}), usage)
            usage.completion, usage.exact = 0, False


def _read_written(tokens: _Tokens, details: _Details | None, usage: Usage) -> None:
    written, kept = tokens.cache_creation_input_tokens, tokens.cache_creation
    if details is not None:
        written = written or details.cache_write_tokens or details.cache_creation_tokens
        written = written or details.cache_creation_input_tokens
        kept = kept or details.cache_creation_token_details
    usage.written = written = min(_count(written), usage.prompt - usage.cached)
    if written and kept is not None and (hour := _count(kept.ephemeral_1h_input_tokens)):
        # A stream states the parts at its begin alone, and the sum again at its end, where it may have grown.
        usage.written_hour = -(-written * hour // (hour + _count(kept.ephemeral_5m_input_tokens)))


def _read_plain(body: bytes, usage: Usage) -> None:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        tokens = _PLAIN.decode(body).usage
        if tokens is None:
            return
        prompt, completion = tokens.prompt_tokens, tokens.completion_tokens
        if prompt is None:
            prompt, completion = tokens.input_tokens, tokens.output_tokens
        if prompt is not None:
            most = float(_MOST_TOKENS)
            counted = [_count(math.ceil(min(one or 0, most))) for one in (prompt, completion)]
            if any(counted):
                usage.prompt, usage.completion = counted
                usage.exact = True


def _read_total(body: bytes, usage: Usage) -> None:
    """Embeddings and rankings of some servers (Voyage's, older vLLM's) say how many tokens they read in all."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        read = _READ.decode(body)
        if read.usage.total_tokens is not None and (read.data or read.results) and not read.choices:
            usage.prompt = _count(read.usage.total_tokens)
            usage.exact = True


def _read_speculation(metrics: msgspec.Raw, usage: Usage) -> None:
    with contextlib.suppress(msgspec.MsgspecError):
        drafted = _METRICS.decode(metrics).speculative_decoding
        if drafted is not None:
            usage.accepted = _count(drafted.num_accepted_draft_tokens)
            usage.rejected = _count(drafted.num_draft_tokens - drafted.num_accepted_draft_tokens)


def _count(said: int | None) -> int:
    if not said or said < 0:
        return 0
    return said if said < _MOST_TOKENS else _MOST_TOKENS


def counting_options(exchange: Exchange) -> dict[str, Any] | None:
    """The `stream_options` that have a backend count where the exchange is metered and its client did not ask.

    None: nothing has to be asked for. What the client set otherwise is kept.
    """
    body = exchange.body
    if not exchange.meter or body is None or body.raw_field("stream") != b"true":
        return None
    if exchange.endpoint not in _COUNTED_ON_DEMAND:
        return None
    options = body.get("stream_options", dict[str, Any]) or {}
    return None if options.get("include_usage") else {**options, "include_usage": True}


class StreamUsage:
    """A tap on a stream of server-sent events: counts events, and at the end looks for the usage in its tail.

    Args:
        usage: Filled in; `completion` counts events while the stream runs.
        known: What an event of this backend's model holds: learned from streams that say, for those that never do.
    """

    __slots__ = ("_begin", "_full", "_known", "_parts", "_size", "_usage")

    def __init__(self, usage: Usage, known: EventTokens) -> None:
        self._usage = usage
        self._known = known
        #: The stream's end, which begins with an event; how long it is, and how long it may become.
        self._parts: list[bytes] = []
        self._size = 0
        self._full = 2 * TAIL_BYTES
        #: The stream's begin, where its end does not hold it.
        self._begin = b""

    def feed(self, chunk: bytes) -> None:
        """Watches one chunk."""
        self._usage.completion += chunk.count(b"\n\n") + chunk.count(b"\r\n\r\n")
        if chunk[:1] in _BREAKS:
            self._usage.completion += _ends_between(b"".join(self._parts[-3:])[-3:], chunk[:3])
        self._parts.append(chunk)
        self._size += len(chunk)
        if self._size >= self._full:
            self._forget()

    def _forget(self) -> None:
        """Keeps the last events: so many that they are long enough, and the last one whole."""
        seen = b"".join(self._parts)
        self._begin = self._begin or seen[:TAIL_BYTES]
        kept = seen[_after_last_event(seen, len(seen) - TAIL_BYTES) :]
        if len(kept) > sse.LONGEST:
            kept = kept[-TAIL_BYTES:]
        self._parts = [kept]
        self._size = len(kept)
        # Twice as much: a long event is copied a few times, not once for each chunk.
        self._full = 2 * max(self._size, TAIL_BYTES)

    def finish(self) -> None:
        """The stream has ended."""
        usage, events = self._usage, self._usage.completion
        tail = b"".join(self._parts)
        at = len(tail)
        while (at := tail.rfind(b'"usage"', 0, at)) >= 0:
            at = max(tail.rfind(b"\n", 0, at), tail.rfind(b"\r", 0, at)) + 1
            line = tail[at : tail.find(b"\n", at) + 1 or None].splitlines()[0]
            if line.startswith(b"data:"):
                said = line[5:] if b'"message_delta"' not in line else _of_message(self._begin or tail, line[5:])
            elif at == 0:
                said = _of_end(line[line.rfind(b'"usage"') :])
            else:
                continue
            read_usage(said, usage)
            if usage.exact:
                # Neither the usage alone nor the end is an event with tokens.
                empty = _is_usage_alone(line) + (b"data: [DONE]" in tail)
                self._known.learn(events - empty, usage.completion)
                return
        read_prompt(_first(self._begin or tail), usage)
        usage.completion = self._known.estimate(events, tail)


def _ends_between(before: bytes, after: bytes) -> int:
    """How many events end with bytes of both; `before` and `after` are the three next to where a stream was cut."""
    both = before + after
    return sum(both.count(end) - before.count(end) - after.count(end) for end in (b"\n\n", b"\r\n\r\n"))


def _of_end(end: bytes) -> bytes:
    """The usage of an event that is too long to be kept, as one with a picture in it, from its end."""
    with contextlib.suppress(ValueError, RecursionError):
        rest, _ = json.JSONDecoder().raw_decode("{" + end.decode())
        return msgspec.json.encode({"usage": rest["usage"]})
    return b""


def _of_message(begin: bytes, last: bytes) -> bytes:
    """What the Messages API counted: its first event says what the prompt took, its last one what was generated.

    Some servers repeat the first in the last.

    Args:
        begin: The stream's begin.
        last: Data of the event `message_delta`.
    """
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        counted = _MESSAGE.decode(last).usage
        message = _MESSAGE.decode(_first(begin)).message
        if counted is not None and message is not None and message.usage is not None:
            new = {name: value for name, value in counted.items() if bytes(value) != b"null"}
            return msgspec.json.encode({"usage": message.usage | new})
    return last


def _first(begin: bytes) -> bytes:
    """Data of a stream's first event."""
    return next((line[5:] for line in begin.splitlines() if line.startswith(b"data:")), b"{}")


class HiddenUsage:
    """Takes the event that holds nothing but the usage out of a stream; every other byte stays as it is."""

    __slots__ = ("_begun",)

    def __init__(self) -> None:
        #: An event whose end has not come yet: it may turn out to be the one.
        self._begun = b""

    def feed(self, chunk: bytes) -> bytes:
        """What the client gets of a chunk now; an event's begin waits for its end."""
        data = self._begun + chunk if self._begun else chunk
        end = _after_last_event(data, len(data))
        self._begun = data[end:] if len(data) - end <= sse.LONGEST else b""
        whole = data[:end] if self._begun else data
        at = whole.find(b'"usage"')
        while at >= 0:
            start, stop = _after_last_event(whole, at), _after_event(whole, at)
            if _is_usage_alone(whole[start:stop]):
                whole = whole[:start] + whole[stop:]
                stop = start
            at = whole.find(b'"usage"', stop)
        return whole

    def finish(self) -> bytes:
        """What is left at the stream's end."""
        return self._begun


def _after_last_event(data: bytes, before: int) -> int:
    """Where the last event that ends before a place ends; 0: none does."""
    plain, carriage = data.rfind(b"\n\n", 0, before), data.rfind(b"\r\n\r\n", 0, before)
    return max(plain + 2 if plain >= 0 else 0, carriage + 4 if carriage >= 0 else 0)


def _after_event(data: bytes, at: int) -> int:
    """Where the event that a place lies in ends."""
    plain, carriage = data.find(b"\n\n", at), data.find(b"\r\n\r\n", at)
    ends = [end for end in (plain + 2 if plain >= 0 else 0, carriage + 4 if carriage >= 0 else 0) if end]
    return min(ends, default=len(data))


def _is_usage_alone(event: bytes) -> bool:
    data = sse.data_of(event)
    try:
        chunk = _CHUNK.decode(data or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return not chunk.choices and chunk.usage is not None
