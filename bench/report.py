"""Tables in Markdown, and README's performance section made of them.

Nothing is shown that is not in the rows: a figure that is missing reads `-`, a contestant that could not take part is
listed with its reason.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenmill.bench.rows import SERVED, Row, least_disturbed
from tokenmill.errors import InputError

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
#: What one table is about.
_TABLE = ("device", "isa", "threads", "K", "N", "group_size")


def tables(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The least disturbed measurement of INT4 layers in every group: one list a device, instruction set and shape."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in least_disturbed(row for row in rows if row.get("op") == "int4_gemm"):
        found[tuple(row[name] for name in _TABLE)].append(row)
    return dict(found)


def served(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The least disturbed measurement of `tokenmill bench serve` in every group: one list a device and model."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    of_servers = (row for row in rows if row.get("op") == "serve")
    for row in least_disturbed(of_servers, SERVED, _seconds_per_token):
        found[row["device"], row["isa"], row["model"]].append(row)
    return dict(found)


def _seconds_per_token(row: Row) -> float:
    return 1 / row["output_tokens_per_second"] if "output_tokens_per_second" in row else 0.0


def baseline(rows: Iterable[Row], M: int) -> float | None:
    """Seconds of the best torch dtype at M rows of activations; None where none was measured."""
    times = [row["p50"] for row in rows if row["role"] == "baseline" and row["M"] == M and "p50" in row]
    return min(times, default=None)


def speedup(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times faster than torch's best a row is; None where either is missing."""
    best = baseline(rows, row["M"])
    return None if best is None or "p50" not in row else best / row["p50"]


def sizes_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["M"] for row in rows})


def by_name(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row["implementation"]][row["M"]] = row
    return dict(found)


def markdown(rows: Sequence[Row]) -> str:
    """INT4 layers, then serving.

    Raises:
        InputError: There are rows of neither.
    """
    text = "\n".join(filter(None, (_layers(rows), _servers(rows))))
    if not text:
        raise InputError("the files hold no rows of INT4 layers or of serving; measure with `tokenmill bench` first")
    return text


def _servers(rows: Sequence[Row]) -> str:
    """One table a model: medians, and in brackets how many times better than the base."""
    parts = []
    for (device, isa, model), found in served(rows).items():
        loads = [row["load_average"] for row in found if "load_average" in row]
        load = f" (load average up to {max(loads):.1f} while measured)" if loads else ""
        parts.append(
            f"**Serving {model} on {device}, {isa}{_narrowed(found)}: vLLM with and without our hooks**{load}\n"
        )
        bases = " or ".join(dict.fromkeys(row.get("compared_with", "stock") for row in found if "skipped" not in row))
        parts.append(
            f"In brackets: how many times better than {bases}, the median over rounds with the same prompts.\n"
        )
        parts.append("| workload | at once | server | TTFT ms | TPOT ms | output tokens/s |\n|---|---|---|---|---|---|")
        for row in found:
            if "skipped" in row:
                continue
            cells = [
                f"{row[figure]:{'.0f' if row[figure] >= 100 else '.3g'}} ({row[f'{figure}_gain']:.2f}x)"
                for figure in ("ttft_p50_ms", "tpot_p50_ms", "output_tokens_per_second")
            ]
            parts.append(f"| {row['workload']} | {row['concurrency']} | {row['variant']} | {' | '.join(cells)} |")
        skipped = {row["variant"]: row["skipped"] for row in found if "skipped" in row}
        parts += [f"\nNot measured: {name}: {reason}." for name, reason in skipped.items()]
        parts.append("")
    return "\n".join(parts)


def _layers(rows: Sequence[Row]) -> str:
    """One table a shape: milliseconds, and in brackets how many times faster than torch's best dtype."""
    parts = []
    for (device, isa, threads, K, N, group), found in tables(rows).items():
        sizes = sizes_of(found)
        loads = [row["load_average"] for row in found if "load_average" in row]
        load = f" (load average {min(loads):.1f} to {max(loads):.1f} while measured)" if loads else ""
        parts.append(
            f"**{device}, {isa}{_narrowed(found)}{_threads(threads)}; K={K}, N={N}, groups of {group}**{load}\n"
        )
        parts.append("| median ms (times torch's best) | " + " | ".join(f"M={M}" for M in sizes) + " |")
        parts.append("|---" * (len(sizes) + 1) + "|")
        for name, by_size in by_name(found).items():
            cells = [_cell(by_size.get(M), found) for M in sizes]
            if any(cell != "-" for cell in cells):
                parts.append(f"| {name} | " + " | ".join(cells) + " |")
        skipped = {row["implementation"]: row["skipped"] for row in found if "skipped" in row}
        parts += [f"\nNot measured: {name}: {reason}." for name, reason in skipped.items()]
        parts.append("")
    return "\n".join(parts)


def _threads(threads: int | None) -> str:
    return f", {threads} threads" if threads else ""


def _narrowed(rows: Sequence[Row]) -> str:
    """Says so where the processor has more than the instruction set that was used."""
    return " (narrowed by TOKENMILL_ISA)" if "TOKENMILL_ISA=" in rows[0].get("command", "") else ""


def _cell(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None or "p50" not in row:
        return "-"
    ratio = speedup(row, rows)
    return f"{row['p50'] * 1e3:.3g}" + ("" if ratio is None else f" ({ratio:.2f}x)")


def update_readme(path: Path, rows: Sequence[Row]) -> bool:
    """Replaces what is between the markers; whether anything changed.

    Raises:
        InputError: The file lacks the markers.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise InputError(f"{path} has no section between {BEGIN} and {END}; add the two lines where it belongs")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    fresh = f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}"
    if fresh != text:
        path.write_text(fresh, encoding="utf-8")
    return fresh != text
