"""A JSON request body, parsed once and only as deep as is asked for.

The body is cut into its top-level fields, each kept as the client's own bytes and decoded when someone asks: a
5 MB prompt costs about a millisecond (a full decode takes 4 to 40 ms, during which nothing else would run). The bytes
go upstream unchanged unless a field is replaced; then all other fields keep their bytes.
"""

import asyncio
import codecs
import functools
from collections.abc import Iterable
from typing import Any, TypeVar, get_origin

import msgspec

from tokenmill.engine.gateway.api_error import ApiError, invalid_json, quote

T = TypeVar("T")

#: Bodies above this are checked for UTF-8 in slices, so that other requests run in between.
SLICE_BYTES = 256 * 1024

#: What may have more items is not decoded to count or measure them: that would take milliseconds.
MOST_ITEMS = 1 << 15

#: No API has nearly as many; what walks through all of them holds up other requests.
MOST_FIELDS = 1024

#: Fields by which it is decided where a request goes, what it costs and what may be seen of it.
DECISIVE = frozenset(
    {
        *("model", "messages", "prompt", "suffix", "input", "instructions", "system", "tools", "functions", "metadata"),
        *("stream", "stream_options", "n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens"),
        *("n_predict", "max_new_tokens", "n_cmpl", "chat_template", "response_format", "logprobs", "top_logprobs"),
        *("previous_response_id", "conversation", "query", "queries", "documents", "texts", "text_1", "text_2"),
    }
)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
#: The fields of a longer body are counted while it is parsed: millions of them take seconds.
_COUNTED_BYTES = 64 * 1024


class _Name(str):
    """A field's name, of which msgspec tells as it meets it."""

    __slots__ = ()


class _TooManyError(Exception):
    """There are more fields than any API has."""


def _counted(raw: bytes) -> dict[str, msgspec.Raw]:
    """The top-level fields; raises what msgspec does, and `_TooManyError`."""
    left = MOST_FIELDS

    def count(_kind: type, name: str) -> _Name:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooManyError
        return _Name(name)

    # 25 microseconds more, a tenth of what a body of that length takes anyhow.
    counted = msgspec.json.decode(raw, type=dict[_Name, msgspec.Raw], dec_hook=count)
    return {str(name): value for name, value in counted.items()}


@functools.cache
def _decoder(kind: Any) -> Any:
    return msgspec.json.Decoder(kind | None)


async def check_utf8(raw: bytes) -> None:
    """Raises 400 unless the bytes are UTF-8; long ones are checked in slices with the event loop running between."""
    if raw.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(raw), SLICE_BYTES):
            decoder.decode(raw[start : start + SLICE_BYTES])
            if len(raw) > SLICE_BYTES:
                await asyncio.sleep(0)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise invalid_json(f"not UTF-8 ({error.reason})") from None


async def parsed(raw: bytes) -> "Body":
    """`Body(raw)`; around that of a long one, which takes milliseconds, other requests get their turn."""
    if len(raw) <= SLICE_BYTES:
        return Body(raw)
    await asyncio.sleep(0)
    body = Body(raw)
    await asyncio.sleep(0)
    return body


def _check_case(names: Iterable[str]) -> None:
    """Refuses `Model`: servers written in Go (Ollama) take it for `model`, and the last of both counts there."""
    for name in names:
        plain = name.casefold()
        if plain != name and plain in DECISIVE:
            raise ApiError(
                400,
                f"The field `{quote(name)}` is `{plain}` to some servers and nothing to others; write `{plain}`.",
                code="invalid_field",
                param=plain,
            )


