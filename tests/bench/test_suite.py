"""The suite survives its kernels, goes on where it was killed, and finds planted bugs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.bench import ops
from tokenmill.bench.machines import Cpu, Machine
from tokenmill.bench.roofline import Roofs
from tokenmill.bench.rows import Row, RowFile, read_rows
from tokenmill.bench.suite import command, correctness, hardware, runner, steps, subjects
from tokenmill.bench.suite.items import Item, Outcome
from tokenmill.errors import ConfigurationError, UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.registry import Implementation

HERE = Path(__file__).resolve().parent
ABOUT: Row = {"device": "here", "source": "abc"}
Make = Callable[..., Item]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Items of suite_tasks.py, which workers find beside this file."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def item(what: str, **changes: Any) -> Item:
        return Item("step", what, "suite_tasks:task", {"what": what, "log": str(tmp_path / "log")}, **changes)

    return item


def run(found: list[Item], out: RowFile, seconds: float = 100.0) -> dict[str, tuple[str, str]]:
    verdicts = runner.run(found, ABOUT, out, time.monotonic() + seconds, lambda item, outcome, known: None)
    return {row["item"]: (row["verdict"], row["detail"]) for row in verdicts}


def test_a_worker_that_dies_or_hangs_costs_its_item_only(tmp_path: Path, make: Make) -> None:
    found = [make("crash"), make("wrong"), make("hang", seconds=2.0), make("skip"), make("fine")]
    verdicts = run(found, RowFile(tmp_path / "rows"))
    assert verdicts == {
        "crash": ("failed", "the process ended with 7: last words"),
        "wrong": ("failed", "AssertionError: 4 of 4 values differ"),
        "hang": ("failed", "no answer within 2 s"),
        "skip": ("skipped", "there is no GPU"),
        "fine": ("measured", "fine"),
    }
    rows = read_rows([tmp_path / "rows"])
    assert [row["op"] for row in rows] == ["suite"] * 4 + ["something", "suite"], "figures stand before their verdict"
    assert all(row["device"] == "here" for row in rows)


def test_what_is_there_is_not_repeated_but_failures_are(tmp_path: Path, make: Make) -> None:
    found = [make("fine"), make("wrong"), make("skip")]
    run(found, RowFile(tmp_path / "rows"))
    assert run(found, RowFile(tmp_path / "rows"))["fine"] == ("measured", "fine")
    assert (tmp_path / "log").read_text().split() == ["fine", "wrong", "skip", "wrong", "skip"]
    other = {**ABOUT, "source": "changed"}
    runner.run(found[:1], other, RowFile(tmp_path / "rows"), time.monotonic() + 100, lambda *arguments: None)
    assert (tmp_path / "log").read_text().split()[-1] == "fine", "other sources are measured again"


def test_when_the_time_is_up_the_rest_is_skipped(tmp_path: Path, make: Make) -> None:
    verdicts = run([make("hang"), make("fine")], RowFile(tmp_path / "rows"), seconds=3.0)
    assert verdicts == {
        "hang": ("skipped", "the time was up while it ran"),
        "fine": ("skipped", "the time was up"),
    }


def test_an_item_has_its_environment(tmp_path: Path, make: Make) -> None:
    run([make("fine", environment={"GIVEN": "yes"})], RowFile(tmp_path / "rows"))
    assert read_rows([tmp_path / "rows"])[0]["value"] == "yes"


def test_every_registered_op_and_implementation_is_in() -> None:
    """Also those that are registered later: nothing is listed by hand."""
    for gpu in (False, True):
        names = [item.name for item in steps.items(gpu=gpu)]
        for op in registry.OPS:
            for implementation in registry.names(registry.op_spec(op)):
                if implementation == "reference" or (gpu and implementation in registry.BY_NAME_ONLY):
                    continue
                assert any(name.startswith(f"{op} {implementation} ") for name in names), (op, implementation, gpu)
            assert any(name.startswith(op) for name in names)
    ordered = [item.step for item in steps.items(gpu=True)]
    assert list(dict.fromkeys(ordered)) == list(steps.STEPS), "steps come in the order of value"


def planted(change: Callable[..., Any]) -> Callable[..., Implementation]:
    """The CPU implementation of greedy acceptance with a bug."""
    good = registry.choose(registry.op_spec("spec_verify_greedy"), problem(), "cpu")

    def run(out: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return torch.as_tensor(change(good.run(out=out, **inputs)))

    return lambda spec, problem, name: Implementation("cpu", run, lambda problem: None)


def problem() -> Any:
    return registry.op_spec("spec_verify_greedy").problem({"T": 7, "B": 3, "V": 50, "max_spec_len": 4})


def unwritten(out: torch.Tensor) -> torch.Tensor:
    out[-1, -1] = 0x5A5A5A5A
    return out


def outside(out: torch.Tensor) -> torch.Tensor:
    torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel())[0] = 1
    return out


_calls = [0]


def fickle(out: torch.Tensor) -> torch.Tensor:
    _calls[0] += 1
    out[0, 0] += _calls[0] % 2
    return out


@pytest.mark.parametrize(
    ("bug", "finding"),
    [(unwritten, "values differ in their bits"), (outside, "memory above the buffer"), (fickle, "values differ")],
)
def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, bug: Callable[..., Any], finding: str) -> None:
    arguments = {"op": "spec_verify_greedy", "implementation": "cpu", "dtype": "float32", "device": "cpu"}
    item = Item(
        "correctness",
        "planted",
        "tokenmill.bench.suite.correctness:check",
        {**arguments, "cases": 2, "seconds": 30.0, "small": True},
    )
    assert item.run({}).verdict == "proven"
    monkeypatch.setattr(subjects, "implementation", planted(bug))
    outcome = item.run({})
    assert outcome.verdict == "failed"
    assert finding in outcome.detail


def test_the_limit_of_int4_catches_one_missing_term() -> None:
    """And lets float32 sums with rounded weights pass."""
    found = subjects.subject("int4_gemm")
    axes, options = {"M": 3, "K": 256, "N": 40, "G": 8, "R": 32}, {"group_size": 32, "symmetric": False}
    one = found.spec.problem(axes, torch.bfloat16, **options)
    inputs = found.spec.inputs_for(one)
    exact = torch.empty(3, 40, dtype=torch.float64)
    found.spec.reference(**inputs, activation_bits=16, out=exact)
    limit = torch.as_tensor(found.limit(one, inputs, exact))
    largest = inputs["x"].double().abs().argmax(dim=1)
    weight = subjects.dequantize(subjects.as_weight(**inputs), torch.float64)
    term = inputs["x"].double().gather(1, largest[:, None]) * weight[largest]
    assert (term.abs() > limit).double().mean() > 0.8, "most dropped terms are beyond the limit"
    rounded = inputs["x"].float() @ weight.bfloat16().float() + inputs["bias"].float()
    assert ((rounded.bfloat16().double() - exact).abs() <= limit).all()


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This CPU with roofs that take no time to measure."""
    found = Cpu()
    monkeypatch.setattr(found, "roofs", lambda: Roofs(1e10, 1e11, "float32"))
    return found


