"""The CUDA kernel of greedy acceptance executed on the CPU by the emulator, to prove it; by name only, and slow."""

import ctypes

import torch

from tokenmill.errors import TokenmillError
from tokenmill.kernels import emulator
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem

SOURCE = emulator.CSRC / "spec_verify" / "greedy.cu"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _GreedyProblem(ctypes.Structure):
    """`GreedyProblem` of csrc/spec_verify/greedy.h, field by field."""

    _fields_ = (
        ("draft_token_ids", ctypes.c_void_p),
        ("cu_num_draft_tokens", ctypes.c_void_p),
        ("target_logits", ctypes.c_void_p),
        ("bonus_token_ids", ctypes.c_void_p),
        ("output_token_ids", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("drafts", ctypes.c_int64),
        ("requests", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("max_spec_len", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def _why_not(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}; the emulator takes CPU tensors"
    try:
        emulator.compiler()
    except TokenmillError as error:
        return str(error)
    return None


def _run(
    draft_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    max_spec_len: int,
    out: torch.Tensor,
) -> torch.Tensor:
    library = emulator.load(SOURCE)
    library.reset()
    T, V = target_logits.shape
    problem = _GreedyProblem(
        draft_token_ids=library.upload(draft_token_ids),
        cu_num_draft_tokens=library.upload(cu_num_draft_tokens),
        target_logits=library.upload(target_logits),
        bonus_token_ids=library.upload(bonus_token_ids),
        output_token_ids=library.allocate(out.nbytes),
        row_bytes=V * target_logits.element_size(),
        drafts=T,
        requests=cu_num_draft_tokens.shape[0],
        vocabulary=V,
        max_spec_len=max_spec_len,
        type=_TYPES[target_logits.dtype],
    )
    status = library.call("tokenmill_spec_verify_greedy", ctypes.byref(problem), None)
    if status:
        raise emulator.EmulatorError(f"greedy acceptance returned {status}\n{library.reports()}".rstrip())
    return out.copy_(library.download(problem.output_token_ids, out.shape, out.dtype))


GREEDY = Implementation("cuda-emulated", _run, _why_not)
