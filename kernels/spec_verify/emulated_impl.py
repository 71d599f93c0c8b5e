"""The CUDA kernel of greedy acceptance executed on the CPU by the emulator, to prove it; by name only, and slow."""

import ctypes
from typing import Any

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


def launch(library: emulator.EmulatedLibrary, out: torch.Tensor, **arguments: Any) -> int:
    """Runs the launcher on copies of the tensors.

    Args:
        library: Built from `SOURCE`.
        out: Its values go in, so that what the kernel leaves out shows; gets the result unless the launcher refuses.
        arguments: Those of the public function.

    Returns:
        0, the number of the emulator's reports, or the launcher's negative error.
    """
    library.reset()
    logits = arguments["target_logits"]
    problem = _GreedyProblem(
        draft_token_ids=library.upload(arguments["draft_token_ids"]),
        cu_num_draft_tokens=library.upload(arguments["cu_num_draft_tokens"]),
        target_logits=library.upload(logits),
        bonus_token_ids=library.upload(arguments["bonus_token_ids"]),
        output_token_ids=library.upload(out),
        row_bytes=logits.shape[1] * logits.element_size(),
        drafts=logits.shape[0],
        requests=out.shape[0],
        vocabulary=logits.shape[1],
        max_spec_len=arguments["max_spec_len"],
        type=_TYPES[logits.dtype],
    )
    status = library.call("tokenmill_spec_verify_greedy", ctypes.byref(problem), None)
    if status >= 0:
        out.copy_(library.download(problem.output_token_ids, out.shape, out.dtype))
    return status


def _run(out: torch.Tensor, **arguments: Any) -> torch.Tensor:
    library = emulator.load(SOURCE)
    if status := launch(library, out, **arguments):
        raise emulator.EmulatorError(f"greedy acceptance returned {status}\n{library.reports()}".rstrip())
    return out


GREEDY = Implementation("cuda-emulated", _run, _why_not)
