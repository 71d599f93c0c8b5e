"""How the Triton kernels of this op are launched: frozen configurations, the heuristic that picks one, what to search.

The reasons below are arithmetic on instruction counts (triton_gates.jsonl) and published bandwidths. Nothing here was
measured on a GPU; `SEARCH_SPACE` is what a tuner has to try before anything here may be called best.
"""

from dataclasses import dataclass
from itertools import product

from tokenmill.kernels.int4_gemm.layout import DEPTH, FINE_GROUP, CudaWeight

#: The smallest token tile: wgmma's n is at least 16 in triton 3.6, which takes mma.sync below.
_SMALLEST_TILE = 16
_LARGEST_TILE = 128
#: The largest batch whose group scales are applied to the sums, see `configuration`.
_DECODE_TOKENS = 32
#: Programs that one multiprocessor should have at a time: while one unpacks, the other's tensor core instructions run.
#: Two decode programs keep 2 x 3 x 8 KiB of weights in flight; 4.8 TB/s at 1 us of latency ask for 36 KiB of each SM.
_PROGRAMS_PER_SM = 2
#: A split of K gets at least this many steps: as many as the pipeline has stages.
_MIN_SPLIT_STEPS = 4


@dataclass(frozen=True)
class TritonConfig:
    """One specialisation of the product kernel; a program computes 128 output features of `token_tile` tokens.

    Attributes:
        token_tile: Tokens of a program, a power of two from 16.
        step_tiles: Packed tiles (64 input features each) of one step along K: 1 or 2. All belong to one group of
            scales, unless a tile has two.
        scale_weights: Scales are multiplied into the weights, which are rounded once more; otherwise into the sums of
            each step, which leaves the weights exact integers.
        num_warps: Warps of a program.
        num_stages: Steps whose weights and activations are in shared memory or on the way there.
    """

    token_tile: int
    step_tiles: int
    scale_weights: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TritonPlan:
    """One launch: the configuration, and packed tiles of each split of K (`splits` of them, the last may be short)."""

    config: TritonConfig
    split_tiles: int
    splits: int


SEARCH_SPACE = tuple(
    TritonConfig(token_tile, step_tiles, scale_weights, num_warps, num_stages)
    for token_tile, step_tiles, scale_weights, num_warps, num_stages in product(
        (16, 32, 64, 128, 256), (1, 2), (False, True), (4, 8), (3, 4, 5)
    )
    # 128 x 256 sums in float32 are 256 registers a thread of four warps
    if token_tile * 128 // (32 * num_warps) <= 128
)


def configuration(M: int, family: str, group_rows: int, tiles: int) -> TritonConfig:
    """The configuration for a batch.

    Args:
        M: Tokens.
        family: Of the GPU, e.g. `sm90`.
        group_rows: Packed rows that share a scale.
        tiles: Packed tiles along K.

    - The smallest tile that holds the batch, at most 128: with 128, a program's sums and weights take 210 to 240
      registers of each of 128 threads on sm_90, and two programs share a multiprocessor. mma.sync keeps more in
      registers; there the tile of 128 takes 256 threads.
    - Up to 32 tokens the sums of a step are 16 to 32 registers a thread, the weights 32 to 64 pairs: scaling the sums
      is less work, and keeps the weights exact. sm_100 has its sums in tensor memory, from where they would have to be
      fetched each time: there the weights are scaled. So are they where a tile has two scales.
    - Two tiles a step share the loop's own instructions on sm_90, if a group spans them: 19 instead of 24 instructions
      for 8 weights. Elsewhere, and with larger token tiles, there are no registers left for it.
    """
    token_tile = min(max(_SMALLEST_TILE, 1 << (M - 1).bit_length()), _LARGEST_TILE)
    decode = token_tile <= _DECODE_TOKENS
    wide = decode and family == "sm90" and tiles % 2 == 0 and group_rows % (2 * DEPTH) == 0
    mma_sync = family not in ("sm90", "sm100")
    return TritonConfig(
        token_tile=token_tile,
        step_tiles=2 if wide else 1,
        scale_weights=group_rows == FINE_GROUP or not decode or family == "sm100",
        num_warps=8 if mma_sync and token_tile == _LARGEST_TILE else 4,
        num_stages=4,
    )


def plan(M: int, weight: CudaWeight, sm_count: int, family: str) -> TritonPlan:
    """The launch for a batch of M tokens: as many splits of K as give every multiprocessor its programs."""
    blocks, tiles = weight.words.shape[:2]
    config = configuration(M, family, weight.group_rows, tiles)
    programs = blocks * -(-M // config.token_tile)
    steps = tiles // config.step_tiles
    splits = max(1, min(_PROGRAMS_PER_SM * sm_count // programs, steps // _MIN_SPLIT_STEPS))
    split_tiles = -(-steps // splits) * config.step_tiles
    return TritonPlan(config, split_tiles, -(-tiles // split_tiles))
