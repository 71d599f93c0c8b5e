"""Maps between a layer's tensors in each checkpoint format and the canonical `Int4Weight`.

`read_layer` and `write_layer` are exact inverses: no value is rounded or lost in either direction.
The tensors are named as in the checkpoint without the layer's own name: `qweight`, `weight_scale`, ...

Where the words differ (Z is the zero point, c the code, both 0..15; row k of K, column n of N, eight to a word):

- gptq: `qweight [K/8, N]` is the canonical packing. `qzeros [G, N/8]` packs Z along N, and each *word* has
  0x11111111 subtracted with borrows between nibbles, so a zero point of 0 is recovered only by adding to the word.
- gptq_v2: as gptq, nothing subtracted.
- awq: `qweight [K, N/8]` and `qzeros [G, N/8]` pack along N in the order 0 2 4 6 1 3 5 7 from the low bits up.
- pack-quantized: `weight_packed [N, K/8]` is the canonical packing transposed (codes are stored as signed plus 8);
  `weight_scale [N, G]`, `weight_zero_point [N/8, G]`, `weight_shape` = [N, K].
"""

from collections.abc import Mapping

import torch

from tokenmill.errors import CheckpointError, InputError
from tokenmill.kernels.int4_gemm.weight import (
    CODES_PER_WORD,
    SCALE_DTYPES,
    SYMMETRIC_ZERO,
    Int4Weight,
    pack_codes,
    unpack_codes,
)
from tokenmill.quant.format import Scheme

Tensors = Mapping[str, torch.Tensor]

#: AWQ's nibble i of a word holds column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ONE_IN_EVERY_NIBBLE = 0x11111111

#: Tensors of a quantized layer by format: (always there, only if asymmetric, only if act-order, may be there).
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "gptq": (("qweight", "scales"), ("qzeros",), ("g_idx",), ("qzeros", "g_idx", "bias")),
    "gptq_v2": (("qweight", "scales"), ("qzeros",), ("g_idx",), ("qzeros", "g_idx", "bias")),
    "awq": (("qweight", "scales"), ("qzeros",), (), ("qzeros", "bias")),
    "pack-quantized": (
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point",),
        ("weight_g_idx",),
        ("weight_zero_point", "weight_g_idx", "bias"),
    ),
}


def weight_tensor(scheme: Scheme) -> str:
    """The tensor whose presence makes a layer a quantized one: `qweight` or `weight_packed`."""
    return _NAMES[scheme.format][0][0]


def tensor_names(scheme: Scheme) -> frozenset[str]:
    """Every tensor that a layer may have in this format."""
    always, _, _, optional = _NAMES[scheme.format]
    return frozenset((*always, *optional))


def missing_tensors(scheme: Scheme, present: frozenset[str] | set[str]) -> tuple[str, ...]:
    """The tensors that a layer of this scheme needs and does not have."""
    always, asymmetric, act_order, _ = _NAMES[scheme.format]
    needed = (*always, *(() if scheme.symmetric else asymmetric), *(act_order if scheme.act_order else ()))
    return tuple(name for name in needed if name not in present)


def read_layer(layer: str, tensors: Tensors, scheme: Scheme) -> Int4Weight:
    """Makes the canonical weight of one layer and checks all of its values.

    Args:
        layer: The layer's full name, for messages.
        tensors: Its tensors by their short names; ones the format does not know are ignored.
        scheme: How it is quantized. Zero points that are all 8 become None where the scheme says symmetric;
            a g_idx that is just ``k // group_size`` becomes None.

    Raises:
        CheckpointError: A tensor is missing, has a wrong shape or dtype, or holds a value out of range.
    """
    try:
        weight = form_layer(layer, tensors, scheme)
        weight.check_values()
    except InputError as error:
        raise CheckpointError(f"{layer}: {error}") from None
    return weight


def form_layer(layer: str, tensors: Tensors, scheme: Scheme) -> Int4Weight:
    """`read_layer` without a look at the values: its tensors, but for `weight_shape`, may be on the meta device.

    Raises:
        CheckpointError: A tensor is missing, or has a wrong shape or dtype.
    """
    missing = missing_tensors(scheme, set(tensors))
    if missing:
        raise CheckpointError(f"{layer}.{missing[0]} is missing; the checkpoint is incomplete")
    try:
        return _READERS[scheme.format](tensors, scheme)
    except InputError as error:
        raise CheckpointError(f"{layer}: {error}") from None


