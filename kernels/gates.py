"""Static gates: what a CUDA source must become, read from the compiler's own output, without a GPU.

For each kernel instance and architecture: registers, spills, shared memory, ptxas warnings (C7513 and its family mean
that wgmmas were serialised or `setmaxnreg` was ignored) and the matrix and copy instructions in the machine code.
The measured rows are committed as `gates.jsonl` beside this file; `tokenmill kernels gates --write` regenerates them.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenmill import platform
from tokenmill.errors import MissingDependencyError, TokenmillError

TABLE = Path(__file__).parent / "gates.jsonl"

#: Machine instructions worth a column: matrix products, copies, synchronisation, and those that must not be there.
COUNTED = (
    *("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "IMMA"),
    *("UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "LDSM", "STSM"),
    *("USETMAXREG", "SYNCS", "ACQBULK", "PREEXIT", "I2F", "LDL", "STL"),
)
#: HGMMA whose A operand is registers, and whose is shared memory: counted besides HGMMA itself.
HGMMA_REGISTERS, HGMMA_SHARED = "HGMMA-RS", "HGMMA-SS"
#: Local memory is where spilled registers and arrays with run-time indices go.
NEVER = ("LDL", "STL")


@dataclass(frozen=True)
class Gate:
    """What every instance of one source must fulfil on some architectures.

    Attributes:
        source: The `.cu` file.
        architectures: As nvcc names them without `sm_`, e.g. `90a`.
        required: Instruction to the least number of it in every instance.
        forbidden: Instructions that no instance may contain.
        max_registers: Of a thread.
        max_step_instructions: Of the loop with the matrix instructions; None: not judged.
        defines: Preprocessor symbols.
    """

    source: Path
    architectures: tuple[str, ...]
    required: Mapping[str, int] = field(default_factory=dict)
    forbidden: tuple[str, ...] = (*NEVER, "I2F")
    max_registers: int = 255
    max_step_instructions: int | None = None
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateRow:
    """What the compiler made of one kernel instance.

    Attributes:
        kernel: Function name.
        instance: Its template arguments; empty for a plain function.
        architecture: e.g. `90a`.
        registers: A thread's.
        spill_bytes: Bytes that spilled registers store and load, as ptxas counts them.
        stack_bytes: Stack frame.
        static_smem_bytes: Shared memory known at compile time (the dynamic part is the launcher's).
        warnings: ptxas warning codes, e.g. `C7513`, of the whole source.
        instructions: Counts of the `COUNTED` mnemonics that occur.
        toolchain: The compiler's release.
        step_instructions: A warp's in one turn of the innermost loop with matrix instructions; None: not counted.
    """

    kernel: str
    instance: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_smem_bytes: int
    warnings: tuple[str, ...]
    instructions: Mapping[str, int]
    toolchain: str
    step_instructions: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the row in the table."""
        return self.kernel, self.instance, self.architecture


def why_not() -> str | None:
    """None when the gates can be measured here, or what is missing."""
    if platform.nvcc() is None:
        return "no nvcc on PATH or under CUDA_HOME; install the CUDA toolkit 12.8 or newer"
    if disassembler() is None:
        return "no cuobjdump; install the CUDA toolkit's binary tools or triton, whose wheel contains it"
    return None


@functools.cache
def disassembler() -> str | None:
    """Path of cuobjdump: the CUDA toolkit's, or the one in triton's wheel."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "cuobjdump").exists():
            return str(Path(home) / "bin" / "cuobjdump")
    found = shutil.which("cuobjdump")
    if found:
        return found
    bundled = triton_tool("cuobjdump")
    return str(bundled) if bundled else None


def triton_tool(name: str) -> Path | None:
    """Path of a program in triton's wheel; found without importing triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def measure(gate: Gate, architecture: str) -> list[GateRow]:
    """Compiles the gate's source for one architecture and reads off every instance.

    Raises:
        MissingDependencyError: nvcc or cuobjdump is absent.
        TokenmillError: It does not compile; carries the compiler's first error.
    """
    reason = why_not()
    compiler = platform.nvcc()
    if reason is not None or compiler is None:
        raise MissingDependencyError("nvcc and cuobjdump", "gpu", f"measuring static gates ({reason})")
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        command = [compiler, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", "-o", str(cubin)]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += [f"-D{define}" for define in gate.defines] + [str(gate.source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or [result.stderr[:400]]
            raise TokenmillError(f"{gate.source.name} does not compile for sm_{architecture}: {errors[0]}")
        counts = count_instructions(disassemble(cubin))
    toolchain = f"nvcc {platform.nvcc_version()}"
    return rows_from_log(result.stderr, counts, architecture, toolchain)


def disassemble(cubin: Path) -> str:
    """The machine code of a cubin as text."""
    program = disassembler()
    if program is None:
        raise MissingDependencyError("cuobjdump", "gpu", "disassembling a kernel")
    return subprocess.run([program, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: byte address, mnemonic without modifiers, operands."""

    address: int
    mnemonic: str
    operands: str


def instructions(sass: str) -> dict[str, list[Instruction]]:
    """Mangled function name to its machine code, in order."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)\S*([^;]*)", line):
            current.append(Instruction(int(match[1], 16), match[2], match[3].strip()))
    return functions


def count_instructions(sass: str) -> dict[str, Counter[str]]:
    """Mangled function name to how often each mnemonic (without its modifiers) occurs in it."""
    counts = {}
    for name, code in instructions(sass).items():
        counts[name] = Counter(instruction.mnemonic for instruction in code)
        for instruction in code:
            if instruction.mnemonic == "HGMMA":
                from_registers = re.match(r"R\d+, R\d+", instruction.operands)
                counts[name][HGMMA_REGISTERS if from_registers else HGMMA_SHARED] += 1
    return counts


def rows_from_log(log: str, counts: Mapping[str, Counter[str]], architecture: str, toolchain: str) -> list[GateRow]:
    """Rows from what `ptxas -v` printed, one for each entry function."""
    warnings = tuple(sorted(set(re.findall(r"\((C7\d\d\d)\)", log))))
    rows = []
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        kernel, instance = _demangled(mangled)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if spills is None or registers is None:
            raise TokenmillError(f"ptxas did not say what {kernel} uses; its -v output has changed")
        smem = re.search(r"(\d+) bytes smem", part)
        rows.append(
            GateRow(
                kernel=kernel,
                instance=instance,
                architecture=architecture,
                registers=int(registers[1]),
                spill_bytes=int(spills[2]) + int(spills[3]),
                stack_bytes=int(spills[1]),
                static_smem_bytes=int(smem[1]) if smem else 0,
                warnings=warnings,
                instructions={name: counts[mangled][name] for name in COUNTED if counts[mangled][name]},
                toolchain=toolchain,
            )
        )
    return sorted(rows, key=lambda row: row.key)


def violations(gate: Gate, row: GateRow) -> list[str]:
    """Every rule of the gate that the row breaks, one line each."""
    broken = []
    if row.spill_bytes or row.stack_bytes:
        broken.append(f"spills {row.spill_bytes} bytes, stack frame {row.stack_bytes} bytes; the limit is 0")
    broken += [f"ptxas warns {code}" for code in row.warnings]
    if row.registers > gate.max_registers:
        broken.append(f"uses {row.registers} registers; the limit is {gate.max_registers}")
    steps, most = row.step_instructions, gate.max_step_instructions
    if most is not None and (steps is None or steps > most):
        broken.append(f"takes {steps} instructions a step; the limit is {most}")
    for name, least in gate.required.items():
        if row.instructions.get(name, 0) < least:
            broken.append(f"has {row.instructions.get(name, 0)} {name}; at least {least} are required")
    broken += [f"contains {name}" for name in gate.forbidden if row.instructions.get(name, 0)]
    where = f"{row.kernel}<{row.instance}> on sm_{row.architecture}"
    return [f"{where}: {rule}" for rule in broken]


def read_table(path: Path = TABLE) -> list[GateRow]:
    """The committed rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        rows.append(GateRow(**{**values, "warnings": tuple(values["warnings"])}))
    return rows


def write_table(rows: Iterable[GateRow], path: Path = TABLE) -> None:
    """Replaces the committed rows; one line each, sorted, so that a change shows as a diff."""
    ordered = sorted(rows, key=lambda row: (*row.key, row.toolchain))
    lines = [json.dumps({name: value for name, value in asdict(row).items() if value is not None}) for row in ordered]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(measured: Sequence[GateRow], committed: Sequence[GateRow]) -> list[str]:
    """Where rows of the same toolchain differ from the committed ones, one line each.

    Another release of the compiler may allocate registers differently: then only the rules of the gate hold, and
    whoever raises the release regenerates the table.
    """
    known = {row.key: row for row in committed}
    lines = []
    for row in measured:
        before = known.get(row.key)
        if before is None:
            lines.append(f"{row.kernel}<{row.instance}> on sm_{row.architecture} is not in the table")
        elif before.toolchain == row.toolchain and before != row:
            changed = {
                name: (getattr(before, name), getattr(row, name))
                for name in (
                    "registers",
                    "spill_bytes",
                    "static_smem_bytes",
                    "warnings",
                    "instructions",
                    "step_instructions",
                )
                if getattr(before, name) != getattr(row, name)
            }
            shown = "; ".join(f"{name}: {old} in the table, {new} now" for name, (old, new) in changed.items())
            lines.append(f"{row.kernel}<{row.instance}> on sm_{row.architecture}: {shown}")
    return lines


def _demangled(mangled: str) -> tuple[str, str]:
    """(function, template arguments) of a mangled name; the mangled name itself where c++filt is missing."""
    program = shutil.which("c++filt")
    if program is None:
        return mangled, ""
    text = subprocess.run([program, mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.removeprefix("void ").replace("(anonymous namespace)::", "")
    end = _matching_end(text)
    name, _, arguments = text[:end].partition("<")
    return name, arguments.removesuffix(">").replace("(bool)0", "false").replace("(bool)1", "true")


def _matching_end(text: str) -> int:
    """Where the parameter list of a demangled name starts: the first `(` outside template brackets."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return index
    return len(text)
