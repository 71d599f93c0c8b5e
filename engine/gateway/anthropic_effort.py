"""`reasoning_effort` of a chat completion in the words of Anthropic's Messages API, which differ with its models.

From Claude 4.6 on a model thinks as its task needs (`thinking.type: adaptive`) and `output_config.effort` has levels of
the same names. Older ones have a budget of tokens for their thoughts; the numbers are LiteLLM's, so that a client which
comes from there gets the same. Sources: https://platform.claude.com/docs/en/build-with-claude/effort and
.../adaptive-thinking, https://docs.litellm.ai/docs/providers/anthropic_effort.
"""

import re
from typing import Any

from tokenmill.engine.gateway.api_error import UntranslatableError, quote

#: `claude-3-7-sonnet-20250219`, `claude-opus-4-20250514`, `anthropic/claude-4.7-opus`: the first number or two.
_VERSION = re.compile(r"claude(?:-[a-z]+)*-(\d{1,2})(?:[-.](\d{1,2})(?!\d))?(?!\d)")
_FIRST_THAT_THINKS = (3, 7)
_FIRST_THAT_ADAPTS = (4, 6)
_LEVELS = ("low", "medium", "high", "xhigh", "max")
_BUDGETS = {"low": 1024, "medium": 2048, "high": 4096}


def most_thoughts(thinking: Any, effort: Any) -> int:
    """The most tokens of thoughts, beside its answer's, that a request with these two fields can be given."""
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    return max(budget if isinstance(budget, int) else 0, max(_BUDGETS.values()) if effort else 0)


def apply(body: dict[str, Any], effort: Any) -> None:
    """Has a Messages request think as hard as is asked for; the client's own `thinking` goes before.

    Args:
        body: The request; changed.
        effort: `reasoning_effort`.

    Raises:
        UntranslatableError: The model has nothing for it.
    """
    model = body["model"]
    found = _VERSION.search(model.lower())
    version = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if version >= _FIRST_THAT_THINKS and effort == "none":
        body.setdefault("thinking", {"type": "disabled"})
        return
    if version >= _FIRST_THAT_ADAPTS and effort in _LEVELS:
        body.setdefault("thinking", {"type": "adaptive"})
        body["output_config"] = {"effort": effort, **body.get("output_config", {})}
        return
    if version < _FIRST_THAT_THINKS or effort not in _BUDGETS or "thinking" in body:
        said = f"`reasoning_effort` `{quote(str(effort))}` has no counterpart for the model {quote(model)}"
        raise UntranslatableError(f"{said}; leave it out, or send Anthropic's `thinking`.", "reasoning_effort")
    budget = _BUDGETS[effort]
    if body["max_tokens"] is not None and body["max_tokens"] <= budget:
        said = f"`reasoning_effort` `{effort}` takes up to {budget} tokens of the answer's {body['max_tokens']}"
        raise UntranslatableError(f"{said}; raise `max_completion_tokens`, or lower the effort.", "reasoning_effort")
    body["thinking"] = {"type": "enabled", "budget_tokens": budget}
