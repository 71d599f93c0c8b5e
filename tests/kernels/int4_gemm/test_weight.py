"""The canonical INT4 weight: packing is a bijection, dequantisation is the formula, bad tensors get one clear line."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes, unpack_codes


def random_weight(
    K: int,
    N: int,
    group_size: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    G = -(-K // group_size)
    zeros = torch.randint(0, 16, (G, N), dtype=torch.uint8, generator=generator)
    groups = (torch.arange(K) // group_size)[torch.randperm(K, generator=generator)].int()
    return Int4Weight(
        codes=pack_codes(torch.randint(0, 16, (K, N), dtype=torch.uint8, generator=generator)),
        scales=(torch.rand(G, N, generator=generator) + 0.5).to(dtype),
        group_size=group_size,
        K=K,
        zeros=None if symmetric else zeros,
        g_idx=groups if act_order else None,
    )


@settings(deadline=None, max_examples=60)
@given(K=st.integers(1, 70), N=st.integers(1, 20), seed=st.integers(0, 99))
def test_packing_is_a_bijection(K: int, N: int, seed: int) -> None:
    codes = torch.randint(0, 16, (K, N), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack_codes(codes)
    assert words.shape == (-(-K // 8), N)
    assert torch.equal(unpack_codes(words, K), codes)
    assert torch.equal(pack_codes(unpack_codes(words, K)), words)


@pytest.mark.parametrize("codes", [torch.zeros(8, 4, dtype=torch.int32), torch.zeros(8, dtype=torch.uint8)])
def test_codes_of_another_form_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"codes must be a 2-D uint8 tensor, got torch\.(int32|uint8) \[8"):
        pack_codes(codes)


@pytest.mark.parametrize(("words", "K"), [(torch.zeros(2, 4, dtype=torch.int64), 16), (torch.zeros(2, 4).int(), 17)])
def test_words_of_another_form_are_refused(words: torch.Tensor, K: int) -> None:
    with pytest.raises(InputError, match=r"words is torch\.int\d\d \[2, 4\]; this weight needs torch\.int32 \[\d, 4\]"):
        unpack_codes(words, K)


def test_a_word_holds_its_rows_from_the_low_bits_up() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15], [9]], dtype=torch.uint8)
    words = pack_codes(codes)
    assert words[:, 0].tolist() == [0xF7654321 - 2**32, 9]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantisation_is_the_formula(symmetric: bool, act_order: bool, dtype: torch.dtype) -> None:
    K, N, group = 43, 5, 16
    weight = random_weight(K, N, group, symmetric=symmetric, act_order=act_order, dtype=dtype)
    codes, dense = unpack_codes(weight.codes, K), dequantize(weight)
    for k in range(K):
        g = k // group if weight.g_idx is None else int(weight.g_idx[k])
        for n in range(N):
            zero = 8 if weight.zeros is None else int(weight.zeros[g, n])
            assert float(dense[k, n]) == float(weight.scales[g, n]) * (int(codes[k, n]) - zero)
    assert torch.equal(dequantize(weight, torch.float32).double(), dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(2, 4, dtype=torch.int64)}, "codes must be a 2-D int32 tensor"),
        ({"codes": torch.zeros(3, 4, dtype=torch.int32)}, r"codes is torch.int32 \[3, 4\]; this weight needs \[2, 4\]"),
        ({"codes": torch.zeros(2, dtype=torch.int32)}, r"codes must be a 2-D int32 tensor, got torch.int32 \[2\]"),
        ({"codes": torch.zeros(2, 0, dtype=torch.int32)}, "N=0: an INT4 weight needs"),
        ({"K": 0}, "at least one row"),
        ({"group_size": 0}, r"group_size=0 is not in 1..K=16"),
        ({"group_size": 32}, r"group_size=32 is not in 1..K=16"),
        ({"scales": torch.ones(2, 4, dtype=torch.float64)}, "scales must be float16, bfloat16 or float32"),
        ({"scales": torch.ones(1, 4)}, r"scales is torch.float32 \[1, 4\]; this weight needs \[2, 4\]"),
        ({"zeros": torch.zeros(2, 4, dtype=torch.int32)}, "zeros is torch.int32"),
        ({"g_idx": torch.zeros(15, dtype=torch.int32)}, "g_idx is"),
        ({"bias": torch.zeros(4, dtype=torch.int32)}, "bias must be floating point"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, codes on cpu"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    good = {"codes": torch.zeros(2, 4, dtype=torch.int32), "scales": torch.ones(2, 4), "group_size": 8, "K": 16}
    with pytest.raises(InputError, match=message):
        Int4Weight(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.tensor([[1.0, float("inf")], [1.0, 1.0]])}, r"scales\[0, 1\]=inf must be finite"),
        ({"scales": torch.tensor([[1.0, 1.0], [float("nan"), 1.0]])}, r"scales\[1, 0\]=nan must be finite"),
        ({"zeros": torch.tensor([[0, 15], [16, 0]], dtype=torch.uint8)}, r"zeros\[1, 0\]=16 must be in 0..15"),
        ({"g_idx": torch.tensor([0] * 15 + [2], dtype=torch.int32)}, r"g_idx\[15\]=2 must be in 0..1"),
        ({"g_idx": torch.tensor([-1] + [0] * 15, dtype=torch.int32)}, r"g_idx\[0\]=-1 must be in 0..1"),
        ({"bias": torch.tensor([0.0, float("nan")])}, r"bias\[1\]=nan must be finite"),
    ],
)
def test_a_value_out_of_range_is_named(change: dict[str, object], message: str) -> None:
    good = {"codes": torch.zeros(2, 2, dtype=torch.int32), "scales": torch.ones(2, 2), "group_size": 8, "K": 16}
    weight = Int4Weight(**(good | change))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        weight.check_values()
