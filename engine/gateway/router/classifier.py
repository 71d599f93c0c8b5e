"""How hard a request looks: a logistic model on a dozen features.

Its value is the estimated probability that a small model's answer will not do. A tier whose `quality` (the share of
requests that it answers well) is at least that value is expected to manage: of all requests, the share that looks
harder is the share that it fails on.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

from tokenmill.engine.gateway.router.features import FEATURES
from tokenmill.errors import ConfigurationError

FORMAT = "tokenmill router weights 1"
#: Features are below 10 or so: larger weights mean nothing.
_LARGEST = 1e9


def complexity(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The logistic function of the weighted sum of the features, 0 to 1."""
    total = 0.0
    for name, value in values.items():
        total += weights.get(name, 0.0) * value
    return logistic(total)


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


@functools.cache
def bundled() -> Mapping[str, float]:
    """The weights that come with Tokenmill: judgement, not data."""
    return read_weights(Path(__file__).with_name("weights.json"))


def read_weights(path: Path) -> Mapping[str, float]:
    """Reads a file that `tokenmill router train` wrote.

    Raises:
        ConfigurationError: It is missing or no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); train it with `tokenmill router`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON ({error}); write it with `tokenmill router train`") from None
    weights = content.get("weights") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(weights, dict):
        raise ConfigurationError(f"{path} is no file of weights; write it with `tokenmill router train`")
    for name, value in weights.items():
        if name not in FEATURES or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigurationError(f"{path}: weight {name!r}={value!r} is none of {', '.join(FEATURES)}")
        if not -_LARGEST <= value <= _LARGEST:
            raise ConfigurationError(
                f"{path}: weight {name!r}={str(value)[:40]} is not between {-_LARGEST:g} and {_LARGEST:g}"
            )
    return {name: float(value) for name, value in weights.items()}
