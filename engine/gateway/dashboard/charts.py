"""Small charts as inline SVG, without scripts or inline styles: colours come from the style sheet by class."""

from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup

WIDTH, HEIGHT = 380, 130
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 4, 8, 20


def area(values: Sequence[float], starts: Sequence[int], unit: str, kind: str, scale: float = 1.0) -> Markup:
    """Values per minute as an area with its axis; the last minute, which is not over, is pale.

    Args:
        values: One per minute.
        starts: When each begins, in milliseconds.
        unit: For the tooltips.
        kind: Class of the curve, for its colour.
        scale: What a value is divided by to be shown.
    """
    shown = [value / scale for value in values]
    top = _round_up(max(shown, default=0.0))
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(shown))
    bottom = HEIGHT - _BOTTOM
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{unit} by minute">']
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(top * share)}</text>'
        )
    for index, (value, start) in enumerate(zip(shown, starts, strict=True)):
        x = _LEFT + index * step
        height = (bottom - _TOP) * value / top if top else 0
        said = f"{clock(start)}: {short(value)} {unit}"
        pale = " pale" if index == len(shown) - 1 else ""
        parts.append(
            f'<g class="bar {kind}{pale}"><title>{said}</title>'
            f'<rect class="hit" x="{x:.1f}" y="{_TOP}" width="{step:.1f}" height="{bottom - _TOP}"/>'
            f'<rect x="{x + step * 0.1:.1f}" y="{bottom - height:.1f}" width="{step * 0.8:.1f}" height="{height:.1f}" '
            f'rx="1.5"/></g>'
        )
    for index in range(0, len(shown), 15):
        anchor = "start" if index == 0 else "middle"
        x = _LEFT + index * step + (0 if index == 0 else step / 2)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{clock(starts[index])}</text>'
        )
    if starts:
        parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">now</text>')
    return Markup("".join(parts) + "</svg>")  # noqa: S704 - numbers and our own words only


def meter(share: float, *, mark: float | None = None, held: float = 0.0, good: bool = False) -> Markup:
    """A bar from 0 to 1; above nine tenths it warns, full it alarms.

    Args:
        share: How much is used.
        mark: Where a line stands, e.g. a soft limit.
        held: Used in a moment, perhaps: drawn pale behind.
        good: More is better: never warns.
    """
    share = min(max(share, 0.0), 1.0)
    kind = "plain" if good else "full" if share >= 1 else "high" if share >= 0.9 else "plain"
    parts = [f'<svg class="meter {kind}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">']
    parts.append('<rect class="track" width="100" height="8" rx="2"/>')
    if held > 0:
        parts.append(f'<rect class="held" width="{min(100.0, 100 * (share + held)):.1f}" height="8"/>')
    parts.append(f'<rect class="used" width="{100 * share:.1f}" height="8"/>')
    if mark is not None and 0 < mark < 1:
        parts.append(f'<rect class="mark" x="{100 * mark:.1f}" width="0.8" height="8"/>')
    return Markup("".join(parts) + "</svg>")  # noqa: S704


def short(value: float) -> str:
    """A number in few characters: `0`, `0.00008`, `0.25`, `12.3`, `456`, `7.8k`, `9M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if abs(value) >= 0.01 or value == 0 else f"{value:.6f}".rstrip("0")


def money(micro_cents: float) -> str:
    """Micro-cents as dollars, with as many decimals as the amount deserves."""
    amount = micro_cents / 1e8
    if amount == 0:
        return "$0"
    if abs(amount) >= 1:
        return f"${amount:,.2f}"
    return f"${amount:.4f}" if abs(amount) >= 0.001 else f"${amount:.6f}" if abs(amount) >= 1e-6 else "<$0.000001"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"


def clock(at: int) -> str:
    """Milliseconds as hours and minutes, UTC."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%H:%M")


def _round_up(value: float) -> float:
    """The next number that reads well on an axis."""
    if value <= 0:
        return 1.0
    size = 1.0
    while size > value:
        size /= 10
    while size * 10 <= value:
        size *= 10
    return next(size * step for step in (1, 2, 4, 5, 6, 8, 10) if size * step >= value)
