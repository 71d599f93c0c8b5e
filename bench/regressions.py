"""Whether ours fell behind a rival since the rows that were committed last: ratios are compared, never times.

A ratio is taken within one measurement, so another clock or a neighbour's load meets both sides.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenmill.bench.rows import SERVED, Row

#: A ratio may fall by so much.
ALLOWED_FALL = 0.05
#: What tells measurements of one thing apart, whatever the op.
_SIZES = ("K", "N", "M", "group_size", "T", "B", "V", "max_spec_len", "dtype")
_GAINS = ("output_tokens_per_second_gain", "ttft_p50_ms_gain", "tpot_p50_ms_gain")


@dataclass(frozen=True)
class Fall:
    """A ratio that fell: what was measured, against whom, before and now (above 1: ours is faster)."""

    what: str
    rival: str
    before: float
    now: float

    def __str__(self) -> str:
        return f"{self.what} against {self.rival}: {self.before:.3f}x before, {self.now:.3f}x now"


def ratios(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """(device, what, rival) to how many times faster ours is, by the last measurement of each.

    Rows of an op are compared within their measurement (`time`); rows of `bench serve` carry their own gains.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    found: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.get("op") == "serve":
            what = " ".join(str(row.get(name)) for name in SERVED[2:])
            for gain in _GAINS:
                if gain in row and row["variant"] != "stock":
                    found[row["device"], f"serve {what}: {row['variant']}, {gain}", "stock"] = row[gain]
        elif "p50" in row and "role" in row:
            sizes = tuple((name, row[name]) for name in _SIZES if name in row)
            key = (row["op"], row["device"], row.get("isa"), row.get("threads"), sizes, row.get("time"))
            groups.setdefault(key, []).append(row)
    for (op, device, isa, _, sizes, _), measured in groups.items():
        size = " ".join(f"{name}={value}" for name, value in sizes)
        for ours in measured:
            for other in measured:
                if ours["role"] == "ours" and other["role"] != "ours":
                    what = f"{op} {size}, {isa}, {ours['implementation']}"
                    found[device, what, other["implementation"]] = other["p50"] / ours["p50"]
    return found


def falls(now: Sequence[Row], before: Sequence[Row], allowed: float = ALLOWED_FALL) -> list[Fall]:
    """Every ratio of `now` that is more than `allowed` below the same ratio of `before`, the worst first."""
    old = ratios(before)
    fallen = [
        Fall(what, rival, old[device, what, rival], ratio)
        for (device, what, rival), ratio in ratios(now).items()
        if (device, what, rival) in old and ratio < (1 - allowed) * old[device, what, rival]
    ]
    return sorted(fallen, key=lambda fall: fall.now / fall.before)


def compared(now: Sequence[Row], before: Sequence[Row]) -> int:
    """How many ratios both have."""
    old: Mapping[tuple[str, str, str], float] = ratios(before)
    return sum(key in old for key in ratios(now))
