"""INT4 GEMM on the CPU: every kernel against float64, on every instruction set that this processor has."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tokenmill import platform
from tokenmill.env import ISA_LEVELS
from tokenmill.errors import InputError, UnsupportedError
from tokenmill.kernels import extension
from tokenmill.kernels.int4_gemm import cpu_impl, cpu_layout, op
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes
from tokenmill.kernels.numerics import Fenced, assert_bit_equal, assert_within, unit_roundoff

pytestmark = pytest.mark.skipif(
    extension.why_not("int4_gemm_cpu") is not None, reason=str(extension.why_not("int4_gemm_cpu"))
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Every tile height, heights that need filling, and several tiles.
HEIGHTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 17, 24, 25, 41)
#: With AMX; more are multiplied in bf16.
MOST_ROWS_AS_INT16 = 12
#: With AVX512_BF16: for so many rows of bf16 the weights are rounded to it, too.
FEWEST_ROWS_DEQUANTISED = 160


@pytest.fixture(params=platform.isa_levels())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOKENMILL_ISA", request.param)
    # Its kernel is chosen on no processor of Intel's, and is tested on them all the same.
    monkeypatch.setattr(platform, "cpu_vendor", lambda: "AuthenticAMD")
    return str(request.param)


def random_weight(
    K: int,
    N: int,
    group_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = True,
    act_order: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> Int4Weight:
    g = torch.Generator().manual_seed(seed)
    G = -(-K // group_size)
    codes = torch.randint(16, (K, N), generator=g, dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(16, (G, N), generator=g, dtype=torch.uint8)
    scales = (torch.rand(G, N, generator=g) * 0.02 + 0.001).to(torch.float16 if dtype == torch.float32 else dtype)
    g_idx = (torch.arange(K) // group_size)[torch.randperm(K, generator=g)].int() if act_order else None
    return Int4Weight(
        pack_codes(codes), scales, group_size, K, zeros, g_idx, torch.randn(N, generator=g).to(dtype) if bias else None
    )


def bound(x: torch.Tensor, weight: Int4Weight, exact: torch.Tensor, activation_bits: int) -> torch.Tensor:
    """Largest error that the method itself can make.

    The kernels subtract zero * sum(x) from sum(code * x), so every term is bounded by its magnitude with both, 30 at
    most; sums are float32, in any order (Higham's gamma). Float16 activations keep 16 bits in the bf16 kernel, where
    code and zero are less by 8; for many rows of bf16 its weights are rounded to that. As int16 an activation is exact
    unless it is much smaller than the largest of its group, and off by half a step of at most 2^-14 of that otherwise.
    Eight-bit activations add half a step per element.
    """
    scales = weight.scales.double()[weight.groups()].abs()
    magnitude = x.double().abs() @ scales
    limit = magnitude * 30 * (weight.K + 8) * unit_roundoff(torch.float32)
    limit += exact.abs() * unit_roundoff(x.dtype) * 1.01
    groups = weight.groups()
    largest = torch.zeros(x.shape[0], weight.num_groups, dtype=torch.float64)
    largest.scatter_reduce_(1, groups.expand(x.shape[0], -1), x.double().abs(), "amax")
    largest = largest[:, groups]
    level = cpu_impl.level(16, x.dtype)
    if activation_bits == 8:
        limit += largest / 127 / 2 * 1.001 @ dequantize(weight).abs()
    elif level == "avx512_bf16" or (level == "amx" and x.shape[0] > MOST_ROWS_AS_INT16):
        if x.dtype == torch.float16:
            limit += magnitude * 16 * 2.0**-16
        elif level == "avx512_bf16" and x.dtype == torch.bfloat16 and x.shape[0] >= FEWEST_ROWS_DEQUANTISED:
            limit += x.double().abs() @ dequantize(weight).abs() * unit_roundoff(torch.bfloat16)
    elif x.dtype != torch.float32 and level != "plain":
        exact_from = largest * 2.0 ** (-6 if x.dtype == torch.bfloat16 else -3)
        limit += torch.where(x.double().abs() < exact_from, largest * 2.0**-15, 0.0) @ dequantize(weight).abs()
    return limit


def check(x: torch.Tensor, weight: Int4Weight, activation_bits: int = 16) -> torch.Tensor:
    exact = x.double() @ dequantize(weight)
    if weight.bias is not None:
        exact += weight.bias.double()
    fenced = Fenced((x.shape[0], weight.N), x.dtype)
    op.int4_gemm(x, weight, activation_bits=activation_bits, out=fenced.tensor, implementation="cpu")
    fenced.check()
    assert_within(fenced.tensor, exact, bound(x, weight, exact, activation_bits))
    return fenced.tensor


def activations(M: int, K: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_sixteen_bit_activations(isa: str, dtype: torch.dtype, symmetric: bool) -> None:
    weight = random_weight(384, 150, 128, dtype=dtype, symmetric=symmetric)
    for M in HEIGHTS:
        check(activations(M, 384, dtype), weight)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_eight_bit_activations(isa: str, symmetric: bool) -> None:
    weight = random_weight(384, 150, 128, symmetric=symmetric)
    if isa == "plain":
        with pytest.raises(UnsupportedError, match="AVX2"):
            op.int4_gemm(activations(1, 384, torch.bfloat16), weight, activation_bits=8, implementation="cpu")
        return
    for M in HEIGHTS:
        check(activations(M, 384, torch.bfloat16), weight, activation_bits=8)


@pytest.mark.parametrize(
    ("K", "N", "group_size"),
    [
        (8, 1, 8),
        (1, 1, 1),
        (100, 17, 100),
        (136, 33, 32),
        (160, 16, 20),
        (257, 129, 64),
        (70, 300, 7),
        (4096, 40, 4096),
    ],
)
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act-order"])
def test_any_shape_and_group(isa: str, K: int, N: int, group_size: int, act_order: bool) -> None:
    for bits in (16, 8) if isa != "plain" else (16,):
        for M in (1, 2, 4, 7, 18):
            weight = random_weight(K, N, group_size, symmetric=False, act_order=act_order, bias=False)
            check(activations(M, K, torch.bfloat16), weight, bits)


@pytest.mark.parametrize(("K", "group_size"), [(384, 128), (600, 300), (136, 32), (1000, 1000), (2200, 128)])
def test_many_rows(isa: str, K: int, group_size: int) -> None:
    """Several passes over the same weight, and last tiles of every height, in groups that are one step and several."""
    if isa == "plain":
        pytest.skip("one tile height, one pass")
    weight = random_weight(K, 150, group_size, symmetric=False)
    for bits in (16, 8):
        for M in (8, 127, 128, 129, 130, 170, 259, 264):
            check(activations(M, K, torch.bfloat16), weight, bits)


@pytest.mark.parametrize(("M", "K"), [(530, 128), (140, 16384)])
def test_more_rows_than_are_packed_at_once(isa: str, M: int, K: int) -> None:
    if isa == "plain":
        pytest.skip("the same driver, at a tenth of the speed")
    for bits in (16, 8):
        check(activations(M, K, torch.bfloat16), random_weight(K, 40, 128), bits)


def test_extreme_codes_and_activations_do_not_overflow(isa: str) -> None:
    """All codes 15 against activations of one sign: the largest intermediate sums there are."""
    K, N = 4096, 32
    codes = torch.full((K, N), 15, dtype=torch.uint8)
    weight = Int4Weight(
        pack_codes(codes), torch.ones(1, N, dtype=torch.float16), K, K, torch.zeros(1, N, dtype=torch.uint8)
    )
    for bits in (16, 8) if isa != "plain" else (16,):
        for M in (2, 9):
            check(torch.full((M, K), -1.9921875, dtype=torch.bfloat16), weight, bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outliers_and_tiny_activations(isa: str, dtype: torch.dtype) -> None:
    """What one scale for a group makes of values far apart, and of all of them near the smallest or the largest."""
    weight = random_weight(384, 48, 128, dtype=dtype, symmetric=False, bias=False)
    x = activations(3, 384, dtype)
    x[:, 7] *= 3000
    check(x, weight)
    check(torch.where(x.abs() > 100, 0, x), weight)
    for factor in (2.0**-110, 2.0**110) if dtype == torch.bfloat16 else (2.0**-13, 2.0**2):
        check(x * factor, weight)


@pytest.mark.parametrize("group_size", [128, 512])
@pytest.mark.parametrize("bits", [16, 8])
def test_rows_do_not_depend_on_their_batch(isa: str, bits: int, group_size: int) -> None:
    """The same row gives the same bits alone and among others: each sum runs over K in one order.

    With AMX, few rows are multiplied as int16 and more in bf16, which rounds otherwise; with AVX512_BF16 weights are
    rounded for many: batches are such as one way takes.
    """
    if bits == 8 and isa == "plain":
        pytest.skip("there is no 8-bit kernel in plain C++")
    weight = random_weight(512, 272, group_size, symmetric=False)
    x = activations(250, 512, torch.bfloat16)
    batches = [(1, 8), (1, 30), (1, 90), (FEWEST_ROWS_DEQUANTISED, 250)]
    if isa == "amx" and bits == 16:
        batches = [(1, 8), (3, MOST_ROWS_AS_INT16), (4, MOST_ROWS_AS_INT16), (13, 30), (20, 90)]
    for few, many in batches:
        together = op.int4_gemm(x[:many], weight, activation_bits=bits, implementation="cpu")
        for row in (0, 5, many - few):
            alone = op.int4_gemm(x[row : row + few], weight, activation_bits=bits, implementation="cpu")
            assert_bit_equal(alone, together[row : row + few])


@pytest.mark.parametrize("N", [400, 2064])
@pytest.mark.parametrize("bits", [16, 8])
def test_threads_do_not_change_a_bit(isa: str, bits: int, N: int) -> None:
    """Neither where they share packed rows nor, with so many columns, where each packs its own."""
    if bits == 8 and isa == "plain":
        pytest.skip("there is no 8-bit kernel in plain C++")
    weight = random_weight(512, N, 64)
    x = activations(21, 512, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op.int4_gemm(x, weight, activation_bits=bits, implementation="cpu")
        torch.set_num_threads(2)
        two = op.int4_gemm(x, weight, activation_bits=bits, implementation="cpu")
    finally:
        torch.set_num_threads(threads)
    assert_bit_equal(one, two)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(isa: str, bits: int, value: float) -> None:
    if bits == 8 and isa == "plain":
        pytest.skip("there is no 8-bit kernel in plain C++")
    weight = random_weight(256, 32, 128, bias=False)
    x = activations(3, 256, torch.bfloat16)
    x[1, 17] = value
    y = op.int4_gemm(x, weight, activation_bits=bits, implementation="cpu")
    assert not bool(y[1].isfinite().any())
    assert bool(y[[0, 2]].isfinite().all())


def test_strided_rows_and_large_batches_are_read_right(isa: str) -> None:
    """More rows than are worked on at a time, read from a wider matrix."""
    if isa == "plain":
        pytest.skip("the same driver, at a tenth of the speed")
    wide = activations(1030, 256, torch.bfloat16)
    check(wide[:, :128], random_weight(128, 48, 32))


@pytest.mark.skipif("avx512_bf16" not in platform.isa_levels(), reason="the processor has no products of bf16")
def test_intel_does_without_products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", "avx512_bf16")
    monkeypatch.setattr(platform, "cpu_vendor", lambda: "AuthenticAMD")
    assert cpu_impl.level(16, torch.bfloat16) == "avx512_bf16"
    monkeypatch.setattr(platform, "cpu_vendor", lambda: "GenuineIntel")
    assert cpu_impl.level(16, torch.bfloat16) == cpu_impl.level(16, torch.float16) == "avx512_vnni"
    assert cpu_impl.level(16, torch.float32) == "avx512"


def test_no_rows() -> None:
    y = op.int4_gemm(torch.empty(0, 256, dtype=torch.bfloat16), random_weight(256, 32, 128), implementation="cpu")
    assert y.shape == (0, 32)


def test_prepared_layer_takes_leading_dimensions() -> None:
    weight = random_weight(256, 48, 128)
    layer = op.prepare(weight, torch.bfloat16)
    assert layer.implementation == "cpu"
    x = activations(6, 256, torch.bfloat16)
    assert_bit_equal(layer(x.view(2, 3, 256)), op.int4_gemm(x, weight).view(2, 3, 48))


def test_prepared_layer_takes_rows_of_any_stride() -> None:
    layer = op.prepare(random_weight(256, 32, 128), torch.float32)
    x = torch.randn(256, 3).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_automatic_choice_explains_itself() -> None:
    problem = op.problem_of(random_weight(256, 32, 128), torch.bfloat16, torch.device("cpu"), 16)
    from tokenmill.kernels import registry

    assert registry.explain(op.INT4_GEMM, problem).chosen == "cpu"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: op.int4_gemm(torch.zeros(2, 255, dtype=torch.bfloat16), w), "K"),
        (lambda w: op.int4_gemm(torch.zeros(2, 256, dtype=torch.float64), w), "float64"),
        (lambda w: op.int4_gemm(torch.zeros(256, 2, dtype=torch.bfloat16).t(), w), "contiguous"),
        (lambda w: op.int4_gemm(torch.zeros(2, 256, dtype=torch.bfloat16), w, activation_bits=4), "activation_bits=4"),
        (lambda w: op.prepare(w, torch.float64), "float64"),
        (lambda w: op.prepare(w, torch.bfloat16, activation_bits=4), "activation_bits=4 is not 8 or 16"),
        (lambda w: op.prepare(w, torch.bfloat16)(torch.zeros(2, 256)), "float32"),
        (lambda w: op.prepare(w, torch.bfloat16)(torch.zeros(2, 12, dtype=torch.bfloat16)), "256"),
        (lambda w: op.prepare(w, torch.bfloat16)(torch.zeros((), dtype=torch.bfloat16)), r"x is torch.bfloat16 \[\]"),
        # Kernels would write four bytes where the buffer has two.
        (lambda w: op.int4_gemm(torch.zeros(2, 256), w, out=torch.zeros(2, 32, dtype=torch.float16)), "out is float16"),
        (lambda w: op.prepare(w, torch.float32)(torch.zeros(2, 256), torch.zeros(2, 32).half()), "torch.float16"),
        (lambda w: op.prepare(w, torch.float32)(torch.zeros(2, 256), torch.zeros(2, 31)), r"out is .* \[2, 31\]"),
        (lambda w: op.prepare(w, torch.float32)(torch.zeros(2, 256), torch.zeros(32, 2).t()), "contiguous"),
        (lambda w: op.int4_gemm(torch.zeros(2, 256, requires_grad=True), w), "x asks for a gradient"),
        (lambda w: op.prepare(w, torch.float32)(torch.zeros(2, 256, requires_grad=True)), "x asks for a gradient"),
    ],
)
def test_bad_input_is_one_line(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        call(random_weight(256, 32, 128))  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_activations_of_a_model_that_is_not_trained_now_are_taken() -> None:
    weight = random_weight(256, 32, 128)
    x = activations(3, 256, torch.float32)
    expected = op.prepare(weight, torch.float32)(x)
    x.requires_grad_()
    with torch.no_grad():
        assert_bit_equal(op.prepare(weight, torch.float32)(x), expected)
        assert_bit_equal(op.int4_gemm(x, weight), expected)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (
            torch.zeros(31, dtype=torch.bfloat16),
            r"bias is torch.bfloat16 \[31\] .*; pass a contiguous torch.bfloat16 \[32\]",
        ),
        (torch.zeros(1, dtype=torch.bfloat16), r"\[1\]"),
        (torch.zeros(1, 32, dtype=torch.bfloat16), r"\[1, 32\]"),
        (torch.zeros(64, dtype=torch.bfloat16)[::2], r"with strides \(2,\)"),
        (torch.zeros(32), r"bias is torch.float32"),
        (torch.zeros(32, dtype=torch.bfloat16, device="meta"), "on meta"),
    ],
)
def test_a_bias_that_does_not_fit_the_call_is_one_line(implementation: str, bias: torch.Tensor, message: str) -> None:
    layer = op.prepare(random_weight(256, 32, 128), torch.bfloat16, implementation=implementation)
    with pytest.raises(InputError, match=message) as error:
        layer(activations(3, 256, torch.bfloat16), bias=bias)
    assert "\n" not in str(error.value)


def test_a_bias_of_another_form_is_brought_into_that_of_the_layer() -> None:
    """The weight's own, which checkpoints may store in float32, and which may be a column of something."""
    weight = random_weight(256, 32, 128)
    assert weight.bias is not None
    wide = torch.zeros(32, 2)
    wide[:, 0] = weight.bias.float()
    x = activations(3, 256, torch.bfloat16)
    expected = op.prepare(weight, torch.bfloat16)(x)
    assert_bit_equal(op.prepare(replace(weight, bias=wide[:, 0]), torch.bfloat16)(x), expected)
    assert_bit_equal(op.prepare(replace(weight, bias=wide.bfloat16()[:, 0]), torch.bfloat16)(x), expected)
    assert_bit_equal(op.int4_gemm(x, replace(weight, bias=wide[:, 0].contiguous())), expected)


def test_the_native_call_refuses_a_bias_that_does_not_fit() -> None:
    packed = cpu_layout.pack(random_weight(256, 32, 128)).buffer
    x, out = activations(3, 256, torch.bfloat16), torch.empty(3, 32, dtype=torch.bfloat16)
    isa = ISA_LEVELS.index(cpu_impl.level(16, torch.bfloat16))
    good = torch.zeros(64, dtype=torch.bfloat16)
    for bias in (good[:31], good[::2], good[:32].float(), good[:32].unsqueeze(0)):
        with pytest.raises(RuntimeError, match="the bias must be contiguous, of the dtype of x, and have 32 elements"):
            torch.ops.tokenmill_native.int4_gemm_cpu(out, x, packed, bias, 16, isa)
    torch.ops.tokenmill_native.int4_gemm_cpu(out, x, packed, good[:32], 16, isa)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("g_idx", (3,), 9, r"g_idx\[3\]=9 must be in 0..1"),
        ("g_idx", (3,), -1, r"g_idx\[3\]=-1 must be in 0..1"),
        ("scales", (1, 2), float("inf"), r"scales\[1, 2\]=inf must be finite"),
        ("scales", (1, 2), float("nan"), r"scales\[1, 2\]=nan must be finite"),
        ("zeros", (0, 2), 16, r"zeros\[0, 2\]=16 must be in 0..15"),
        ("bias", (4,), float("nan"), r"bias\[4\]=nan must be finite"),
    ],
)
def test_values_that_no_weight_has_are_one_line(
    implementation: str, name: str, place: tuple[int, ...], value: float, message: str
) -> None:
    weight = random_weight(256, 32, 128, symmetric=False, act_order=True)
    getattr(weight, name)[place] = value
    x = activations(3, 256, torch.bfloat16)
    calls: list[Callable[[], object]] = [
        lambda: op.prepare(weight, torch.bfloat16, implementation=implementation),
        lambda: op.int4_gemm(x, weight, implementation=implementation),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_torch_compile_sees_one_opaque_call(activation_bits: int) -> None:
    """As vLLM compiles its models: one graph, any number of rows, the same bits as without."""
    if activation_bits == 8 and platform.isa() == "plain":
        pytest.skip("there is no 8-bit kernel in plain C++")
    weight = random_weight(256, 96, 64, symmetric=False, act_order=True)
    layer = op.prepare(weight, torch.bfloat16, activation_bits=activation_bits)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(layer(x * 0.5)) + 1

    torch.compiler.reset()
    # Without inductor, whose own fusions may round in another order.
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(disable=False):  # this backend needs no headers, which may be why it is off
        for rows in (1, 2, 9):
            x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).bfloat16()
            assert_bit_equal(compiled(x), block(x))


