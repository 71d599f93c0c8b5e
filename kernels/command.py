"""`tokenmill kernels`: prove CUDA kernels on this CPU, measure static gates, compare a GPU with the emulator."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenmill import platform
from tokenmill.errors import ConfigurationError, UnsupportedError
from tokenmill.kernels import gates, prove
from tokenmill.kernels.emulator import ASYNC_MODES
from tokenmill.kernels.prove import MutantResult, Proof

#: Commands with options of their own, and their modules.
_MODULES = {"micro": "tokenmill.kernels.micro", "triton": "tokenmill.kernels.int4_gemm.triton_gates"}
PARTS = ("emulated", "mutants", "gates")
_DOCUMENT = Path("docs/mutants.md")
#: At most so many failures are printed whole; the rest is counted.
_SHOWN = 5


@dataclass
class Verdict:
    """What was found out about one kernel; a part that was not asked for or cannot run here stays None."""

    reference: str
    proof: Proof
    findings: prove.Findings | None = None
    mutants: list[MutantResult] | None = None
    rows: list[gates.GateRow] | None = None
    broken_gates: list[str] = field(default_factory=list)
    gates_skipped: str | None = None

    @property
    def missed(self) -> list[MutantResult]:
        """Mutants without a report of the kind that names them."""
        return [result for result in self.mutants or [] if not result.named]

    @property
    def failed(self) -> bool:
        """Whether anything speaks against the kernel."""
        return bool((self.findings and self.findings.bad) or self.missed or self.broken_gates)


def main(argv: list[str]) -> int:
    """Entry of `tokenmill kernels`; 0: proven, 1: not, 2: bad input."""
    parser = argparse.ArgumentParser(prog="tokenmill kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    proving = commands.add_parser(
        "prove",
        help="run kernels in the CPU emulator, with their mutants and static gates",
        description="Runs kernels in the CPU emulator against a float64 reference, in adversarial orders of events; "
        "checks that every seeded bug is reported; checks registers, spills and instructions with nvcc.",
    )
    proving.add_argument("names", nargs="*", metavar="NAME", help="a kernel, or a Python file with a PROOF; none: all")
    proving.add_argument("--launches", type=int, default=500, help="emulated launches of each kernel (default 500)")
    proving.add_argument(
        "--seeds", type=int, default=1, help="launches of each mutant, case and async mode (default 1)"
    )
    proving.add_argument("--seed", type=int, default=1, help="of cases, data and schedules (default 1)")
    proving.add_argument("--jobs", type=int, default=platform.physical_cores(), help="processes (default: all cores)")
    proving.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be repeated")
    proving.add_argument(
        "--write", action="store_true", help="rewrite docs/mutants.md and kernels/gates.jsonl (a source checkout)"
    )
    commands.add_parser("list", help="the kernels that can be proven")
    commands.add_parser(
        "micro", add_help=False, help="compare the primitives with their golden file: on a GPU, or emulated"
    )
    commands.add_parser("triton", add_help=False, help="static gates of the Triton kernels; needs triton, no GPU")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in _MODULES:
        return int(import_module(_MODULES[arguments.command]).main(rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "list":
        return _list()
    for name in ("launches", "seeds", "jobs"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name}={getattr(arguments, name)} must be at least 1")
    return _prove(arguments)


def _list() -> int:
    table = Table("kernel", "what it is", "cases", "mutants", box=None)
    for name, reference in prove.PROOFS.items():
        proof = prove.load_proof(reference)
        table.add_row(name, proof.summary, str(len(proof.cases)), str(len(proof.mutants)))
    Console().print(table)
    return 0


def _prove(arguments: argparse.Namespace) -> int:
    parts = tuple(arguments.only or PARTS)
    references = [r for name in arguments.names or prove.PROOFS for r in prove.proof_reference(name)]
    if arguments.write and (arguments.names or parts != PARTS or not _DOCUMENT.parent.is_dir()):
        raise ConfigurationError("--write needs a whole run in a source checkout: leave out NAME and --only")
    console, started = Console(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    verdicts = []
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        for reference in references:
            verdict = Verdict(reference, prove.load_proof(reference))
            verdicts.append(verdict)
            if "emulated" in parts:
                _emulate(verdict, arguments, progress)
            if "mutants" in parts and verdict.proof.mutants:
                _mutate(verdict, arguments, progress)
            if "gates" in parts and verdict.proof.gates:
                _gate(verdict, arguments.write, progress)
            if not console.is_terminal:  # a log has no bars
                console.print(f"{verdict.proof.name}: done after {time.monotonic() - started:.0f} s")
    if arguments.write:
        _write(verdicts)
    for verdict in verdicts:
        _print_failures(verdict, console)
    console.print(_summary(verdicts))
    failed = [verdict.proof.name for verdict in verdicts if verdict.failed]
    console.print(
        f"{'NOT PROVEN: ' + ', '.join(failed) if failed else 'proven in the emulator'} "
        f"({time.monotonic() - started:.0f} s); what has run on no GPU is called emulated, not proven on hardware"
    )
    return 1 if failed else 0


def _emulate(verdict: Verdict, arguments: argparse.Namespace, progress: Progress) -> None:
    launches = prove.planned_launches(verdict.proof, arguments.launches, arguments.seed)
    task = progress.add_task(f"{verdict.proof.name}: launches", total=len(launches))
    verdict.findings = prove.prove_clean(
        verdict.reference, launches, arguments.jobs, lambda launch: progress.advance(task)
    )


def _mutate(verdict: Verdict, arguments: argparse.Namespace, progress: Progress) -> None:
    task = progress.add_task(f"{verdict.proof.name}: mutants", total=len(verdict.proof.mutants))
    results = {}
    for result in prove.prove_mutants(verdict.reference, verdict.proof.mutants, arguments.seeds, jobs=arguments.jobs):
        results[result.mutant.name] = result
        progress.advance(task)
    verdict.mutants = [results[mutant.name] for mutant in verdict.proof.mutants]


def _gate(verdict: Verdict, rewriting: bool, progress: Progress) -> None:
    verdict.gates_skipped = gates.why_not()
    if verdict.gates_skipped is not None:
        return
    targets = [(gate, architecture) for gate in verdict.proof.gates for architecture in gate.architectures]
    task = progress.add_task(f"{verdict.proof.name}: static gates", total=len(targets))
    verdict.rows = []
    for gate, architecture in targets:
        rows = gates.measure(gate, architecture)
        verdict.rows += rows
        verdict.broken_gates += [line for row in rows for line in gates.violations(gate, row)]
        progress.advance(task)
    if verdict.reference in prove.PROOFS.values() and not rewriting:
        verdict.broken_gates += gates.compare(verdict.rows, gates.read_table())


def _write(verdicts: Sequence[Verdict]) -> None:
    rows = [row for verdict in verdicts for row in verdict.rows or []]
    if not rows:
        reason = next((verdict.gates_skipped for verdict in verdicts if verdict.gates_skipped), "no gate was measured")
        raise UnsupportedError("--write", {"static gates": reason})
    gates.write_table(rows)
    _DOCUMENT.write_text(mutants_document(verdicts), encoding="utf-8")


def mutants_document(verdicts: Sequence[Verdict]) -> str:
    """docs/mutants.md: every mutant, how often it was noticed by async mode, and the report that names it."""
    lines = [
        "# Mutants",
        "",
        "Bugs that are put into the project's own CUDA kernels, one at a time, and what the emulator says about each.",
        "`early`, `late` and `random` are the moments at which asynchronous operations move their data: launches with",
        "a finding, of launches made. A report names the bug; WRONG RESULT means that only the numbers show it.",
        "",
        "Generated by `tokenmill kernels prove --write`; the mutants are defined in `kernels/*/mutants.py`.",
    ]
    for verdict in verdicts:
        results = verdict.mutants or []
        named = sum(result.named for result in results)
        lines += ["", f"## {verdict.proof.name}: {named} of {len(results)} caught", ""]
        lines += ["| bug | file | early | late | random | finding |", "|---|---|---|---|---|---|"]
        for result in results:
            by_mode = {mode: f"{found}/{made}" for mode, found, made in result.caught}
            shares = " | ".join(by_mode.get(mode, "–") for mode in ASYNC_MODES)
            finding = result.finding.splitlines()[0].replace("|", "\\|") if result.finding else "not noticed"
            lines.append(f"| {result.mutant.name} | `{Path(result.mutant.file).name}` | {shares} | {finding} |")
    return "\n".join(lines) + "\n"


def _print_failures(verdict: Verdict, console: Console) -> None:
    bad = verdict.findings.bad if verdict.findings else []
    for launch in bad[:_SHOWN]:
        console.print(f"[red]{verdict.proof.name}[/] ", end="")
        console.print(f"{launch}\n{launch.finding()}\n", markup=False, highlight=False)
    if len(bad) > _SHOWN:
        console.print(f"... and {len(bad) - _SHOWN} more launches with findings")
    for result in verdict.missed:
        heard = result.finding or "nothing at all"
        expected = " or ".join(result.mutant.reports)
        console.print(f"[red]{verdict.proof.name}[/] mutant not named: ", end="")
        console.print(f"{result.mutant.name}; expected {expected}, got {heard}\n", markup=False, highlight=False)
    for line in verdict.broken_gates:
        console.print(f"[red]{verdict.proof.name}[/] gate: ", end="")
        console.print(line, markup=False, highlight=False)


def _summary(verdicts: Sequence[Verdict]) -> Table:
    table = Table("kernel", "emulated launches", "mutants named", "static gates", "verdict")
    for verdict in verdicts:
        launches = mutants = "–"
        if verdict.findings is not None:
            launches = f"{verdict.findings.launches - len(verdict.findings.bad)} of {verdict.findings.launches} clean"
        if verdict.mutants is not None:
            mutants = f"{len(verdict.mutants) - len(verdict.missed)} of {len(verdict.mutants)}"
        static = "–" if verdict.gates_skipped is None else f"skipped: {verdict.gates_skipped}"
        if verdict.rows is not None:
            static = f"{len(verdict.rows)} instances, {len(verdict.broken_gates)} rules broken"
        mark = "[red]failed[/]" if verdict.failed else "[green]ok[/]"
        table.add_row(verdict.proof.name, launches, mutants, static, mark)
    return table
