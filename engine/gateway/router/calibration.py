"""From logged (confidence, correct) pairs to a threshold: which answers of the first tier may be given.

For a threshold t, the answers with confidence >= t are given and the others escalated. `error` is the share of wrong
ones among those given. The chosen threshold is the lowest whose error is below the limit even at the upper end of its
interval (Wilson's score interval), so that little data makes it cautious. The gateway knows thresholds up to 1, which
gives the answers of confidence 1: where too many of those are wrong, there is none to choose.

Where the second tier's correctness is not logged it counts as always right, and `quality` is then relative to it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from tokenmill.engine.gateway.router.settings import Statistic
from tokenmill.errors import ConfigurationError, InputError

FORMAT = "tokenmill calibration 1"
#: Points of the curve that are written and drawn.
MOST_POINTS = 201
#: Standard deviations of a one-sided 95% bound.
_Z = 1.6448536269514722


@dataclass(frozen=True)
class Sample:
    """One logged answer of the first tier.

    Attributes:
        confidence: What `confidence` said of it.
        correct: Whether it was right.
        then_correct: Whether the second tier's was; None: not known, counts as right.
    """

    confidence: float
    correct: bool
    then_correct: bool | None = None


@dataclass(frozen=True)
class Point:
    """What a threshold does on the data.

    Attributes:
        threshold: Answers with at least this confidence are given.
        escalated: Share of requests that the second tier answers.
        error: Share of wrong answers among those given of the first tier; 0 where none is.
        error_bound: Upper end of its one-sided 95% interval.
        quality: Share of right answers in all.
        cost: Mean cost of a request, in units of one answer of the second tier.
    """

    threshold: float
    escalated: float
    error: float
    error_bound: float
    quality: float
    cost: float


@dataclass(frozen=True)
class Calibration:
    """A threshold and the data behind it.

    Attributes:
        threshold: The chosen one.
        statistic: What confidence means.
        samples: How many answers it was chosen from.
        chosen: What it does on them.
        curve: What others would do.
    """

    threshold: float
    statistic: Statistic
    samples: int
    chosen: Point
    curve: tuple[Point, ...]


def curve(samples: Sequence[Sample], cost_ratio: float) -> list[Point]:
    """The points of every threshold up to 1 that the data can tell apart, from giving all answers to giving the fewest.

    Args:
        samples: The data; at least one.
        cost_ratio: Cost of an answer of the first tier, in units of one of the second.
    """
    ordered = sorted(samples, key=lambda sample: -sample.confidence)
    total = len(ordered)
    then_right = sum(sample.then_correct is not False for sample in ordered)
    given = right = 0
    points = [_point(1.0, 0, 0, then_right, total, cost_ratio)] if ordered[0].confidence < 1 else []
    for place, sample in enumerate(ordered, 1):
        given, right = place, right + sample.correct
        then_right -= sample.then_correct is not False
        if place == total or ordered[place].confidence < sample.confidence:
            points.append(_point(sample.confidence, given, right, then_right, total, cost_ratio))
    points.reverse()
    return points


def _point(threshold: float, given: int, right: int, then_right: int, total: int, cost_ratio: float) -> Point:
    wrong = given - right
    return Point(
        threshold,
        (total - given) / total,
        wrong / given if given else 0.0,
        upper_bound(wrong, given),
        (right + then_right) / total,
        cost_ratio + (total - given) / total,
    )


def upper_bound(events: int, trials: int) -> float:
    """Upper end of Wilson's one-sided 95% score interval of a share (Wilson 1927); 0 without trials."""
    if not trials:
        return 0.0
    share, square = events / trials, _Z * _Z
    spread = _Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return min(1.0, (share + square / (2 * trials) + spread) / (1 + square / trials))


def calibrate(samples: Sequence[Sample], statistic: Statistic, max_error: float, cost_ratio: float) -> Calibration:
    """Chooses a threshold.

    Args:
        samples: The data; at least 20.
        statistic: What their confidence means.
        max_error: Most wrong answers among those given, 0 to 1.
        cost_ratio: Cost of an answer of the first tier, in units of one of the second.

    Raises:
        InputError: Too few samples, or no threshold keeps to `max_error`.
    """
    if len(samples) < 20:
        raise InputError(f"{len(samples)} samples are too few to calibrate from; log at least 20, better 500")
    points = curve(samples, cost_ratio)
    chosen = next((point for point in points if point.error_bound <= max_error), None)
    if chosen is None:
        best = min(points, key=lambda point: point.error_bound)
        raise InputError(
            f"no threshold keeps the wrong ones among the answers given to {max_error:.2%}: the best, "
            f"{best.threshold:.4f}, gives {1 - best.escalated:.1%} of the answers, of which {best.error:.2%} are "
            f"wrong, at most {best.error_bound:.2%} (95%); raise --max-error, or ask the second tier alone"
        )
    shown = points
    if len(points) > MOST_POINTS:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        shown = [points[round(number * step)] for number in range(MOST_POINTS)]
    return Calibration(chosen.threshold, statistic, len(samples), chosen, tuple(shown))


def write(calibration: Calibration, path: Path) -> None:
    """Writes the file that `routing.escalation.calibration` names."""
    path.write_text(json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Calibration:
    """Reads it.

    Raises:
        ConfigurationError: It is missing or no such file.
    """
    remedy = "write it with `tokenmill calibrate`"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON ({error}); {remedy}") from None
    try:
        if content["format"] != FORMAT or content["statistic"] not in get_args(Statistic):
            raise ValueError
        threshold = float(content["threshold"])
        if not 0 <= threshold <= 1:
            raise ValueError
        points = tuple(Point(**point) for point in content["curve"])
        return Calibration(threshold, content["statistic"], int(content["samples"]), Point(**content["chosen"]), points)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigurationError(f"{path} is no calibration; {remedy}") from None
