"""Charts as inline SVG: no package, no network, and colours that follow the page's light or dark scheme.

Colours are CSS classes (`series-ours-0`, `series-rival-2`, ...) that the page defines.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 46
_DASHES = {"ours": "", "baseline": "5 4", "rival": ""}


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: In the legend.
        style: Its CSS class, `series-ROLE-NUMBER`.
        role: `ours`, `baseline` or `rival`.
        points: (x, y), in order of x; both positive.
    """

    name: str
    style: str
    role: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis.

    Attributes:
        label: What it shows, with the unit.
        ticks: Where it is labelled.
        low: Its smaller end.
        high: Its larger end.
    """

    label: str
    ticks: tuple[float, ...]
    low: float
    high: float

    def place(self, value: float, start: float, end: float) -> float:
        """The coordinate of a value between those of the axis's ends."""
        span = math.log(self.high / self.low) or 1.0
        return start + (end - start) * math.log(value / self.low) / span


def axis(values: Sequence[float], label: str, ticks: Sequence[float] | None = None) -> Axis:
    """An axis around positive values; ticks at powers of two or ten unless they are given."""
    low, high = min(values), max(values)
    if ticks is None:
        base = 10.0 if high / low > 200 else 2.0
        first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
        ticks = [base**power for power in range(first, max(last, first + 1) + 1)]
    return Axis(label, tuple(ticks), min(low, *ticks), max(high, *ticks))


def lines(series: Sequence[Series], x: Axis, y: Axis, title: str, reference: float | None = None) -> str:
    """A line chart on two logarithmic axes.

    Args:
        series: What is drawn, the most important last, on top.
        x: Horizontal.
        y: Vertical.
        title: Also read aloud.
        reference: A value of y at which a line across marks equality.
    """
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    parts = [_frame(x, y, left, right, top, bottom)]
    if reference is not None:
        level = y.place(reference, bottom, top)
        parts.append(f'<line class="reference" x1="{left}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}"/>')
    for one in series:
        places = [(x.place(a, left, right), y.place(b, bottom, top)) for a, b in one.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        dash = f' stroke-dasharray="{_DASHES[one.role]}"' if _DASHES[one.role] else ""
        width = 3 if one.role == "ours" else 1.8
        parts.append(f'<polyline class="{one.style}" fill="none" stroke-width="{width}"{dash} points="{path}"/>')
        for (a, b), (_, value) in zip(places, one.points, strict=True):
            tip = html.escape(f"{one.name}: {value:.3g}")
            parts.append(
                f'<circle class="{one.style} dot" cx="{a:.1f}" cy="{b:.1f}" r="3.4"><title>{tip}</title></circle>'
            )
    return _figure(title, parts, _HEIGHT, series)


def roofline(points: Sequence[Series], bandwidth: float, peak: float, title: str) -> str:
    """Achieved GFLOP/s over FLOP per byte under the two roofs.

    Args:
        points: Dots, without lines.
        bandwidth: GB/s.
        peak: GFLOP/s.
        title: Also read aloud.
    """
    every = [point for one in points for point in one.points]
    bend = peak / bandwidth
    x = axis([*(a for a, _ in every), bend], "FLOP per byte that has to move")
    y = axis([*(b for _, b in every), peak, x.low * bandwidth], "GFLOP/s")
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    roof = [(x.low, x.low * bandwidth), (bend, peak), (x.high, peak)]
    path = " ".join(f"{x.place(a, left, right):.1f},{y.place(b, bottom, top):.1f}" for a, b in roof)
    parts = [_frame(x, y, left, right, top, bottom), f'<polyline class="roof" fill="none" points="{path}"/>']
    for one in points:
        radius = 4.5 if one.role == "ours" else 3.2
        for a, b in one.points:
            tip = html.escape(f"{one.name}: {b:.3g} GFLOP/s at {a:.3g} FLOP/byte")
            place = f'cx="{x.place(a, left, right):.1f}" cy="{y.place(b, bottom, top):.1f}"'
            parts.append(f'<circle class="{one.style} dot" {place} r="{radius}"><title>{tip}</title></circle>')
    return _figure(title, parts, _HEIGHT, points)


def bars(groups: Mapping[str, Sequence[tuple[str, str, float]]], title: str, unit: str) -> str:
    """Horizontal bars, group by group.

    Args:
        groups: Group's label to (name, CSS class, value).
        title: Also read aloud.
        unit: Behind each value.
    """
    most = max((value for group in groups.values() for _, _, value in group), default=1.0) or 1.0
    left, row, gap = 190, 19, 16
    parts, y = [], 8
    for label, group in groups.items():
        middle = y + row * len(group) / 2
        parts.append(
            f'<text class="group" x="0" y="{middle:.1f}" dominant-baseline="middle">{html.escape(label)}</text>'
        )
        for name, style, value in group:
            width = max(1.0, (_WIDTH - left - 70) * value / most)
            tip = html.escape(f"{name}: {value:.4g}{unit}")
            parts.append(
                f'<rect class="{style} bar" x="{left}" y="{y + 2}" width="{width:.1f}" height="{row - 4}" rx="2">'
                f"<title>{tip}</title></rect>"
                f'<text class="value" x="{left + width + 6:.1f}" y="{y + row / 2:.1f}" dominant-baseline="middle">'
                f"{value:.3g}{unit}</text>"
            )
            y += row
        y += gap
    names = {name: style for group in groups.values() for name, style, _ in group}
    series = [Series(name, style, "ours", ()) for name, style in names.items()]
    return _figure(title, parts, y, series)


def _frame(x: Axis, y: Axis, left: float, right: float, top: float, bottom: float) -> str:
    parts = []
    skip = -(-len(x.ticks) // 9)
    for index, tick in enumerate(x.ticks):
        place = x.place(tick, left, right)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}"/>')
        if index % skip == 0:
            parts.append(f'<text x="{place:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(tick)}</text>')
    for tick in y.ticks:
        place = y.place(tick, bottom, top)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{place + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{bottom + 38}" text-anchor="middle">{html.escape(x.label)}</text>'
    )
    height = (top + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y.label)}</text>"
    )
    return "".join(parts)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:g}k" if value < 1_000_000 else f"{value / 1e6:g}M"
    return f"{value:.4g}"


def _figure(title: str, parts: Sequence[str], height: float, series: Sequence[Series]) -> str:
    keys = "".join(
        '<li><svg class="key" viewBox="0 0 12 12" aria-hidden="true">'
        f'<rect class="{one.style} bar" width="12" height="12" rx="3"/></svg>{html.escape(one.name)}</li>'
        for one in sorted(series, key=lambda one: ("ours", "baseline", "rival").index(one.role))
    )
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg><ul class="legend">{keys}</ul></figure>'
    )
