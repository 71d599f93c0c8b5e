"""Right sampling under speculation on vLLM's CPU build.

While drafts are verified, vLLM repeats each request's temperature, top-k and top-p for each of its draft
tokens. On the CPU build the Triton kernel that does this is replaced by one that converts its output to int64
and fills the copy, so callers get uninitialised memory for float32 and int32: any batch that is not all greedy
samples from a wrong distribution, greedy requests in it come out wrong, and a top-k read this way can stop the
engine with an index error. `expand` does the same with plain torch.

The CPU build also stops with an error where a request with top-k reaches a step in which nothing was drafted,
because it takes the maximum of an empty tensor. `constrain` lets such steps pass.
"""

from typing import Any

import torch

from tokenmill.engine.vllm import compat
from tokenmill.engine.vllm.hooks import HookStatus


def expand(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Repeats each request's value once per token: [a, b] with 2 and 1 tokens is [a, a, b].

    Args:
        x: One value per request, [batch], any dtype.
        cu_num_tokens: Tokens of the requests up to and including each, [batch]; a request may have none.
        num_tokens: All tokens, the last entry of `cu_num_tokens` (given, so that nothing waits for the device).
        replace_from: Values equal to this one ...
        replace_to: ... become this one; nothing changes where the two are equal.

    Returns:
        [num_tokens], dtype and device of `x`.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    if replace_from != replace_to:
        x = x.masked_fill(x == replace_from, replace_to)
    return x.repeat_interleave(counts, output_size=num_tokens)


def constrain(logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
    """vLLM's own temperature, top-k and top-p for draft tokens, which are left alone where there are none.

    Args:
        logits: The target's logits of every draft token, [draft tokens, vocabulary]; changed in place.
        cu_num_draft_tokens: Draft tokens of the requests up to and including each, [batch].
        sampling_metadata: vLLM's sampling parameters of the batch.

    Returns:
        The logits, ready for softmax.
    """
    if logits.shape[0] == 0:
        return logits
    constrained: torch.Tensor = compat.APPLY_SAMPLING_CONSTRAINTS.stock()(
        logits, cu_num_draft_tokens, sampling_metadata
    )
    return constrained


def install() -> HookStatus:
    """Puts `expand` and `constrain` in the place of vLLM's on the CPU build; elsewhere vLLM's own are right."""
    if not compat.on_cpu():
        return HookStatus("verification", "stock", "vLLM's own kernels; they are right on this platform")
    compat.EXPAND_BATCH_TO_TOKENS.replace(expand)
    compat.APPLY_SAMPLING_CONSTRAINTS.replace(constrain)
    return HookStatus("verification", "active", "vLLM's acceptance with its sampling parameters repaired")
