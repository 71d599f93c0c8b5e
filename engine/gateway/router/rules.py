"""Which of the operator's rules a request meets."""

from collections.abc import Sequence

from tokenmill.engine.gateway.router.features import Features
from tokenmill.engine.gateway.router.settings import Rule
from tokenmill.engine.gateway.sensitivity.scanner import compile_pattern


class Matcher:
    """Finds the first rule that holds.

    Args:
        rules: In their order.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [
            (rule, compile_pattern(rule.matches.encode("latin-1")) if rule.matches else None) for rule in rules
        ]

    def first(self, features: Features) -> Rule | None:
        """The first rule all of whose conditions hold."""
        for rule, pattern in self._rules:
            if pattern is not None and pattern.search(features.question) is None:
                continue
            if _holds(rule, features):
                return rule
        return None


def _holds(rule: Rule, features: Features) -> bool:
    tokens = features.prompt_tokens
    return (
        (rule.endpoint is None or rule.endpoint == features.endpoint)
        and (rule.min_tokens is None or tokens >= rule.min_tokens)
        and (rule.max_tokens is None or tokens <= rule.max_tokens)
        and (rule.tools is None or rule.tools == ("tools" in features.needs))
    )
