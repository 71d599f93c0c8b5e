"""The packed weight that every CUDA kernel of this op reads, for decode and prefill alike.

The kernels compute ``y^T = W^T x^T`` on tensor cores with the weight as the *A* operand, whose m16 x k16 fragment
(PTX ISA, "Matrix Fragments for mma.m16n8k16"; wgmma's register A operand is four of them, one a warp) is spread over
the 32 lanes of a warp. So the buffer stores, for each thread, exactly the codes of its own fragments, in the order
in which it uses them: one 16-byte load a thread and K step of 64, no shuffles, every byte of a row block contiguous.

    words  [N/128, K/64, 256, 4] int32   tile of 128 output features x 64 input features: 8 warps x 32 lanes,
                                         four k16 steps; nibble p of a word is
                                           feature 16*warp + lane//4 + 8*(p & 1)
                                           input   16*step + 2*(lane%4) + 8*(p>>1 & 1) + (p>>2)
    scales [N/128, G, 128]               activation dtype
    zeros  [N/128, G, 128] uint8         absent for symmetric weights

N is padded to 128 and K to 64; padding has scale 0 or meets inputs that the kernels read as zero.
Bits ``4p`` and ``4p+16`` hold two neighbouring inputs, so ``(word >> 4r) & 0x000f000f`` is register r of a fragment
but for the exponent.

A group of a packed weight is 32 rows of K, 64 times a power of two, or everything. Other group sizes and act-order
are brought into that form: rows are sorted by group, each group is filled up to a multiple of 32, and `order` says
which input feature each packed row multiplies.
"""

from dataclasses import dataclass

import torch

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import SYMMETRIC_ZERO, Int4Weight, pack_codes, unpack_codes

ROWS = 128  #: Output features of a tile.
DEPTH = 64  #: Input features of a tile.
FINE_GROUP = 32  #: The smallest group; two of them in a tile.
_THREADS = 256
_WORDS = 4
#: Row blocks packed at a time: bounds the temporary memory to a few MiB for any layer.
_BLOCKS_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class CudaWeight:
    """One linear layer in the packed CUDA layout; see the module's diagram.

    Attributes:
        words: [Np/128, Kp/64, 256, 4] int32.
        scales: [Np/128, G, 128] float16 or bfloat16.
        zeros: [Np/128, G, 128] uint8, or None when the zero point is 8 everywhere.
        group_rows: Packed rows of K that share a scale: 32, 64 times a power of two, or Kp.
        K: Input features of the layer.
        N: Output features of the layer.
        order: [Kp] int32, the input feature of each packed row, -1 for padding; None: packed row k is feature k.
        source: [G] int32, the canonical group of each packed group, -1 for padding; what `unpack` needs.
        group_size: Of the canonical weight.
        num_groups: G of the canonical weight.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_rows: int
    K: int
    N: int
    order: torch.Tensor | None
    source: torch.Tensor
    group_size: int
    num_groups: int

    @property
    def padded_rows(self) -> int:
        """Np: output features in the buffer."""
        return self.words.shape[0] * ROWS

    @property
    def padded_depth(self) -> int:
        """Kp: input features in the buffer."""
        return self.words.shape[1] * DEPTH

    def nbytes(self) -> int:
        """Bytes that a kernel reads once for any batch size."""
        tensors = [self.words, self.scales] + ([] if self.zeros is None else [self.zeros])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fragment_map() -> tuple[torch.Tensor, torch.Tensor]:
    """Where each nibble of a tile belongs.

    Returns:
        (feature, input): two [256, 4, 8] int64 tensors, for thread, word and nibble: the output feature (0..127) and
        the input feature (0..63) inside the tile. Together they hit every element of the tile once.
    """
    thread = torch.arange(_THREADS).view(-1, 1, 1)
    step = torch.arange(_WORDS).view(1, -1, 1)
    nibble = torch.arange(8).view(1, 1, -1)
    warp, lane = thread // 32, thread % 32
    feature = 16 * warp + lane // 4 + 8 * (nibble & 1)
    depth = 16 * step + 2 * (lane % 4) + 8 * (nibble >> 1 & 1) + (nibble >> 2)
    shape = (_THREADS, _WORDS, 8)
    return feature.expand(shape), depth.expand(shape)


def pack_tiles(codes: torch.Tensor) -> torch.Tensor:
    """Codes to words.

    Args:
        codes: [Kp, Np] uint8, each 0..15; Kp a multiple of 64 and Np of 128.

    Returns:
        [Np/128, Kp/64, 256, 4] int32.
    """
    Kp, Np = codes.shape
    feature, depth = fragment_map()
    place = (depth * ROWS + feature).view(-1).to(codes.device)
    tiles = codes.view(Kp // DEPTH, DEPTH, Np // ROWS, ROWS).permute(2, 0, 1, 3).reshape(-1, DEPTH * ROWS)
    nibbles = tiles.index_select(1, place).view(-1, 8)
    words = torch.zeros(nibbles.shape[0], dtype=torch.int32, device=codes.device)
    for p in range(8):
        words |= nibbles[:, p].to(torch.int32) << (4 * p)
    return words.view(Np // ROWS, Kp // DEPTH, _THREADS, _WORDS)


def unpack_tiles(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_tiles`.

    Args:
        words: [Np/128, Kp/64, 256, 4] int32.

    Returns:
        [Kp, Np] uint8, each 0..15.
    """
    blocks, tiles = words.shape[:2]
    feature, depth = fragment_map()
    place = (depth * ROWS + feature).view(-1).to(words.device)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=words.device)
    nibbles = ((words.reshape(-1, 1) >> shifts) & 15).to(torch.uint8).view(blocks * tiles, DEPTH * ROWS)
    codes = torch.empty_like(nibbles)
    codes[:, place] = nibbles
    return codes.view(blocks, tiles, DEPTH, ROWS).permute(1, 2, 0, 3).reshape(tiles * DEPTH, blocks * ROWS)


