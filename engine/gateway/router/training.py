"""Fits the classifier's weights to logged outcomes: logistic regression by Newton's method, with a ridge penalty.

(Hastie, Tibshirani, Friedman: The Elements of Statistical Learning, 4.4.1.) A dozen features and some ten thousand
lines take seconds in plain Python, so the gateway needs no numerical library.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.engine.gateway.router.classifier import logistic
from tokenmill.engine.gateway.router.features import FEATURES
from tokenmill.errors import InputError

#: Steps at most; Newton's method needs about eight.
_STEPS = 50
#: Every how manieth line is held out to be judged by.
_HELD_OUT = 5


@dataclass(frozen=True)
class Example:
    """One outcome: the features of a request, and whether the first tier's answer was not good enough."""

    values: Sequence[float]
    hard: bool


@dataclass(frozen=True)
class Fit:
    """Weights and how they do on lines that they were not made from.

    Attributes:
        weights: By feature.
        examples: Lines used, those held out included.
        log_loss: Mean negative log likelihood of the held-out lines, in nats.
        base_log_loss: The same for always saying the mean of the others.
        auc: Probability that a hard request looks harder than an easy one.
    """

    weights: dict[str, float]
    examples: int
    log_loss: float
    base_log_loss: float
    auc: float


def fit(examples: Sequence[Example], ridge: float = 1.0, seed: int = 0) -> Fit:
    """Fits weights to four fifths of the examples and judges them by the rest.

    Args:
        examples: The data, with both outcomes among them.
        ridge: Strength of the penalty on the weights, the bias aside.
        seed: Of the split.

    Raises:
        InputError: Too few examples, all with the same outcome, or features beyond all measure.
    """
    if len(examples) < 50:
        raise InputError(f"{len(examples)} lines are too few to train from; log at least 50, better 2000")
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    held, used = shuffled[::_HELD_OUT], [one for place, one in enumerate(shuffled) if place % _HELD_OUT]
    if len({one.hard for one in used}) < 2 or len({one.hard for one in held}) < 2:
        raise InputError("all outcomes are the same; log good and bad answers")
    weights = _newton(used, ridge)
    if not all(map(math.isfinite, weights)):
        raise InputError("no weights fit these features, which are too large; take the lines that routing.log writes")
    said = [(logistic(_dot(weights, one.values)), one.hard) for one in held]
    mean = sum(one.hard for one in used) / len(used)
    return Fit(
        {name: round(weight, 6) for name, weight in zip(FEATURES, weights, strict=True)},
        len(examples),
        _log_loss(said),
        _log_loss([(mean, hard) for _, hard in said]),
        _auc(said),
    )


def _newton(examples: Sequence[Example], ridge: float) -> list[float]:
    count = len(FEATURES)
    weights = [0.0] * count
    for _ in range(_STEPS):
        gradient = [-ridge * weight if place else 0.0 for place, weight in enumerate(weights)]
        curvature = [[ridge * (row == column and row > 0) + 1e-9 * (row == column) for column in range(count)]
                     for row in range(count)]  # fmt: skip
        for one in examples:
            chance = logistic(_dot(weights, one.values))
            error, spread = one.hard - chance, chance * (1 - chance)
            for row, value in enumerate(one.values):
                if value:
                    gradient[row] += error * value
                    line = curvature[row]
                    for column, other in enumerate(one.values):
                        if other:
                            line[column] += spread * value * other
        step = _solve(curvature, gradient)
        weights = [weight + change for weight, change in zip(weights, step, strict=True)]
        if max(map(abs, step)) < 1e-8:
            break
    return weights


def _solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Solves a positive definite system by Gaussian elimination with pivoting."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for place in range(size):
        pivot = max(range(place, size), key=lambda row: abs(rows[row][place]))
        rows[place], rows[pivot] = rows[pivot], rows[place]
        for row in range(place + 1, size):
            factor = rows[row][place] / rows[place][place]
            if factor:
                rows[row] = [a - factor * b for a, b in zip(rows[row], rows[place], strict=True)]
    found = [0.0] * size
    for place in reversed(range(size)):
        known = sum(rows[place][column] * found[column] for column in range(place + 1, size))
        found[place] = (rows[place][size] - known) / rows[place][place]
    return found


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def _log_loss(said: Sequence[tuple[float, bool]]) -> float:
    return -sum(math.log(max(chance if hard else 1 - chance, 1e-12)) for chance, hard in said) / len(said)


def _auc(said: Sequence[tuple[float, bool]]) -> float:
    """Area under the ROC curve, ties counted half (Mann and Whitney)."""
    ordered = sorted(said)
    hard_count = sum(hard for _, hard in ordered)
    total = 0.0
    place = 0
    while place < len(ordered):
        stop = place
        while stop < len(ordered) and ordered[stop][0] == ordered[place][0]:
            stop += 1
        rank = (place + stop + 1) / 2
        total += rank * sum(hard for _, hard in ordered[place:stop])
        place = stop
    easy = len(ordered) - hard_count
    return (total - hard_count * (hard_count + 1) / 2) / (hard_count * easy)
