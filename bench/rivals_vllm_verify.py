"""vLLM's rejection sampler, called as its model runner calls it for greedy requests."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tokenmill.kernels.spec import Problem


def prepare(problem: Problem, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A call of `rejection_sample` on the op's inputs; vLLM 0.26 to 0.32."""
    from vllm.v1.sample.rejection_sampler import rejection_sample

    ends = inputs["cu_num_draft_tokens"]
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    greedy = SimpleNamespace(all_greedy=True, all_random=False, generators={})

    def call() -> torch.Tensor:
        found: torch.Tensor = rejection_sample(
            inputs["draft_token_ids"],
            counts,
            problem["max_spec_len"],
            ends,
            None,
            inputs["target_logits"],
            inputs["bonus_token_ids"],
            greedy,
        )
        return found

    return call
