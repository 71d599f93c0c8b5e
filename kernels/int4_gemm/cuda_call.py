"""How the CUDA launchers of csrc/int4_gemm are called: their argument block, and which kernel takes which batch."""

import ctypes
from dataclasses import dataclass

import torch

from tokenmill.kernels.int4_gemm.layout import ROWS, CudaWeight

#: Launcher name to the token tiles that it is compiled for.
TOKEN_TILES = {"sm90": (64, 128, 256), "mma_sync": (8, 16, 32, 64)}
#: The largest batch for which the bandwidth kernel is planned on Hopper.
_DECODE_TOKENS = 32
#: A split of K gets at least this many tiles, so that the pipeline is worth filling.
_MIN_SPLIT_TILES = 4
_TYPES = {torch.float16: 0, torch.bfloat16: 1}


class Arguments(ctypes.Structure):
    """`Int4GemmArguments` of csrc/int4_gemm/arguments.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "words", "scales", "zeros", "y", "workspace", "tickets")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride")),
        *((name, ctypes.c_int32) for name in ("M", "N", "K", "tiles", "group_rows", "type", "token_tile")),
        *((name, ctypes.c_int32) for name in ("splits", "dependent")),
    )


@dataclass(frozen=True)
class Plan:
    """One launch: the kernel's name (`sm90` or `mma_sync`), tokens of a CTA, and CTAs that share one tile's K."""

    kernel: str
    token_tile: int
    splits: int


def plan(M: int, weight: CudaWeight, sm_count: int, hopper: bool) -> Plan:
    """The launch for a batch of M tokens.

    The smallest token tile that holds the batch, and as many splits of K as fill the multiprocessors once (the
    Hopper kernel takes a whole one) or twice (two or three CTAs of the portable one share one).
    """
    kernel = "sm90" if hopper and M > _DECODE_TOKENS else "mma_sync"
    token_tile = next((tile for tile in TOKEN_TILES[kernel] if tile >= M), TOKEN_TILES[kernel][-1])
    blocks, tiles = weight.words.shape[:2]
    ctas = blocks * -(-M // token_tile)
    wanted = sm_count if kernel == "sm90" else 2 * sm_count
    most = max(1, tiles // _MIN_SPLIT_TILES)
    return Plan(kernel, token_tile, max(1, min(wanted // max(ctas, 1), most)))


def arguments(
    weight: CudaWeight, dtype: torch.dtype, M: int, x_stride: int, y_stride: int, launch: Plan, dependent: bool
) -> Arguments:
    """The argument block without its pointers.

    Args:
        weight: Packed for activations of `dtype`.
        dtype: float16 or bfloat16.
        M: Tokens.
        x_stride: Elements from one token's inputs to the next one's; a multiple of 8.
        y_stride: The same of the outputs.
        launch: From `plan`.
        dependent: Whether weights may be fetched before the grid before has ended.
    """
    return Arguments(
        x_stride=x_stride,
        y_stride=y_stride,
        M=M,
        N=weight.N,
        K=weight.K if weight.order is None else weight.padded_depth,
        tiles=weight.words.shape[1],
        group_rows=weight.group_rows,
        type=_TYPES[dtype],
        token_tile=launch.token_tile,
        splits=launch.splits,
        dependent=dependent,
    )


def workspace_floats(weight: CudaWeight, M: int, launch: Plan) -> int:
    """float32 elements of the partial sums; 0 without splits."""
    tokens = -(-M // launch.token_tile) * launch.token_tile
    return launch.splits * tokens * weight.padded_rows if launch.splits > 1 else 0


def tickets(weight: CudaWeight, M: int, launch: Plan) -> int:
    """32-bit counters, zero before the first launch and after each; 0 without splits."""
    return -(-M // launch.token_tile) * (weight.padded_rows // ROWS) if launch.splits > 1 else 0


def arranged(x: torch.Tensor, weight: CudaWeight) -> torch.Tensor:
    """Activations in the order of the packed rows: [M, K], or [M, Kp] with zeros where a packed row is padding."""
    if weight.order is None:
        return x
    padded = torch.nn.functional.pad(x, (0, 1))  # column K is the zero that order -1 means
    return padded.index_select(1, weight.order.long() % (weight.K + 1))


def padded_stride(columns: int) -> int:
    """The smallest row stride that TMA and 16-byte accesses allow, in 16-bit elements."""
    return -(-columns // 8) * 8
