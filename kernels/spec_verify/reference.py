"""Greedy acceptance in the plainest torch: the specification of every implementation."""

import torch


def greedy(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `tokenmill.kernels.spec_verify.op.spec_verify_greedy`; writes and returns `out`."""
    out.fill_(-1)
    ends = cu_num_draft_tokens.tolist()
    starts = [0, *ends[:-1]]
    for request, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for step, position in enumerate(range(start, end)):
            token = target_logits[position].argmax()
            out[request, step] = token
            if token != draft_token_ids[position]:
                break
        else:
            out[request, end - start] = bonus_token_ids[request, 0]
    return out
