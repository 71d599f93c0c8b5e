"""What the suite does, one piece at a time: an item is a function of a module and its arguments, run in a worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, cast

from tokenmill.bench.rows import Row

#: proven: checked, and right. measured: there are figures. failed: checked, and wrong, or it ended with an error.
#: skipped: it cannot be done here, or the time was up; the detail says why.
Verdict = Literal["proven", "measured", "failed", "skipped"]


class Skip(Exception):  # noqa: N818 - not an error: the reason why an item cannot be done here
    """Raised by an item that this machine cannot do; the message is the reason."""


@dataclass(frozen=True)
class Outcome:
    """What an item found: a verdict in one line, and rows of figures."""

    verdict: Verdict
    detail: str
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Item:
    """One piece.

    Attributes:
        step: The step it belongs to.
        name: Unique within the step.
        target: `module:function`; takes `about` (fields of every row) and `arguments`.
        arguments: What JSON can carry.
        seconds: After this long it counts as stuck.
        environment: Variables of the process that runs it.
        alone: Its process runs nothing after it: it changed what a process loads once.
    """

    step: str
    name: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False

    def run(self, about: Row) -> Outcome:
        """In this process; every error becomes an outcome, so that the next item runs."""
        module, _, function = self.target.partition(":")
        try:
            task = cast("Callable[..., Outcome]", getattr(import_module(module), function))
            return task(about, **self.arguments)
        except Skip as reason:
            return Outcome("skipped", str(reason))
        except Exception as error:  # noqa: BLE001 - whatever a kernel under test does is a finding
            text = " ".join(str(error).split())
            return Outcome("failed", f"{type(error).__name__}: {text[:300]}")
