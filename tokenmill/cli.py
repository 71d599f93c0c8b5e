"""The `tokenmill` command: a table of subcommands, each imported only when it is called.

A subcommand is a function `main(argv: list[str]) -> int` that owns its arguments and its help.
"""

import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from tokenmill import __version__
from tokenmill.errors import TokenmillError


@dataclass(frozen=True)
class Command:
    """One subcommand: its name, where its `main` lives, and one line of help."""

    name: str
    target: str
    summary: str

    def load(self) -> Callable[[list[str]], int]:
        """Imports the module and returns its entry function."""
        module, _, function = self.target.partition(":")
        return cast("Callable[[list[str]], int]", getattr(import_module(module), function))


COMMANDS: tuple[Command, ...] = (
    Command("serve", "tokenmill.engine.supervisor.main:main", "Serve models: start, watch and restart the servers."),
    Command("admin", "tokenmill.engine.gateway.admin.command:main", "Accounts, keys, budgets, ledger, audit trail."),
    Command("doctor", "tokenmill.doctor:main", "Explain this machine: what would run, and why something would not."),
    Command("build", "tokenmill.native_build:main", "Compile the native library in place, only what changed."),
    Command("kernels", "tokenmill.kernels.command:main", "Prove CUDA kernels in the CPU emulator; static gates."),
    Command(
        "train-pair",
        "tokenmill.speculative.pair.command:main",
        "Train a tiny draft/target pair from Python's own library.",
    ),
    Command("quantize", "tokenmill.quant.command:quantize", "Quantize a model to INT4 for Tokenmill and stock vLLM."),
    Command("bench", "tokenmill.bench.command:bench", "Measure against rivals, row by row; continues after a kill."),
    Command("gpu-suite", "tokenmill.bench.suite.command:main", "Prove and measure every kernel on this machine's GPU."),
    Command("report", "tokenmill.bench.command:report", "Tables, plots and a page from measured rows."),
    Command("router", "tokenmill.engine.gateway.router.command:router", "Train the gateway's router from its own log."),
    Command(
        "calibrate",
        "tokenmill.engine.gateway.router.command:calibrate",
        "Choose when the gateway escalates, from logged answers.",
    ),
    Command("memory", "tokenmill.quant.command:memory", "Plan a model's memory from its config.json."),
)


def usage() -> str:
    """The overview that `tokenmill` prints without arguments."""
    width = max((len(command.name) for command in COMMANDS), default=0)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: tokenmill COMMAND [ARGUMENTS]",
            "",
            "commands:",
            *lines,
            "",
            "`tokenmill COMMAND --help` explains one; `tokenmill --version` prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status (2: bad input, 130: interrupted, 141: nobody reads)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another age has no ✓, and gets ? instead of an end
        sys.stdout.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"tokenmill {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    for command in COMMANDS:
        if command.name == name:
            try:
                status = command.load()(rest)
                sys.stdout.flush()
                return status
            except BrokenPipeError:
                if not _nobody_reads():
                    raise
                # Whoever read has seen enough, as `head` has. Python would try to write the rest once more at the end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            except TokenmillError as error:
                print(f"tokenmill {name}: {error}", file=sys.stderr)
                return 2
            except OSError as error:
                if error.filename is None:
                    raise
                reason = (error.strerror or type(error).__name__).lower()
                print(f"tokenmill {name}: {error.filename} cannot be used: {reason}; name another", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                return 130
    known = ", ".join(command.name for command in COMMANDS)
    print(f"tokenmill: unknown command {name!r}; known: {known}", file=sys.stderr)
    return 2


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone; a broken pipe may also be another one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