def test_torch_as_a_rival_computes_the_same_tokens(cpu: Machine) -> None:
    rows = ops.measure(
        {"op": "spec_verify_greedy"},
        "spec_verify_greedy",
        {"T": 40, "B": 17, "V": 99, "max_spec_len": 3},
        torch.float32,
        cpu,
        rounds=1,
    )
    timed = {row["implementation"] for row in rows if "p50" in row}
    assert {"tokenmill-cpu", "torch"} <= timed
    skipped = {row["implementation"]: row["skipped"] for row in rows if "skipped" in row}
    assert "tokenmill-cuda" in skipped, "who cannot take part is there with the reason"


def test_a_rival_that_is_wrong_or_raises_has_no_time(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        name, role = "wrong", "rival"

        def version(self) -> str:
            return "1"

        def why_not(self, problem: Any) -> None:
            return None

        def prepare(self, problem: Any, inputs: Any) -> Callable[[], torch.Tensor]:
            return lambda: torch.zeros(problem["B"], problem["max_spec_len"] + 1, dtype=torch.int32)

    class Raises(Wrong):
        name = "raises"

        def prepare(self, problem: Any, inputs: Any) -> Callable[[], torch.Tensor]:
            raise RuntimeError("no kernel image")

    monkeypatch.setitem(ops.RIVALS, "spec_verify_greedy", (Wrong(), Raises()))
    axes = {"T": 7, "B": 3, "V": 50, "max_spec_len": 4}
    rows = ops.measure({}, "spec_verify_greedy", axes, torch.float32, cpu, rounds=1)
    found = {row["implementation"]: row for row in rows}
    assert "p50" not in found["wrong"]
    assert "wrong: error" in found["wrong"]["skipped"]
    assert found["raises"]["skipped"] == "it raised RuntimeError: no kernel image"
    assert "p50" in found["tokenmill-cpu"]


def test_bad_arguments_are_one_line() -> None:
    with pytest.raises(ConfigurationError, match="--minutes 0 is not positive"):
        command.main(["--minutes", "0"])
    with pytest.raises(ConfigurationError, match="--steps speed,x"):
        command.main(["--steps", "speed,x"])


def test_a_compiler_that_fails_is_a_failure_and_a_missing_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ninja: Entering directory\nbinding.cpp:19:9: error: 'X' was not declared\ntokenmill build: it failed\n"
    monkeypatch.setattr(hardware.extension, "why_not_loaded", lambda: "it is not built")
    monkeypatch.setattr(hardware.native_build, "find_toolchain", lambda: None)
    monkeypatch.setattr(
        hardware.subprocess, "run", lambda command, **how: subprocess.CompletedProcess(command, 2, said, "")
    )
    item = Item("build", "native library", "tokenmill.bench.suite.hardware:build", {"cuda": True})
    wanted = "`tokenmill build` ended with 2: binding.cpp:19:9: error: 'X' was not declared"
    assert item.run({}) == Outcome("failed", wanted)

    def lacks() -> None:
        raise UnsupportedError("building the native library", {"ninja": "not found; pip install ninja"})

    monkeypatch.setattr(hardware.native_build, "find_toolchain", lacks)
    outcome = item.run({})
    assert outcome.verdict == "skipped"
    assert "pip install ninja" in outcome.detail


def test_without_the_sanitizer_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness.shutil, "which", lambda name: None)
    monkeypatch.setattr(correctness.platform, "nvcc", lambda: None)
    arguments = {"tool": "memcheck", "op": "int4_gemm", "implementation": "cuda", "dtype": "bfloat16"}
    item = Item("sanitizer", "memcheck", "tokenmill.bench.suite.correctness:sanitize", arguments)
    assert item.run({}) == Outcome("skipped", "compute-sanitizer is neither on the path nor beside nvcc")


