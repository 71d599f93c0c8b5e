"""INT4 linear layers: ours, torch and the rivals, in turns, checked before they are timed, on a CPU or a GPU.

One group of rows is one shape and one number of rows of activations. It is measured as a whole, so that its ratios
come from the same minutes, and written as a whole; a run that was ended continues with the next group.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tokenmill.bench import timing
from tokenmill.bench.cuda_timing import Call, Timed
from tokenmill.bench.machines import Machine
from tokenmill.bench.rivals import WRONG, Contestant, Layer, broken, int4_bytes
from tokenmill.bench.roofline import Roofs
from tokenmill.bench.rows import GROUP, Row, RowFile, facts, identity
from tokenmill.bench.shapes import Shape
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight, dequantize
from tokenmill.kernels.numerics import Tolerance, max_error

#: What is not measured twice: the same, by the same sources.
_MEASURED = ("source", *GROUP)


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        shapes: (K, N) of the layers.
        rows: Numbers of rows of activations.
        group_size: Of the weights; symmetric, bfloat16 scales.
        rounds: Turns of each contestant.
        command: The words by which the user can repeat it.
    """

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    group_size: int
    rounds: int
    command: tuple[str, ...]


def measure(
    plan: Plan,
    contestants: Sequence[Contestant],
    machine: Machine,
    out: RowFile,
    say: Callable[[str], None],
) -> None:
    """Measures every group that `out` lacks and appends it.

    Args:
        plan: Shapes and sizes.
        contestants: Who takes part; one that cannot gets a row with the reason.
        machine: Where.
        out: Where rows go.
        say: Told about each group in one line.
    """
    about = {**facts(plan.command, machine.name), "isa": machine.kind, "threads": machine.threads}
    done = {identity(row, _MEASURED) for row in out.rows}
    for K, N in plan.shapes:
        sizes = {"K": K, "N": N, "group_size": min(plan.group_size, K)}
        groups: list[Row] = [{"op": "int4_gemm", **about, **sizes, "M": M} for M in plan.rows]
        missing = [group for group in groups if identity(group, _MEASURED) not in done]
        if len(missing) < len(groups):
            say(f"{K}x{N}: {len(groups) - len(missing)} of {len(groups)} groups are in {out.path.name} already")
        if not missing:
            continue
        for rows in measure_shape(missing, contestants, machine, plan.rounds):
            out.append(rows)
            say(summary(rows))


