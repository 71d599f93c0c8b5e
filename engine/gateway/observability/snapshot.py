"""The figures of one process in a form that can be written down, and added to those of the others."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

#: Families that say how things are now: a process that has ended has none of it.
_MOMENTARY = "gauge"


class Family(msgspec.Struct, array_like=True):
    """One metric with its samples: (name, labels, value)."""

    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


def total(snapshots: Sequence[Sequence[Family]], live: Sequence[bool]) -> list[Family]:
    """The sums over processes, in the order in which families and samples are first met.

    Args:
        snapshots: One per process.
        live: Whether that process still runs; counts of one that ended stay, its gauges go.
    """
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for snapshot, lives in zip(snapshots, live, strict=True):
        for family in snapshot:
            if family.kind == _MOMENTARY and not lives:
                continue
            families.setdefault(family.name, family)
            sums = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, tuple(labels.items()))
                known = sums.get(key, 0.0)
                # A backend is up when any worker reaches it; everything else adds up.
                sums[key] = max(known, value) if family.name.endswith("_up") else known + value
    return [
        Family(
            name, family.text, family.kind, [(sample, dict(labels), v) for (sample, labels), v in values[name].items()]
        )
        for name, family in families.items()
    ]


class _Fixed(CollectorRegistry):
    """Families that were taken before, for the exposition format."""

    def __init__(self, families: Iterable[Family]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric


def text(families: Iterable[Family]) -> bytes:
    """The families in Prometheus' text format."""
    return generate_latest(_Fixed(families))
