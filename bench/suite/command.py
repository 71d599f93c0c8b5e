"""`tokenmill gpu-suite`: proves the kernels on this machine's GPU and measures them against their rivals."""

import argparse
import platform as host
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tokenmill import platform
from tokenmill.bench import regressions
from tokenmill.bench.rows import Row, cpu_device, facts, read_rows
from tokenmill.bench.suite.items import Item, Outcome
from tokenmill.bench.suite.runner import results_file, run
from tokenmill.bench.suite.screen import Screen
from tokenmill.bench.suite.steps import STEPS, items
from tokenmill.errors import ConfigurationError

_VERDICTS = ("proven", "measured", "failed", "skipped")
#: Characters of a reason in the summary; the rows have it whole.
_WIDEST = 160
#: Rows that are committed, beside this file's folder; an installed wheel has them, too.
COMMITTED = Path(__file__).resolve().parent.parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="tokenmill gpu-suite",
        description="Proves every kernel on this machine's GPU and measures it against its rivals, in the order of "
        "value, until the time is up. Installs nothing; what is missing is skipped with the reason. A second run "
        "with the same --out goes on where the first ended. Exit status: 0 nothing failed, 1 something did or fell "
        "behind, 2 bad arguments.",
    )
    found.add_argument("--minutes", type=float, default=15.0, help="time limit (default %(default)g)")
    found.add_argument("--out", type=Path, default=Path("gpu-suite"), help="folder of rows.jsonl (default %(default)s)")
    found.add_argument("--cpu", action="store_true", help="the reduced form for a machine without a GPU")
    found.add_argument("--steps", help=f"only these, commas between: {', '.join(STEPS)}")
    found.add_argument(
        "--against", type=Path, default=COMMITTED, help="folder of earlier rows (default: those committed)"
    )
    return found


def main(argv: list[str]) -> int:
    """Runs the suite and prints what was found; see the parser's description for the status."""
    arguments = parser().parse_args(argv)
    if not arguments.minutes > 0:
        raise ConfigurationError(f"--minutes {arguments.minutes:g} is not positive; 10 is enough for the first figures")
    chosen = _steps(arguments.steps)
    screen = Screen()
    gpu = None if arguments.cpu else next(iter(platform.gpus()), None)
    if gpu is None and not arguments.cpu:
        screen.line("torch sees no CUDA device: running the reduced form on this CPU, as --cpu does", "skipped")
    about = facts(["tokenmill", "gpu-suite", *argv], gpu.name if gpu else cpu_device())
    screen.line(f"{about['device']}, commit {about['commit']}, {_versions()}")
    out = results_file(arguments.out)
    deadline = time.monotonic() + 60 * arguments.minutes

    def say(item: Item, outcome: Outcome, known: bool) -> None:
        again = " (from an earlier run)" if known else ""
        screen.item(outcome.verdict, f"{item.step:<12} {item.name}: {outcome.detail}{again}")

    todo = [item for item in items(gpu=gpu is not None) if item.step in chosen]
    verdicts = run(todo, about, out, deadline, say)
    screen.table(("step", *_VERDICTS, "why"), summary(verdicts))
    fallen = _compare(out.rows, about, arguments.against, screen)
    failed = sum(row["verdict"] == "failed" for row in verdicts)
    screen.line(f"rows: {out.path}; a page from them: tokenmill report {out.path} --html report.html")
    screen.line(verdict_line(failed, len(fallen), gpu is not None), "bad" if failed or fallen else "good")
    return 1 if failed or fallen else 0


def _steps(text: str | None) -> tuple[str, ...]:
    chosen = tuple(STEPS) if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = sorted(set(chosen) - set(STEPS))
    if unknown or not chosen:
        raise ConfigurationError(f"--steps {text}: give some of {', '.join(STEPS)}")
    return chosen


def _versions() -> str:
    found = [f"Python {host.python_version()}"]
    for name in ("torch", "triton"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def summary(verdicts: Sequence[Row]) -> list[list[str]]:
    """One line a step: how many items got which verdict; then why those that failed or were skipped did."""
    lines = []
    for step in STEPS:
        rows = [row for row in verdicts if row["step"] == step]
        if not rows:
            continue
        counts = [sum(row["verdict"] == verdict for row in rows) for verdict in _VERDICTS]
        failed = [f"{row['item']}: {row['detail']}" for row in rows if row["verdict"] == "failed"]
        skipped = list(dict.fromkeys(row["detail"] for row in rows if row["verdict"] == "skipped"))
        why = "\n".join(line[:_WIDEST] for line in [*failed, *skipped])
        lines.append([step, *(str(count) if count else "-" for count in counts), why])
    return lines


def _compare(rows: Sequence[Row], about: Row, folder: Path, screen: Screen) -> list[regressions.Fall]:
    """Names every ratio of this source that fell below the earlier rows of the device."""
    now = [row for row in rows if row.get("source") == about["source"] and row.get("device") == about["device"]]
    before = [row for row in read_rows(sorted(folder.glob("*/*.jsonl"))) if row.get("source") != about["source"]]
    fallen = regressions.falls(now, before)
    count = regressions.compared(now, before)
    if count:
        screen.line(f"{count} ratios to rivals compared with earlier rows; {len(fallen)} fell by more than 5%")
    else:
        screen.line(f"no earlier ratios of {about['device']} to compare with")
    for fall in fallen:
        screen.line(f"FELL  {fall}", "bad")
    return fallen


def verdict_line(failed: int, fallen: int, on_gpu: bool) -> str:
    """The last line."""
    if failed or fallen:
        return f"NOT PROVEN: {failed} items failed, {fallen} ratios fell"
    if on_gpu:
        return "everything that could run here is proven on this GPU; what was skipped is not"
    return "nothing failed; on a CPU this proves implementations, emulated and interpreted kernels, not the GPU"
