"""A multipart form, read for the one field that decides where it goes: `model`.

Servers read sloppy forms in different ways: some take the first of two fields of one name and some the last, some
decode names and values that others take as they are. Whoever could have the gateway read one model and the backend
another would walk around every allow-list. So only forms are taken that all servers read alike, which is what the usual
clients send (RFC 7578, in its plainest spelling); any other is refused. The other fields' contents are not looked at.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import NamedTuple

from tokenmill.engine.gateway.api_error import ApiError, quote

#: So much of a form is searched at once, a fraction of a millisecond; other requests run in between.
SLICE_BYTES = 1 << 20
#: So many parts are read at once, a few milliseconds at most.
SLICE_PARTS = 64
#: More parts than this are no request to a model, and take long to read; Starlette has the same limit.
MOST_PARTS = 1000
#: Longest head of a part.
MOST_HEAD_BYTES = 8192
#: Most header fields of a part; the usual clients send up to four.
MOST_HEADERS = 16
#: Longest name of a model.
MOST_NAME_BYTES = 1024

_CHARSET = rb'(?:;[ \t]*charset="?utf-8"?)?'
_TYPE = re.compile(
    rb"multipart/form-data" + _CHARSET + rb';[ \t]*boundary=(?:"([0-9A-Za-z_.+/:=-]{1,70})"|([0-9A-Za-z_.+-]{1,70}))'
    rb"[ \t]*" + _CHARSET,
    re.IGNORECASE,
)
_HEADER = re.compile(rb"([0-9A-Za-z_-]+):([\t\x20-\x7e\x80-\xff]*)")
_PARAMETER = re.compile(
    rb"[ \t]*;[ \t]*(filename\*|filename|name)=(?:\"([^\"]*)\"|([0-9A-Za-z!#$%&'*+.^_`|~-]+))", re.IGNORECASE
)
#: A name that nobody decodes, unquotes or trims.
_NAME = re.compile(rb"[][0-9A-Za-z_.-]+")
_MODEL = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
#: Of a part that is a plain text, in characters that are the same bytes in all of these.
_PLAIN = re.compile(rb'text/plain(?:;[ \t]*charset="?(?:utf-8|us-ascii|iso-8859-1)"?)?', re.IGNORECASE)
_AS_IT_IS = frozenset({b"7bit", b"8bit", b"binary"})
#: What a part that names the model may say of itself.
_HARMLESS = frozenset({b"content-disposition", b"content-type", b"content-length", b"content-transfer-encoding"})


class Form(NamedTuple):
    """A form.

    Attributes:
        payload: All of it.
        model: The value of its field `model`; None: it has none.
        start, stop: Where the part that holds it begins and ends in the payload, without the boundaries; where the
            first part begins, both, if there is none.
    """

    payload: bytes
    model: str | None
    start: int
    stop: int

    async def with_model(self, name: str) -> bytearray:
        """The form with another model, or with one; every other part keeps its bytes.

        A long one is copied in slices, with the event loop running between.
        """
        view = memoryview(self.payload)
        part = b'Content-Disposition: form-data; name="model"\r\n\r\n' + name.encode()
        if self.model is None:
            part += b"\r\n" + self.payload[: self.start]
        changed = bytearray()
        for piece in (view[: self.start], memoryview(part), view[self.stop :]):
            for at in range(0, len(piece), SLICE_BYTES):
                changed += piece[at : at + SLICE_BYTES]
                if len(view) > SLICE_BYTES:
                    await asyncio.sleep(0)
        return changed


def is_form(content_type: bytes) -> bool:
    """Whether this is what a form's `content-type` begins with."""
    return content_type[:19].lower() == b"multipart/form-data"


async def form_of(payload: bytes, fields: Mapping[bytes, bytes]) -> Form:
    """Reads a form; of a long one in slices, with the event loop running between.

    Args:
        payload: The request's body.
        fields: The request's headers; `content-type` names the boundary.

    Raises:
        ApiError: 400 for a form that servers could read in different ways.
    """
    boundary = _boundary(fields.get(b"content-type", b""))
    if b"content-encoding" in fields:
        raise _refused("it has a `content-encoding`; send it as it is")
    if not payload.startswith(boundary + b"\r\n"):
        raise _refused("its body does not begin with the boundary that `content-type` names")
    model: str | None = None
    first = last = len(boundary) + 2
    at = rested = len(boundary)
    for number in range(1, MOST_PARTS + 1):
        if number % SLICE_PARTS == 0 or at - rested > SLICE_BYTES:
            rested = at
            await asyncio.sleep(0)
        start = at + 2
        stop = await _find(payload, boundary, start) - 2
        if stop < start or payload[stop : stop + 2] != b"\r\n":
            raise _refused("a part does not end with a boundary on a line of its own")
        named = _part(payload, start, stop)
        if named is not None:
            if model is not None:
                raise _refused("it has two fields `model`; send one")
            model, first, last = named, start, stop
        at = stop + 2 + len(boundary)
        if payload.startswith(b"--", at):
            if payload[at + 2 :] not in (b"", b"\r\n"):
                raise _refused("something follows its last boundary")
            return Form(payload, model, first, last)
        if not payload.startswith(b"\r\n", at):
            raise _refused("a boundary is not on a line of its own")
    raise _refused(f"it has more than {MOST_PARTS} parts")


