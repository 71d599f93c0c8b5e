"""The six criteria, each a small strategy: how it ranks the tiers that may answer, and what it has to say.

The smaller a rank, the better; tiers are compared by the first criterion, where equal by the next, and so on. A
criterion ranks all of them in one call, and none where it does not matter: most requests bring neither hints nor rules,
and two criteria decide. What must not be overruled (sensitivity, context, capabilities, a key's models) was settled
before, in `options`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenmill.engine.gateway.decision import Reason
from tokenmill.engine.gateway.hints import Hints
from tokenmill.engine.gateway.money import dollars
from tokenmill.engine.gateway.router.features import Features
from tokenmill.engine.gateway.router.observed import Observed
from tokenmill.engine.gateway.router.options import Option
from tokenmill.engine.gateway.router.settings import RoutingSettings, Rule
from tokenmill.engine.gateway.sensitivity.clearance import Clearance


@dataclass(slots=True)
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
        observed: Times to the first token.
        frugal: Cost goes before quality.
        asked_quality: The least quality asked for, the classifier aside.
        judged: Whether the classifier has a say: where neither the client nor a rule states what is wanted.
        needed: What a tier must manage to do.
    """

    features: Features
    hints: Hints
    complexity: float
    rule: Rule | None
    over_soft_limit: bool
    clearance: Clearance | None
    settings: RoutingSettings
    refused: dict[str, str]
    observed: Observed
    frugal: bool = field(init=False)
    asked_quality: float = field(init=False)
    judged: bool = field(init=False)
    needed: float = field(init=False)

    def __post_init__(self) -> None:
        # Once, not whenever a criterion asks.
        hinted, rule = self.hints.quality, self.rule
        ruled = rule.quality if rule else None
        self.frugal = self.over_soft_limit and hinted is None
        if hinted is not None:
            self.asked_quality = hinted
        else:
            self.asked_quality = self.settings.quality if ruled is None else ruled
        self.judged = hinted is None and (rule is None or (ruled is None and not rule.tier))
        self.needed = max(self.asked_quality, self.complexity) if self.judged else self.asked_quality


#: What the options are to one criterion, in their order; None: it makes no difference between them.
Ranks = Sequence[float | tuple[float, float]] | None


class Ranking(Protocol):
    """One strategy, as it compares."""

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """The smaller, the better."""
        ...


class Speaking(Protocol):
    """One strategy, as it explains itself."""

    name: str

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """What it has to say about the choice; None: it did not matter."""
        ...


class Sensitivity:
    """Data that must stay where it is: a hard constraint, so it ranks nothing; it says what it took away."""

    name = "sensitivity"

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Which zones and regions may see the request."""
        clearance = question.clearance
        if clearance is None:
            return None
        if clearance.zones is None and clearance.regions is None:
            return None if clearance.action == "allow" else clearance.why
        places = [*sorted(clearance.zones or ()), *(f"region {region}" for region in sorted(clearance.regions or ()))]
        return f"{clearance.why}: stays in {' and '.join(places) or 'no zone'}"


class ContextLength:
    """What does not fit: a hard constraint, too."""

    name = "context"

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Which tiers are too small."""
        if not question.refused:
            return None
        small = [tier for tier, reason in question.refused.items() if reason.startswith("context")]
        if not small:
            return None
        features = question.features
        answer = f" and {features.completion_limit} of the answer" if features.completion_limit else ""
        return f"about {features.at_once} tokens{answer} are too many for {', '.join(small)}"


class Budget:
    """A stated most cost, and a budget that has passed its soft limit."""

    name = "cost"

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """Tiers above the stated cost go last; where money is short, cost comes before everything."""
        most, frugal = question.hints.max_cost, question.frugal
        if most is None and not frugal:
            return None
        within = [option.cost / (1.0 + option.cost) if frugal else 0.0 for option in options]
        if most is None:
            return within
        return [1.0 + one.cost if one.cost > most else rank for one, rank in zip(options, within, strict=True)]

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """What it is expected to cost, and why that mattered."""
        shown = f"about ${dollars(chosen.cost):.6f}"
        if question.frugal:
            return f"{shown}; the budget's soft limit is passed, so the cheapest goes first"
        most = question.hints.max_cost
        if most is not None:
            fits = "within" if chosen.cost <= most else "the least, although above"
            return f"{shown}, {fits} the stated ${dollars(most):.6f}"
        if len(options) > 1 and _is_cheapest_that_will_do(question, chosen, options):
            return f"{shown}, the cheapest that will do"
        return shown


