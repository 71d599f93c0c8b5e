"""One self-contained HTML page from rows: what is proven, the roofs, every figure beside its rivals, plots.

Nothing is loaded from elsewhere and nothing is shown that is not in the rows; light and dark follow the reader.
"""

import html
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenmill.bench import svg
from tokenmill.bench.regressions import Fall
from tokenmill.bench.report import by_name, served, sizes_of, speedup, tables
from tokenmill.bench.rows import Row
from tokenmill.errors import InputError

_STYLE = Path(__file__).with_name("style.css")
#: How many colours each role has in the stylesheet.
_COLOURS = {"ours": 3, "baseline": 3, "rival": 5}
_VERDICTS = ("failed", "skipped", "measured", "proven")


def page(rows: Sequence[Row], falls: Sequence[Fall] = ()) -> str:
    """The whole page.

    Args:
        rows: From any of the product's measurements.
        falls: Ratios that fell, to be named at the top.

    Raises:
        InputError: There are no rows.
    """
    if not rows:
        raise InputError("the files hold no rows; measure with `tokenmill gpu-suite` or `tokenmill bench` first")
    sections = [
        (title, body)
        for title, make in (
            ("What is proven", _proof),
            ("The machine and its roofs", _machine),
            ("INT4 linear layers", _int4),
            ("Other operations", _other_ops),
            ("Serving", _serving),
            ("Gateway", _gateway),
            ("Quantizers", _quantizers),
            ("How it was measured", _commands),
        )
        if (body := make(rows))
    ]
    links = "".join(f'<a href="#{_anchor(title)}">{html.escape(title)}</a>' for title, _ in sections)
    bodies = "".join(f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>{body}' for title, body in sections)
    devices = " · ".join(dict.fromkeys(str(row["device"]) for row in rows if "device" in row))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width">'
        f"<title>Tokenmill: measurements</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f'<h1>Tokenmill: measurements</h1><p class="faint">{html.escape(devices)}</p><nav>{links}</nav>'
        f"{_fallen(falls)}{bodies}"
        "<footer><p>Interpreter and emulator are never timed. What is not here was not measured.</p></footer>"
        "</body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _fallen(falls: Sequence[Fall]) -> str:
    items = "".join(f'<li class="failed">{html.escape(str(fall))}</li>' for fall in falls)
    return f"<h3>Fell behind since the last committed rows</h3><ul>{items}</ul>" if items else ""


def _table(
    head: Sequence[str], body: Iterable[Sequence[str]], text: int = 1, ours: Callable[[int], bool] | None = None
) -> str:
    """A table of cells that are HTML already; the first `text` columns are words."""

    def cell(tag: str, index: int, content: str) -> str:
        return f'<{tag} class="text">{content}</{tag}>' if index < text else f"<{tag}>{content}</{tag}>"

    top = "".join(cell("th", index, html.escape(name)) for index, name in enumerate(head))
    lines = []
    for number, line in enumerate(body):
        mark = ' class="ours"' if ours is not None and ours(number) else ""
        lines.append(f"<tr{mark}>{''.join(cell('td', index, content) for index, content in enumerate(line))}</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _proof(rows: Sequence[Row]) -> str:
    """The last verdict of every item, failures first within a device."""
    last: dict[str, dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in rows:
        if row.get("op") == "suite":
            last[row["device"]][row["step"], row["item"]] = row
    parts = []
    for device, found in last.items():
        verdicts = list(found.values())
        counts = [(name, sum(row["verdict"] == name for row in verdicts)) for name in reversed(_VERDICTS)]
        cards = "".join(f'<div class="card {name}"><b>{count}</b><span>{name}</span></div>' for name, count in counts)
        ordered = sorted(verdicts, key=lambda row: row["verdict"] != "failed")
        body = [
            (
                html.escape(row["step"]),
                html.escape(row["item"]),
                f'<span class="badge {row["verdict"]}">{row["verdict"]}</span>',
                html.escape(row["detail"]),
            )
            for row in ordered
            if row["step"] not in ("machine", "roofs", "speed") or row["verdict"] in ("failed", "skipped")
        ]
        parts.append(f"<h3>{html.escape(device)}</h3><div class='cards'>{cards}</div>")
        parts.append(_table(("step", "what", "verdict", "finding"), body, text=4))
    return "".join(parts)


def _machine(rows: Sequence[Row]) -> str:
    latest = {(row["op"], row["device"]): row for row in rows if row.get("op") in ("machine", "roofs")}
    parts = []
    for device in dict.fromkeys(device for _, device in latest):
        machine, roofs = latest.get(("machine", device), {}), latest.get(("roofs", device), {})
        cards = [
            ("read", roofs.get("read_bytes_per_second"), 1e9, "GB/s"),
            ("copy", roofs.get("copy_bytes_per_second"), 1e9, "GB/s"),
            (f"{roofs.get('flops_dtype', '')} product", roofs.get("flops_per_second"), 1e9, "GFLOP/s"),
            ("bf16 product", roofs.get("bf16_flops_per_second"), 1e12, "TFLOP/s"),
            ("fp8 product", roofs.get("fp8_flops_per_second"), 1e12, "TFLOP/s"),
            ("kernel after kernel", roofs.get("launch_seconds"), 1e-6, "µs"),
        ]
        shown = "".join(
            f'<div class="card"><b>{value / scale:.3g} {unit}</b><span>{html.escape(name)}</span></div>'
            for name, value, scale, unit in cards
            if value
        )
        facts = [
            f"{name} {machine[name]}" for name in ("cpu", "family", "driver", "nvcc", "torch_cuda") if machine.get(name)
        ]
        facts += [f"{name}: {version}" for name, version in machine.get("rivals", {}).items()]
        parts.append(f"<h3>{html.escape(device)}</h3><div class='cards'>{shown}</div>")
        parts.append(f'<p class="faint">{html.escape(", ".join(facts))}</p>' if facts else "")
    return "".join(parts)


def _styles(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Contestant to (CSS class, role), in the order in which they appear."""
    found: dict[str, tuple[str, str]] = {}
    count: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["implementation"] not in found:
            role = row["role"]
            found[row["implementation"]] = (f"series-{role}-{count[role] % _COLOURS[role]}", role)
            count[role] += 1
    return found


def _int4(rows: Sequence[Row]) -> str:
    if not any(row.get("op") == "int4_gemm" for row in rows):
        return ""
    found = tables(rows)
    styles = _styles(row for group in found.values() for row in group)
    parts = [
        "<p>Median time of one call on cold weights; in brackets how many times faster than torch's best dtype on the "
        "dequantised weight. Every result was checked against float64 before it was timed.</p>"
    ]
    for (device, isa, threads, K, N, group), shape in found.items():
        on = f"{device}, {isa}" + (f", {threads} threads" if threads else "")
        parts.append(f"<h3>{html.escape(on)}: K={K}, N={N}, groups of {group}</h3>")
        sizes = sizes_of(shape)
        names = {name: by_size for name, by_size in by_name(shape).items() if any("p50" in r for r in by_size.values())}
        body = [[html.escape(name), *(_time(by_size.get(M), shape) for M in sizes)] for name, by_size in names.items()]
        roles = [next(iter(by_size.values()))["role"] for by_size in names.values()]
        parts.append(_int4_plots(shape, names, styles, f"K={K}, N={N}"))
        parts.append(_table(("", *(f"M={M}" for M in sizes)), body, ours=lambda n, r=tuple(roles): r[n] == "ours"))  # type: ignore[misc]
        parts.append(_reasons(shape))
    return "".join(parts)


def _int4_plots(
    shape: Sequence[Row], names: dict[str, dict[int, Row]], styles: dict[str, tuple[str, str]], title: str
) -> str:
    """Speed against torch's best, and the roofline; one size alone makes no line."""
    measured = [row for row in shape if "p50" in row]
    if len({row["M"] for row in measured}) < 2:
        return ""
    series, dots = [], []
    for name in sorted(names, key=lambda name: styles[name][1] == "ours"):
        by_size = [row for _, row in sorted(names[name].items()) if "p50" in row]
        style, role = styles[name]
        ratios = tuple((row["M"], ratio) for row in by_size if (ratio := speedup(row, shape)) is not None)
        if ratios:
            series.append(svg.Series(name, style, role, ratios))
        points = tuple((row["flops"] / row["bytes"], row["flops"] / row["p50"] / 1e9) for row in by_size)
        dots.append(svg.Series(name, style, role, points))
    if not series:
        return ""
    sizes = sorted({point[0] for one in series for point in one.points})
    x = svg.axis(sizes, "M, rows of activations", sizes)
    y = svg.axis([point[1] for one in series for point in one.points], "times torch's best")
    wide = [row for row in measured if row["activation_bits"] == 16]
    # A roof is no lower than what a kernel showed, whichever run its row comes from.
    bandwidth = max(max(row["read_bytes_per_second"], row["bytes"] / row["p20"]) for row in measured) / 1e9
    peak = max(max(row["flops_per_second"], row["flops"] / row["p20"]) for row in wide) / 1e9
    roofs = f"{bandwidth:.0f} GB/s read, {peak:.0f} GFLOP/s of 16 bits or more"
    plots = svg.lines(series, x, y, f"Speed, {title}", reference=1.0)
    plots += svg.roofline(dots, bandwidth, peak, f"Roofline, {title}: {roofs} (A8 computes in int8)")
    return f'<div class="plots">{plots}</div>'


def _time(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None or "p50" not in row:
        return "–"
    ratio = speedup(row, rows)
    return _seconds(row["p50"]) + ("" if ratio is None else f'<span class="times">({ratio:.2f}x)</span>')


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _reasons(rows: Iterable[Row]) -> str:
    skipped = {row["implementation"]: row["skipped"] for row in rows if "skipped" in row}
    items = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in skipped.items())
    return f'<p class="faint">Not measured:</p><ul class="reasons">{items}</ul>' if items else ""


def _other_ops(rows: Sequence[Row]) -> str:
    """Ops that were measured by their spec: one table a device and op."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "role" in row and row.get("op") not in (None, "int4_gemm"):
            groups[row["op"], row["device"]].append(row)
    parts = []
    for (op, device), found in groups.items():
        axes = [name for name in ("T", "B", "M", "N", "K", "V", "max_spec_len") if any(name in row for row in found)]
        latest = {(*(row.get(axis) for axis in axes), row["implementation"]): row for row in found}
        best: dict[tuple[Any, ...], float] = {}
        for key, row in latest.items():
            if row["role"] != "ours" and "p50" in row:
                best[key[:-1]] = min(best.get(key[:-1], row["p50"]), row["p50"])
        body, ours = [], []
        for key, row in latest.items():
            if "p50" not in row:
                continue
            ratio = f"{best[key[:-1]] / row['p50']:.2f}x" if key[:-1] in best else "–"
            share = f"{row['share_of_read_roof']:.0%}"
            sizes = [str(row.get(axis, "–")) for axis in axes]
            body.append([html.escape(row["implementation"]), *sizes, _seconds(row["p50"]), share, ratio])
            ours.append(row["role"] == "ours")
        parts.append(f"<h3>{html.escape(op)}: {html.escape(device)}</h3>")
        head = ("", *axes, "median", "of read roof", "times the best other")
        parts.append(_table(head, body, ours=lambda number, marks=tuple(ours): marks[number]))  # type: ignore[misc]
        parts.append(_reasons(latest.values()))
    return "".join(parts)


def _serving(rows: Sequence[Row]) -> str:
    parts = []
    for (device, isa, model), found in served(rows).items():
        reasons = {row["variant"]: row["skipped"] for row in found if "skipped" in row}
        latest = {
            (row["workload"], row["concurrency"], row["own_tokens"], row["variant"]): row
            for row in found
            if "skipped" not in row
        }
        variants = list(dict.fromkeys(row["variant"] for row in latest.values()))
        styles = {name: _variant_style(name, variants) for name in variants}
        speed: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
        pace: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
        body, ours = [], []
        for row in latest.values():
            label = f"{row['workload']}, {row['concurrency']} at once"
            speed[label].append((row["variant"], styles[row["variant"]], row["output_tokens_per_second"]))
            pace[label].append((row["variant"], styles[row["variant"]], row["tpot_p50_ms"]))
            body.append([html.escape(row["workload"]), html.escape(row["variant"]), *_cells(row)])
            ours.append(not row["variant"].startswith(("stock", "no-draft")))
        sizes = next(iter(latest.values()))
        parts.append(f"<h3>{html.escape(device)}, {html.escape(isa)}: {html.escape(model)}</h3>")
        bases = html.escape(" or ".join(dict.fromkeys(row.get("compared_with", "stock") for row in latest.values())))
        loads = [row["load_average"] for row in latest.values() if "load_average" in row]
        load = f" Load average {min(loads):.1f} to {max(loads):.1f}." if loads else ""
        parts.append(
            f"<p>vLLM's own client over HTTP, servers side by side, {sizes['rounds']} rounds in turns; in brackets the "
            f"median over the rounds of how many times better than {bases} in the same round. A good request "
            f"has its first token within {sizes['slo_ttft_ms']:g} ms and then one every {sizes['slo_tpot_ms']:g} ms."
            f"{load}</p>"
        )
        plots = svg.bars(speed, "Output tokens per second: more is better", "")
        plots += svg.bars(pace, "Median milliseconds an output token: less is better", "")
        parts.append(f'<div class="plots">{plots}</div>')
        head = (
            "workload",
            "variant",
            "at once",
            "prompt + output",
            "TTFT p50",
            "TPOT p50",
            "tokens/s",
            "good req/s",
            "accepted",
            "J/token",
        )
        parts.append(_table(head, body, text=2, ours=lambda number, marks=tuple(ours): marks[number]))  # type: ignore[misc]
        hooks = [
            f"{row['variant']}: {state}"
            for row in latest.values()
            for hook, state in row["hooks"].items()
            if row["variant"] == hook or row["variant"].startswith(f"{hook}-")
        ]
        hooks += [f"{name}: not measured: {reason}" for name, reason in reasons.items()]
        parts.append("".join(f'<p class="faint">{html.escape(line)}</p>' for line in dict.fromkeys(hooks)))
    return "".join(parts)


def _variant_style(name: str, variants: Sequence[str]) -> str:
    stock = [one for one in variants if one.startswith(("stock", "no-draft"))]
    if name in stock:
        return f"series-baseline-{stock.index(name) % _COLOURS['baseline']}"
    return f"series-ours-{[one for one in variants if one not in stock].index(name) % _COLOURS['ours']}"


def _cells(row: Row) -> list[str]:
    def with_gain(figure: str, gain: str, unit: str) -> str:
        digits = ".0f" if row[figure] >= 1000 else ".3g"
        return f'{row[figure]:{digits}}{unit}<span class="times">({row[gain]:.2f}x)</span>'

    prompt = f"{row['shared_tokens']}+{row['own_tokens']}" if row["shared_tokens"] else str(row["own_tokens"])
    return [
        str(row["concurrency"]),
        f"{prompt} + {row['output_tokens']}",
        with_gain("ttft_p50_ms", "ttft_p50_ms_gain", " ms"),
        with_gain("tpot_p50_ms", "tpot_p50_ms_gain", " ms"),
        with_gain("output_tokens_per_second", "output_tokens_per_second_gain", ""),
        f"{row['good_requests_per_second']:.3g}" if "good_requests_per_second" in row else "–",
        f"{row['accepted_percent']:.0f}%" if "accepted_percent" in row else "–",
        f"{row['joules_per_output_token']:.3g}" if "joules_per_output_token" in row else "–",
    ]


def _gateway(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("op") == "gateway"]
    body = [
        (
            html.escape(row["scenario"]),
            html.escape(row["implementation"]),
            str(row["clients"]),
            f"{row['requests_per_s']:.0f}",
            f"{row['p50_ms']:.2f} ms",
            f"+{row['added_p50_ms']:.2f} ms",
            f"+{row['added_p99_ms']:.2f} ms",
            f"{row['cpu_us_per_request']:.0f} µs",
        )
        for row in found
    ]
    head = ("scenario", "gateway", "clients", "requests/s", "p50", "added p50", "added p99", "CPU a request")
    return (
        _table(head, body, text=2, ours=lambda number: found[number]["implementation"] == "tokenmill") if body else ""
    )


def _quantizers(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("op") == "quantize"]
    body = [
        (
            html.escape(row["implementation"]),
            html.escape(f"{row['method']}, {row['act_order']}, {'symmetric' if row['symmetric'] else 'asymmetric'}"),
            str(row["group_size"]),
            "–" if row["layer_loss_mean"] is None else f"{row['layer_loss_mean']:.3g}",
            f"{row['bits_per_byte_after'] - row['bits_per_byte_before']:+.4f}",
            f"{row['seconds']:.1f} s",
        )
        for row in found
    ]
    head = ("quantizer", "method", "group", "layer loss", "bits per byte", "time")
    return (
        _table(head, body, text=2, ours=lambda number: found[number]["implementation"] == "tokenmill") if body else ""
    )


def _commands(rows: Sequence[Row]) -> str:
    """Each command with its commit, and the versions that took part."""
    seen = {(row["command"], row["commit"], row["device"]): row for row in rows if "command" in row and "commit" in row}
    body = [
        (
            f"<code>{html.escape(command)}</code>",
            html.escape(commit),
            html.escape(device),
            html.escape(", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())),
        )
        for (command, commit, device), row in seen.items()
    ]
    return _table(("command", "commit", "device", "versions"), body, text=4) if body else ""
