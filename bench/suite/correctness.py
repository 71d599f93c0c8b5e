"""The correctness suite of one implementation: examples and shapes at random, poisoned outputs, the same bits twice."""

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tokenmill import platform
from tokenmill.bench.rows import Row
from tokenmill.bench.suite import subjects
from tokenmill.bench.suite.items import Item, Outcome, Skip
from tokenmill.bench.suite.subjects import Subject, subject
from tokenmill.errors import UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.numerics import Fenced, assert_bit_equal, assert_within, max_error
from tokenmill.kernels.spec import Problem

#: Tools of compute-sanitizer that find what a right result can hide.
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Examples that move more are left out where cases have to be small.
_SMALL_BYTES = 1 << 19


def check(
    about: Row, op: str, implementation: str, dtype: str, device: str, cases: int, seconds: float, small: bool
) -> Outcome:
    """Runs an implementation on every example and on shapes at random, until the cases or the seconds are used up.

    Args:
        about: Not used; verdicts carry no figures.
        op: Registered name.
        implementation: As the registry names it.
        dtype: Of the op's defining argument.
        device: Where.
        cases: Shapes at random.
        seconds: No new case is begun after so long.
        small: Small shapes only, for the emulator, the interpreter and the sanitizer.
    """
    found, end = subject(op), time.monotonic() + seconds
    problems = _problems(found, getattr(torch, dtype), device, cases, small)
    done, refusals, worst = 0, [], 0.0
    for seed, problem in enumerate(problems):
        if done and time.monotonic() > end:
            break
        try:
            chosen = subjects.implementation(found.spec, problem, implementation)
        except UnsupportedError as refusal:
            refusals.append(refusal.refusals[implementation])
            continue
        worst = max(worst, _check_one(found, problem, chosen, seed))
        done += 1
    if not done:
        raise Skip(refusals[0] if refusals else "there is no case")
    refused = f", {len(refusals)} refused ({refusals[0]})" if refusals else ""
    return Outcome("proven", f"{done} cases, worst error {worst:.0%} of the limit, same bits twice{refused}")


def _problems(found: Subject, dtype: torch.dtype, device: str, cases: int, small: bool) -> list[Problem]:
    spec, rng = found.spec, random.Random(f"{found.spec.name} {dtype}")
    drawn: list[tuple[dict[str, int], dict[str, Any]]] = [(dict(axes), {}) for axes in spec.examples]
    if found.draw is not None:
        drawn += [found.draw(rng, small) for _ in range(cases)]
    problems = [spec.problem(axes, dtype, device, **options) for axes, options in drawn]
    return [one for one in problems if not small or spec.bytes_moved(one) <= _SMALL_BYTES]


def _check_one(found: Subject, problem: Problem, chosen: registry.Implementation, seed: int) -> float:
    """Raises where the result is wrong; else its error over the limit."""
    spec = found.spec
    inputs = spec.inputs_for(problem, seed)
    accepted = inspect.signature(spec.reference).parameters
    inputs |= {name: value for name, value in problem.options.items() if name in accepted and name not in inputs}
    output = spec.outputs[0]
    sizes = output.sizes(problem.axes)
    dtype = problem.dtype if output.same_dtype_as else output.dtypes[0]
    exact = torch.empty(sizes, dtype=dtype if spec.tolerance.exact else torch.float64, device=problem.device)
    spec.reference(**inputs, out=exact)
    if exact.numel() == 0:
        return 0.0  # the public function does not call the implementation
    results = []
    for _ in range(2):
        fenced = Fenced(sizes, dtype, problem.device)
        chosen.run(**inputs, out=fenced.tensor)
        fenced.check(str(problem))
        results.append(fenced.tensor)
    if spec.tolerance.exact:
        assert_bit_equal(results[0], exact, str(problem))
        assert_bit_equal(results[1], results[0], f"{problem}, second run")
        return 0.0
    limit = found.limit(problem, inputs, exact)
    assert_within(results[0], exact, limit, str(problem))
    assert_bit_equal(results[1], results[0], f"{problem}, second run")
    largest = torch.as_tensor(limit, dtype=torch.float64, device=exact.device).expand_as(exact)
    nonzero = largest > 0
    share = ((results[0].double() - exact).abs() / largest)[nonzero]
    return max_error(share, torch.zeros_like(share))


def sanitize(about: Row, tool: str, op: str, implementation: str, dtype: str) -> Outcome:
    """The same under one tool of compute-sanitizer, on few small cases.

    Args:
        about: Passed on.
        tool: One of `SANITIZERS`.
        op, implementation, dtype: As for `check`.
    """
    program = _sanitizer()
    item = Item(
        "sanitizer",
        tool,
        "tokenmill.bench.suite.correctness:check",
        {
            "op": op,
            "implementation": implementation,
            "dtype": dtype,
            "device": "cuda",
            "cases": 4,
            "seconds": 60.0,
            "small": True,
        },
    )
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"item": vars(item), "about": {}}, file)
        file.flush()
        answer = subprocess.run(
            [
                *(program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"),
                *(sys.executable, "-m", "tokenmill.bench.suite.worker", "--once", file.name),
            ],
            capture_output=True,
            text=True,
            check=False,
            # Torch's allocator would hide accesses beyond a tensor inside its own blocks.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    said = [line for line in (answer.stdout + answer.stderr).splitlines() if line.startswith("=========")]
    errors = [line.strip("= ") for line in said if "Invalid" in line or "Error:" in line or "hazard" in line.lower()]
    if answer.returncode == 9 or errors:
        return Outcome("failed", f"{tool}: {errors[0] if errors else said[-1].strip('= ') if said else 'errors'}")
    if answer.returncode:
        last = (answer.stdout + answer.stderr).strip().splitlines()[-1:]
        return Outcome("failed", f"{tool}: ended with {answer.returncode}: {last[0][:300] if last else 'no message'}")
    return Outcome("proven", f"{tool}: no finding")


def _sanitizer() -> str:
    nvcc = platform.nvcc()
    beside = None if nvcc is None else Path(nvcc).with_name("compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(beside) if beside and beside.exists() else None)
    if program is None:
        raise Skip("compute-sanitizer is neither on the path nor beside nvcc")
    return program
