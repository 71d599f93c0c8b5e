"""The packed CPU layout is an exact, documented rearrangement of the canonical form."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.kernels.int4_gemm import cpu_layout
from tokenmill.kernels.int4_gemm.weight import Int4Weight, pack_codes, unpack_codes


@st.composite
def weights(draw: st.DrawFn) -> Int4Weight:
    K, N = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    group_size = draw(st.integers(1, K))
    G = -(-K // group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(16, (K, N), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (G, N), generator=generator, dtype=torch.uint8) if draw(st.booleans()) else None
    g_idx = None
    if draw(st.booleans()):
        g_idx = torch.randint(G, (K,), generator=generator, dtype=torch.int32)
    scales = torch.rand(G, N, generator=generator).to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
    return Int4Weight(pack_codes(codes), scales, group_size, K, zeros, g_idx)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_unpack_is_the_inverse_of_pack(weight: Int4Weight) -> None:
    again = cpu_layout.unpack(cpu_layout.pack(weight), weight.group_size, weight.g_idx)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scales, weight.scales)
    assert (again.zeros is None) == (weight.zeros is None)
    if weight.zeros is not None and again.zeros is not None:
        assert torch.equal(again.zeros, weight.zeros)


@given(weights())
@settings(max_examples=100, deadline=None)
def test_every_packed_row_belongs_to_its_group(weight: Int4Weight) -> None:
    packed = cpu_layout.pack(weight)
    units = packed.group_units.tolist()
    groups = weight.groups()
    seen = []
    for group, (first, last) in enumerate(itertools.pairwise(units)):
        rows = packed.source[first * 8 : last * 8]
        real = rows[rows >= 0]
        assert bool((groups[real.long()] == group).all())
        seen += real.tolist()
    assert sorted(seen) == list(range(weight.K))


def test_nibbles_stand_where_the_header_says() -> None:
    """Line u of block b holds, in word c, the codes of rows 8u..8u+7 of column 16 b + c, the first lowest."""
    K, N = 24, 35
    codes = torch.arange(K * N).view(K, N).remainder(16).to(torch.uint8)
    weight = Int4Weight(pack_codes(codes), torch.ones(1, N, dtype=torch.float16), K, K)
    packed = cpu_layout.pack(weight)
    assert packed.lines.shape == (3, 3, 16)
    for column in (0, 15, 16, 34):
        for row in (0, 7, 8, 23):
            word = int(packed.lines[column // 16, row // 8, column % 16])
            assert word >> (4 * (row % 8)) & 15 == int(codes[row, column])
    assert packed.in_order


def test_padding_columns_have_scale_zero() -> None:
    weight = Int4Weight(pack_codes(torch.full((8, 3), 15, dtype=torch.uint8)), torch.ones(1, 3).half(), 8, 8)
    packed = cpu_layout.pack(weight)
    assert bool((packed.scales[0, 0, 3:] == 0).all())
    assert bool((unpack_codes(packed.lines[0], 8)[:, 3:] == 0).all())


def test_a_natural_weight_is_only_transposed() -> None:
    """A 70B-sized layer is packed in seconds because nothing is unpacked: the words are the same words."""
    words = torch.randint(-(2**31), 2**31, (64, 48), dtype=torch.int64).int()
    packed = cpu_layout.pack(Int4Weight(words, torch.ones(4, 48).half(), 128, 512))
    assert torch.equal(packed.lines.transpose(0, 1).reshape(64, 48), words)
