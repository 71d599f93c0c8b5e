"""Every format's tensors and the canonical weight are exact inverses, and a damaged layer gets one clear line."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.errors import CheckpointError, InputError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes
from tokenmill.quant.format import FORMATS, Scheme
from tokenmill.quant.pack import AWQ_ORDER, read_layer, write_layer


def random_weight(K: int, N: int, scheme: Scheme, dtype: torch.dtype, bias: bool, seed: int) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    group_size = scheme.rows_per_group(K)
    G = -(-K // group_size)
    groups = (torch.arange(K) // group_size)[torch.randperm(K, generator=generator)].int()
    is_trivial = torch.equal(groups, (torch.arange(K) // group_size).int())
    return Int4Weight(
        codes=pack_codes(torch.randint(0, 16, (K, N), dtype=torch.uint8, generator=generator)),
        scales=(torch.rand(G, N, generator=generator) + 0.01).to(dtype),
        group_size=group_size,
        K=K,
        zeros=None if scheme.symmetric else torch.randint(0, 16, (G, N), dtype=torch.uint8, generator=generator),
        g_idx=groups if scheme.act_order and not is_trivial else None,
        bias=torch.randn(N, generator=generator).to(dtype) if bias else None,
    )


def assert_same(left: Int4Weight, right: Int4Weight) -> None:
    assert (left.K, left.N, left.group_size) == (right.K, right.N, right.group_size)
    for name in ("codes", "scales", "zeros", "g_idx", "bias"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


@settings(deadline=None, max_examples=150)
@given(
    format_name=st.sampled_from(FORMATS),
    num_groups=st.integers(1, 4),
    last=st.integers(1, 40),
    group_size=st.sampled_from([32, 64, 128, -1]),
    N=st.integers(1, 40),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_reading_and_writing_are_inverses(
    format_name: str,
    num_groups: int,
    last: int,
    group_size: int,
    N: int,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    bias: bool,
    seed: int,
) -> None:
    scheme = Scheme(format_name, group_size, symmetric, act_order and format_name != "awq" and group_size != -1)
    ragged = format_name.startswith("gptq") or group_size == -1
    K = last if group_size == -1 else group_size * num_groups + (last % group_size - group_size if ragged else 0)
    weight = random_weight(max(K, 1), N, scheme, dtype, bias, seed)
    if scheme.act_order and weight.g_idx is None:
        scheme = Scheme(format_name, group_size, symmetric)  # a shuffle that moved nothing
    tensors = write_layer(weight, scheme)
    again = read_layer("layer", tensors, scheme)
    assert_same(weight, again)
    rewritten = write_layer(again, scheme)
    assert rewritten.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous()
        assert torch.equal(rewritten[name], tensor), name


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_weight_goes_from_any_format_to_any_other(source: str, target: str) -> None:
    weight = random_weight(96, 24, Scheme(source, 32, False), torch.float16, True, 3)
    read = read_layer("a", write_layer(weight, Scheme(source, 32, False)), Scheme(source, 32, False))
    moved = read_layer("a", write_layer(read, Scheme(target, 32, False)), Scheme(target, 32, False))
    assert_same(weight, moved)
    assert torch.equal(dequantize(weight), dequantize(moved))


def test_gptq_zero_points_are_stored_minus_one_with_borrows() -> None:
    """The zero point 0 borrows from its neighbour; reading nibble by nibble would turn the neighbour wrong."""
    scheme = Scheme("gptq", 32, False)
    zeros = torch.tensor([[0, 8, 15, 1, 0, 0, 3, 9]], dtype=torch.uint8)
    weight = Int4Weight(torch.zeros(4, 8, dtype=torch.int32), torch.ones(1, 8, dtype=torch.float16), 32, 32, zeros)
    word = sum(int(z) << (4 * i) for i, z in enumerate(zeros[0])) - 0x11111111
    stored = write_layer(weight, scheme)["qzeros"]
    assert stored.item() % 2**32 == word % 2**32
    read = read_layer("a", write_layer(weight, scheme), scheme).zeros
    assert read is not None
    assert torch.equal(read, zeros)


def test_awq_interleaves_columns_within_a_word() -> None:
    weight = Int4Weight(
        codes=pack_codes(torch.arange(8, dtype=torch.uint8).repeat(8, 1)),
        scales=torch.ones(1, 8, dtype=torch.float16),
        group_size=8,
        K=8,
    )
    word = write_layer(weight, Scheme("awq", 8, True))["qweight"][0].item()
    assert [(int(word) >> (4 * i)) & 15 for i in range(8)] == list(AWQ_ORDER)


def test_pack_quantized_is_transposed_and_offset() -> None:
    """q + 8 packed along K, as compressed-tensors' own packing does."""
    q = torch.tensor([[-8, -1, 0, 7, 1, 2, 3, 4, 5]], dtype=torch.int8)
    weight = Int4Weight(pack_codes((q + 8).to(torch.uint8).T.contiguous()), torch.ones(1, 1), 9, 9)
    tensors = write_layer(weight, Scheme("pack-quantized", -1, True))
    assert tensors["weight_shape"].tolist() == [1, 9]
    assert tensors["weight_packed"].tolist() == [[0xCBA9F870 - 2**32, 13]]
    assert dequantize(weight).T.tolist() == q.tolist()


