"""Header fields as the bytes of a message's head: the names are looked at once, however many messages have the same.

Clients and backends send the same few sets of names over and over. What a set comes to (are all of them names at all,
which of them frame the message, what stands between the values) is worked out when it is first met.
"""

import functools
import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenmill.engine.gateway.api_error import Headers

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: Fields that say where a message ends, or what becomes of its connection.
FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection"})
#: Sets of names that are remembered. Bounded: they are whatever clients and backends send.
_MOST_SETS = 256
_name_of = operator.itemgetter(0)


class Layout(NamedTuple):
    """What a message's names come to.

    Attributes:
        template: The lines, `%b` in the place of each value.
        framing: Position and name of those that frame the message.
    """

    template: bytes
    framing: tuple[tuple[int, bytes], ...]


@functools.lru_cache(maxsize=_MOST_SETS)
def layout(names: tuple[bytes, ...]) -> Layout:
    """The layout of header fields with these names, which it puts into lower case.

    Raises:
        ValueError: One of them is no name (RFC 9110, 5.1).
    """
    if not all(map(_TOKEN.fullmatch, names)):
        raise ValueError("a header's name is none")
    lowered = [name.lower() for name in names]
    template = b"".join(name.replace(b"%", b"%%") + b": %b\r\n" for name in lowered)
    return Layout(template, tuple((at, name) for at, name in enumerate(lowered) if name in FRAMING))


def first_values(headers: Headers) -> dict[bytes, bytes]:
    """The first value of each header field, by its name."""
    return dict(reversed(headers))


def without(headers: Headers, names: frozenset[bytes]) -> Headers:
    """The header fields but for those of these names."""
    return list(map(headers.__getitem__, _others(tuple(map(_name_of, headers)), names)))


@functools.lru_cache(maxsize=_MOST_SETS)
def _others(there: tuple[bytes, ...], names: frozenset[bytes]) -> Sequence[int]:
    """Where those stand that have other names."""
    return [at for at, name in enumerate(there) if name not in names]


def lines(headers: Headers) -> bytes:
    """Header fields as lines; the values are taken as they are.

    Raises:
        ValueError: See `layout`.
    """
    if not headers:
        return b""
    names, values = zip(*headers, strict=True)
    return layout(names).template % values


def sentence(text: str) -> str:
    """A text fit for a response header: one line of ASCII."""
    return text if text.isascii() and text.isprintable() else re.sub(r"[^\x20-\x7e]+", " ", text)