def _boundary(content_type: bytes) -> bytes:
    found = _TYPE.fullmatch(content_type)
    if found is None:
        shown = quote(content_type.decode("latin-1"))
        raise _refused(f"`content-type` is `{shown}`; write `multipart/form-data; boundary=...` and nothing else")
    return b"--" + (found[1] or found[2])


async def _find(payload: bytes, what: bytes, start: int) -> int:
    """Where the next `what` begins; -1: there is none."""
    overlap = len(what) - 1
    while True:
        stop = start + SLICE_BYTES
        at = payload.find(what, start, stop + overlap)
        if at >= 0 or stop >= len(payload):
            return at
        start = stop
        await asyncio.sleep(0)


def _part(payload: bytes, start: int, stop: int) -> str | None:
    """The model that a part names; None: it is another field."""
    end = payload.find(b"\r\n\r\n", start, min(stop, start + MOST_HEAD_BYTES))
    if end < 0:
        raise _refused(f"a part has no head of at most {MOST_HEAD_BYTES} bytes with an empty line after it")
    headers = _headers(payload[start:end])
    value, size = end + 4, stop - end - 4
    name, is_file = _disposition(headers.get(b"content-disposition", b""))
    if headers.get(b"content-length", b"%d" % size) != b"%d" % size:
        raise _refused(f"the part `{name}` has {size} bytes and says another `content-length`")
    if headers.get(b"content-type", b"")[:10].lower() == b"multipart/":
        raise _refused(f"the part `{name}` is a form itself")
    if name != "model":
        return None
    if is_file:
        raise _refused("`model` is a file; send it as a plain field")
    if (
        not headers.keys() <= _HARMLESS
        or _PLAIN.fullmatch(headers.get(b"content-type", b"text/plain")) is None
        or headers.get(b"content-transfer-encoding", b"8bit").lower() not in _AS_IT_IS
    ):
        raise _refused("`model` is not sent as plain text; leave its part's headers out but `Content-Disposition`")
    model = payload[value : value + min(size, MOST_NAME_BYTES)]
    if size > MOST_NAME_BYTES or _MODEL.fullmatch(model) is None:
        shown = quote(model.decode("latin-1"))
        raise _refused(f"`model` is `{shown}`; give 1 to {MOST_NAME_BYTES} printable ASCII characters")
    return model.decode("ascii")


def _headers(head: bytes) -> dict[bytes, bytes]:
    """A part's header fields, names in lower case."""
    headers: dict[bytes, bytes] = {}
    if head.count(b"\r\n") >= MOST_HEADERS:
        raise _refused(f"a part has more than {MOST_HEADERS} headers")
    for line in head.split(b"\r\n"):
        found = _HEADER.fullmatch(line)
        if found is None or found[1].lower() in headers:
            shown = quote(line.decode("latin-1"))
            raise _refused(f"a part's header `{shown}` is none, or stands there twice")
        headers[found[1].lower()] = found[2].strip(b" \t")
    return headers


def _disposition(value: bytes) -> tuple[str, bool]:
    """(name, whether it is a file) of a part."""
    at = len(b"form-data")
    named: dict[bytes, bytes] = {}
    clear = value[:at].lower() == b"form-data"
    while clear and at < len(value):
        found = _PARAMETER.match(value, at)
        if found is None:
            break
        what, said = found[1].lower(), found[3] if found[2] is None else found[2]
        # Where a backslash takes the quote's meaning away, the text goes on; for some servers it does not. What follows
        # a semicolon in a quoted text is the next parameter to some.
        clear = what not in named and not said.endswith(b"\\") and b"=" not in said.partition(b";")[2]
        named[what] = said
        at = found.end()
    name = named.get(b"name", b"")
    if not clear or at < len(value) or _NAME.fullmatch(name) is None or _resembles(name):
        shown = quote(value.decode("latin-1"))
        raise _refused(f'a part\'s `Content-Disposition` is `{shown}`; write `form-data; name="..."`')
    return name.decode("ascii"), len(named) > 1


def _resembles(name: bytes) -> bool:
    """Whether a name that is not `model` is the same to some servers, or changes what their fields mean."""
    plain = name.partition(b"[")[0].lower()
    return (plain == b"model" and name != b"model") or plain == b"_charset_"


def _refused(what: str) -> ApiError:
    return ApiError(
        400, f"This form is not taken, because servers could read it in different ways: {what}.", code="invalid_form"
    )
