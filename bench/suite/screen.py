"""What the suite prints: one line an item, a table last. With rich where it is installed, else as plain text."""

from collections.abc import Sequence
from typing import Any

STYLES = {
    "proven": "green",
    "measured": "cyan",
    "failed": "bold red",
    "skipped": "yellow",
    "good": "bold green",
    "bad": "bold red",
    "": "",
}


class Screen:
    """Standard output."""

    def __init__(self) -> None:
        self._rich: Any = None
        try:
            from rich.console import Console

            self._rich = Console(highlight=False)
        except ImportError:
            pass  # a machine with torch alone

    def line(self, text: str, style: str = "") -> None:
        """One line, however long, in one of `STYLES`."""
        if self._rich is None:
            print(text, flush=True)
        else:
            self._rich.print(text, style=STYLES[style], markup=False, soft_wrap=True)

    def item(self, verdict: str, text: str) -> None:
        """One item: its verdict in colour, then what was found."""
        if self._rich is None:
            print(f"{verdict:<9} {text}", flush=True)
            return
        from rich.text import Text

        self._rich.print(Text.assemble((f"{verdict:<9}", STYLES[verdict]), " ", text), soft_wrap=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns under their heads; the first and the last are words, the last may have several lines."""
        if self._rich is None:
            self._plain_table(head, rows)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for index, name in enumerate(head):
            words = index in (0, len(head) - 1)
            table.add_column(name, justify="left" if words else "right", no_wrap=index == 0, overflow="fold")
        for row in rows:
            cells = [Text(cell, style=self._style(head[index], cell)) for index, cell in enumerate(row)]
            table.add_row(*cells)
        self._rich.print(table)

    @staticmethod
    def _style(column: str, cell: str) -> str:
        return "dim" if cell == "-" else STYLES.get(column, "")

    @staticmethod
    def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(len(line[index]) for line in (head, *rows)) for index in range(len(head) - 1)]
        for line in (head, *rows):
            cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)]
            print("  ".join([*cells, line[-1].replace("\n", "\n" + " " * (sum(widths) + 2 * len(widths)))]), flush=True)
