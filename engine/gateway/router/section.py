"""The configuration's `routing` section."""

from collections.abc import Collection, Mapping
from pathlib import Path

import re2
from pydantic import Field, field_validator, model_validator

from tokenmill.engine.gateway.router import calibration, classifier
from tokenmill.engine.gateway.router.settings import AUTO, EscalationSettings, RoutingSettings, Statistic
from tokenmill.engine.gateway.router.settings import Rule as RuleSettings
from tokenmill.engine.gateway.sections import Section
from tokenmill.engine.gateway.sensitivity.scanner import compile_pattern
from tokenmill.errors import ConfigurationError


class Rule(Section):
    """Goes before the classifier: the first rule whose conditions all hold decides."""

    matches: str | None = Field(
        None,
        description="Regular expression (RE2) that the user's last message must match; of a long one, its first "
        "or last 4 KiB.",
        min_length=1,
    )
    endpoint: str | None = Field(None, description="The request's path, e.g. `/v1/chat/completions`.", pattern=r"^/")
    min_tokens: int | None = Field(None, description="Least estimated tokens of the prompt.", ge=0)
    max_tokens: int | None = Field(None, description="Most estimated tokens of the prompt.", ge=0)
    tools: bool | None = Field(None, description="Whether the request must, or must not, offer tools.")
    tier: str | None = Field(None, description="This tier goes first, where it is allowed.")
    quality: float | None = Field(None, description="The quality asked for, where the client does not say.", ge=0, le=1)

    @field_validator("matches")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                compile_pattern(value.encode("latin-1"))
        except (re2.error, UnicodeEncodeError) as error:
            raise ValueError(f"{value!r} is no RE2 pattern of Latin-1 characters ({error})") from None
        return value

    @model_validator(mode="after")
    def _decides_something(self) -> "Rule":
        if (self.tier is None) == (self.quality is None):
            raise ValueError("a rule names either a 'tier' or a 'quality'; add one of them")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"no request has at least {self.min_tokens} and at most {self.max_tokens} tokens; exchange "
                "'min_tokens' and 'max_tokens'"
            )
        return self


class Escalation(Section):
    """Ask one tier first and another one only where the first is not sure of its answer."""

    first: str = Field(description="The tier that is asked first; its backends need the capability `logprobs`.")
    then: str = Field(description="The tier that takes over.")
    threshold: float | None = Field(
        None, description="Confidence from which the first answer is good enough; or name `calibration`.", ge=0, le=1
    )
    calibration: str | None = Field(
        None, description="File of `tokenmill calibrate`, which gives threshold and statistic.", min_length=1
    )
    statistic: Statistic | None = Field(
        None,
        description="`lowest_tenth` (of the token probabilities), `mean`, `lowest_window` (of eight tokens); default: "
        "`lowest_tenth`; beside a `calibration` it can only repeat what that says.",
    )
    hold_tokens: int | None = Field(
        None, description="Tokens of a stream that are held back and judged; default: all.", ge=1, le=100_000
    )
    allowance_seconds: float = Field(
        30.0, description="From the request's start; after that nothing is escalated.", gt=0, le=3600
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> "Escalation":
        if (self.threshold is None) == (self.calibration is None):
            raise ValueError("escalation needs either a 'threshold' or a 'calibration'; give one of them")
        if self.first == self.then:
            raise ValueError(f"escalation goes from {self.first!r} to itself; name another tier in 'then'")
        return self

    def settings(self) -> EscalationSettings:
        """What the workers are told; raises `ConfigurationError` where the calibration cannot be had."""
        threshold, statistic = self.threshold, self.statistic
        if self.calibration is not None:
            found = calibration.read(Path(self.calibration))
            if statistic not in (None, found.statistic):
                raise ConfigurationError(
                    f"routing.escalation: {self.calibration} holds a threshold of {found.statistic!r}, which says "
                    f"nothing about {statistic!r}; leave 'statistic' out, or calibrate with --statistic {statistic}"
                )
            threshold, statistic = found.threshold, found.statistic
        assert threshold is not None
        return EscalationSettings(
            self.first, self.then, threshold, statistic or "lowest_tenth", self.hold_tokens, self.allowance_seconds
        )


class Routing(Section):
    """How requests for the model `auto` are routed, and in which order zones are asked. Without it: not at all."""

    name: str = Field(AUTO, description="The model name that stands for the router's choice.", min_length=1)
    quality: float = Field(
        0.0, description="The least tier quality, where neither the client nor a rule says.", ge=0, le=1
    )
    interactive_ms: float = Field(
        1000.0, description="Time to the first token that `x-tokenmill-latency: interactive` asks for.", gt=0
    )
    completion_tokens: int = Field(300, description="Tokens expected of an answer, for its cost.", ge=1)
    weights: str | None = Field(
        None, description="File of `tokenmill router train`; default: weights that come with Tokenmill.", min_length=1
    )
    rules: list[Rule] = Field(default_factory=list, description="Rules that go before the classifier.")
    burst: bool = Field(
        True, description="Backends in other zones (edge, then cloud) may take what nearer ones of their tier cannot."
    )
    burst_queue: int | None = Field(
        None,
        description="Open requests at every nearer backend from which others take over, in equal parts for each "
        "worker, at least 1; default: when full.",
        ge=1,
    )
    log: str | None = Field(
        None, description="File that gets a line of features and outcome per routed request, no text.", min_length=1
    )
    escalation: Escalation | None = Field(None, description="Ask a better tier where the first is not sure.")

    def names_tiers(self, tiers: Mapping[str, Collection[str]]) -> None:
        """Checks what is named here.

        Args:
            tiers: Each with what any of its backends is capable of.

        Raises:
            ValueError: A tier does not exist, cannot do its part, or has the router's name.
        """
        named = [rule.tier for rule in self.rules if rule.tier is not None]
        if self.escalation is not None:
            named += [self.escalation.first, self.escalation.then]
        for name in named:
            if name not in tiers:
                raise ValueError(f"routing names the tier {name!r}, which does not exist; known: {', '.join(tiers)}")
        if self.escalation is not None and "logprobs" not in tiers[self.escalation.first]:
            raise ValueError(
                f"escalation asks {self.escalation.first!r} for log probabilities, which none of its backends gives; "
                "add 'logprobs' to the capabilities of those that do"
            )
        if self.name in tiers:
            raise ValueError(f"routing.name {self.name!r} is the name of a tier; give one of them another name")

    def settings(self) -> RoutingSettings:
        """What the workers are told; raises `ConfigurationError` where a file cannot be read."""
        return RoutingSettings(
            self.name,
            self.quality,
            self.interactive_ms / 1000,
            self.completion_tokens,
            None if self.weights is None else classifier.read_weights(Path(self.weights)),
            tuple(RuleSettings(**rule.model_dump()) for rule in self.rules),
            self.burst,
            self.burst_queue,
            None if self.log is None else str(Path(self.log).absolute()),
            None if self.escalation is None else self.escalation.settings(),
        )