def most_items(raw: bytes) -> int:
    """As many items at most has a list of texts, lists and objects; told from its JSON without decoding it."""
    return min(raw.count(b",") + 1, raw.count(b'"') // 2 + raw.count(b"[") - 1 + raw.count(b"{"))


def too_deep() -> ApiError:
    """400 for JSON that whoever parses it, with his own calls on the stack, finds nested too deeply."""
    return invalid_json("nested too deeply")


class Body:
    """The top-level fields of a JSON object.

    Args:
        raw: The body's bytes, already known to be UTF-8 (`check_utf8`).

    Raises:
        ApiError: 400 when the bytes are not one JSON object, or one with more than `MOST_FIELDS`, or hold a field that
            some servers take for another.
    """

    __slots__ = ("_fields", "raw")

    def __init__(self, raw: bytes) -> None:
        if not raw:
            raise ApiError(400, "The request body is empty; send a JSON object.", code="invalid_json")
        try:
            self._fields = fields = _FIELDS.decode(raw) if len(raw) <= _COUNTED_BYTES else _counted(raw)
            if len(fields) > MOST_FIELDS:
                raise _TooManyError
        except msgspec.ValidationError:
            raise ApiError(400, "The request body must be a JSON object.", code="invalid_json") from None
        except msgspec.DecodeError as error:
            raise invalid_json(str(error).removeprefix("JSON is malformed: ")) from None
        except RecursionError:
            raise too_deep() from None
        except _TooManyError:
            found = f"more than {MOST_FIELDS} fields at its top; send at most {MOST_FIELDS}"
            raise ApiError(400, f"The request body has {found}.", code="too_many_fields") from None
        names = "".join(fields)
        if not (names.isascii() and names.islower()):
            _check_case(fields)
        self.raw = raw

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def those_of(self, names: frozenset[str]) -> frozenset[str]:
        """Which of these fields there are."""
        return names.intersection(self._fields)

    def names(self) -> tuple[str, ...]:
        """The names of the fields, in their order."""
        return tuple(self._fields)

    def raw_field(self, name: str) -> bytes | None:
        """A field's JSON text as the client wrote it; None where it is absent."""
        field = self._fields.get(name)
        return None if field is None else bytes(field)

    def view(self, name: str) -> memoryview | None:
        """The same without a copy."""
        field = self._fields.get(name)
        return None if field is None else memoryview(field)

    def get(self, name: str, kind: type[T]) -> T | None:
        """A field decoded as `kind`; None where it is absent or null.

        Raises:
            ApiError: 400 with `param` when it is of another type, or an object with so many members that it takes long
                to read them; 400 when it is nested too deeply.
        """
        field = self._fields.get(name)
        if field is None:
            return None
        if len(self.raw) > _COUNTED_BYTES and get_origin(kind) is dict and bytes(field).count(b",") > MOST_ITEMS:
            found = f"`{name}` has more than {MOST_ITEMS} commas; send fewer members"
            raise ApiError(400, f"{found}.", code="too_many_fields", param=name)
        decoder: msgspec.json.Decoder[T | None] = _decoder(kind)  # type: ignore[arg-type] # mypy: T may be unhashable; types are not
        try:
            return decoder.decode(field)
        except msgspec.MsgspecError as error:
            raise ApiError(400, f"`{name}`: {error}", code="invalid_type", param=name) from None
        except RecursionError:
            # The whole could just be parsed, with fewer calls on the stack.
            raise too_deep() from None

    def with_fields(self, changes: dict[str, Any]) -> bytes:
        """The body with some top-level fields set; every other field keeps its bytes and its place.

        Raises:
            ApiError: 400 when one of them is nested too deeply.
        """
        encode = msgspec.json.encode
        fields: dict[str, msgspec.Raw | bytes] = {**self._fields}
        try:
            fields.update((name, encode(value)) for name, value in changes.items())
        except RecursionError:
            raise too_deep() from None
        # One copy of each field, also of megabytes.
        parts: list[msgspec.Raw | bytes] = []
        for name, value in fields.items():
            parts += (b"," if parts else b"{", encode(name), b":", value)
        parts.append(b"}" if parts else b"{}")
        return b"".join(parts)