def write_layer(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one layer in the scheme's format: the inverse of `read_layer`.

    Raises:
        InputError: The weight cannot be expressed: zero points in a symmetric scheme, an act-order weight in AWQ,
            another group size than the scheme's.
    """
    if scheme.symmetric and weight.zeros is not None:
        raise InputError("a weight with zero points cannot be written symmetric; use an asymmetric scheme")
    if weight.group_size != scheme.rows_per_group(weight.K):
        raise InputError(f"the weight has group_size={weight.group_size}, the scheme {scheme.group_size}")
    if weight.g_idx is not None and not scheme.act_order:
        raise InputError(f"an act-order weight needs an act-order scheme; {scheme.format} was asked without one")
    tensors = _WRITERS[scheme.format](weight)
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")
    if shape is None and (tensor.dim() != 2 or 0 in tensor.shape):
        raise InputError(f"{name} has shape {list(tensor.shape)}; it must have two dimensions and no empty one")


def _words(count: int) -> int:
    return -(-count // CODES_PER_WORD)


def _make(
    tensors: Tensors,
    scheme: Scheme,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    K: int,
    g_idx: torch.Tensor | None,
) -> Int4Weight:
    """The canonical weight, with redundant zero points and group indices left out."""
    group_size = scheme.rows_per_group(K)
    has_values = not codes.is_meta
    if zeros is not None and scheme.symmetric and has_values and bool((zeros == SYMMETRIC_ZERO).all()):
        zeros = None
    if g_idx is not None:
        _check("g_idx", g_idx, (K,), (torch.int32, torch.int64))
        g_idx = g_idx.to(torch.int32)
        natural = torch.arange(K, dtype=torch.int32, device=g_idx.device) // group_size
        if has_values and torch.equal(g_idx, natural):
            g_idx = None
    return Int4Weight(
        codes=codes.contiguous(),
        scales=scales.contiguous(),
        group_size=group_size,
        K=K,
        zeros=zeros,
        g_idx=g_idx,
        bias=tensors.get("bias"),
    )


def _check_groups(num_groups: int, K: int, scheme: Scheme, ragged: bool) -> None:
    group_size = scheme.rows_per_group(K)
    if not ragged and K % group_size:
        raise InputError(f"K={K} is not a multiple of group_size={group_size}, which this format needs")
    if num_groups != -(-K // group_size):
        raise InputError(
            f"there are {num_groups} scales a column; K={K} with group_size={scheme.group_size} "
            f"needs {-(-K // group_size)}"
        )


def _read_gptq(tensors: Tensors, scheme: Scheme) -> Int4Weight:
    qweight, scales, g_idx = tensors["qweight"], tensors["scales"], tensors.get("g_idx")
    _check("qweight", qweight, None, (torch.int32,))
    _check("scales", scales, (scales.shape[0], qweight.shape[1]), SCALE_DTYPES)
    # Only g_idx tells a K that is no multiple of 8.
    K, N = qweight.shape[0] * CODES_PER_WORD if g_idx is None else g_idx.shape[0], qweight.shape[1]
    if _words(K) != qweight.shape[0]:
        raise InputError(f"qweight has {qweight.shape[0]} rows of 8 codes, g_idx {K} entries; they do not fit")
    G = scales.shape[0]
    _check_groups(G, K, scheme, ragged=True)
    zeros = None
    if (qzeros := tensors.get("qzeros")) is not None:
        _check("qzeros", qzeros, (G, _words(N)), (torch.int32,))
        zeros = read_gptq_zeros(qzeros, N, scheme.format)
    return _make(tensors, scheme, qweight, scales, zeros, K, g_idx)


def read_gptq_zeros(qzeros: torch.Tensor, N: int, checkpoint_format: str) -> torch.Tensor:
    """Zero points [G, N] uint8 from a GPTQ layer's `qzeros [G, ceil(N/8)]`; see the module for the two formats."""
    words = qzeros if checkpoint_format == "gptq_v2" else qzeros + _ONE_IN_EVERY_NIBBLE
    return unpack_codes(words.T.contiguous(), N).T.contiguous()


def _write_gptq(weight: Int4Weight) -> dict[str, torch.Tensor]:
    tensors = _write_gptq_v2(weight)
    tensors["qzeros"] -= _ONE_IN_EVERY_NIBBLE
    return tensors


def _write_gptq_v2(weight: Int4Weight) -> dict[str, torch.Tensor]:
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    return {
        "qweight": weight.codes,
        "qzeros": pack_codes(zeros.T.contiguous()).T.contiguous(),
        "scales": weight.scales,
        "g_idx": weight.groups().to(torch.int32),
    }


def _interleave(values: torch.Tensor) -> torch.Tensor:
    """[R, N] codes in AWQ's order of columns, filled up to whole words."""
    R, N = values.shape
    padded = torch.nn.functional.pad(values, (0, _words(N) * CODES_PER_WORD - N))
    return padded.view(R, -1, CODES_PER_WORD)[:, :, list(AWQ_ORDER)].reshape(R, -1)


def _deinterleave(values: torch.Tensor, N: int) -> torch.Tensor:
    """The inverse of `_interleave`."""
    natural = [AWQ_ORDER.index(column) for column in range(CODES_PER_WORD)]
    return values.view(values.shape[0], -1, CODES_PER_WORD)[:, :, natural].reshape(values.shape[0], -1)[:, :N]


def _unpack_columns(words: torch.Tensor, N: int) -> torch.Tensor:
    """[R, ceil(N/8)] AWQ words to [R, N] codes."""
    unpacked = unpack_codes(words.T.contiguous(), words.shape[1] * CODES_PER_WORD).T.contiguous()
    return _deinterleave(unpacked, N).contiguous()


def _pack_columns(codes: torch.Tensor) -> torch.Tensor:
    return pack_codes(_interleave(codes).T.contiguous()).T.contiguous()


def _read_awq(tensors: Tensors, scheme: Scheme) -> Int4Weight:
    qweight, scales = tensors["qweight"], tensors["scales"]
    _check("qweight", qweight, None, (torch.int32,))
    _check("scales", scales, None, SCALE_DTYPES)
    K, (G, N) = qweight.shape[0], scales.shape
    _check("qweight", qweight, (K, _words(N)), (torch.int32,))
    _check_groups(G, K, scheme, ragged=False)
    zeros = None
    if (qzeros := tensors.get("qzeros")) is not None and not scheme.symmetric:
        _check("qzeros", qzeros, (G, _words(N)), (torch.int32,))
        zeros = _unpack_columns(qzeros, N)
    return _make(tensors, scheme, pack_codes(_unpack_columns(qweight, N)), scales, zeros, K, None)


def _write_awq(weight: Int4Weight) -> dict[str, torch.Tensor]:
    tensors = {"qweight": _pack_columns(unpack_codes(weight.codes, weight.K)), "scales": weight.scales}
    if weight.zeros is not None:
        tensors["qzeros"] = _pack_columns(weight.zeros)
    return tensors


def _read_pack_quantized(tensors: Tensors, scheme: Scheme) -> Int4Weight:
    packed, scales, shape = tensors["weight_packed"], tensors["weight_scale"], tensors["weight_shape"]
    _check("weight_packed", packed, None, (torch.int32,))
    _check("weight_shape", shape, (2,), (torch.int64, torch.int32))
    N, K = (int(size) for size in shape)
    if K < 1 or N < 1:
        raise InputError(f"weight_shape is [{N}, {K}]; both must be positive")
    _check("weight_packed", packed, (N, _words(K)), (torch.int32,))
    scales = scales.view(-1, 1) if scales.dim() == 1 else scales
    _check("weight_scale", scales, (N, scales.shape[-1]), SCALE_DTYPES)
    G = scales.shape[1]
    _check_groups(G, K, scheme, ragged=False)
    zeros = None
    if (packed_zeros := tensors.get("weight_zero_point")) is not None and not scheme.symmetric:
        _check("weight_zero_point", packed_zeros, (_words(N), G), (torch.int32,))
        zeros = unpack_codes(packed_zeros, N).T.contiguous()
    return _make(tensors, scheme, packed.T, scales.T, zeros, K, tensors.get("weight_g_idx"))


def _write_pack_quantized(weight: Int4Weight) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": weight.codes.T,
        "weight_scale": weight.scales.T,
        "weight_shape": torch.tensor([weight.N, weight.K]),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack_codes(weight.zeros.T.contiguous())
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


_READERS = {
    "gptq": _read_gptq,
    "gptq_v2": _read_gptq,
    "awq": _read_awq,
    "pack-quantized": _read_pack_quantized,
}
_WRITERS = {
    "gptq": _write_gptq,
    "gptq_v2": _write_gptq_v2,
    "awq": _write_awq,
    "pack-quantized": _write_pack_quantized,
}
