"""Any registered op against plain torch and its rivals: inputs, costs and limits come from its `OpSpec`.

An op whose weights are packed once, like `int4_gemm`, has a benchmark of its own (`kernels.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

import tokenmill
from tokenmill.bench import timing
from tokenmill.bench.machines import Machine
from tokenmill.bench.rivals import WRONG, broken
from tokenmill.bench.rivals_verify import TorchGreedy, VllmGreedy
from tokenmill.bench.rows import Row
from tokenmill.kernels import registry
from tokenmill.kernels.numerics import max_error, poisoned
from tokenmill.kernels.spec import OpSpec, Problem


class Rival(Protocol):
    """Another way to compute an op.

    Attributes:
        name: In the rows.
        role: `baseline`: plain torch; `rival`: another project's.
    """

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Literal["baseline", "rival"]: ...

    def version(self) -> str:
        """Its package and version."""
        ...

    def why_not(self, problem: Problem) -> str | None:
        """None when it can, else why it is not measured."""
        ...

    def prepare(self, problem: Problem, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """A call that returns the op's result for these inputs."""
        ...


#: Op to who else computes it.
RIVALS: dict[str, tuple[Rival, ...]] = {"spec_verify_greedy": (TorchGreedy(), VllmGreedy())}


@dataclass(frozen=True)
class _Ours:
    """One implementation of the registry, writing into a buffer of its own."""

    spec: OpSpec
    name: str
    implementation: str
    role: Literal["ours"] = "ours"

    def version(self) -> str:
        return f"tokenmill {tokenmill.__version__}"

    def why_not(self, problem: Problem) -> str | None:
        return registry.explain(self.spec, problem).refusals.get(self.implementation)

    def prepare(self, problem: Problem, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        chosen = registry.choose(self.spec, problem, self.implementation)
        output = self.spec.outputs[0]
        dtype = problem.dtype if output.same_dtype_as else output.dtypes[0]
        out = poisoned(output.sizes(problem.axes), dtype, problem.device)

        def call() -> torch.Tensor:
            chosen.run(**inputs, out=out)
            return out

        return call


def measure(
    shared: Row, name: str, axes: dict[str, int], dtype: torch.dtype, machine: Machine, rounds: int
) -> list[Row]:
    """One row a contestant.

    Args:
        shared: Fields of every row.
        name: The registered op.
        axes: Sizes.
        dtype: Of the op's defining argument.
        machine: Where.
        rounds: Turns of each.
    """
    spec = registry.op_spec(name)
    problem = spec.problem(axes, dtype, machine.device)
    skipped = ("reference", *registry.BY_NAME_ONLY)
    ours = [_Ours(spec, f"tokenmill-{one}", one) for one in registry.names(spec) if one not in skipped]
    contestants: Sequence[_Ours | Rival] = [*ours, *RIVALS.get(name, ())]
    nbytes, flops = spec.bytes_moved(problem), spec.flops(problem)
    ring = [spec.inputs_for(problem, seed) for seed in range(timing.copies(nbytes, machine.ring_bytes()))]
    refusals = {one.name: one.why_not(problem) for one in contestants}
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {}
    for one in contestants:
        if refusals[one.name] is None:
            try:
                calls[one.name] = [one.prepare(problem, inputs) for inputs in ring]
                calls[one.name][0]()
            except Exception as error:  # noqa: BLE001 - one that raises is a row, too
                calls.pop(one.name, None)
                refusals[one.name] = broken(error)
    limits, errors = _checked(spec, problem, ring[0], {who: found[0] for who, found in calls.items()})
    right = {who: found for who, found in calls.items() if errors[who] <= limits}
    timed = machine.take_turns(right, rounds)
    roofs = machine.roofs().raised((nbytes / one.sample.least for one in timed.values()), ())
    rows: list[Row] = []
    for one in contestants:
        row: Row = {**shared, **axes, "dtype": str(dtype).removeprefix("torch."), **machine.state()}
        row |= {"implementation": one.name, "role": one.role, "version": one.version()}
        if refusals[one.name] is not None:
            rows.append({**row, "skipped": refusals[one.name]})
            continue
        row |= {"max_error": errors[one.name], "error_limit": limits}
        if one.name not in timed:
            rows.append({**row, "skipped": f"{WRONG} error {errors[one.name]:.3g} where {limits:.3g} is allowed"})
            continue
        sample = timed[one.name].sample
        row |= {"p20": sample.p20, "p50": sample.p50, "p80": sample.p80, "calls": sample.count}
        row |= {"timing": timed[one.name].method, "do_bench_seconds": timed[one.name].do_bench_seconds}
        row |= {"bytes": nbytes, "flops": flops, "read_bytes_per_second": roofs.read_bytes_per_second}
        row["floor_seconds"] = nbytes / roofs.read_bytes_per_second
        row["share_of_read_roof"] = nbytes / sample.p50 / roofs.read_bytes_per_second
        rows.append(row)
    return rows


def _checked(
    spec: OpSpec, problem: Problem, inputs: dict[str, Any], calls: dict[str, Callable[[], torch.Tensor]]
) -> tuple[float, dict[str, float]]:
    """The allowed error and each contestant's."""
    output = spec.outputs[0]
    dtype = problem.dtype if output.same_dtype_as else output.dtypes[0]
    exact = torch.empty(
        output.sizes(problem.axes), dtype=dtype if spec.tolerance.exact else torch.float64, device=problem.device
    )
    spec.reference(**inputs, out=exact)
    limit = spec.tolerance.bound(exact, exact.to(dtype))
    errors = {who: max_error(call(), exact) for who, call in calls.items()}
    return limit, {who: math.inf if math.isnan(error) else error for who, error in errors.items()}