class Rules:
    """The operator's rules go before the classifier, and are part of the same criterion."""

    name = "complexity"

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """The tier that a rule names goes first."""
        named = question.rule.tier if question.rule else None
        return [0.0 if option.tier == named else 1.0 for option in options] if named else None

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Which rule it was."""
        if question.rule is None or not question.rule.tier:
            return None
        number = question.settings.rules.index(question.rule) + 1
        return f"rule {number} names {question.rule.tier}"


class Quality:
    """The least quality asked for: by the client, a rule or the configuration."""

    name = "quality"

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """How far the tier falls short."""
        asked = question.asked_quality
        if not asked or question.frugal:
            return None
        return [asked - option.quality if asked > option.quality else 0.0 for option in options]

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """Whether the tier reaches it."""
        asked = question.asked_quality
        if not asked or question.frugal:
            return None
        return (
            f"{chosen.tier} {_manages(chosen, options, asked, 'reaches')} {chosen.quality:.2f} of the asked {asked:.2f}"
        )


class Complexity:
    """A request that looks harder than what a tier usually manages goes to a better one."""

    name = "complexity"

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """How far the tier falls short of what the request seems to need."""
        if question.frugal or not question.judged:
            return None
        needed = question.complexity
        return [needed - option.quality if needed > option.quality else 0.0 for option in options]

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """How hard it looks."""
        if question.frugal or not question.judged:
            return None
        manages = _manages(chosen, options, question.complexity, "manages")
        return f"looks {question.complexity:.2f} hard; {chosen.tier} {manages} {chosen.quality:.2f}"


class Latency:
    """How soon the first token is wanted, against what was seen of the tiers."""

    name = "latency"

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """`interactive`: whether the limit is kept; `fast`: the expected time itself."""
        wanted = question.hints.latency
        if wanted not in ("interactive", "fast"):
            return None
        waits = [question.observed.soonest_s(option.first) for option in options]
        return waits if wanted == "fast" else [max(0.0, wait - question.settings.interactive_s) for wait in waits]

    def verdict(self, question: Question, chosen: Option, options: Sequence[Option]) -> str | None:
        """What is expected."""
        wanted = question.hints.latency
        if wanted not in ("interactive", "fast"):
            return None
        wait_s = question.observed.soonest_s(chosen.first)
        if wait_s == math.inf:
            return f"{wanted}: {chosen.tier} is full"
        seen = f"{wait_s * 1000:.0f} ms" if wait_s else "not measured yet"
        return f"{wanted}: first token expected of {chosen.tier}: {seen}"


class ExpectedCost:
    """Among those that are equal so far, the cheapest; where that is equal, too, the best."""

    def ranks(self, question: Question, options: Sequence[Option]) -> Ranks:
        """Cost, then quality; `Budget` speaks for both."""
        return [(option.cost, -option.quality) for option in options]


def _manages(chosen: Option, options: Sequence[Option], wanted: float, word: str) -> str:
    """How a tier's quality stands to what is wanted: `word` where it is as much, else whether any has more."""
    if chosen.quality >= wanted:
        return word
    return "has" if any(one.quality > chosen.quality for one in options) else "comes nearest, with"


def _is_cheapest_that_will_do(question: Question, chosen: Option, options: Sequence[Option]) -> bool:
    needed, cost = question.needed, chosen.cost
    if chosen.quality < needed:
        return False
    return not any(one.cost < cost and one.quality >= needed and one.up for one in options)


_PREFERENCES = (Budget(), Rules(), Quality(), Complexity(), Latency())
#: In the order in which they are asked.
RANKING: tuple[Ranking, ...] = (*_PREFERENCES, ExpectedCost())
#: In the order in which they speak.
SPEAKING: tuple[Speaking, ...] = (Sensitivity(), ContextLength(), *_PREFERENCES)


def ranked(question: Question, options: Sequence[Option]) -> Sequence[Option]:
    """The options, the best first; tiers that are down come last, for they may be back in a moment."""
    if len(options) < 2:
        return options
    columns: list[Sequence[Any]] = []
    for option in options:
        if not option.up:
            columns.append([not one.up for one in options])
            break
    for criterion in RANKING:
        ranks = criterion.ranks(question, options)
        if ranks is not None:
            columns.append(ranks)
    # Their places come before the options themselves: where all is equal they stay in their order.
    compared = sorted(zip(*columns, range(len(options)), options))  # noqa: B905 (all have one entry for each option)
    return [entry[-1] for entry in compared]


def reasons(question: Question, order: Sequence[Option]) -> tuple[Reason, ...]:
    """What the criteria have to say about the choice of the first."""
    said = []
    for criterion in SPEAKING:
        verdict = criterion.verdict(question, order[0], order)
        if verdict:
            said.append(Reason(criterion.name, verdict))
    return tuple(said)
