"""Proving CUDA kernels on a CPU: right against a reference, no hazard in any order of events, every seeded bug found.

A kernel is described by a `Proof`. This repository's are listed in `PROOFS`; one of another repository is a Python
file with a global `PROOF` (or `PROOFS`, a tuple), proven by ``tokenmill kernels prove path/to/file.py``:

    from pathlib import Path
    import torch
    from tokenmill.kernels.prove import Proof

    HERE = Path(__file__).parent

    def check(library, case, seed):                      # launch one case, say what is wrong with its numbers
        x = torch.randn(case["n"], generator=torch.Generator().manual_seed(seed))
        source, target = library.upload(x), library.allocate(4 * x.numel())
        if (status := library.call("my_scale", source, target, case["n"], None)) < 0:
            return f"the launcher refused with {status}"
        y = library.download(target, x.shape, torch.float32)
        return None if torch.equal(y, 2 * x) else "y is not 2 x"

    PROOF = Proof(name="my_scale", root=HERE, source="scale.cu", check=check, cases=({"n": 1}, {"n": 1000}))

`scale.cu` includes `ptx.cuh` and `launch.cuh` (both on the include path) and has an ``extern "C" int my_scale(...)``.
Mutants and gates are optional: see `mutation.Mutant` and `gates.Gate`. docs/emulator.md explains the rest.
"""

import importlib.util
import multiprocessing
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import extract_tb
from typing import Any

from tokenmill.errors import InputError
from tokenmill.kernels import emulator
from tokenmill.kernels.emulator import ASYNC_MODES, EmulatedLibrary
from tokenmill.kernels.gates import Gate
from tokenmill.kernels.mutation import WRONG_RESULT, Mutant, naming_report, write_mutated_tree

#: Every kernel of this repository: name to where its `Proof` is. A new kernel adds one line and brings its mutants.
PROOFS: dict[str, str] = {
    "int4_gemm_sm90": "tokenmill.kernels.int4_gemm.proof:SM90",
    "int4_gemm_mma_sync": "tokenmill.kernels.int4_gemm.proof:MMA_SYNC",
    "spec_verify_greedy": "tokenmill.kernels.spec_verify.proof:GREEDY",
}
#: CTAs that the emulator keeps in flight: alone, as usual, and more than most cases have.
_RESIDENT = (1, 4, 16)
#: A worker that says nothing for so long is stuck: the emulator's own reports come within seconds.
_SILENCE_S = 300.0

Case = Mapping[str, Any]
#: (library, case, seed) -> None, or one line that says what is wrong with the numbers.
Check = Callable[[EmulatedLibrary, Case, int], str | None]


@dataclass(frozen=True)
class Proof:
    """How one kernel is proven; the module's docstring has an example.

    Attributes:
        name: The kernel's.
        root: Folder of its CUDA sources; on the include path.
        source: The translation unit with the `extern "C"` launcher, relative to `root`.
        check: Uploads data, launches once, compares with a reference of higher precision.
        cases: What `check` is run on; each must make every pipeline of the kernel wrap around.
        summary: One line for tables.
        random_case: Draws a further case; None: only `cases` are run.
        mutants: Seeded bugs; each must be reported.
        mutant_cases: Small cases that make every mutant's mistake matter; empty: `cases`.
        mutant_defines: Preprocessor symbols for compiling mutants, to leave out instances that they do not need.
        defines: Preprocessor symbols for compiling the kernel.
        gates: Static gates, for nvcc.
    """

    name: str
    root: Path
    source: str
    check: Check
    cases: tuple[Case, ...]
    summary: str = ""
    random_case: Callable[[random.Random], Case] | None = None
    mutants: tuple[Mutant, ...] = ()
    mutant_cases: tuple[Case, ...] = ()
    mutant_defines: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class Launch:
    """One emulated launch: what was asked and what came of it."""

    case: Case
    seed: int
    mode: str
    resident_ctas: int
    reports: str = ""
    wrong: str | None = None

    @property
    def clean(self) -> bool:
        """No report and right numbers."""
        return not self.reports and self.wrong is None

    def finding(self) -> str:
        """The reports and what is wrong with the numbers; empty when nothing is."""
        return "\n".join(filter(None, (self.reports.rstrip(), f"{WRONG_RESULT}: {self.wrong}" if self.wrong else "")))

    def __str__(self) -> str:
        case = " ".join(f"{name}={value}" for name, value in self.case.items())
        return f"[{case}] seed={self.seed} async={self.mode} resident={self.resident_ctas}"


