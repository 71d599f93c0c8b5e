"""The canonical INT4 weight: what every checkpoint format is read into and every kernel layout is made from.

A linear layer is ``y [M, N] = x [M, K] @ W [K, N] + bias [N]`` with

    W[k, n] = scales[g(k), n] * (code[k, n] - zero[g(k), n])       0 <= code, zero <= 15

where ``g(k) = k // group_size``, or ``g_idx[k]`` for an act-order checkpoint, and ``zero = 8`` for a symmetric one.
Codes are packed as in GPTQ (Frantar et al., 2022): bits ``4i .. 4i+3`` of ``codes[r, n]`` hold the code of row
``k = 8r + i``. K and N may be any positive integers; the rows that fill up the last word are zero bits.
"""

from dataclasses import dataclass

import torch

from tokenmill.errors import InputError

#: Codes in one int32 word.
CODES_PER_WORD = 8
#: The zero point of a symmetric weight.
SYMMETRIC_ZERO = 8
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """One quantized linear layer in canonical form; see the module's formula.

    Shapes, dtypes and devices are checked when it is made, values by `check_values` (which reads every element).

    Attributes:
        codes: [ceil(K / 8), N] int32, eight codes a word along K.
        scales: [G, N] float16, bfloat16 or float32, with G = ceil(K / group_size); the last group may be short.
        group_size: Rows of K that share a scale, 1..K; K means per channel (G = 1).
        K: Input features.
        zeros: [G, N] uint8, each 0..15; None for a symmetric weight, whose zero point is 8 everywhere.
        g_idx: [K] int32, the group of each row, each 0..G-1; None where it is ``k // group_size``.
            Groups need not have the same number of rows (a tensor-parallel shard of an act-order layer).
        bias: [N] floating point, or None.

    Raises:
        InputError: A shape, dtype or device does not fit.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    K: int
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def N(self) -> int:  # noqa: N802 (the formula's letter)
        """Output features."""
        return self.codes.shape[1]

    @property
    def num_groups(self) -> int:
        """G, the number of scales of each output feature."""
        return self.scales.shape[0]

    @property
    def device(self) -> torch.device:
        """Where all of its tensors are."""
        return self.codes.device

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int32 or self.codes.dim() != 2:
            raise InputError(f"codes must be a 2-D int32 tensor, got {_describe(self.codes)}")
        K, N = self.K, self.codes.shape[1]
        if K < 1 or N < 1:
            raise InputError(f"K={K}, N={N}: an INT4 weight needs at least one row and one column")
        if not 1 <= self.group_size <= K:
            raise InputError(f"group_size={self.group_size} is not in 1..K={K}; per channel is group_size=K")
        if self.scales.dtype not in SCALE_DTYPES:
            raise InputError(f"scales must be float16, bfloat16 or float32, got {self.scales.dtype}")
        G = -(-K // self.group_size)
        # A shard of an act-order layer sees the groups of the whole layer.
        G = self.scales.shape[0] if self.g_idx is not None and self.scales.dim() == 2 else G
        _check_shape("codes", self.codes, (-(-K // CODES_PER_WORD), N))
        _check_shape("scales", self.scales, (G, N))
        if self.zeros is not None:
            _check_shape("zeros", self.zeros, (G, N), torch.uint8)
        if self.g_idx is not None:
            _check_shape("g_idx", self.g_idx, (K,), torch.int32)
        if self.bias is not None:
            _check_shape("bias", self.bias, (N,))
            if not self.bias.is_floating_point():
                raise InputError(f"bias must be floating point, got {self.bias.dtype}")
        for name in ("scales", "zeros", "g_idx", "bias"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.device:
                raise InputError(f"{name} is on {tensor.device}, codes on {self.device}; move them to one device")

    def check_values(self) -> None:
        """Checks what only the data can tell: finite scales and bias, zeros in 0..15, g_idx in 0..G-1.

        Raises:
            InputError: The first element that breaks a limit, with its place and value.
        """
        _check_elements("scales", self.scales, ~torch.isfinite(self.scales), "must be finite")
        if self.bias is not None:
            _check_elements("bias", self.bias, ~torch.isfinite(self.bias), "must be finite")
        if self.zeros is not None:
            _check_elements("zeros", self.zeros, self.zeros > 15, "must be in 0..15")
        if self.g_idx is not None:
            outside = (self.g_idx < 0) | (self.g_idx >= self.num_groups)
            _check_elements("g_idx", self.g_idx, outside, f"must be in 0..{self.num_groups - 1}")

    def groups(self) -> torch.Tensor:
        """[K] int64: the group of each row."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.K, device=self.device) // self.group_size

    def to(self, device: torch.device | str) -> "Int4Weight":
        """The same weight on another device."""
        moved = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "g_idx", "bias")}
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in moved.items()}
        return Int4Weight(group_size=self.group_size, K=self.K, **moved)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes along the first dimension, eight a word.

    Args:
        codes: [K, N] uint8, each 0..15.

    Returns:
        [ceil(K / 8), N] int32, zero bits beyond K.

    Raises:
        InputError: The shape or dtype is another.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise InputError(f"codes must be a 2-D uint8 tensor, got {_describe(codes)}")
    rows = -(-codes.shape[0] // CODES_PER_WORD)
    missing = rows * CODES_PER_WORD - codes.shape[0]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, missing)).view(rows, CODES_PER_WORD, codes.shape[1])
    words = torch.zeros(rows, codes.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(CODES_PER_WORD):
        words |= padded[:, i].to(torch.int32) << (4 * i)
    return words


def unpack_codes(words: torch.Tensor, K: int) -> torch.Tensor:
    """The inverse of `pack_codes`.

    Args:
        words: [ceil(K / 8), N] int32.
        K: Number of rows to return; what lies beyond is dropped.

    Returns:
        [K, N] uint8, each 0..15.

    Raises:
        InputError: The shape or dtype is another.
    """
    _check_shape("words", words, (-(-K // CODES_PER_WORD), words.shape[-1]), torch.int32)
    codes = torch.empty(words.shape[0], CODES_PER_WORD, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(CODES_PER_WORD):
        codes[:, i] = (words >> (4 * i)) & 15
    return codes.view(-1, words.shape[1])[:K]


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """W [K, N] of the module's formula: the reference that every reader and kernel is judged by.

    A code minus a zero point has at most 5 bits and a 16-bit scale at most 11, so float64 and float32 are exact;
    a narrower dtype is that exact product, rounded once.
    """
    codes = unpack_codes(weight.codes, weight.K).to(torch.float64)
    groups = weight.groups()
    if weight.zeros is None:
        codes -= SYMMETRIC_ZERO
    else:
        codes -= weight.zeros.to(torch.float64)[groups]
    return (codes * weight.scales.to(torch.float64)[groups]).to(dtype)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        wanted = list(shape) if dtype is None else f"{dtype} {list(shape)}"
        raise InputError(f"{name} is {_describe(tensor)}; this weight needs {wanted}")


def _check_elements(name: str, tensor: torch.Tensor, bad: torch.Tensor, limit: str) -> None:
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        shown = ", ".join(map(str, place))
        raise InputError(f"{name}[{shown}]={tensor[place].item()} {limit}; the checkpoint is damaged")
