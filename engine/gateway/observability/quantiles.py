"""Quantiles from the histograms of all workers, as Prometheus' `histogram_quantile` has them."""

from collections.abc import Sequence

from tokenmill.engine.gateway.observability.snapshot import Family


def quantiles(families: Sequence[Family], name: str, label: str, shares: Sequence[float]) -> dict[str, list[float]]:
    """By a label's value, the histogram's quantiles; linear within a bucket, its last finite bound beyond.

    Args:
        families: Metrics.
        name: The histogram.
        label: Whose values to tell apart; all others are added.
        shares: Which quantiles, 0 to 1.
    """
    found: dict[str, list[float]] = {}
    bounds: tuple[float, ...] = ()
    for family in families:
        if family.name == name:
            at, bounds = family.labels.index(label), family.bounds
            for values, (*counts, _) in family.series:
                known = found.get(values[at])
                found[values[at]] = counts if known is None else list(map(float.__add__, known, counts))
    return {
        value: [_quantile(bounds, counts, share) for share in shares]
        for value, counts in sorted(found.items())
        if sum(counts)
    }


def _quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float:
    rank = share * sum(counts)
    below, low = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= rank:
            return low + (bound - low) * ((rank - below) / count if count else 1.0)
        below, low = below + count, bound
    return low
