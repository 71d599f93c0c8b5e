"""The packed CUDA layout: exact inverses, and every nibble where the tensor core's fragments want it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.layout import (
    DEPTH,
    ROWS,
    CudaWeight,
    fragment_map,
    pack,
    pack_tiles,
    unpack,
    unpack_tiles,
)
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes, unpack_codes


def random_weight(
    K: int, N: int, group_size: int, *, zeros: bool = False, act_order: bool = False, seed: int = 0
) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    G = -(-K // group_size)
    natural = (torch.arange(K) // group_size).to(torch.int32)
    return Int4Weight(
        codes=pack_codes(torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8)),
        scales=(torch.rand(G, N, generator=generator) + 0.5).to(torch.bfloat16),
        group_size=group_size,
        K=K,
        zeros=torch.randint(0, 16, (G, N), generator=generator, dtype=torch.uint8) if zeros else None,
        g_idx=natural[torch.randperm(K, generator=generator)] if act_order else None,
    )


def packed_formula(packed: CudaWeight) -> torch.Tensor:
    """W [K, N] as a kernel sees it: codes, scales and zero points by packed row, scattered to input features."""
    codes = unpack_tiles(packed.words).double()
    group = torch.arange(packed.padded_depth) // packed.group_rows

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values.permute(1, 0, 2).reshape(values.shape[1], -1)[group].double()

    zeros = by_row(packed.zeros) if packed.zeros is not None else 8.0
    padded = (codes - zeros) * by_row(packed.scales)
    order = torch.arange(packed.padded_depth) if packed.order is None else packed.order.long()
    real = (order >= 0) & (order < packed.K)
    result = torch.full((packed.K, packed.padded_rows), float("nan"), dtype=torch.float64)
    result[order[real]] = padded[real]
    return result[:, : packed.N]


def test_fragment_map_is_a_permutation_of_the_tile() -> None:
    feature, depth = fragment_map()
    places = (depth * ROWS + feature).view(-1)
    assert torch.equal(places.sort().values, torch.arange(ROWS * DEPTH))


def test_every_fragment_register_holds_what_ptx_says() -> None:
    """PTX ISA, m16n8k16 A fragment: element i (register i // 2, half i % 2) of lane l is at
    row l // 4 (+ 8 unless i < 2 or 4 <= i < 6), column 2 (l % 4) + (i & 1) (+ 8 if i >= 4)."""
    codes = torch.randint(0, 16, (DEPTH, ROWS), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words = pack_tiles(codes)[0, 0]
    for warp in range(8):
        for lane in range(32):
            for step in range(4):
                word = int(words[32 * warp + lane, step]) & 0xFFFFFFFF
                for element in range(8):
                    register, half = element // 2, element % 2
                    pair = (word >> (4 * register)) & 0x000F000F
                    code = (pair >> (16 * half)) & 0xFFFF
                    row = lane // 4 + (0 if element < 2 or 4 <= element < 6 else 8)
                    column = 2 * (lane % 4) + (element & 1) + (8 if element >= 4 else 0)
                    assert code == int(codes[16 * step + column, 16 * warp + row])


@given(blocks=st.integers(1, 3), tiles=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_tiles_round_trip(blocks: int, tiles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (tiles * DEPTH, blocks * ROWS), dtype=torch.uint8, generator=generator)
    assert torch.equal(unpack_tiles(pack_tiles(codes)), codes)


@given(
    K=st.integers(1, 520),
    N=st.integers(1, 300),
    group=st.sampled_from([1, 8, 16, 31, 32, 48, 64, 96, 128, 192, 256, 10**6]),
    zeros=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_weight_round_trip(K: int, N: int, group: int, zeros: bool, act_order: bool, seed: int) -> None:
    weight = random_weight(K, N, min(group, K), zeros=zeros, act_order=act_order, seed=seed)
    packed = pack(weight, torch.bfloat16)
    back = unpack(packed)
    assert torch.equal(unpack_codes(back.codes, K), unpack_codes(weight.codes, K))
    assert torch.equal(back.groups(), weight.groups())
    assert torch.equal(back.scales, weight.scales)
    assert back.group_size == weight.group_size
    assert (back.zeros is None) == (weight.zeros is None)
    if weight.zeros is not None:
        assert back.zeros is not None
        assert torch.equal(back.zeros, weight.zeros)
    assert torch.equal(packed_formula(packed), dequantize(weight))


@pytest.mark.parametrize(
    ("group", "K", "rows"),
    [(32, 256, 32), (64, 256, 64), (128, 300, 128), (256, 1024, 256), (300, 300, 320), (96, 384, 32), (192, 384, 32)],
)
def test_groups_keep_their_size_where_a_kernel_can_find_them(group: int, K: int, rows: int) -> None:
    packed = pack(random_weight(K, 64, group), torch.float16)
    assert packed.group_rows == rows
    assert packed.order is None


def test_act_order_with_whole_groups_keeps_the_group_size() -> None:
    packed = pack(random_weight(512, 64, 128, act_order=True), torch.float16)
    assert packed.group_rows == 128
    assert packed.padded_depth == 512
    assert packed.order is not None


def test_a_shard_with_ragged_and_empty_groups() -> None:
    """A tensor-parallel shard of an act-order layer: it sees all scales, but few or no rows of some groups."""
    weight = random_weight(200, 130, 32)
    g_idx = torch.randint(0, 3, (200,), dtype=torch.int32, generator=torch.Generator().manual_seed(2)) * 2
    shard = Int4Weight(codes=weight.codes, scales=weight.scales, group_size=32, K=200, g_idx=g_idx)
    packed = pack(shard, torch.bfloat16)
    assert torch.equal(packed_formula(packed), dequantize(shard))
    assert torch.equal(unpack(packed).groups(), shard.groups())


def test_padding_multiplies_nothing() -> None:
    packed = pack(random_weight(100, 130, 32, zeros=True), torch.bfloat16)
    assert packed.words.shape == (2, 2, 256, 4)
    assert packed.nbytes() == packed.words.numel() * 4 + packed.scales.numel() * 2 + packed.scales.numel()
    assert not packed.scales[1, :, 2:].any()
    assert torch.equal(packed.source, torch.tensor([0, 1, 2, 3], dtype=torch.int32))


def test_refusals_name_value_and_remedy() -> None:
    weight = random_weight(64, 64, 64)
    with pytest.raises(InputError, match=r"float16 or bfloat16 activations, not torch.float32"):
        pack(weight, torch.float32)
    huge = Int4Weight(codes=weight.codes, scales=torch.full((1, 64), 1e5), group_size=64, K=64)
    with pytest.raises(InputError, match=r"100000 is beyond the range of torch.float16; use bfloat16"):
        pack(huge, torch.float16)
