"""Reading bitsandbytes' NF4 checkpoints (Dettmers et al., QLoRA, 2023).

A linear's `weight` is a column of bytes, each two 4-bit codes, the first in the high bits, over the flattened
[out, in] matrix. Its companions are `weight.quant_map` (16 values), `weight.absmax` (one scale for each block of
64 elements) and `weight.quant_state.bitsandbytes__nf4` (JSON in bytes: shape, dtype, block size). With double
quantization absmax is itself 8-bit: `weight.nested_quant_map[absmax] * weight.nested_absmax` plus an offset.

The arithmetic is the format's: float32 value times float32 scale, rounded once to the stored dtype. So this needs no
bitsandbytes, and gives the weights that it gives, bit for bit.
"""

import json
from collections.abc import Container, Mapping
from typing import Any

import torch

from tokenmill.errors import CheckpointError

_STATE = ".quant_state.bitsandbytes__nf4"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses what is not NF4.

    Raises:
        CheckpointError: The checkpoint is 8-bit or FP4.
    """
    kind = str(config.get("bnb_4bit_quant_type", "nf4"))
    if not config.get("load_in_4bit", config.get("_load_in_4bit", False)) or kind != "nf4":
        found = kind if config.get("load_in_4bit") else "8-bit"
        raise CheckpointError(f"the bitsandbytes checkpoint is {found}; only nf4 can be read")


def is_quantized(name: str, tensors: Container[str]) -> bool:
    """Whether the parameter `name` is stored in NF4."""
    return name + _STATE in tensors


def parts(name: str, tensors: Container[str]) -> tuple[str, ...]:
    """Full names of the stored tensors that make up the parameter."""
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
    return tuple(name + suffix for suffix in suffixes if name + suffix in tensors)


def dequantize(name: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parameter in its original shape and dtype.

    Args:
        name: Its full name.
        stored: The tensors of `parts`, by their full names.

    Raises:
        CheckpointError: A companion is missing or does not fit.
    """
    try:
        state = json.loads(bytes(stored[name + _STATE].tolist()))
        shape, block, dtype = torch.Size(state["shape"]), int(state["blocksize"]), _DTYPES[state["dtype"]]
        absmax = stored[name + ".absmax"]
        _check_blocks("weights", shape.numel(), block, "absmax", absmax)
        if "nested_absmax" in state or name + ".nested_absmax" in stored:
            nested_block, nested = int(state["nested_blocksize"]), stored[name + ".nested_absmax"]
            _check_blocks("absmax", absmax.numel(), nested_block, "nested_absmax", nested)
            nested = nested.repeat_interleave(nested_block)
            absmax = stored[name + ".nested_quant_map"][absmax.long()] * nested[: absmax.numel()]
            absmax = absmax + float(state["nested_offset"])
        packed = stored[name].flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
        scales = absmax.float().repeat_interleave(block)[: codes.numel()]
        values = stored[name + ".quant_map"].float()[codes] * scales
        return values[: shape.numel()].view(shape).to(dtype)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        message = str(error).splitlines()[0]
        raise CheckpointError(f"{name} is damaged NF4: {type(error).__name__}: {message}") from None


def _check_blocks(what: str, count: int, block: int, name: str, scales: torch.Tensor) -> None:
    """Refuses scales of blocks of another size: they would be given to the wrong elements."""
    if block < 1 or scales.numel() != -(-count // block):
        raise ValueError(f"{count} {what} in blocks of {block} do not fit {scales.numel()} {name}")
