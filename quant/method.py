"""How the linears of a model are rounded: what a request says of every block."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from tokenmill.quant.gptq import GptqOptions

#: rtn: nearest codes, no calibration. gptq: error compensation. awq: input scaling, then nearest codes.
#: awq-gptq: input scaling, then error compensation.
Method = Literal["rtn", "gptq", "awq", "awq-gptq"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class BlockSettings:
    """How the linears of a block are quantized.

    Attributes:
        method: See `Method`.
        group_size: Input features that share a scale; -1 is per output channel.
        symmetric: Whether the zero point is 8 everywhere.
        scale_dtype: What scales are stored as.
        gptq: Options of the methods that use GPTQ.
    """

    method: Method
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    gptq: GptqOptions

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at inputs."""
        return self.method != "rtn"

    @property
    def scales_inputs(self) -> bool:
        """Whether the method is one of AWQ's."""
        return self.method.startswith("awq")

    @property
    def compensates(self) -> bool:
        """Whether the method is one of GPTQ's."""
        return self.method.endswith("gptq")
