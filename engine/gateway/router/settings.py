"""What the gateway is told about routing; plain data that travels to the workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: The model name that stands for the router's choice, where nobody calls it otherwise.
AUTO = "auto"
#: Statistics of token probabilities; see `confidence`.
Statistic = Literal["lowest_tenth", "mean", "lowest_window"]


@dataclass(frozen=True)
class Rule:
    """Goes before the classifier: the first rule whose conditions all hold decides.

    Attributes:
        matches: RE2 pattern that the last message must match.
        endpoint: The request's path.
        min_tokens, max_tokens: Bounds of the prompt's estimated tokens, inclusive.
        tools: Whether the request must, or must not, offer tools.
        tier: Goes first, where it is allowed.
        quality: What is asked for, where the client does not say.
    """

    matches: str | None = None
    endpoint: str | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    tools: bool | None = None
    tier: str | None = None
    quality: float | None = None


@dataclass(frozen=True)
class EscalationSettings:
    """The second tier answers where the first one is not sure.

    Attributes:
        first, then: The tiers.
        threshold: Confidence from which the first tier's answer is good enough, 0 to 1.
        statistic: How confidence is made of the tokens' probabilities.
        hold_tokens: Tokens of a stream that are held back and judged; None: all.
        allowance_s: From the request's start; later nothing is escalated.
    """

    first: str
    then: str
    threshold: float
    statistic: Statistic = "lowest_tenth"
    hold_tokens: int | None = None
    allowance_s: float = 30.0


@dataclass(frozen=True)
class RoutingSettings:
    """How requests that name no concrete model are routed.

    Attributes:
        name: The model name that stands for "you choose".
        quality: What is asked for at least, where neither the client nor a rule says.
        interactive_s: Time to the first token that a person waits for willingly.
        completion_tokens: Tokens expected of an answer, for its cost.
        weights: The classifier's weights by feature; None: those that come with Tokenmill.
        rules: Go before the classifier, in this order.
        burst: Backends in other zones may take what the preferred ones cannot.
        burst_queue: Open requests at every preferred backend, of all workers together, from which others take over;
            None: when they are full.
        log: File that gets a line of features and outcome for each routed request; None: none.
        escalation: None: none.
    """

    name: str = AUTO
    quality: float = 0.0
    interactive_s: float = 1.0
    completion_tokens: int = 300
    weights: Mapping[str, float] | None = None
    rules: tuple[Rule, ...] = ()
    burst: bool = True
    burst_queue: int | None = None
    log: str | None = None
    escalation: EscalationSettings | None = None
