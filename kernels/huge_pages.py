"""Large CPU tensors on large pages.

A weight that comes from memory once a token is read faster when the translation of its addresses does not have to come
from memory, too: with pages of 4 KiB a layer of 8 MiB needs two thousand of them.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch

PAGE = 2 << 20  #: Bytes of a large page on x86-64 and on ARM with small pages of 4 KiB.
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] | None:
    """The C library's; None where it has none."""
    found = getattr(ctypes.CDLL(None), "madvise", None)
    return found if callable(found) else None


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous tensor, of large pages where Linux grants them and the tensor fills one.

    Args:
        shape: Its sizes.
        dtype: Of its elements.

    Returns:
        A CPU tensor. Its storage may be up to `PAGE` bytes larger than it is.

    Source: Linux, madvise(2), MADV_HUGEPAGE; a wish, of which nobody has to know whether it was granted.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    madvise = _madvise()
    if nbytes < PAGE or madvise is None:
        return torch.empty(*shape, dtype=dtype)
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    offset = -memory.data_ptr() % PAGE
    madvise(ctypes.c_void_p(memory.data_ptr() + offset), ctypes.c_size_t(nbytes), _MADV_HUGEPAGE)
    return memory[offset : offset + nbytes].view(dtype).view(*shape)
