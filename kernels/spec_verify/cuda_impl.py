"""Greedy acceptance by csrc/spec_verify on a CUDA device: one thread block a request."""

import torch

from tokenmill.kernels import extension
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem

#: The GPU families that csrc/spec_verify/greedy.cu is compiled for.
FAMILIES = ("sm90", "sm100")


def _why_not(problem: Problem) -> str | None:
    return extension.why_not_cuda("spec_verify_greedy_cuda", problem, FAMILIES)


def _run(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
    out: torch.Tensor,
) -> torch.Tensor:
    extension.native("spec_verify_greedy_cuda")(
        out, draft_token_ids, cu_num_draft_tokens, target_logits, bonus_token_ids
    )
    return out


GREEDY = Implementation("cuda", _run, _why_not)
