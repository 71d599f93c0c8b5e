"""Tables, plots and one self-contained page from rows; README's performance section.

Nothing is shown that is not in the rows: a figure that is missing reads `-`, a contestant that could not take part is
listed with its reason.
"""

import base64
import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenmill.bench.rows import Row, least_disturbed
from tokenmill.errors import InputError, MissingDependencyError

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
#: What one table is about.
_TABLE = ("device", "isa", "threads", "K", "N", "group_size")
_COLOURS = {"ours": "#0b5cad", "baseline": "#8a8a8a", "rival": "#c2570c"}
_MARKERS = "osD^vP*X"


def tables(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The least disturbed measurement of every group, one list a device, instruction set and shape."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in least_disturbed(row for row in rows if row.get("op") == "int4_gemm"):
        found[tuple(row[name] for name in _TABLE)].append(row)
    if not found:
        raise InputError("the files hold no rows of int4_gemm; measure with `tokenmill bench int4 --cpu` first")
    return dict(found)


def baseline(rows: Iterable[Row], M: int) -> float | None:
    """Seconds of the best torch dtype at M rows of activations; None where none was measured."""
    times = [row["p50"] for row in rows if row["role"] == "baseline" and row["M"] == M and "p50" in row]
    return min(times, default=None)


def speedup(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times faster than torch's best a row is; None where either is missing."""
    best = baseline(rows, row["M"])
    return None if best is None or "p50" not in row else best / row["p50"]


def _sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({row["M"] for row in rows})


def _by_name(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row["implementation"]][row["M"]] = row
    return dict(found)


def markdown(rows: Sequence[Row]) -> str:
    """One table a shape: milliseconds, and in brackets how many times faster than torch's best dtype."""
    parts = []
    for (device, isa, threads, K, N, group), found in tables(rows).items():
        sizes = _sizes(found)
        loads = [row["load_average"] for row in found]
        parts.append(
            f"**{device}, {isa}{_narrowed(found)}, {threads} threads; K={K}, N={N}, groups of {group}** "
            f"(load average {min(loads):.1f} to {max(loads):.1f} while measured)\n"
        )
        parts.append("| median ms (times torch's best) | " + " | ".join(f"M={M}" for M in sizes) + " |")
        parts.append("|---" * (len(sizes) + 1) + "|")
        for name, by_size in _by_name(found).items():
            cells = [_cell(by_size.get(M), found) for M in sizes]
            if any(cell != "-" for cell in cells):
                parts.append(f"| {name} | " + " | ".join(cells) + " |")
        skipped = {row["implementation"]: row["skipped"] for row in found if "skipped" in row}
        parts += [f"\nNot measured: {name}: {reason}." for name, reason in skipped.items()]
        parts.append("")
    return "\n".join(parts)


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


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes tables.md, one PNG a device and instruction set, and report.html with all of it inside.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(rows)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    machines: dict[tuple[Any, ...], list[list[Row]]] = defaultdict(list)
    for key, found in tables(rows).items():
        machines[key[:3]].append(found)
    written = [folder / "tables.md"]
    images = []
    for number, shapes in enumerate(machines.values(), 1):
        path = folder / f"int4-{number}-{shapes[0][0]['isa']}.png"
        _plot(shapes, path)
        images.append(path)
    page = folder / "report.html"
    page.write_text(_page(text, images), encoding="utf-8")
    return [*written, *images, page]


def _plot(shapes: Sequence[list[Row]], path: Path) -> None:
    """Two rows of panels, one column a shape: speed against torch's best, and the roofline."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingDependencyError("matplotlib", "bench", "tokenmill report") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(shapes), figsize=(7.5 * len(shapes), 10), squeeze=False)
    first = shapes[0][0]
    figure.suptitle(f"INT4 linear layers: {first['device']}, {first['isa']}, {first['threads']} threads", fontsize=15)
    for column, rows in enumerate(shapes):
        ratio, roof = axes[0][column], axes[1][column]
        for index, (name, by_size) in enumerate(_by_name(rows).items()):
            measured = [by_size[M] for M in sorted(by_size) if "p50" in by_size[M]]
            if not measured:
                continue
            ours = measured[0]["role"] == "ours"
            style = {
                "label": name,
                "marker": _MARKERS[index % len(_MARKERS)],
                "color": _COLOURS[measured[0]["role"]],
                "linewidth": 2.4 if ours else 1.2,
                "linestyle": "-" if index % 2 == 0 else "--",
            }
            ratio.plot([row["M"] for row in measured], [speedup(row, rows) for row in measured], **style)
            intensity = [row["flops"] / row["bytes"] for row in measured]
            roof.plot(intensity, [row["flops"] / row["p50"] / 1e9 for row in measured], **style)
        _dress(ratio, roof, rows)
    names, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(names, labels, loc="lower center", ncols=len(labels), fontsize=10, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def _dress(ratio: Any, roof: Any, rows: Sequence[Row]) -> None:
    """Axes, roofs and legends of one shape's two panels."""
    sizes = _sizes(rows)
    ratio.axhline(1, color="black", linewidth=0.8)
    ratio.set_xscale("log", base=2)
    ratio.set_yscale("log", base=2)
    ratio.set_xticks(sizes, [str(M) for M in sizes])
    ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8]
    ratio.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    ratio.set_xlabel("M, rows of activations")
    ratio.set_ylabel("speed against torch's best dtype")
    ratio.set_title(f"K={rows[0]['K']}, N={rows[0]['N']}")
    points = [row["flops"] / row["bytes"] for row in rows if "p50" in row]
    if points:
        low, high = min(points), max(points)
        measured = [row for row in rows if "p50" in row]
        wide = [row for row in measured if row["activation_bits"] == 16]
        # A roof is no lower than what a kernel showed, whichever run its row comes from.
        bandwidth = max(max(row["read_bytes_per_second"], row["bytes"] / row["p20"]) for row in measured) / 1e9
        peak = max(max(row["flops_per_second"], row["flops"] / row["p20"]) for row in wide) / 1e9
        bend = peak / bandwidth
        roof.plot(
            [low, bend, max(high, bend)],
            [low * bandwidth, peak, peak],
            color="black",
            linewidth=1.5,
            label=f"roofs: {bandwidth:.0f} GB/s read, {peak:.0f} GFLOP/s {rows[0]['flops_dtype']}",
        )
    roof.set_xscale("log", base=2)
    roof.set_yscale("log", base=10)
    roof.set_title("A8 rows compute in int8, which the arithmetic roof does not bound", fontsize=10)
    roof.set_xlabel("FLOP per byte that has to move")
    roof.set_ylabel("GFLOP/s")
    for axis in (ratio, roof):
        axis.grid(True, which="major", color="#dddddd")
    roof.legend(handles=roof.lines[-1:], fontsize=9, loc="lower right")


def _page(text: str, images: Sequence[Path]) -> str:
    pictures = "".join(
        f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in images
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222;"
        "background:#fff}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;"
        "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tokenmill: measurements</title>'
        f"<style>{style}</style><h1>Tokenmill: measurements</h1>{pictures}{_as_html(text)}</html>\n"
    )


def _as_html(text: str) -> str:
    """The few forms that `markdown` writes: tables and paragraphs."""
    parts: list[str] = []
    table: list[str] = []

    def close() -> None:
        if table:
            parts.append("<table>" + "".join(table) + "</table>")
            table.clear()

    for line in text.splitlines():
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            tag = "td" if table else "th"
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            table.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
            continue
        close()
        if line.strip():
            parts.append(f"<p>{html.escape(line).replace('**', '')}</p>")
    close()
    return "".join(parts)
