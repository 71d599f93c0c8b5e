"""Greedy verification of speculated tokens.

The target's logits at every drafted position are known at once. A draft is accepted while it equals the target's
argmax; the first that differs is replaced by the argmax and the rest of the request's drafts are dropped; a request
whose drafts are all accepted gets its bonus token. The tokens are those that the target alone would have produced
(Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, at temperature 0),
in the layout of vLLM's rejection sampler: unused places hold -1.
"""

from typing import Any

import torch

from tokenmill.errors import InputError
from tokenmill.kernels import checks, library, registry
from tokenmill.kernels.numerics import EXACT
from tokenmill.kernels.spec import OpSpec, Problem, TensorSpec
from tokenmill.kernels.spec_verify import reference


def _greedy_inputs(problem: Problem, generator: torch.Generator) -> dict[str, Any]:
    """Ragged draft lengths that sum to T, drafts that agree with the argmax about three times in four."""
    T, B, V, longest = problem["T"], problem["B"], problem["V"], problem["max_spec_len"]
    lengths = _ragged_lengths(T, B, longest, generator)
    logits = torch.randn(T, V, generator=generator).to(problem.dtype)
    other = torch.randint(V, (T,), generator=generator)
    agrees = torch.rand(T, generator=generator) < 0.75
    return {
        "draft_token_ids": torch.where(agrees, logits.argmax(dim=1), other).int(),
        "cu_num_draft_tokens": torch.tensor(lengths).cumsum(0).int(),
        "target_logits": logits,
        "bonus_token_ids": torch.randint(V, (B, 1), generator=generator, dtype=torch.int32),
        "max_spec_len": longest,
    }


def _ragged_lengths(total: int, requests: int, longest: int, generator: torch.Generator) -> list[int]:
    if total > requests * longest:
        raise InputError(f"T={total} drafts do not fit in B={requests} requests of at most {longest}; take T smaller")
    places = torch.randperm(requests * longest, generator=generator)[:total] // longest
    return torch.bincount(places, minlength=requests).tolist()


def _greedy_bytes(problem: Problem) -> int:
    """Every logit once (the bound when all drafts are accepted), the token ids, the result."""
    logits = problem["T"] * problem["V"] * problem.dtype.itemsize
    return logits + 4 * (problem["T"] + 2 * problem["B"] + problem["B"] * (problem["max_spec_len"] + 1))


_TOKENS = (torch.int32,)
GREEDY = OpSpec(
    name="spec_verify_greedy",
    doc="Greedy acceptance of drafted tokens against the target's logits.",
    axes={
        "T": "drafted tokens of all requests",
        "B": "requests",
        "V": "vocabulary",
        "max_spec_len": "most drafts a request may have",
    },
    inputs=(
        TensorSpec("draft_token_ids", ("T",), _TOKENS, "drafted tokens, request after request"),
        TensorSpec("cu_num_draft_tokens", ("B",), _TOKENS, "inclusive sums of the requests' numbers of drafts"),
        TensorSpec(
            "target_logits",
            ("T", "V"),
            (torch.float32, torch.bfloat16, torch.float16),
            "the target's logits at each drafted position",
            layout="rows",
        ),
        TensorSpec("bonus_token_ids", ("B", 1), _TOKENS, "the token after a request's last draft"),
    ),
    outputs=(TensorSpec("out", ("B", "max_spec_len + 1"), _TOKENS, "accepted tokens, then -1"),),
    scalars=("max_spec_len",),
    dtype_of="target_logits",
    reference=reference.greedy,
    make_inputs=_greedy_inputs,
    flops=lambda problem: problem["T"] * problem["V"],
    bytes_moved=_greedy_bytes,
    tolerance=EXACT,
    implementations={
        "cuda": "tokenmill.kernels.spec_verify.cuda_impl:GREEDY",
        "cpu": "tokenmill.kernels.spec_verify.cpu_impl:GREEDY",
        "cuda-emulated": "tokenmill.kernels.spec_verify.emulated_impl:GREEDY",
    },
    examples=(
        {"T": 32, "B": 8, "V": 32000, "max_spec_len": 5},
        {"T": 0, "B": 3, "V": 128, "max_spec_len": 4},
        {"T": 1, "B": 1, "V": 1, "max_spec_len": 1},
        {"T": 7, "B": 1, "V": 4099, "max_spec_len": 7},
        {"T": 40, "B": 17, "V": 2049, "max_spec_len": 3},
    ),
)


def spec_verify_greedy(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
    *,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Accepts drafted tokens while they equal the target's argmax.

    Ties take the lowest index and a NaN counts as larger than every number (the first NaN wins), as in
    `torch.argmax`. A drafted id outside the vocabulary is never accepted. For CUDA tensors
    `cu_num_draft_tokens` is not checked against T, which would stall the stream: the kernel never reads outside the
    tensors, but the result is unspecified for sums that decrease or pass T.

    Args:
        draft_token_ids: [T] int32, the requests' drafts one after another.
        cu_num_draft_tokens: [B] int32, inclusive sums of the numbers of drafts; the last is T.
        target_logits: [T, V] float32, bfloat16 or float16; rows may be strided.
        bonus_token_ids: [B, 1] int32.
        max_spec_len: The most drafts a request has.
        out: [B, max_spec_len + 1] int32 buffer for the result; None allocates one.
        implementation: `cuda`, `cpu`, `reference` or `cuda-emulated`; None chooses.

    Returns:
        [B, max_spec_len + 1] int32: accepted tokens, then the target's own or the bonus token, then -1.

    Raises:
        InputError: An argument is outside what is said above.
        UnsupportedError: The implementation asked for cannot do this.
    """
    arguments = {
        "draft_token_ids": draft_token_ids,
        "cu_num_draft_tokens": cu_num_draft_tokens,
        "target_logits": target_logits,
        "bonus_token_ids": bonus_token_ids,
        "max_spec_len": max_spec_len,
    }
    problem = checks.bind(GREEDY, arguments)
    if problem["V"] == 0:
        raise InputError("target_logits has V=0 tokens; pass at least one column")
    if problem.device.type == "cpu":
        _check_sums(cu_num_draft_tokens.tolist(), problem)
    if out is None:
        out = torch.empty(problem["B"], max_spec_len + 1, dtype=torch.int32, device=problem.device)
    else:
        checks.check_output(GREEDY.outputs[0], out, problem)
    chosen = registry.choose(GREEDY, problem, implementation)
    if problem["B"] > 0:
        chosen.run(**arguments, out=out)
    return out


def _check_sums(ends: list[int], problem: Problem) -> None:
    start = 0
    for request, end in enumerate(ends):
        if not 0 <= end - start <= problem["max_spec_len"]:
            raise InputError(
                f"cu_num_draft_tokens gives request {request} {end - start} drafts; it must be 0 to "
                f"max_spec_len={problem['max_spec_len']}; pass inclusive sums"
            )
        start = end
    if start != problem["T"]:
        raise InputError(f"cu_num_draft_tokens ends at {start}, but there are T={problem['T']} drafts; make them agree")


def _op(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
) -> torch.Tensor:
    return spec_verify_greedy(draft_token_ids, cu_num_draft_tokens, target_logits, bonus_token_ids, max_spec_len)


def _fake(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
) -> torch.Tensor:
    return cu_num_draft_tokens.new_empty((cu_num_draft_tokens.shape[0], max_spec_len + 1))


library.define(
    "spec_verify_greedy(Tensor draft_token_ids, Tensor cu_num_draft_tokens, Tensor target_logits, "
    "Tensor bonus_token_ids, int max_spec_len) -> Tensor",
    _op,
    _fake,
)
