"""Figures: ours against torch and every rival that is there, each result checked before it is timed."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from tokenmill.bench import kernels, ops
from tokenmill.bench.machines import machine
from tokenmill.bench.rivals import RAISED, WRONG, Contestant, all_contestants
from tokenmill.bench.rows import Row
from tokenmill.bench.suite.items import Outcome


def int4(
    about: Row, K: int, N: int, group_size: int, rows: Sequence[int], cpu: bool, rounds: int, quick: bool
) -> Outcome:
    """INT4 layers of one shape.

    Args:
        about: Fields of every row.
        K, N, group_size: The weight.
        rows: Numbers of rows of activations.
        cpu: On this CPU instead of the GPU.
        rounds: Turns of each contestant.
        quick: Only those that need no import of seconds.
    """
    where = machine(cpu=cpu)
    contestants: list[Contestant] = [
        one for one in all_contestants(cpu=cpu) if not (quick and one.name in ("vllm-wna16", "onnxruntime-acc4"))
    ]
    shared: Row = {"op": "int4_gemm", **about, "isa": where.kind, "threads": where.threads}
    groups: list[Row] = [{**shared, "K": K, "N": N, "group_size": group_size, "M": M} for M in rows]
    made = [row for found in kernels.measure_shape(groups, contestants, where, rounds) for row in found]
    return _outcome(made)


def op(about: Row, name: str, axes: dict[str, int], dtype: str, cpu: bool, rounds: int) -> Outcome:
    """Any registered op by its spec: each implementation that can, plain torch, and the op's rivals."""
    where = machine(cpu=cpu)
    shared: Row = {"op": name, **about, "isa": where.kind, "threads": where.threads, "time": int(time.time())}
    return _outcome(ops.measure(shared, name, axes, getattr(torch, dtype), where, rounds))


def _outcome(rows: Sequence[Row]) -> Outcome:
    """Measured, or failed where one of ours is wrong; the line says how ours stands against the best of the others."""
    ours_skipped = [row for row in rows if row["role"] == "ours" and "skipped" in row]
    wrong = [row for row in ours_skipped if row["skipped"].startswith((RAISED, WRONG))]
    if wrong:
        return Outcome("failed", f"{wrong[0]['implementation']}: {wrong[0]['skipped']}", tuple(rows))
    parts = []
    for key in dict.fromkeys(_size(row) for row in rows):
        group = [row for row in rows if _size(row) == key and "p50" in row]
        ours = min((row for row in group if row["role"] == "ours"), key=lambda row: row["p50"], default=None)
        others = min((row for row in group if row["role"] != "ours"), key=lambda row: row["p50"], default=None)
        if ours is not None:
            against = "" if others is None else f", {others['p50'] / ours['p50']:.2f}x {others['implementation']}"
            floor = f", {ours['floor_seconds'] / ours['p50']:.0%} of the floor"
            parts.append(f"{key}{ours['implementation']} {ours['p50'] * 1e6:.1f} us{floor}{against}")
    if not parts:
        reasons = "; ".join(f"{row['implementation']}: {row['skipped']}" for row in ours_skipped)
        return Outcome("measured", f"none of ours can: {reasons}", tuple(rows))
    return Outcome("measured", "; ".join(parts), tuple(rows))


def _size(row: dict[str, Any]) -> str:
    return f"M={row['M']} " if "M" in row else ""
