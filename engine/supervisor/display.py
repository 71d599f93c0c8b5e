"""What the terminal shows: progress while servers start, then a panel, then what happens to them.

On a terminal it is colourful and alive; anywhere else it is plain lines, each with the seconds since the start.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tokenmill import __version__


@dataclass(frozen=True)
class Fact:
    """One line of the panel.

    Attributes:
        label: What it is about; empty: the same as the line above.
        value: The fact.
        note: More about it.
        mood: How it is marked: something of ours runs (`good`), does not (`quiet`), or should but cannot (`bad`).
    """

    label: str
    value: str
    note: str = ""
    mood: Literal["good", "quiet", "bad", ""] = ""


_MARKS = {"good": ("● ", "green"), "quiet": ("○ ", "dim"), "bad": ("▲ ", "yellow"), "": ("", "")}


def _content(fact: Fact, width: int) -> Text | Table:
    """A fact without its label; values that have notes share a column of this width."""
    mark, style = _MARKS[fact.mood]
    value = Text.assemble((mark, style), (fact.value, "dim" if fact.mood == "quiet" else ""), overflow="fold")
    if not fact.note:
        return value
    row = Table.grid(padding=(0, 1))
    row.add_column(width=width)
    row.add_row(value, Text(fact.note, style="green" if fact.mood == "good" else "dim", overflow="fold"))
    return row


class Display:
    """Shows the life of a server on one console."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self._console = console
        self._verbose = verbose
        self._started = time.monotonic()
        self._running: dict[str, tuple[str, float]] = {}
        self._live: Live | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def begin(self) -> None:
        """Shows the name of the product, and from now on what is under way."""
        if self._console.is_terminal:
            self._console.print(Text.assemble(("\nTokenmill ", "bold"), (__version__, "dim"), "\n"))
            self._live = Live(
                get_renderable=self._progress, console=self._console, refresh_per_second=8, transient=True
            )
            self._live.start()
        else:
            self._plain(f"tokenmill {__version__}")

    def stage(self, name: str, stage: str) -> None:
        """A process enters a stage; the one before is done. An empty stage: there is no other."""
        before = self._running.pop(name, None)
        if before is not None and before[0] == stage:
            self._running[name] = before
            return
        if before is not None and self._console.is_terminal:
            self._console.print(self._done_line(name, before[0], f"{time.monotonic() - before[1]:.1f} s"))
        if stage:
            self._running[name] = (stage, time.monotonic())
            if not self._console.is_terminal:
                self._plain(f"{name}: {stage}")

    def done(self, name: str, what: str, detail: str = "") -> None:
        """Something that is done."""
        if self._console.is_terminal:
            self._console.print(self._done_line(name, what, detail))
        else:
            self._plain(f"{name}: {what}: {detail}" if detail else f"{name}: {what}")

    def panel(self, title: str, facts: Sequence[Fact], command: str) -> None:
        """Ends the progress; shows what is served, and a command to try it."""
        self.end()
        if not self._console.is_terminal:
            self._plain(title)
            for fact in facts:
                self._plain("  " + "  ".join(part for part in (fact.label, fact.value, fact.note) if part))
            self._plain(f"  try: {command}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        width = max((len(fact.value) + 3 for fact in facts if fact.note), default=0)
        for fact in facts:
            table.add_row(fact.label, _content(fact, width))
        self._console.print()
        self._console.print(
            Panel(table, title=f"[bold green]{title}[/]", border_style="green", padding=(1, 2), expand=False)
        )
        # Outside the frame and unwrapped, so that it can be copied.
        self._console.print(Text("\nTry it:", style="bold"))
        self._console.out(command + "\n", highlight=False)

    def event(self, name: str, text: str, *, bad: bool = False) -> None:
        """Something happened to a process."""
        if self._console.is_terminal:
            mark = Text("! ", style="yellow") if bad else Text("✓ ", style="green")
            now = time.strftime("%H:%M:%S ")
            self._console.print(Text.assemble((now, "dim"), mark, (name, "bold"), "  ", text))
        else:
            self._plain(f"{name}: {text}")

    def output(self, name: str, line: str) -> None:
        """A line that a process printed; shown under --verbose."""
        if self._verbose:
            self._console.print(Text.assemble((f"{name} | ", "dim"), line), soft_wrap=True)

    def end(self) -> None:
        """Ends the progress."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _plain(self, text: str) -> None:
        self._console.out(f"[{self.seconds:6.1f} s] {text}", highlight=False)

    def _done_line(self, name: str, what: str, detail: str) -> Text:
        return Text.assemble(("  ✓ ", "green"), (f"{name:<12} ", "bold"), f"{what:<18} ", (detail, "dim"))

    def _progress(self) -> Group:
        lines = []
        for name, (stage, since) in self._running.items():
            row = Text.assemble((f"{name:<12} ", "bold"), f"{stage:<18} ", (f"{time.monotonic() - since:.0f} s", "dim"))
            lines.append(Table.grid(padding=(0, 0)))
            lines[-1].add_row("  ", self._spinner, " ", row)
        return Group(*lines)

    _spinner = Spinner("dots", style="cyan")
