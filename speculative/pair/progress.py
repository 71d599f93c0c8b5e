"""How a run tells its user where it is: a bar on a terminal, a line now and then in a log file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Seconds between two lines in a log file.
_LINE_EVERY = 30.0


class Reporter:
    """Shows stages and steps; use as a context manager.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} steps  {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name, self._total, self._last_line = "", 0, 0.0

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one line; above the bar on a terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, name: str, total: int, done: int) -> None:
        """Opens the bar of a stage of which `done` steps are behind us."""
        self._name, self._total, self._last_line = name, total, time.monotonic()
        self._task = self._bar.add_task(name, total=total, completed=done, note="")

    def update(self, done: int, note: str) -> None:
        """Moves the bar; in a log file prints a line every half minute, and at the end of the stage."""
        assert self._task is not None
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line >= _LINE_EVERY or done == self._total):
            self._last_line = now
            self.say(f"{self._name}: {done}/{self._total} steps  {note}")
