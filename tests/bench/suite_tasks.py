"""Items that the runner's tests run in real workers: they count their runs in a file."""

import os
import time
from pathlib import Path

from tokenmill.bench.rows import Row
from tokenmill.bench.suite.items import Outcome, Skip


def task(about: Row, what: str, log: str) -> Outcome:
    """Does what it is told, after noting that it ran."""
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{what}\n")
    if what == "crash":
        print("last words", file=__import__("sys").stderr, flush=True)
        os._exit(7)
    if what == "hang":
        time.sleep(60)
    if what == "skip":
        raise Skip("there is no GPU")
    if what == "wrong":
        raise AssertionError("4 of 4 values\n  differ")
    return Outcome("measured", what, ({"op": "something", **about, "value": os.environ.get("GIVEN", "")},))
