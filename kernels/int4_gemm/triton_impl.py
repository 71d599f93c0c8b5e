"""INT4 GEMM in Triton: decode and prefill from the packed buffer of the CUDA kernels (layout.py), read as it is.

The problem is transposed, ``y^T = W^T x^T``: the unpacked weight is the first operand of `tl.dot`, which is what
Triton feeds to wgmma from registers on sm_90. The buffer holds each thread's codes in the order of that operand's
fragments; a contiguous 16-byte load a thread, reshaped and permuted, *is* the operand, and no layout conversion is
left in the machine code. On sm_100 the operand goes through shared memory, because UTCHMMA takes it from there.

A word holds four pairs of neighbouring inputs, 16 bits apart. ``(word >> 4r) & 0x000f000f``, with the exponent of
1024 (float16) or 128 (bfloat16) set by the same LOP3, is a pair of numbers 1024 + code; subtracting 1024 + 8 is exact.
With zero points, 16 - zero is added to the pair as an integer, and 1024 + 16 subtracted. Nothing converts integers to
floating point.

K is split over programs that write float32 partial sums; a second kernel adds them in the order of the splits, so that
results are bit-equal from run to run. There are no atomics.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from tokenmill import platform
from tokenmill.kernels import extension
from tokenmill.kernels.int4_gemm import configs, cuda_call
from tokenmill.kernels.int4_gemm.layout import DEPTH, FINE_GROUP, CudaWeight, pack
from tokenmill.kernels.int4_gemm.prepared import Multiply, from_canonical
from tokenmill.kernels.int4_gemm.weight import Int4Weight
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import Problem, short_dtype

#: GPU families that the static gates compile for; sm86 runs what sm80 does.
FAMILIES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
#: The oldest release that the static gates are held with.
_OLDEST_TRITON = (3, 6)

#: Low bits of the four pairs of a word. The kernel gets it as an argument and not as a constant: ptxas has room for
#: one constant in a LOP3 and would otherwise split ``word & low | exponent`` into two.
LOW_NIBBLES = 0x000F000F
#: dtype to (two numbers whose last place is 1, that number).
MAGIC = {torch.float16: (0x64006400, 1024.0), torch.bfloat16: (0x43004300, 128.0)}
#: Beyond any number of tiles: the shift of a weight that has one group.
_ONE_GROUP_SHIFT = 31
_SUM_BLOCK = 1024


@triton.jit
def _by_feature(values, FINE: tl.constexpr):
    """A tile's scales or zero points where the unpacked words need them: [1, 8, 8, 1, 1 or 2, 1, 2, 1].

    Loads of 64 values, fewer than a program's threads, are what Triton repeats in the layout of their use. More would
    go through shared memory, with a barrier that makes ptxas serialise the wgmmas in flight.
    """
    warp = tl.arange(0, 8)[None, :, None, None]
    lane = tl.arange(0, 8)[None, None, :, None]
    feature = values + 16 * warp + lane
    lower = tl.load(feature)
    upper = tl.load(feature + 8)
    if FINE:
        lower = tl.join(lower, tl.load(feature + 128))
        upper = tl.join(upper, tl.load(feature + 136))
    else:
        lower = lower[:, :, :, :, None]
        upper = upper[:, :, :, :, None]
    return tl.join(lower, upper)[:, :, :, :, :, None, :, None]


@triton.jit(do_not_specialize=["M", "N", "tiles", "split_tiles", "groups", "group_shift", "low_nibbles"])
def int4_gemm_product(  # noqa: PLR0917
    x,
    words,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    tiles,
    split_tiles,
    groups,
    group_shift,
    low_nibbles,
    x_stride,
    out_stride,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    FINE: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    MAGIC_PAIR: tl.constexpr,
    MAGIC_VALUE: tl.constexpr,
):
    """One block of 128 features and TOKENS tokens of one split of K; out is y, or [splits, M, N] partial sums."""
    dtype: tl.constexpr = x.dtype.element_ty
    offset: tl.constexpr = MAGIC_VALUE + (8 if zeros is None else 16)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1)
    split = tl.program_id(2)
    real = token[None, :] < M
    first = split * split_tiles
    last = tl.minimum(first + split_tiles, tiles)

    word = words + block.to(tl.int64) * tiles * 1024 + tl.arange(0, 1024 * STEP)
    activation = x + token[None, :].to(tl.int64) * x_stride + tl.arange(0, 64 * STEP)[:, None]
    total = tl.zeros((128, TOKENS), tl.float32)
    for tile in range(first, last, STEP):
        packed = tl.load(word + tile * 1024, eviction_policy="evict_first")
        right = tl.load(activation + tile * 64, mask=real, other=0.0)
        group = (block * groups + (2 * tile if FINE else tile >> group_shift)) * 128
        # tile, warp, lane // 4, lane % 4, step // 2, step % 2, then feature + 8 and input + 8: see layout.fragment_map
        packed = tl.reshape(packed, (STEP, 8, 8, 4, 2, 2))
        pairs = tl.join(
            tl.join(packed & low_nibbles, (packed >> 4) & low_nibbles),
            tl.join((packed >> 8) & low_nibbles, (packed >> 12) & low_nibbles),
        )
        if zeros is None:
            pairs = pairs | MAGIC_PAIR
        else:
            zero = _by_feature(zeros + group, FINE).to(tl.int32)
            pairs = pairs + (MAGIC_PAIR + 0x00100010 - zero * 0x00010001)
        even = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        odd = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
        left = tl.join(even, odd) - offset
        if SCALE_WEIGHTS:
            left = left * _by_feature(scales + group, FINE)[:, :, :, :, :, :, :, :, None]
        left = tl.reshape(tl.permute(left, (1, 6, 2, 0, 4, 5, 7, 3, 8)), (128, 64 * STEP))
        if SCALE_WEIGHTS:
            total = tl.dot(left, right, total)
        else:
            scale = tl.permute(_by_feature(scales + group, FINE), (0, 1, 6, 2, 3, 4, 5, 7))
            total += tl.dot(left, right) * tl.reshape(scale, (128, 1)).to(tl.float32)

    feature = block * 128 + tl.arange(0, 128)
    if bias is not None:
        total += tl.load(bias + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * M + token[None, :]) * out_stride + feature[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=real & (feature[:, None] < N))


@triton.jit(do_not_specialize=["M", "N", "splits"])
def int4_gemm_sum(partial, bias, out, M, N, splits, partial_stride, out_stride, BLOCK: tl.constexpr):
    """BLOCK features of one token: the partial sums [splits, M, N] in their order, then the bias, rounded once."""
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    real = feature < N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * M + token) * partial_stride + feature, mask=real, other=0.0)
    if bias is not None:
        total += tl.load(bias + feature, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + feature, total.to(out.dtype.element_ty), mask=real)


def multiplier(packed: CudaWeight, sm_count: int, family: str) -> Multiply:
    """What multiplies by a packed weight: brings x into the kernel's form and plans each batch size.

    Args:
        packed: The weight, on the device of the activations (on the CPU in Triton's interpreter).
        sm_count: Streaming multiprocessors of the device.
        family: Of the device, e.g. `sm90`.
    """

    def multiply(x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        M = x.shape[0]
        if M == 0:
            return
        plan = configs.plan(M, packed, sm_count, family)
        rows = _whole_tiles(cuda_call.arranged(x, packed), packed.padded_depth)
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            if plan.splits == 1:
                launch_product(packed, plan, rows, out, bias)
                return
            partial = x.new_empty((plan.splits * M, packed.padded_rows), dtype=torch.float32)
            launch_product(packed, plan, rows, partial, None)
            grid = (triton.cdiv(packed.N, _SUM_BLOCK), M)
            sizes = (M, packed.N, plan.splits, partial.stride(0), out.stride(0))
            int4_gemm_sum[grid](partial, bias, out, *sizes, BLOCK=_SUM_BLOCK, enable_fp_fusion=True)

    return multiply


def launch_product(
    packed: CudaWeight, plan: configs.TritonPlan, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Launches the product kernel.

    Args:
        packed: The weight.
        plan: From `configs.plan`.
        x: [M, Kp] activations in the order of the packed rows; rows start at multiples of 32 bytes.
        out: [M, N] result, or without a bias [splits * M, >= N] float32 partial sums.
        bias: [N] or None.
    """
    M, config = x.shape[0], plan.config
    tiles, groups = packed.words.shape[1], packed.scales.shape[1]
    rows = packed.group_rows
    shift = _ONE_GROUP_SHIFT if rows == packed.padded_depth else (rows // DEPTH).bit_length() - 1
    pair, value = MAGIC[x.dtype]
    # All tokens of one block of weights side by side: each weight is read from memory once, activations come from L2.
    grid = (-(-M // config.token_tile), packed.words.shape[0], plan.splits)
    int4_gemm_product[grid](
        *(x, packed.words, packed.scales, packed.zeros, bias, out),
        *(M, packed.N, tiles, plan.split_tiles, groups, shift, LOW_NIBBLES, x.stride(0), out.stride(0)),
        **constants(config, rows == FINE_GROUP, pair, value),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # triton 3.9 warns when it is left out
    )


def constants(config: configs.TritonConfig, fine: bool, pair: int, value: float) -> dict[str, Any]:
    """The constexpr arguments of the product kernel: those of a launch and of its static gates."""
    return {
        "TOKENS": config.token_tile,
        "STEP": config.step_tiles,
        "FINE": fine,
        "SCALE_WEIGHTS": config.scale_weights,
        "MAGIC_PAIR": pair,
        "MAGIC_VALUE": value,
    }


def _whole_tiles(x: torch.Tensor, depth: int) -> torch.Tensor:
    """x itself, or a copy whose rows are `depth` long, zeros at the end, and start at multiples of 32 bytes.

    So the kernel needs no mask along K and is compiled for one alignment. Only K that is no multiple of 64 costs this.
    """
    if x.shape[1] == depth and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    rows = x.new_zeros(x.shape[0], depth)
    rows[:, : x.shape[1]] = x
    return rows


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot do a problem, wherever they run."""
    if problem.dtype not in MAGIC:
        return f"the activations are {short_dtype(problem.dtype)}; the Triton kernels take float16 or bfloat16"
    if problem.options["activation_bits"] != 16:
        return f"activation_bits={problem.options['activation_bits']}; the Triton kernels multiply 16-bit activations"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        return f"triton {triton.__version__} is older than 3.6, with which the kernels were never compiled; upgrade it"
    return None


def _why_not(problem: Problem) -> str | None:
    return refusal(problem) or extension.why_not_gpu(problem, FAMILIES)


def prepare(weight: Int4Weight, dtype: torch.dtype, activation_bits: int) -> Multiply:
    """Packs a weight once, on its own CUDA device or the current one; the result multiplies by it."""
    weight = weight if weight.device.type == "cuda" else weight.to("cuda")
    properties = torch.cuda.get_device_properties(weight.device)
    families = {gpu.index: gpu.family for gpu in platform.gpus()}
    return multiplier(pack(weight, dtype), properties.multi_processor_count, families[weight.device.index or 0])


TRITON = Implementation("triton", from_canonical(prepare), _why_not)
