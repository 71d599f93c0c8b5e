"""What a client may say about how its request is to be treated, in headers or in the body's `metadata`.

    x-tokenmill-quality: 0.9            metadata.tokenmill_quality        share of such requests to be answered well
    x-tokenmill-latency: interactive    metadata.tokenmill_latency        interactive, fast or batch
    x-tokenmill-max-cost: 0.002         metadata.tokenmill_max_cost       dollars for this request
    x-tokenmill-sensitivity: private    metadata.tokenmill_sensitivity    public or private

A header goes before `metadata`, but what either calls private is private. The headers are for the gateway alone and are
not passed on; the body, `metadata` included, goes to the backend as it is.
"""

import functools
from typing import Any

import msgspec

from tokenmill.engine.gateway.api_error import ApiError, quote
from tokenmill.engine.gateway.money import MOST_DOLLARS, micro_cents
from tokenmill.engine.gateway.pipeline import Exchange

PREFIX = b"x-tokenmill-"
#: Where a request's hints stand in `Exchange.notes` once they were read.
NOTE = "hints"
_NAMES = ("quality", "latency", "max-cost", "sensitivity")
_PUBLIC = "public"
LATENCIES = ("interactive", "fast", "batch")
#: Sets of header names that are remembered. Bounded: they are whatever clients send.
_MOST_SETS = 256


class Hints(msgspec.Struct, frozen=True):
    """What the client said.

    Attributes:
        quality: Share of such requests that it wants answered well, 0 to 1.
        latency: `interactive`: soon enough for a person; `fast`: as soon as can be; `batch`: whenever.
        max_cost: Most that it may cost, in micro-cents.
        sensitivity: `private`: for trusted zones only; `public` says nothing. Any other word counts as `private`.
    """

    quality: float | None = None
    latency: str | None = None
    max_cost: int | None = None
    sensitivity: str | None = None


NONE = Hints()


def hints_of(exchange: Exchange) -> Hints:
    """The hints of a request; they are read once, however many stages ask.

    Raises:
        ApiError: 400 for a value that cannot be meant.
    """
    hints: Hints | None = exchange.notes.get(NOTE)
    if hints is None:
        hints = exchange.notes[NOTE] = _read(_said(exchange))
    return hints


def _read(said: dict[str, str]) -> Hints:
    if not said:
        return NONE
    sensitivity = said.get("sensitivity")
    latency = said.get("latency")
    if latency is not None and latency not in LATENCIES:
        raise _wrong("latency", latency, "one of " + ", ".join(LATENCIES))
    quality = _number(said, "quality", 1.0)
    cost = _number(said, "max-cost", float(MOST_DOLLARS))
    return Hints(
        quality,
        latency,
        None if cost is None else micro_cents(cost),
        None if sensitivity is None else _PUBLIC if sensitivity == _PUBLIC else "private",
    )


def strip(exchange: Exchange) -> None:
    """Takes the gateway's headers out of those that go to a backend."""
    if _any_ours(tuple(exchange.fields)):
        exchange.forward = [header for header in exchange.forward if not header[0].startswith(PREFIX)]


@functools.lru_cache(maxsize=_MOST_SETS)
def _any_ours(names: tuple[bytes, ...]) -> bool:
    """Whether any of a request's headers is for the gateway; clients send the same few sets over and over."""
    return any(name.startswith(PREFIX) for name in names)


def _said(exchange: Exchange) -> dict[str, str]:
    said: dict[str, str] = {}
    body = exchange.body
    written = None if body is None else body.raw_field("metadata")
    if body is not None and written is not None and b"tokenmill_" in written:
        metadata = body.get("metadata", dict[str, Any]) or {}
        for name in _NAMES:
            value = metadata.get("tokenmill_" + name.replace("-", "_"))
            if value is not None:
                nested = isinstance(value, list | dict)
                said[name] = "a list or object" if nested else str(value).strip().lower()
    for key, value in exchange.headers if _any_ours(tuple(exchange.fields)) else ():
        if key.startswith(PREFIX):
            name = key[len(PREFIX) :].decode("latin-1")
            # What is called private stays so: `public` says nothing.
            if name in _NAMES and not (name == "sensitivity" and said.get(name, _PUBLIC) != _PUBLIC):
                said[name] = value.decode("latin-1").strip().lower()
    return said


def _number(said: dict[str, str], name: str, most: float) -> float | None:
    text = said.get(name)
    if text is None:
        return None
    try:
        # Not what Python alone takes for a number.
        value = float(text) if text.isascii() and "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise _wrong(name, text, f"a number from 0 to {most:g}")
    return value


def _wrong(name: str, value: str, wanted: str) -> ApiError:
    return ApiError(
        400,
        f"The hint {name} is {quote(value, 40)!r}; it must be {wanted}.",
        code="invalid_hint",
        param=f"x-tokenmill-{name}",
    )
