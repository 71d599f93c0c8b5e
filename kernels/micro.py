"""Hardware micro-tests: facts about the GPU that the CUDA emulator relies on, compared line by line.

`csrc/micro/micro.cu` is one source for both builds and writes one line per fact: name, hash, first words. The
emulator's answers are committed as `csrc/micro/emulated.txt`. Where a GPU is at hand, `tokenmill kernels micro --gpu`
is its first minute of use: what differs names the primitive that the emulator models wrongly.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill import platform
from tokenmill.errors import InputError, UnsupportedError
from tokenmill.kernels import emulator

SOURCE = emulator.CSRC / "micro" / "micro.cu"
GOLDEN = emulator.CSRC / "micro" / "emulated.txt"


@dataclass(frozen=True)
class Fact:
    """One line: what was tried, the FNV-1a hash of every word of the answer, its first words, what failed.

    Attributes:
        name: The primitive and its parameters; `~` in front: informs tolerances, may differ between devices.
        digest: 16 hex digits.
        words: Up to 64 words, hex.
        failure: Empty, or why the test did not run.
    """

    name: str
    digest: str
    words: tuple[str, ...]
    failure: str = ""


@dataclass(frozen=True)
class Difference:
    """A fact on which two runs disagree, and how, in one line."""

    name: str
    how: str


def read(path: Path) -> dict[str, Fact]:
    """The facts in a file, by name.

    Raises:
        InputError: The file cannot be read or has a line that is no fact.
    """
    facts: dict[str, Fact] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) not in (3, 4) or len(fields[1]) != 16:
            raise InputError(f"{path}:{number} is not a line of micro-test results (name, hash, words, by tabs)")
        facts[fields[0]] = Fact(fields[0], fields[1], tuple(fields[2].split()), fields[3] if len(fields) == 4 else "")
    if not facts:
        raise InputError(f"{path} has no micro-test results")
    return facts


def compare(expected: Mapping[str, Fact], found: Mapping[str, Fact]) -> list[Difference]:
    """Where two runs disagree, in the order of `expected`; facts that only inform tolerances are left out."""
    differences = []
    for name, fact in expected.items():
        other = found.get(name)
        if name.startswith("~"):
            continue
        if other is None:
            differences.append(Difference(name, "missing"))
        elif other.failure:
            differences.append(Difference(name, other.failure))
        elif other.digest != fact.digest:
            differences.append(Difference(name, _how(fact, other)))
    differences += [Difference(name, "not in the expected file") for name in found if name not in expected]
    return differences


def _how(expected: Fact, found: Fact) -> str:
    for index, (left, right) in enumerate(zip(expected.words, found.words, strict=False)):
        if left != right:
            wrong = sum(a != b for a, b in zip(expected.words, found.words, strict=False))
            return f"word {index}: {right} instead of {left} ({wrong} of the first {len(expected.words)} differ)"
    return f"after the first {len(expected.words)} words"


def run_emulated(output: Path, seed: int = 1, mode: str = "random") -> None:
    """Runs the micro-tests on the emulator and writes their facts.

    Raises:
        InputError: The file cannot be written.
    """
    library = emulator.load(SOURCE)
    library.reset()
    library.configure(seed=seed, mode=mode)
    if library.call("tokenmill_micro", ctypes.c_char_p(str(output).encode()), None) < 0:
        raise InputError(f"{output} cannot be written; name another file")
    library.reset()


def run_on_gpu(output: Path, architecture: str) -> None:
    """Compiles the micro-tests with nvcc, runs them on the GPU and writes their facts.

    Raises:
        UnsupportedError: There is no nvcc or no driver.
        InputError: The compilation or the run failed; with the last messages.
    """
    nvcc = platform.nvcc()
    if nvcc is None or not platform.has_nvidia_driver():
        missing = "no nvcc on PATH or in CUDA_HOME" if nvcc is None else "no NVIDIA driver is loaded"
        raise UnsupportedError("running the micro-tests on a GPU", {"cuda": missing})
    output.write_bytes(b"")  # what an earlier run left there must not be taken for what this one says
    with tempfile.TemporaryDirectory() as work:
        binary = Path(work) / "micro"
        gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        for command in (
            [nvcc, "-std=c++20", "-O2", gencode, "-I", str(emulator.CSRC), str(SOURCE), "-o", str(binary)],
            [str(binary), str(output)],
        ):
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode and not output.stat().st_size:  # else it counts the facts that failed
                raise InputError(f"{command[0]} failed: {(answer.stderr or answer.stdout).strip()[-500:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """`tokenmill kernels micro`: 0 when all facts agree, 1 when not."""
    parser = argparse.ArgumentParser(prog="tokenmill kernels micro", description=__doc__.partition("\n\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gpu", action="store_true", help="run on this machine's GPU instead of the emulator")
    source.add_argument("--compare", type=Path, metavar="FILE", help="compare a file that a GPU run has written")
    parser.add_argument("--arch", default="90a", help="GPU architecture to compile for (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the facts of this run")
    parser.add_argument("--update", action="store_true", help="make the emulator's answers of now the expected ones")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        output = options.output or Path(work) / "facts.txt"
        if options.gpu:
            run_on_gpu(output, options.arch)
        elif options.compare is None:
            run_emulated(output)
        found_in = options.compare or output
        if options.update:
            if options.gpu or options.compare:
                raise InputError("--update writes the emulator's answers; use it without --gpu and --compare")
            GOLDEN.write_text(output.read_text(encoding="utf-8"), encoding="utf-8")
        expected, found = read(GOLDEN), read(found_in)
    differences = compare(expected, found)
    for difference in differences:
        print(f"DIFFERS  {difference.name}: {difference.how}")
    exact = sum(not name.startswith("~") for name in expected)
    print(f"{exact - len(differences)} of {exact} facts agree with the emulator's ({GOLDEN.name})")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