@dataclass(frozen=True)
class MutantResult:
    """What the emulator said about one mutant.

    Attributes:
        mutant: The bug.
        launches: Those that were made.
        caught: (mode, launches of that mode with a finding, launches of that mode), for each mode that was used.
        finding: The first finding of an expected kind, or else the first of any; empty: not noticed.
        named: Whether a report of an expected kind was given.
    """

    mutant: Mutant
    launches: int
    caught: tuple[tuple[str, int, int], ...]
    finding: str
    named: bool


@dataclass(frozen=True)
class Findings:
    """Emulated launches of one kernel: how many, and those with a report or wrong numbers."""

    launches: int
    bad: list[Launch]


def proof_reference(name: str) -> list[str]:
    """The references (`target:attribute`) that a name on the command line stands for.

    Args:
        name: A key of `PROOFS`, or the path of a Python file with `PROOF` or `PROOFS`.

    Raises:
        InputError: Neither.
    """
    if name in PROOFS:
        return [PROOFS[name]]
    path = Path(name)
    if path.suffix != ".py" or not path.exists():
        raise InputError(f"{name!r} is no kernel of this repository ({', '.join(PROOFS)}) and no Python file")
    module = _module_of_file(path.resolve())
    if isinstance(getattr(module, "PROOF", None), Proof):
        return [f"{path.resolve()}:PROOF"]
    proofs = getattr(module, "PROOFS", None)
    if isinstance(proofs, tuple) and proofs and all(isinstance(proof, Proof) for proof in proofs):
        return [f"{path.resolve()}:PROOFS.{index}" for index in range(len(proofs))]
    raise InputError(f"{name} defines neither PROOF nor a tuple PROOFS of tokenmill.kernels.prove.Proof")


def load_proof(reference: str) -> Proof:
    """The `Proof` behind a reference of `PROOFS` or `proof_reference`."""
    target, _, attribute = reference.rpartition(":")
    module = _module_of_file(Path(target)) if target.endswith(".py") else import_module(target)
    name, _, index = attribute.partition(".")
    found = getattr(module, name)
    proof = found[int(index)] if index else found
    assert isinstance(proof, Proof)
    return proof


def planned_launches(proof: Proof, count: int, seed: int = 1) -> list[Launch]:
    """`count` launches: every case in every async mode first, then cases at random; seeds and residency vary."""
    rng = random.Random(f"{proof.name} {seed}")
    launches: list[Launch] = []
    while len(launches) < count:
        for case in proof.cases:
            for mode in ASYNC_MODES:
                launches.append(Launch(case, rng.randrange(1, 2**31), mode, rng.choice(_RESIDENT)))
        if proof.random_case is not None:
            for _ in range(2 * len(proof.cases)):
                case = proof.random_case(rng)
                launches.append(Launch(case, rng.randrange(1, 2**31), rng.choice(ASYNC_MODES), rng.choice(_RESIDENT)))
    return launches[:count]


def prove_clean(
    reference: str,
    launches: Sequence[Launch],
    jobs: int = 2,
    on_launch: Callable[[Launch], None] = lambda launch: None,
    defines: Sequence[str] | None = None,
) -> Findings:
    """Runs the unchanged kernel; every finding is a failure.

    Args:
        reference: Of the proof.
        launches: From `planned_launches`.
        jobs: Processes.
        on_launch: Called after each, for progress.
        defines: Preprocessor symbols instead of the proof's.
    """
    proof = load_proof(reference)
    symbols = proof.defines if defines is None else defines
    library = emulator.build(proof.root / proof.source, include=(proof.root,), defines=symbols)

    def run(chunk: Sequence[Launch]) -> list[Launch]:
        done = []
        for launch in _in_process(reference, library, chunk):
            on_launch(launch)
            done.append(launch)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        done = [launch for chunk in pool.map(run, [launches[start::jobs] for start in range(jobs)]) for launch in chunk]
    return Findings(len(done), [launch for launch in done if not launch.clean])


