"""`tokenmill bench` and `tokenmill report`."""

import argparse
import sys
from pathlib import Path

from tokenmill import platform
from tokenmill.bench import shapes, timing
from tokenmill.errors import ConfigurationError


def bench(argv: list[str]) -> int:
    """Measures one subject, named by the first argument."""
    subjects = {"int4": _int4, "serve": _serve}
    parser = argparse.ArgumentParser(prog="tokenmill bench", description="Measures one subject against its rivals.")
    parser.add_argument(
        "subject", choices=sorted(subjects), help="int4: INT4 linear layers; serve: vLLM with our hooks"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`tokenmill bench SUBJECT --help` explains them")
    chosen = parser.parse_args(argv)
    return subjects[chosen.subject](chosen.arguments)


def _serve(argv: list[str]) -> int:
    from tokenmill.bench.serving import command

    return command.main(argv)


def _int4_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenmill bench int4", description="INT4 linear layers against their rivals."
    )
    parser.add_argument(
        "--cpu", action="store_true", help="measure this CPU instead of the GPU (TOKENMILL_ISA narrows it)"
    )
    parser.add_argument("--shapes", default="square,wide", help=f"KxN or {', '.join(shapes.NAMED)}; commas between")
    parser.add_argument("--m", default="1,4,16,64,128,512", help="rows of activations, commas between")
    parser.add_argument("--group-size", type=int, default=128, help="rows of K that share a scale (default 128)")
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant (default 7)")
    parser.add_argument("--out", type=Path, default=Path("rows.jsonl"), help="rows; what is there is not repeated")
    return parser


def _int4(argv: list[str]) -> int:
    arguments = _int4_parser().parse_args(argv)
    layers, rows = shapes.parse(arguments.shapes), shapes.parse_rows(arguments.m)
    if arguments.rounds < 1 or arguments.group_size < 1:
        raise ConfigurationError(
            f"--rounds {arguments.rounds} --group-size {arguments.group_size}: both have to be positive"
        )
    if arguments.cpu:
        timing.pinned(arguments.threads or platform.physical_cores(), ["bench", "int4", *argv])
    elif not platform.gpus():
        raise ConfigurationError("torch sees no CUDA device; pass --cpu to measure this processor")

    from tokenmill.engine.vllm import isa

    isa.narrow()

    from tokenmill.bench import kernels
    from tokenmill.bench.machines import machine
    from tokenmill.bench.rivals import all_contestants
    from tokenmill.bench.rows import RowFile

    command = ("tokenmill", "bench", "int4", *argv)
    plan = kernels.Plan(layers, rows, arguments.group_size, arguments.rounds, command)
    contestants, out = all_contestants(cpu=arguments.cpu), RowFile(arguments.out)
    kernels.measure(plan, contestants, machine(cpu=arguments.cpu), out, lambda line: print(line, flush=True))
    return 0


def report(argv: list[str]) -> int:
    """Writes one self-contained page from rows, or brings README.md up to date; 1 where a ratio fell."""
    parser = argparse.ArgumentParser(prog="tokenmill report", description="A page, and README's tables, from rows.")
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS", help="files of JSON lines")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one self-contained page with tables and plots")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="file whose marked section is generated anew")
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar="ROWS",
        help="earlier rows: names ratios to rivals that fell by over 5%%",
    )
    arguments = parser.parse_args(argv)
    if not (arguments.html or arguments.readme or arguments.against):
        raise ConfigurationError("report writes nothing; pass --html FILE, --readme FILE or --against ROWS")

    from tokenmill.bench import page, regressions
    from tokenmill.bench import report as tables
    from tokenmill.bench.rows import read_rows

    rows = read_rows(arguments.rows)
    fallen = regressions.falls(rows, read_rows(arguments.against)) if arguments.against else []
    for fall in fallen:
        print(f"FELL  {fall}")
    if arguments.html is not None:
        text = page.page(rows, fallen)
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(text, encoding="utf-8")
        print(arguments.html)
    if arguments.readme is not None:
        changed = tables.update_readme(arguments.readme, rows)
        print(f"{arguments.readme} {'brought up to date' if changed else 'was up to date'}", file=sys.stderr)
    return 1 if fallen else 0
