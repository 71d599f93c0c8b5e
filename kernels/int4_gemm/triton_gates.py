"""Static gates of the Triton kernels: what triton makes of them for GPUs that this machine does not have.

    tokenmill kernels triton              measures and judges every target with the triton that is installed
    tokenmill kernels triton --write      and replaces this release's rows of the table

`triton_gates.jsonl` holds the rows of each triton release that was measured. A step is one turn of the loop along K:
64 inputs (128 where `step=2`) of 128 output features.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenmill import platform
from tokenmill.errors import MissingDependencyError
from tokenmill.kernels import gates
from tokenmill.kernels.gates import Gate, GateRow
from tokenmill.kernels.int4_gemm import configs
from tokenmill.kernels.int4_gemm.layout import FINE_GROUP

if TYPE_CHECKING:
    from tokenmill.kernels import aot

TABLE = Path(__file__).parent / "triton_gates.jsonl"
_SOURCE = Path(__file__).parent / "triton_impl.py"
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_INTEGERS = ("M", "N", "tiles", "split_tiles", "groups", "group_shift", "low_nibbles", "x_stride", "out_stride")
#: Tiles along K of the gated launches: even, so that two of them make a step.
_TILES = 64


@dataclass(frozen=True)
class Target:
    """One specialisation of the product kernel, as the heuristic launches it, on one architecture.

    Attributes:
        architecture: As ptxas names it without `sm_`.
        tokens: The batch.
        step_instructions: The most that a step may take.
        dtype: Of the activations.
        zeros: Whether the weight has zero points.
        group_rows: Packed rows that share a scale.
        partial: Whether it writes float32 partial sums, for a split of K; otherwise the result with a bias.
    """

    architecture: str
    tokens: int
    step_instructions: int
    dtype: torch.dtype = torch.bfloat16
    zeros: bool = False
    group_rows: int = 128
    partial: bool = False

    @property
    def config(self) -> configs.TritonConfig:
        """What the heuristic launches."""
        family = f"sm{self.architecture.removesuffix('a')}"
        return configs.configuration(self.tokens, family, self.group_rows, _TILES)

    @property
    def label(self) -> str:
        """Names the row."""
        config = self.config
        scheme = "asymmetric" if self.zeros else "symmetric"
        return (
            f"{_POINTERS[self.dtype][1:]} {scheme} group={self.group_rows} tokens={config.token_tile} "
            f"step={config.step_tiles} scale={'weights' if config.scale_weights else 'sums'} warps={config.num_warps}"
            f"{' partial' if self.partial else ''}"
        )

    def gate(self) -> Gate:
        """The matrix instruction of the architecture, nothing spilled or converted, a step within its bound."""
        matrix = {"90a": gates.HGMMA_REGISTERS, "100a": "UTCHMMA"}.get(self.architecture, "HMMA")
        return Gate(
            _SOURCE,
            (self.architecture,),
            required={matrix: 4, "LDGSTS": 2},
            forbidden=(*gates.NEVER, "I2F", gates.HGMMA_SHARED),
            max_step_instructions=self.step_instructions,
        )


_F16 = torch.float16
#: sm_90 and sm_100 in every form; of the other families one decode and one prefill form each. The bounds are what
#: triton 3.6 and 3.9 take, and a few instructions: a layout conversion or a lost LOP3 costs far more.
TARGETS = (
    Target("90a", 16, 360, partial=True),
    Target("90a", 16, 402, dtype=_F16, zeros=True),
    Target("90a", 16, 262, zeros=True, group_rows=64),
    Target("90a", 16, 290, zeros=True, group_rows=FINE_GROUP),
    Target("90a", 32, 384),
    Target("90a", 64, 302, zeros=True),
    Target("90a", 128, 280),
    Target("90a", 128, 316, dtype=_F16, zeros=True),
    Target("90a", 128, 312, zeros=True, group_rows=FINE_GROUP),
    Target("100a", 16, 282, partial=True),
    Target("100a", 16, 334, zeros=True, group_rows=FINE_GROUP),
    Target("100a", 64, 326, dtype=_F16, zeros=True),
    Target("100a", 128, 310),
    Target("100a", 128, 346, zeros=True),
    *(Target(architecture, 16, 412, zeros=True) for architecture in ("80", "89", "120a")),
    *(Target(architecture, 128, 592) for architecture in ("80", "89", "120a")),
)


def measure(target: Target) -> GateRow:
    """Compiles one target with the triton that is installed.

    Raises:
        TokenmillError: Triton or ptxas refuses it.
    """
    from tokenmill.kernels import aot
    from tokenmill.kernels.int4_gemm import triton_impl

    return aot.measure(triton_impl.int4_gemm_product, configuration(target), target.architecture)


def configuration(target: Target) -> "aot.Configuration":
    """Types, constants and alignments of a target, as a launch has them."""
    from tokenmill.kernels import aot
    from tokenmill.kernels.int4_gemm import triton_impl

    pointer = _POINTERS[target.dtype]
    signature = {"x": pointer, "words": "*i32", "scales": pointer}
    signature["zeros"] = "*u8" if target.zeros else "constexpr"
    signature["bias"] = "constexpr" if target.partial else pointer
    signature["out"] = "*fp32" if target.partial else pointer
    signature |= dict.fromkeys(_INTEGERS, "i32")
    constants: dict[str, Any] = {name: None for name in ("zeros", "bias") if signature[name] == "constexpr"}
    fine = target.group_rows == FINE_GROUP
    values = triton_impl.constants(target.config, fine, *triton_impl.MAGIC[target.dtype])
    signature |= dict.fromkeys(values, "constexpr")
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return aot.Configuration(
        label=target.label,
        signature=signature,
        constants=constants | values,
        num_warps=target.config.num_warps,
        num_stages=target.config.num_stages,
        aligned=(*pointers, "x_stride", "out_stride"),
    )


def main(arguments: Sequence[str]) -> int:
    """Measures every target, prints a line for each and what breaks a rule; 1 when anything does."""
    parser = argparse.ArgumentParser(prog="tokenmill kernels triton", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="replace this triton's rows of triton_gates.jsonl")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines and judge nothing")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        raise MissingDependencyError("triton", "gpu", "compiling Triton kernels")
    with ThreadPoolExecutor(platform.physical_cores()) as pool:
        rows = list(pool.map(measure, TARGETS))
    if options.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
        return 0
    for row in rows:
        print(
            f"sm_{row.architecture} {row.instance}: {row.step_instructions} instructions a step, {row.registers} "
            f"registers, {row.static_smem_bytes} bytes of shared memory, {dict(row.instructions)}"
        )
    broken = judge(rows, committed=[] if options.write else gates.read_table(TABLE))
    print("\n".join(broken) or f"{rows[0].toolchain}: every rule is kept")
    if options.write:
        others = [row for row in gates.read_table(TABLE) if row.toolchain != rows[0].toolchain]
        gates.write_table([*others, *rows], TABLE)
    return 1 if broken else 0


def judge(rows: Sequence[GateRow], committed: Sequence[GateRow]) -> list[str]:
    """Broken rules, and differences from the committed rows of the same triton, if there are any; one line each."""
    broken = [line for target, row in zip(TARGETS, rows, strict=True) for line in gates.violations(target.gate(), row)]
    same = [row for row in committed if row.toolchain == rows[0].toolchain]
    return broken + (gates.compare(rows, same) if same else [])
