"""The six criteria, each a small strategy: how it ranks the tiers that may answer, and what it has to say.

A rank is a number, the smaller the better; tiers are compared by the first criterion, where equal by the next, and so
on. What must not be overruled (sensitivity, context, capabilities, a key's models) was settled before, in `options`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenmill.engine.gateway.hints import Hints
from tokenmill.engine.gateway.money import dollars
from tokenmill.engine.gateway.router.features import Features
from tokenmill.engine.gateway.router.options import Option
from tokenmill.engine.gateway.router.settings import RoutingSettings, Rule
from tokenmill.engine.gateway.sensitivity.clearance import Clearance


@dataclass(frozen=True)
class Question:
    """Everything that the criteria look at.

    Attributes:
        features: The request at a glance.
        hints: What the client said.
        complexity: How hard it looks, 0 to 1.
        rule: The first rule that holds; None: none does.
        over_soft_limit: Its budget has passed the limit from which cheaper tiers are preferred.
        clearance: What may be done with it; None: anything.
        settings: The configuration.
        refused: Tiers that may not answer, with the reason.
    """

    features: Features
    hints: Hints
    complexity: float
    rule: Rule | None
    over_soft_limit: bool
    clearance: Clearance | None
    settings: RoutingSettings
    refused: dict[str, str]

    @property
    def frugal(self) -> bool:
        """Cost goes before quality."""
        return self.over_soft_limit and self.hints.quality is None

    @property
    def asked_quality(self) -> float:
        """The least quality asked for, the classifier aside."""
        if self.hints.quality is not None:
            return self.hints.quality
        ruled = self.rule.quality if self.rule else None
        return self.settings.quality if ruled is None else ruled

    @property
    def judged(self) -> bool:
        """Whether the classifier has a say: where neither the client nor a rule states what is wanted."""
        return self.hints.quality is None and (self.rule is None or (self.rule.quality is None and not self.rule.tier))


class Criterion(Protocol):
    """One strategy."""

    name: str

    def rank(self, question: Question, option: Option) -> float:
        """The smaller, the better."""
        ...

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """What it has to say about the choice; None: it did not matter."""
        ...


class Sensitivity:
    """Data that must stay where it is: a hard constraint, so it ranks nothing; it says what it took away."""

    name = "sensitivity"

    def rank(self, question: Question, option: Option) -> float:
        """Always 0."""
        return 0.0

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Which zones may see the request."""
        clearance = question.clearance
        if clearance is None or (clearance.zones is None and clearance.action == "allow"):
            return None
        if clearance.zones is None:
            return clearance.why
        return f"{clearance.why}: stays in {' and '.join(sorted(clearance.zones)) or 'no zone'}"


class ContextLength:
    """What does not fit: a hard constraint, too."""

    name = "context"

    def rank(self, question: Question, option: Option) -> float:
        """Always 0."""
        return 0.0

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Which tiers are too small."""
        small = [tier for tier, reason in question.refused.items() if reason.startswith("context")]
        return f"about {question.features.prompt_tokens} tokens are too many for {', '.join(small)}" if small else None


class Budget:
    """A stated most cost, and a budget that has passed its soft limit."""

    name = "cost"

    def rank(self, question: Question, option: Option) -> float:
        """Tiers above the stated cost go last; where money is short, cost comes before everything."""
        most = question.hints.max_cost
        if most is not None and option.cost > most:
            return 1.0 + option.cost
        return float(option.cost) / (1.0 + option.cost) if question.frugal else 0.0

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """What it is expected to cost, and why that mattered."""
        shown = f"about ${dollars(chosen.cost):.6f}"
        if question.frugal:
            return f"{shown}; the budget's soft limit is passed, so the cheapest goes first"
        most = question.hints.max_cost
        if most is not None:
            fits = "within" if chosen.cost <= most else "the least, although above"
            return f"{shown}, {fits} the stated ${dollars(most):.6f}"
        return f"{shown}, the cheapest that will do" if len(options) > 1 else shown


class Rules:
    """The operator's rules go before the classifier, and are part of the same criterion."""

    name = "complexity"

    def rank(self, question: Question, option: Option) -> float:
        """The tier that a rule names goes first."""
        return 0.0 if not (question.rule and question.rule.tier) or option.tier == question.rule.tier else 1.0

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Which rule it was."""
        if question.rule is None or not question.rule.tier:
            return None
        number = question.settings.rules.index(question.rule) + 1
        return f"rule {number} names {question.rule.tier}"


class Quality:
    """The least quality asked for: by the client, a rule or the configuration."""

    name = "quality"

    def rank(self, question: Question, option: Option) -> float:
        """How far the tier falls short."""
        return 0.0 if question.frugal else max(0.0, question.asked_quality - option.quality)

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Whether the tier reaches it."""
        asked = question.asked_quality
        if not asked or question.frugal:
            return None
        reaches = "reaches" if chosen.quality >= asked else "comes nearest, with"
        return f"{chosen.tier} {reaches} {chosen.quality:.2f} of the asked {asked:.2f}"


class Complexity:
    """A request that looks harder than what a tier usually manages goes to a better one."""

    name = "complexity"

    def rank(self, question: Question, option: Option) -> float:
        """How far the tier falls short of what the request seems to need."""
        if question.frugal or not question.judged:
            return 0.0
        return max(0.0, question.complexity - option.quality)

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """How hard it looks."""
        if question.frugal or not question.judged:
            return None
        manages = "manages" if chosen.quality >= question.complexity else "comes nearest, with"
        return f"looks {question.complexity:.2f} hard; {chosen.tier} {manages} {chosen.quality:.2f}"


class Latency:
    """How soon the first token is wanted, against what was seen of the tiers."""

    name = "latency"

    def rank(self, question: Question, option: Option) -> float:
        """`interactive`: whether the limit is kept; `fast`: the expected time itself."""
        wanted = question.hints.latency
        if wanted == "interactive":
            return max(0.0, option.first_token_s - question.settings.interactive_s)
        return option.first_token_s if wanted == "fast" else 0.0

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """What is expected."""
        wanted = question.hints.latency
        if wanted not in ("interactive", "fast"):
            return None
        seen = f"{chosen.first_token_s * 1000:.0f} ms" if chosen.first_token_s else "not measured yet"
        return f"{wanted}: first token expected of {chosen.tier}: {seen}"


class ExpectedCost:
    """Among those that are equal so far, the cheapest; where that is equal, too, the best."""

    name = "cost"

    def rank(self, question: Question, option: Option) -> float:
        """The cost."""
        return float(option.cost)

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """`Budget` speaks for both."""
        return None


#: In the order in which they are asked.
CRITERIA: tuple[Criterion, ...] = (
    Sensitivity(),
    ContextLength(),
    Budget(),
    Rules(),
    Quality(),
    Complexity(),
    Latency(),
    ExpectedCost(),
)


def ranked(question: Question, options: Sequence[Option]) -> list[Option]:
    """The options, the best first; tiers that are down come last, for they may be back in a moment."""
    return sorted(
        options,
        key=lambda option: (
            not option.up,
            *(criterion.rank(question, option) for criterion in CRITERIA),
            -option.quality,
        ),
    )