def gptq_layer() -> dict[str, torch.Tensor]:
    scheme = Scheme("gptq", 32, False, act_order=True)
    return write_layer(random_weight(96, 16, scheme, torch.float16, True, 1), scheme)


GPTQ = Scheme("gptq", 32, False, act_order=True)


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros", "g_idx"])
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = gptq_layer()
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"model.a.{name} is missing; the checkpoint is incomplete"):
        read_layer("model.a", tensors, GPTQ)


def changed(name: str, place: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    tensors = gptq_layer()
    tensors[name] = tensors[name].clone()
    tensors[name][place] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (gptq_layer() | {"qweight": torch.zeros(12, 16)}, "qweight is float32; it must be int32"),
        (gptq_layer() | {"qweight": torch.zeros(0, 16, dtype=torch.int32)}, r"qweight has shape \[0, 16\]"),
        (gptq_layer() | {"qweight": torch.zeros(11, 16, dtype=torch.int32)}, "11 rows of 8 codes, g_idx 96 entries"),
        (gptq_layer() | {"scales": torch.ones(3, 16, dtype=torch.int32)}, "scales is int32; it must be float16 or"),
        (gptq_layer() | {"scales": torch.ones(3, 15)}, r"scales has shape \[3, 15\]; it must be \[3, 16\]"),
        (gptq_layer() | {"scales": torch.ones(4, 16)}, "4 scales a column; K=96 with group_size=32 needs 3"),
        (gptq_layer() | {"qzeros": torch.zeros(3, 3, dtype=torch.int32)}, r"qzeros has shape \[3, 3\]"),
        (gptq_layer() | {"g_idx": torch.zeros(96)}, "g_idx is float32; it must be int32 or int64"),
        (gptq_layer() | {"bias": torch.zeros(3)}, r"bias is torch.float32 \[3\]"),
        (changed("scales", (1, 2), float("inf")), r"scales\[1, 2\]=inf must be finite"),
        (changed("scales", (0, 0), float("nan")), r"scales\[0, 0\]=nan must be finite"),
        (changed("g_idx", (5,), 3), r"g_idx\[5\]=3 must be in 0..2"),
        (changed("g_idx", (0,), -1), r"g_idx\[0\]=-1 must be in 0..2"),
    ],
)
def test_a_damaged_gptq_layer_gets_one_line(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_layer("model.a", tensors, GPTQ)
    assert str(caught.value).startswith("model.a: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format_name", ["awq", "pack-quantized"])
def test_a_group_that_does_not_divide_is_refused(format_name: str) -> None:
    tensors = write_layer(
        random_weight(96, 16, Scheme(format_name, 32, True), torch.float16, False, 1), Scheme(format_name, 32, True)
    )
    with pytest.raises(CheckpointError, match="K=96 is not a multiple of group_size=64"):
        read_layer("a", tensors, Scheme(format_name, 64, True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([16, 0], r"weight_shape is \[16, 0\]"),
        ([16, 104], r"weight_packed has shape \[16, 12\]; it must be \[16, 13\]"),
    ],
)
def test_a_wrong_weight_shape_is_refused(shape: list[int], message: str) -> None:
    scheme = Scheme("pack-quantized", 32, True)
    tensors = write_layer(random_weight(96, 16, scheme, torch.float16, False, 1), scheme)
    with pytest.raises(CheckpointError, match=message):
        read_layer("a", tensors | {"weight_shape": torch.tensor(shape)}, scheme)


@pytest.mark.parametrize(
    ("made", "written", "message"),
    [
        (Scheme("gptq", 32, False), Scheme("gptq", 32, True), "cannot be written symmetric"),
        (Scheme("gptq", 32, True), Scheme("gptq", 64, True), "has group_size=32, the scheme 64"),
        (Scheme("gptq", 32, True, True), Scheme("awq", 32, True), "needs an act-order scheme"),
    ],
)
def test_a_weight_that_a_scheme_cannot_say_is_refused(made: Scheme, written: Scheme, message: str) -> None:
    weight = random_weight(128, 16, made, torch.float16, False, 1)
    with pytest.raises(InputError, match=message):
        write_layer(weight, written)
