"""The packed weight of the CPU kernels: one buffer for every instruction set, decode and prefill alike.

Columns stand in blocks of 16; one line of 64 bytes holds eight rows of K of one block, a 32-bit word a column, as in
the canonical form. Blocks are contiguous along K (see csrc/int4_gemm/cpu.h for why):

    lines  [ceil(N/16), U, 16] int32
    scales [ceil(N/16), G, 16] the canonical scales' dtype
    zeros  [ceil(N/16), G, 16] uint8, absent for symmetric weights

Rows are stored group by group, each group filled up to whole words with code 0; `source` says which input feature
feeds each packed row, -1 for filling. Act-order, group sizes that are no multiple of 8 and ragged last groups are
thereby the same as everything else. `pack` and `unpack` are exact inverses.

All of it is one tensor, which begins with a header of int64 that says where the parts are (`Header` in cpu.h): a call
that comes after megabytes of another layer's weight finds nothing in the caches, so it should look at few tensors.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenmill.kernels import huge_pages
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight, pack_codes, unpack_codes

BLOCK = 16  #: Columns of a block.
#: Columns packed at a time where rows have to be rearranged: bounds the temporary memory.
_COLUMNS_AT_ONCE = 4096
_LINE = 64  #: Bytes: every part begins at a multiple.
_MAGIC = b"INT4CPU1"
#: magic; K, N, blocks, units, groups, scale type, in order; offsets of lines, scales, zeros (0: none), group_units and
#: source
_HEADER = struct.Struct("<8s12q")
#: As `Type` in csrc/int4_gemm/cpu.h counts.
_SCALE_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """One linear layer in the packed CPU layout; see the module's diagram.

    Attributes:
        buffer: [bytes] uint8, what the native op takes: the header and all of the following, which are views of it.
        lines: [B, U, 16] int32.
        scales: [B, G, 16].
        zeros: [B, G, 16] uint8, or None when the zero point is 8 everywhere.
        group_units: [G + 1] int32, where each group begins, in units of 8 packed rows; the last is U.
        source: [8 U] int32, the input feature of each packed row, -1 for filling.
        in_order: Whether packed row i is input feature i, with filling only at the end.
        K: Input features.
        N: Output features.
    """

    buffer: torch.Tensor
    lines: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_units: torch.Tensor
    source: torch.Tensor
    in_order: bool
    K: int
    N: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weight proper: lines, scales and zero points."""
        return sum(t.nbytes for t in (self.lines, self.scales, self.zeros) if t is not None)


def pack(weight: Int4Weight) -> CpuWeight:
    """Packs a canonical weight (on any device) for the CPU; the bias stays with the caller.

    A layer whose groups are whole words in natural order is a transposition; others are unpacked and rearranged,
    4096 columns at a time.
    """
    K, N, G = weight.K, weight.N, weight.num_groups
    groups = weight.groups().cpu()
    counts = torch.bincount(groups, minlength=G)
    units = -(-counts // CODES_PER_WORD)
    group_units = torch.cat([torch.zeros(1, dtype=torch.int64), units.cumsum(0)])
    total = int(group_units[-1])
    order = torch.argsort(groups, stable=True)  # input features, group by group
    within = torch.arange(K) - (counts.cumsum(0) - counts)[groups[order]]
    packed_row = group_units[groups[order]] * CODES_PER_WORD + within
    source = torch.full((total * CODES_PER_WORD,), -1, dtype=torch.int32)
    source[packed_row] = order.int()
    in_order = bool((source[:K] == torch.arange(K)).all())
    codes = weight.codes.cpu()
    if not in_order:
        codes = _rearranged(codes, source, K)
    padded = torch.nn.functional.pad(codes, (0, -N % BLOCK)) if N % BLOCK else codes
    in_blocks = padded.view(total, -1, BLOCK).transpose(0, 1)
    scales = _blocks(weight.scales.cpu())
    zeros = None if weight.zeros is None else _blocks(weight.zeros.cpu())
    group_units = group_units.int()
    buffer, offsets = _allocate([in_blocks, scales, zeros, group_units, source])
    facts = (K, N, in_blocks.shape[0], total, G, _SCALE_TYPES.index(scales.dtype), int(in_order))
    buffer[: _HEADER.size] = torch.frombuffer(bytearray(_HEADER.pack(_MAGIC, *facts, *offsets)), dtype=torch.uint8)

    def placed(part: torch.Tensor, offset: int) -> torch.Tensor:
        return buffer[offset : offset + part.nbytes].view(part.dtype).view(part.shape).copy_(part)

    return CpuWeight(
        buffer,
        placed(in_blocks, offsets[0]),
        placed(scales, offsets[1]),
        None if zeros is None else placed(zeros, offsets[2]),
        placed(group_units, offsets[3]),
        placed(source, offsets[4]),
        in_order,
        K,
        N,
    )


def _allocate(parts: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, list[int]]:
    """A buffer for a header and these parts, and where each begins; 0 for one that is missing."""
    offsets = []
    end = _HEADER.size
    for part in parts:
        begin = -(-end // _LINE) * _LINE
        offsets.append(0 if part is None else begin)
        end = end if part is None else begin + part.nbytes
    return huge_pages.empty((end,), torch.uint8), offsets


def unpack(packed: CpuWeight, group_size: int, g_idx: torch.Tensor | None = None) -> Int4Weight:
    """The canonical weight that `packed` was made from, given what packing does not keep.

    Args:
        packed: The result of `pack`.
        group_size: Of the canonical weight.
        g_idx: Its [K] int32 group indices, if it has them.
    """
    words = packed.lines.transpose(0, 1).reshape(packed.lines.shape[1], -1)[:, : packed.N]
    source = packed.source.long()
    real = source >= 0
    codes = torch.empty(packed.K, packed.N, dtype=torch.uint8)
    codes[source[real]] = unpack_codes(words, len(source))[real]
    scales = _columns(packed.scales, packed.N)
    zeros = None if packed.zeros is None else _columns(packed.zeros, packed.N)
    return Int4Weight(pack_codes(codes), scales, group_size, packed.K, zeros, g_idx)


def _rearranged(words: torch.Tensor, source: torch.Tensor, K: int) -> torch.Tensor:
    """Canonical words [ceil(K/8), N] with rows taken from `source`, filling as code 0."""
    rows = source.long()
    filling = (rows < 0).unsqueeze(1)
    parts = []
    for first in range(0, words.shape[1], _COLUMNS_AT_ONCE):
        codes = unpack_codes(words[:, first : first + _COLUMNS_AT_ONCE], K)[rows.clamp(min=0)]
        parts.append(pack_codes(codes.masked_fill(filling, 0)))
    return torch.cat(parts, dim=1)


def _blocks(table: torch.Tensor) -> torch.Tensor:
    """[G, N] to [ceil(N/16), G, 16], zeros in the padding."""
    padded = torch.nn.functional.pad(table, (0, -table.shape[1] % BLOCK))
    return padded.view(table.shape[0], -1, BLOCK).transpose(0, 1).contiguous()


def _columns(blocks: torch.Tensor, N: int) -> torch.Tensor:
    """The inverse of `_blocks`."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)[:, :N].contiguous()
