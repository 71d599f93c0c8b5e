"""The CUDA kernels of INT4 GEMM executed by the emulator on CPU tensors: to prove them, never chosen automatically.

Slow by a factor of a million; every launch is checked for hazards, and a finding is an error.
"""

import ctypes

import torch

from tokenmill.kernels import emulator
from tokenmill.kernels.emulator import CSRC, EmulatorError
from tokenmill.kernels.int4_gemm import cuda_call
from tokenmill.kernels.int4_gemm.cuda_call import Plan
from tokenmill.kernels.int4_gemm.cuda_impl import multiplier, refusal
from tokenmill.kernels.int4_gemm.layout import pack
from tokenmill.kernels.int4_gemm.prepared import Multiply, from_canonical
from tokenmill.kernels.int4_gemm.weight import Int4Weight
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem

#: A few multiprocessors, so that emulated launches are planned with splits but not with many.
SM_COUNT = 4


def _why_not(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}; the emulator takes CPU tensors"
    return refusal(problem)


def prepare(weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply:
    """Packs a weight once; the result multiplies by it in the emulator and raises `EmulatorError` with any finding."""
    packed = pack(weight.to("cpu"), dtype)

    def launch(x: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor, tickets: torch.Tensor, plan: Plan) -> None:
        library = emulator.load(CSRC / f"int4_gemm/{plan.kernel}.cu", (CSRC,))
        library.reset()
        block = cuda_call.arguments(packed, dtype, x.shape[0], x.stride(0), out.stride(0), plan, dependent=False)
        block.x = library.upload(_whole_rows(x))
        block.words, block.scales = library.upload(packed.words), library.upload(packed.scales)
        block.zeros = None if packed.zeros is None else library.upload(packed.zeros)
        block.y = library.upload(_whole_rows(out))
        if plan.splits > 1:
            block.workspace, block.tickets = library.upload(workspace), library.upload(tickets)
        status = library.call(f"tokenmill_int4_gemm_{plan.kernel}", ctypes.byref(block), None)
        if status:
            raise EmulatorError(f"{plan} returned {status}\n{library.reports()}".rstrip())
        _whole_rows(out).copy_(library.download(block.y, _whole_rows(out).shape, out.dtype))
        if plan.splits > 1:
            tickets.copy_(library.download(block.tickets, tickets.shape, tickets.dtype))

    return multiplier(packed, SM_COUNT, True, launch)


def _whole_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view of all rows with what lies between them, as far as the storage has it."""
    rows, stride = tensor.shape[0], tensor.stride(0)
    inside = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if inside >= rows * stride:
        return tensor.as_strided((rows, stride), (stride, 1))
    return tensor.as_strided(((rows - 1) * stride + tensor.shape[1],), (1,))


EMULATED = Implementation("cuda-emulated", from_canonical(prepare), _why_not)
