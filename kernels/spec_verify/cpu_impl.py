"""Greedy acceptance by csrc/spec_verify on the CPU: requests in parallel, argmax vectorised per instruction set."""

import torch

from tokenmill.kernels import extension
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem

#: The instruction-set levels csrc/spec_verify has kernels for.
ISA_LEVELS = ("plain", "avx2", "avx512")


def _why_not(problem: Problem) -> str | None:
    return extension.why_not_cpu("spec_verify_greedy_cpu", problem)


def _run(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
    out: torch.Tensor,
) -> torch.Tensor:
    extension.native("spec_verify_greedy_cpu")(
        out,
        draft_token_ids,
        cu_num_draft_tokens,
        target_logits,
        bonus_token_ids,
        extension.isa_index(ISA_LEVELS),
    )
    return out


GREEDY = Implementation("cpu", _run, _why_not)
