"""INT4 GEMM by csrc/int4_gemm on CUDA devices: wgmma on Hopper, mma.sync for small batches and everywhere else."""

from collections.abc import Callable

import torch

from tokenmill import platform
from tokenmill.kernels import extension
from tokenmill.kernels.int4_gemm import cuda_call
from tokenmill.kernels.int4_gemm.cuda_call import Plan
from tokenmill.kernels.int4_gemm.layout import CudaWeight, pack
from tokenmill.kernels.int4_gemm.prepared import Multiply, from_canonical
from tokenmill.kernels.int4_gemm.weight import Int4Weight
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem, short_dtype

_NATIVE = "int4_gemm_cuda"
#: GPU families that csrc/int4_gemm is compiled for.
FAMILIES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")

#: (x, out, workspace, tickets, plan): rows of x and out are whole multiples of 16 bytes apart; the last two tensors are
#: empty unless the plan splits K.
Launch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Plan], None]


def refusal(problem: Problem) -> str | None:
    """Why the CUDA kernels cannot do a problem, wherever they run."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the activations are {short_dtype(problem.dtype)}; the CUDA kernels take float16 or bfloat16"
    if problem.options["activation_bits"] != 16:
        return f"activation_bits={problem.options['activation_bits']}; the CUDA kernels multiply 16-bit activations"
    return None


def multiplier(packed: CudaWeight, sm_count: int, hopper: bool, launch: Launch) -> Multiply:
    """What multiplies by a packed weight: brings x and out into the kernels' form and plans each batch size.

    Args:
        packed: The weight, on the device of the activations.
        sm_count: Streaming multiprocessors of the device.
        hopper: Whether wgmma is there.
        launch: Runs one plan.
    """
    # Counters that each launch leaves at zero. Launches on one stream follow each other and share them.
    tickets: dict[int, torch.Tensor] = {}

    def multiply(x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        M = x.shape[0]
        if M == 0:
            return
        plan = cuda_call.plan(M, packed, sm_count, hopper)
        rows = _with_aligned_rows(cuda_call.arranged(x, packed))
        target = out if out.stride(0) % 8 == 0 and out.data_ptr() % 16 == 0 else None
        if target is None:
            target = out.new_empty(M, cuda_call.padded_stride(packed.N))[:, : packed.N]
        workspace = x.new_empty(cuda_call.workspace_floats(packed, M, plan), dtype=torch.float32)
        count = cuda_call.tickets(packed, M, plan)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        if count and (stream not in tickets or tickets[stream].numel() < count):
            tickets[stream] = x.new_zeros(count, dtype=torch.int32)
        launch(rows, target, workspace, tickets[stream] if count else workspace.to(torch.int32), plan)
        if target is not out:
            out.copy_(target)
        if bias is not None:
            out += bias.to(out.dtype)

    return multiply


def _with_aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy whose rows start at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    rows = x.new_empty(x.shape[0], cuda_call.padded_stride(x.shape[1]))[:, : x.shape[1]]
    return rows.copy_(x)


def _why_not(problem: Problem) -> str | None:
    return refusal(problem) or extension.why_not_cuda(_NATIVE, problem, FAMILIES)


def prepare(weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply:
    """Packs a weight once, on its own CUDA device or the current one; the result multiplies by it."""
    weight = weight if weight.device.type == "cuda" else weight.to("cuda")
    packed = pack(weight, dtype)
    native = extension.native(_NATIVE)
    properties = torch.cuda.get_device_properties(weight.device)
    families = {gpu.index: gpu.family for gpu in platform.gpus()}
    hopper = families.get(weight.device.index or 0) == "sm90"

    def launch(x: torch.Tensor, out: torch.Tensor, workspace: torch.Tensor, tickets: torch.Tensor, plan: Plan) -> None:
        native(
            out,
            x,
            packed.words,
            packed.scales,
            packed.zeros,
            workspace,
            tickets,
            packed.group_rows,
            plan.kernel,
            plan.token_tile,
            plan.splits,
        )

    return multiplier(packed, properties.multi_processor_count, hopper, launch)


CUDA = Implementation("cuda", from_canonical(prepare), _why_not)
