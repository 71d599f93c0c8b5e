"""A bound on the number of different values of a metric's label."""

import contextlib
import json
import logging
from io import FileIO
from pathlib import Path

log = logging.getLogger("tokenmill.gateway")

OTHER = "other"


class Bounded:
    """Lets the first `limit` names through and calls all later ones `other`, so that series cannot grow without end.

    A name keeps its series once it has one: counters must not change what they count. Workers of one gateway write the
    names that they meet at the end of one file, a line each; the first `limit` of its lines are what all of them let
    through. The kernel writes such lines one after the other, so nobody waits for anybody.

    Args:
        limit: Most names.
        file: Where workers agree; its folder must exist when the first name comes. None: this process is alone.
    """

    __slots__ = ("_file", "_limit", "_names", "_seen")

    def __init__(self, limit: int, file: Path | None = None) -> None:
        self._limit = limit
        self._file = file
        self._names: set[str] = set()
        #: Bytes of the file that are known.
        self._seen = 0

    def name(self, name: str | None) -> str:
        """The label for a name; empty for none. A new name takes a look at the file, unless all names are taken."""
        if name is None:
            return ""
        if name in self._names:
            return name
        if len(self._names) < self._limit:
            self._meet(name)
            if name in self._names:
                return name
        return OTHER

    def _meet(self, name: str) -> None:
        if self._file is None:
            self._names.add(name)
            return
        try:
            with self._file.open("a+b", buffering=0) as file:
                self._read(file)
                if name not in self._names and len(self._names) < self._limit:
                    # What another process broke off before it does not spoil this line.
                    file.write(b"\n%b\n" % json.dumps(name).encode())
                    self._read(file)
        except OSError:
            log.exception("workers cannot agree on more names for metrics: new teams and apps are counted as %r", OTHER)
            self._limit = 0

    def _read(self, file: FileIO) -> None:
        """Takes up the lines that have come since the last look."""
        file.seek(self._seen)
        text = file.read()
        lines = text[: text.rfind(b"\n") + 1]
        self._seen += len(lines)
        for line in lines.splitlines():
            if len(self._names) < self._limit:
                with contextlib.suppress(ValueError):
                    self._names.add(json.loads(line))