def prove_mutants(
    reference: str,
    mutants: Sequence[Mutant],
    seeds: int = 1,
    stop_when_caught: bool = False,
    jobs: int = 2,
) -> Iterator[MutantResult]:
    """Compiles and runs mutants, in the order in which they finish.

    Args:
        reference: Of the proof.
        mutants: Some or all of the proof's.
        seeds: Launches of each case in each async mode.
        stop_when_caught: Go on to the next mutant after the first report of an expected kind.
        jobs: Mutants at a time.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_try_mutant, reference, mutant, seeds, stop_when_caught) for mutant in mutants]
        for future in as_completed(futures):
            yield future.result()


def _try_mutant(reference: str, mutant: Mutant, seeds: int, stop_when_caught: bool) -> MutantResult:
    proof = load_proof(reference)
    launches = [
        Launch(case, seed, mode, 4)
        for seed in range(1, seeds + 1)
        for mode in ASYNC_MODES
        for case in (proof.mutant_cases or proof.cases)
    ]
    done: list[Launch] = []
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "source"
        write_mutated_tree(mutant, proof.root, tree)
        library = emulator.build(
            tree / proof.source, include=(tree,), defines=proof.mutant_defines, output=Path(directory) / "mutant.so"
        )
        for launch in _in_process(reference, library, launches):
            done.append(launch)
            if stop_when_caught and naming_report(mutant, launch.finding()) is not None:
                break
    named = [finding for launch in done if (finding := naming_report(mutant, launch.finding())) is not None]
    noticed = [launch for launch in done if not launch.clean]
    made, found = Counter(launch.mode for launch in done), Counter(launch.mode for launch in noticed)
    return MutantResult(
        mutant=mutant,
        launches=len(done),
        caught=tuple((mode, found[mode], made[mode]) for mode in ASYNC_MODES if made[mode]),
        finding=(named or [launch.finding() for launch in noticed] or [""])[0],
        named=bool(named),
    )


def _in_process(reference: str, library: Path, launches: Sequence[Launch]) -> Iterator[Launch]:
    """Runs launches in a process of their own, so that a kernel that crashes the emulator is a finding."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenmill.kernels.prove"])  # once, not in every process
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, reference, library, list(launches)), daemon=True)
    process.start()
    theirs.close()
    try:
        for launch in launches:
            if not ours.poll(_SILENCE_S):
                yield _finished(launch, f"STUCK: no answer within {_SILENCE_S:.0f} s")
                return
            try:
                yield ours.recv()
            except EOFError:
                process.join()
                yield _finished(launch, f"CRASH: the process ended with exit code {process.exitcode}")
                return
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(connection: Connection, reference: str, library_path: Path, launches: Sequence[Launch]) -> None:
    proof, library = load_proof(reference), EmulatedLibrary(library_path)
    for launch in launches:
        library.reset()
        library.configure(seed=launch.seed, mode=launch.mode, resident_ctas=launch.resident_ctas)
        wrong = proof.check(library, launch.case, launch.seed)
        connection.send(_finished(launch, library.reports(), wrong))


def _finished(launch: Launch, reports: str, wrong: str | None = None) -> Launch:
    return Launch(launch.case, launch.seed, launch.mode, launch.resident_ctas, reports, wrong)


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody else's file may raise anything
        line = next(
            (f":{frame.lineno}" for frame in reversed(extract_tb(error.__traceback__)) if frame.filename == str(path)),
            "",
        )
        raise InputError(f"{path}{line} does not load: {type(error).__name__}: {error}") from error
    return module