def test_opcheck() -> None:
    """What torch asks of every op: its schema, its fake implementation, and that it compiles."""
    weight = random_weight(128, 40, 64, symmetric=False)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = (x, weight.codes, weight.scales, weight.zeros, weight.g_idx, weight.bias, weight.group_size, 16)
    torch.library.opcheck(torch.ops.tokenmill.int4_gemm.default, arguments)
    assert_bit_equal(torch.ops.tokenmill.int4_gemm(*arguments), op.int4_gemm(x, weight))


def test_the_native_op_takes_nothing_but_what_was_packed_for_it() -> None:
    """It takes addresses from the buffer that it is given: another tensor or rows of another size end in an error."""
    native = extension.native("int4_gemm_cpu")
    packed = cpu_layout.pack(random_weight(64, 32, 32)).buffer
    x, out = activations(3, 64, torch.bfloat16), torch.empty(3, 32, dtype=torch.bfloat16)
    native(out, x, packed, None, 16, 0)
    for bad, reason in (
        ((out, x, torch.zeros_like(packed), None, 16, 0), "not a weight packed"),
        ((out, x[:, :56], packed, None, 16, 0), "do not fit a weight of 64 by 32"),
        ((out[:2], x, packed, None, 16, 0), "do not fit"),
        ((out, x, packed, None, 8, 0), "no kernel for 8-bit activations"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            native(*bad)
