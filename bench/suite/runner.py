"""Runs items one after the other in a worker, writes each one's rows as it ends, and never repeats what is there."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tokenmill.bench.rows import Row, RowFile
from tokenmill.bench.suite.items import Item, Outcome

#: Fields by which a verdict is found again after a kill.
IDENTITY = ("device", "source", "step", "item")
_DONE = ("proven", "measured")


class _Worker:
    """One child process; its messages go to a file whose end explains a crash."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenmill.bench.suite.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
        )

    def ask(self, item: Item, about: Row, seconds: float) -> Outcome:
        """The outcome; a worker that ends or says nothing is one, too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"item": dataclasses.asdict(item), "about": about}
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], seconds)
            if not ready:
                return Outcome("failed", f"no answer within {seconds:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            return Outcome("failed", f"the process ended with {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return Outcome(answer["verdict"], answer["detail"], tuple(answer["rows"]))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")[:300]

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def run(
    items: Iterable[Item],
    about: Row,
    out: RowFile,
    deadline: float,
    say: Callable[[Item, Outcome, bool], None],
) -> list[Row]:
    """Runs what `out` lacks and returns the verdict row of every item, in order.

    Args:
        items: In the order of value: when the time is up, the rest is skipped.
        about: Fields of every row; with `device` and `source`.
        out: Rows of an item are appended together, its verdict last.
        deadline: By `time.monotonic`; an item that runs into it is ended.
        say: Told about each item, its outcome, and whether it was there already.
    """
    before = {tuple(row.get(name) for name in IDENTITY): row for row in out.rows if row.get("op") == "suite"}
    worker: _Worker | None = None
    verdicts: list[Row] = []
    try:
        for item in items:
            known = before.get((about["device"], about["source"], item.step, item.name))
            if known is not None and known["verdict"] in _DONE:
                say(item, Outcome(known["verdict"], known["detail"]), True)
                verdicts.append(known)
                continue
            left = deadline - time.monotonic()
            started = time.monotonic()
            if left <= 0:
                outcome = Outcome("skipped", "the time was up")
            else:
                if worker is None or worker.environment != item.environment:
                    worker = _replaced(worker, dict(item.environment))
                outcome = worker.ask(item, about, min(item.seconds, left))
                # An error on a GPU can stay with its process.
                if outcome.verdict == "failed" or item.alone:
                    worker.close()
                    worker = None
                if outcome.verdict == "failed" and item.seconds > left and time.monotonic() >= deadline:
                    outcome = Outcome("skipped", "the time was up while it ran")
            row = {
                "op": "suite",
                **about,
                "step": item.step,
                "item": item.name,
                "verdict": outcome.verdict,
                "detail": outcome.detail,
                "seconds": round(time.monotonic() - started, 2),
                "time": int(time.time()),
            }
            out.append([*outcome.rows, row])
            verdicts.append(row)
            say(item, outcome, False)
    finally:
        if worker is not None:
            worker.close()
    return verdicts


def _replaced(worker: _Worker | None, environment: dict[str, str]) -> _Worker:
    if worker is not None:
        worker.close()
    return _Worker(environment)


def results_file(folder: Path) -> RowFile:
    """The rows of a folder, to be continued."""
    return RowFile(folder / "rows.jsonl")
