"""Quantiles from the histograms of all workers, as Prometheus' `histogram_quantile` has them."""

import math
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
    found: dict[str, dict[float, float]] = {}
    for family in families:
        if family.name == name:
            for sample, labels, value in family.samples:
                if sample.endswith("_bucket"):
                    buckets = found.setdefault(labels[label], {})
                    bound = float(labels["le"])
                    buckets[bound] = buckets.get(bound, 0.0) + value
    return {
        value: [_quantile(sorted(buckets.items()), share) for share in shares]
        for value, buckets in sorted(found.items())
        if buckets.get(math.inf)
    }


def _quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    rank = share * buckets[-1][1]
    below, low = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return low
            return low + (bound - low) * ((rank - below) / (count - below) if count > below else 1.0)
        below, low = count, bound
    return low