def random_weight(K: int, N: int, group_size: int, device: torch.device) -> Int4Weight:
    """A seeded symmetric weight with bfloat16 scales."""
    generator = torch.Generator(device).manual_seed(K * 31 + N)
    words = -(-K // CODES_PER_WORD)
    codes = torch.randint(-(2**31), 2**31, (words, N), generator=generator, dtype=torch.int64, device=device).int()
    if K % CODES_PER_WORD:
        codes[-1] &= (1 << (4 * (K % CODES_PER_WORD))) - 1
    scales = torch.rand(-(-K // group_size), N, generator=generator, device=device) * 0.02 + 0.001
    return Int4Weight(codes, scales.bfloat16(), group_size, K)


@dataclass
class _Ring:
    """Copies of one contestant's weight, used one after the other so that each call finds its weight in memory."""

    contestant: Contestant
    layers: list[Layer]

    def calls(self, x: torch.Tensor) -> list[Call]:
        """One call without arguments a copy."""
        return [lambda layer=layer: layer.call(x) for layer in self.layers]  # type: ignore[misc]


def measure_shape(
    groups: Sequence[Row], contestants: Sequence[Contestant], machine: Machine, rounds: int
) -> Iterator[list[Row]]:
    """The rows of each group of one shape, group by group.

    Args:
        groups: Fields that the rows of a group share; `K`, `N`, `group_size` and `M` say what is measured.
        contestants: Who takes part.
        machine: Where.
        rounds: Turns of each contestant.
    """
    K, N, group_size = (groups[0][name] for name in ("K", "N", "group_size"))
    refusals = {one.name: one.why_not(K, N, group_size) for one in contestants}
    weight = random_weight(K, N, group_size, machine.device)
    roofs = machine.roofs()
    rings: list[_Ring] = []
    ring_bytes = machine.ring_bytes(sum(reason is None for reason in refusals.values()))
    for contestant in contestants:
        if refusals[contestant.name] is None:
            try:
                first = contestant.prepare(weight)
                row = torch.zeros(1, K, dtype=contestant.dtype, device=machine.device)
                first.call(row)
                rest = [contestant.prepare(weight) for _ in range(timing.copies(first.nbytes, ring_bytes) - 1)]
                # What was only ever written is slower to read the first time; a server reads it often.
                for layer in rest:
                    layer.call(row)
                rings.append(_Ring(contestant, [first, *rest]))
            except Exception as error:  # noqa: BLE001 - one that raises is a row, too
                refusals[contestant.name] = broken(error)
    exact_weight = dequantize(weight, torch.float64)
    for group in groups:
        x = (
            torch.randn(group["M"], K, generator=torch.Generator().manual_seed(group["M"]))
            .bfloat16()
            .to(machine.device)
        )
        inputs = {dtype: x.to(dtype) for dtype in {ring.contestant.dtype for ring in rings}}
        limits = _limits(x, weight, exact_weight)
        refused, errors = dict(refusals), {}
        for ring in rings:
            try:
                errors[ring.contestant.name] = _worst(ring, inputs, limits)
            except Exception as error:  # noqa: BLE001 - one that raises is a row, too
                refused[ring.contestant.name] = broken(error)
        right = [ring for ring in rings if errors.get(ring.contestant.name, math.inf) <= limits.of(ring.contestant)]
        before, started = machine.state(), time.time()
        timed = machine.take_turns(
            {ring.contestant.name: ring.calls(inputs[ring.contestant.dtype]) for ring in right}, rounds
        )
        kept = [(ring, timed[ring.contestant.name].sample.least) for ring in right]
        roofs = roofs.raised(
            (_moved(ring, weight, group["M"]) / seconds for ring, seconds in kept),
            (2 * group["M"] * K * N / seconds for ring, seconds in kept if ring.contestant.activation_bits == 16),
        )
        shared: Row = {
            **group,
            **_busiest(before, machine.state()),
            "time": int(started),
            "read_bytes_per_second": roofs.read_bytes_per_second,
            "flops_per_second": roofs.flops_per_second,
            "flops_dtype": roofs.flops_dtype,
        }
        by_name = {ring.contestant.name: ring for ring in rings}
        yield [
            {
                **shared,
                "implementation": one.name,
                "role": one.role,
                "version": one.version(),
                "dtype": str(one.dtype).removeprefix("torch."),
                "activation_bits": one.activation_bits,
                **_result(one, by_name.get(one.name), refused, errors, limits, timed, shared, roofs, weight),
            }
            for one in contestants
        ]


def _result(
    one: Contestant,
    ring: _Ring | None,
    refusals: Mapping[str, str | None],
    errors: Mapping[str, float],
    limits: "_Limits",
    timed: Mapping[str, Timed],
    shared: Row,
    roofs: Roofs,
    weight: Int4Weight,
) -> Row:
    """The figures of one contestant, or why there are none."""
    if ring is None or refusals[one.name] is not None:
        return {"skipped": refusals[one.name]}
    checked = {"max_error": errors[one.name], "error_limit": limits.of(one)}
    if one.name not in timed:
        return {**checked, "skipped": f"{WRONG} error {errors[one.name]:.3g} where {limits.of(one):.3g} is allowed"}
    sample, M = timed[one.name].sample, shared["M"]
    nbytes, flops = _moved(ring, weight, M), 2 * M * weight.K * weight.N
    return {
        **checked,
        "p20": sample.p20,
        "p50": sample.p50,
        "p80": sample.p80,
        "calls": sample.count,
        "timing": timed[one.name].method,
        "do_bench_seconds": timed[one.name].do_bench_seconds,
        "bytes": nbytes,
        "flops": flops,
        "floor_seconds": roofs.floor_seconds(int4_bytes(weight) + 2 * M * (weight.K + weight.N), flops),
        "share_of_read_roof": nbytes / sample.p50 / roofs.read_bytes_per_second,
    }


def _busiest(before: Row, after: Row) -> Row:
    """The machine's state after a group, with the higher of two load averages."""
    return {**after, **{name: max(before[name], after[name]) for name in ("load_average",) if name in after}}


def _moved(ring: _Ring, weight: Int4Weight, M: int) -> int:
    """Bytes that one call has to move: the weight in the contestant's format, activations and results."""
    return ring.layers[0].nbytes + ring.contestant.dtype.itemsize * M * (weight.K + weight.N)


@dataclass(frozen=True)
class _Limits:
    """The exact result of a group, and the error that each kind of arithmetic may make."""

    exact: torch.Tensor
    sixteen: float
    eight: float

    def of(self, contestant: Contestant) -> float:
        """The allowed largest error."""
        return self.eight if contestant.activation_bits == 8 else self.sixteen


def _limits(x: torch.Tensor, weight: Int4Weight, exact_weight: torch.Tensor) -> _Limits:
    """Limits for bfloat16 activations.

    Sixteen bits: twice the error of plain torch with weight and result rounded to bfloat16. Eight bits: that, and six
    standard deviations of the noise of rounding each activation to 127 steps of its group's largest.
    """
    exact = x.double() @ exact_weight
    plain = (x.float() @ exact_weight.bfloat16().float()).bfloat16()
    sixteen = Tolerance(factor=2.0).bound(exact, plain)
    padded = torch.nn.functional.pad(x.float(), (0, -weight.K % weight.group_size))
    groups = padded.view(x.shape[0], -1, weight.group_size)
    step = groups.abs().amax(2).repeat_interleave(weight.group_size, 1)[:, : weight.K] / 127
    noise = ((step.square() / 12) @ exact_weight.float().square()).sqrt()
    return _Limits(exact, sixteen, sixteen + 6 * float(noise.max()))


def _worst(ring: _Ring, inputs: Mapping[torch.dtype, torch.Tensor], limits: _Limits) -> float:
    """The largest error over all copies; infinite where a result has NaN."""
    x = inputs[ring.contestant.dtype]
    worst = max(max_error(layer.call(x), limits.exact) for layer in ring.layers[:2])
    return math.inf if math.isnan(worst) else worst


def summary(rows: Sequence[Row]) -> str:
    """One line about a group: everybody's median, and ours against torch's best."""
    first = rows[0]
    times = {row["implementation"]: row["p50"] for row in rows if "p50" in row}
    torch_best = min((row["p50"] for row in rows if row["role"] == "baseline" and "p50" in row), default=math.nan)
    parts = [f"{name} {seconds * 1e3:.3f} ms ({torch_best / seconds:.2f}x)" for name, seconds in times.items()]
    load = f" load {first['load_average']}" if "load_average" in first else ""
    return f"{first['K']}x{first['N']} M={first['M']}{load}: {', '.join(parts)}"