def pack(weight: Int4Weight, dtype: torch.dtype) -> CudaWeight:
    """Brings a weight into the packed layout, on the device where it is.

    Args:
        weight: The canonical weight; its bias is not part of the layout.
        dtype: float16 or bfloat16, that of the activations; scales are rounded to it.

    Raises:
        InputError: Another dtype, or a scale beyond its range.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"the CUDA kernels take float16 or bfloat16 activations, not {dtype}; convert them")
    arrangement = _arrange(weight)
    Kp, blocks = arrangement.padded_depth, -(-weight.N // ROWS)
    words = torch.empty(blocks, Kp // DEPTH, _THREADS, _WORDS, dtype=torch.int32, device=weight.device)
    for start in range(0, blocks, _BLOCKS_AT_ONCE):
        stop = min(start + _BLOCKS_AT_ONCE, blocks)
        codes = unpack_codes(weight.codes[:, start * ROWS : stop * ROWS].contiguous(), weight.K)
        words[start:stop] = pack_tiles(_placed(codes, arrangement.order, Kp, (stop - start) * ROWS))
    scales = weight.scales.to(dtype)
    if not bool(torch.isfinite(scales).all()):
        largest = float(weight.scales.abs().max())
        raise InputError(f"a scale of {largest:g} is beyond the range of {dtype}; use bfloat16 activations")
    zeros = None if weight.zeros is None else _by_block(weight.zeros, arrangement.source, blocks)
    return CudaWeight(
        words=words,
        scales=_by_block(scales, arrangement.source, blocks),
        zeros=zeros,
        group_rows=arrangement.group_rows,
        K=weight.K,
        N=weight.N,
        order=arrangement.order,
        source=arrangement.source,
        group_size=weight.group_size,
        num_groups=weight.num_groups,
    )


def unpack(packed: CudaWeight) -> Int4Weight:
    """The inverse of `pack`.

    Scales come back in the packed dtype. Of a group without any row (a shard of an act-order layer may have one)
    nothing was kept: its scale and zero point come back as 0.
    """
    padded = unpack_tiles(packed.words)[:, : packed.N]
    device, K = packed.words.device, packed.K
    row_group = packed.source.long().repeat_interleave(packed.group_rows)[: packed.padded_depth]
    if packed.order is None:
        codes, g_idx = padded[:K], None
    else:
        real = packed.order >= 0
        codes = torch.empty(K, packed.N, dtype=torch.uint8, device=device)
        codes[packed.order[real].long()] = padded[real]
        g_idx = torch.empty(K, dtype=torch.int32, device=device)
        g_idx[packed.order[real].long()] = row_group[real].to(torch.int32)
        natural = torch.arange(K, dtype=torch.int32, device=device) // packed.group_size
        if packed.num_groups == -(-K // packed.group_size) and bool((g_idx == natural).all()):
            g_idx = None
    return Int4Weight(
        codes=pack_codes(codes.contiguous()),
        scales=_by_group(packed.scales, packed),
        group_size=packed.group_size,
        K=K,
        zeros=None if packed.zeros is None else _by_group(packed.zeros, packed),
        g_idx=g_idx,
    )


@dataclass(frozen=True)
class _Arrangement:
    """How rows and groups of a canonical weight are placed: the fields of `CudaWeight` of the same names."""

    order: torch.Tensor | None
    source: torch.Tensor
    group_rows: int
    padded_depth: int


def _arrange(weight: Int4Weight) -> _Arrangement:
    K, size, device = weight.K, weight.group_size, weight.device
    Kp = _round_up(K, DEPTH)
    if weight.g_idx is None and (weight.num_groups == 1 or size % FINE_GROUP == 0):
        several = size if _is_coarse(size) else FINE_GROUP
        group_rows = Kp if weight.num_groups == 1 else several
        first_row = torch.arange(0, Kp, group_rows, device=device)
        source = torch.where(first_row < K, first_row // size, -1).to(torch.int32)
        return _Arrangement(None, source, group_rows, Kp)
    groups = weight.groups()
    counts = torch.bincount(groups, minlength=weight.num_groups)
    filled = (counts + FINE_GROUP - 1) // FINE_GROUP * FINE_GROUP
    used = filled[filled > 0]
    common = int(used[0])
    group_rows = common if bool((used == common).all()) and _is_coarse(common) else FINE_GROUP
    Kp = _round_up(int(filled.sum()), DEPTH)
    order = torch.full((Kp,), -1, dtype=torch.int32, device=device)
    by_group = torch.argsort(groups, stable=True)
    # A row moves down by the padding of the groups before its own.
    shift = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)
    order[torch.arange(K, device=device) + shift[groups[by_group]]] = by_group.to(torch.int32)
    source = torch.full((-(-Kp // group_rows),), -1, dtype=torch.int32, device=device)
    owners = torch.arange(weight.num_groups, device=device).repeat_interleave(filled // group_rows)
    source[: owners.numel()] = owners.to(torch.int32)
    return _Arrangement(order, source, group_rows, Kp)


def _is_coarse(rows: int) -> bool:
    """Whether a kernel finds the group of a tile by a shift."""
    tiles, rest = divmod(rows, DEPTH)
    return rest == 0 and tiles > 0 and tiles & (tiles - 1) == 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _placed(codes: torch.Tensor, order: torch.Tensor | None, depth: int, rows: int) -> torch.Tensor:
    """[K, n] codes in their packed rows, filled up to [depth, rows] with the code of zero."""
    placed = torch.full((depth, rows), SYMMETRIC_ZERO, dtype=torch.uint8, device=codes.device)
    if order is None:
        placed[: codes.shape[0], : codes.shape[1]] = codes
    else:
        real = order >= 0
        placed[real, : codes.shape[1]] = codes[order[real].long()]
    return placed


def _by_block(values: torch.Tensor, source: torch.Tensor, blocks: int) -> torch.Tensor:
    """[G, N] values of canonical groups as [blocks, packed groups, 128], zero in the padding."""
    placed = torch.zeros(source.numel(), blocks * ROWS, dtype=values.dtype, device=values.device)
    real = source >= 0
    placed[real, : values.shape[1]] = values[source[real].long()]
    return placed.view(-1, blocks, ROWS).permute(1, 0, 2).contiguous()


def _by_group(values: torch.Tensor, packed: CudaWeight) -> torch.Tensor:
    """The inverse of `_by_block`."""
    flat = values.permute(1, 0, 2).reshape(packed.source.numel(), -1)[:, : packed.N]
    groups = torch.zeros(packed.num_groups, packed.N, dtype=values.dtype, device=values.device)
    real = packed.source >= 0
    groups[packed.source[real].long()] = flat[real]
    return groups
