"""The header of a safetensors file: names, dtypes and shapes, checked against the file's size without reading data.

The layout is 8 bytes little-endian length, that many bytes of JSON, then the tensors' bytes; see
https://github.com/huggingface/safetensors#format.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import CheckpointError

#: Bytes of an element of each dtype that occurs in language-model checkpoints.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: The format's own limit on the JSON.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: the file that holds it, its dtype in safetensors' spelling and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that its elements occupy."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file.

    Raises:
        CheckpointError: The file cannot be read, is no safetensors file, or is shorter than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or no safetensors file: {size} bytes hold no whole header")
            entries = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file} is no safetensors file: its header is not JSON") from None
    tensors, end = {}, 0
    try:
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            tensors[name] = TensorInfo(file, entry["dtype"], tuple(int(size) for size in entry["shape"]))
            first, last = entry["data_offsets"]
            if last - first != tensors[name].num_bytes:
                raise CheckpointError(f"{file}: {name} has {last - first} bytes; its shape needs another number")
            end = max(end, last)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a damaged header: {error!r}") from None
    if size < 8 + length + end:
        raise CheckpointError(f"{file} is truncated: it has {size} bytes and needs {8 + length + end}; copy it again")
    return tensors
