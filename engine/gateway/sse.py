"""Server-sent events in a stream of bytes: cut where an event ends, each kept as the bytes that came."""

from collections.abc import Iterator

#: An event that is longer than this is no event of a language model; it passes uncut.
LONGEST = 1 << 20


class Events:
    """Cuts chunks into events."""

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The events that end in this chunk, with the empty line that ends each."""
        data = self._begun + chunk if self._begun else chunk
        start = 0
        while (stop := _end(data, start)) > 0:
            yield data[start:stop]
            start = stop
        self._begun = data[start:]
        if len(self._begun) > LONGEST:
            yield self.rest()

    def rest(self) -> bytes:
        """What came after the last event; forgotten afterwards."""
        rest, self._begun = self._begun, b""
        return rest


def _end(data: bytes, start: int) -> int:
    """Where the event that begins at `start` ends; 0: not yet."""
    plain, carriage = data.find(b"\n\n", start), data.find(b"\r\n\r\n", start)
    if plain >= 0 and (carriage < 0 or plain < carriage):
        return plain + 2
    return carriage + 4 if carriage >= 0 else 0


def data_of(event: bytes) -> bytes | None:
    """The data of an event; None when it has none."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def event(data: bytes, like: bytes) -> bytes:
    """An event with other data; the other lines of `like` (its name, its id) are kept."""
    others = [line for line in like.splitlines() if line and not line.startswith(b"data:")]
    return b"\n".join([*others, b"data: " + data, b"", b""])