def test_a_finding_of_the_sanitizer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool runs the very worker; a program with its interface stands in for it."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "job = json.load(open(sys.argv[-1]))['item']['arguments']\n"
        "assert sys.argv[1:3] == ['--tool', 'memcheck'] and job['op'] == 'int4_gemm' and job['small'], sys.argv\n"
        "print('========= Invalid __global__ read of size 16 bytes')\nsys.exit(9)\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(correctness.shutil, "which", lambda name: str(fake))
    outcome = correctness.sanitize({}, "memcheck", "int4_gemm", "cuda", "bfloat16")
    assert outcome == Outcome("failed", "memcheck: Invalid __global__ read of size 16 bytes")


@pytest.mark.emulator
def test_the_reduced_suite_continues_after_a_kill(tmp_path: Path) -> None:
    """The command itself, killed in the middle, started again; nothing may fail on a CPU."""
    arguments = [sys.executable, "-m", "tokenmill", "gpu-suite", "--cpu", "--out", str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if b"micro-tests" in line:
                first.send_signal(signal.SIGKILL)
                break
    kept = [row for row in read_rows([tmp_path / "rows.jsonl"]) if row["op"] == "suite"]
    assert [row["step"] for row in kept][-1] == "primitives"
    answer = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("(from an earlier run)") == len(kept)
    assert "nothing failed" in answer.stdout.splitlines()[-1]
    rows = read_rows([tmp_path / "rows.jsonl"])
    verdicts = {(row["step"], row["item"]): row for row in rows if row["op"] == "suite"}
    assert not [row for row in verdicts.values() if row["verdict"] == "failed"]
    assert len(verdicts) == len(list(steps.items(gpu=False)))
    for op in registry.OPS:
        assert [row for row in rows if row["op"] == op and "p50" in row], f"{op} has figures"
    assert all({"commit", "versions", "command", "device"} <= row.keys() for row in rows)
    json.dumps(rows)


@pytest.mark.gpu
def test_everything_is_right_on_the_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    steps_here = "machine,build,primitives,correctness,sanitizer"
    assert command.main(["--minutes", "20", "--out", str(tmp_path), "--steps", steps_here]) == 0
