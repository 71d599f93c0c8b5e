"""Our INT4 GEMM as one of vLLM's mixed-precision linear kernels.

vLLM asks each kernel of its platform in turn whether it can do a layer of a GPTQ, AWQ or compressed-tensors
checkpoint; `linear.install` puts this one first. What arrives is one of three layouts (`_canonical`), brought into
`Int4Weight` and packed by `kernels.int4_gemm.op.prepare` for the device the layer is on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.scalar_type import scalar_types

from tokenmill import env
from tokenmill.engine.vllm import compat, hooks
from tokenmill.errors import CheckpointError, InputError
from tokenmill.kernels import registry
from tokenmill.kernels.int4_gemm import op
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight, unpack_codes
from tokenmill.kernels.spec import Problem

#: vLLM's names of four-bit codes with the zero point 8, and with zero points of their own.
WEIGHT_TYPES = (scalar_types.uint4b8, scalar_types.uint4)
ACTIVATION_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(K: int, N: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> str | None:
    """Why no implementation of ours but the slow reference can do a layer on this platform; None when one can.

    Args:
        K: Input features of the layer's shard.
        N: Output features of the layer's shard.
        group_size: Rows of K that share a scale; -1: all.
        symmetric: Whether the zero point is 8 everywhere.
        dtype: Of the activations.
    """
    if dtype not in ACTIVATION_TYPES:
        return f"activations are {dtype}; it takes float16, bfloat16 or float32"
    size = K if group_size == -1 else group_size
    axes = {"M": 1, "K": K, "N": N, "G": -(-K // size), "R": -(-K // CODES_PER_WORD)}
    bits = env.INT4_ACTIVATION_BITS.get()
    device = torch.device("cpu" if compat.on_cpu() else "cuda")
    problem = Problem(
        op.INT4_GEMM.name, axes, dtype, device, {"group_size": size, "symmetric": symmetric, "activation_bits": bits}
    )
    choice = registry.explain(op.INT4_GEMM, problem)
    return str(choice) if choice.chosen in (None, "reference") else None


class TokenmillLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """INT4 weights of any group size and shape, on every device that `int4_gemm` has an implementation for."""

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is too old by itself: `can_implement` asks the implementations."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether the layer can run on ours, or the reason why not (vLLM logs it)."""
        if c.weight_type not in WEIGHT_TYPES:
            return False, f"weight type {c.weight_type}; it takes {', '.join(map(str, WEIGHT_TYPES))}"
        K, N = c.partition_weight_shape
        if c.group_size not in (-1, 0) and c.full_weight_shape[0] != K and K % c.group_size:
            return False, f"a shard of {K} input features splits a group of {c.group_size}"
        reason = why_not(K, N, c.group_size, not c.zero_points, c.act_type)
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Packs the layer and lets go of the checkpoint's tensors."""
        names = [self.w_q_name, self.w_s_name, self.w_zp_name, getattr(self, "w_gidx_name", None)]
        with naming(layer_name(layer)):
            self.prepared = prepare(self._canonical(layer), self.config.act_type)
        for name in names:
            release(layer, name)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ W + bias."""
        return self.prepared(x, bias=bias)

    def _canonical(self, layer: torch.nn.Module) -> Int4Weight:
        """The layer's tensors as one `Int4Weight`; QKV and gate/up are merged by then.

        GPTQ: qweight [K/8, N], scales [G, N]; AWQ as vLLM converts it: the same, zero points [N/8, G];
        compressed-tensors: weight_packed [N, K/8], scales [N, G], zero points [N/8, G].
        """
        K, N = self.config.partition_weight_shape
        codes, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        codes_kn = codes.data if codes.input_dim == 0 else codes.data.t()
        scales_gn = scales.data.t() if getattr(scales, "output_dim", 1) == 0 else scales.data
        zeros = None
        if self.config.zero_points:
            packed = getattr(layer, str(self.w_zp_name))
            words = packed.data if packed.output_dim == 0 else packed.data.t()
            zeros = unpack_codes(words.contiguous(), N).t().contiguous()
        g_idx = None
        if getattr(self.config, "has_g_idx", False):
            g_idx = getattr(layer, str(getattr(self, "w_gidx_name", "g_idx"))).data.to(torch.int32)
        group_size = K if self.config.group_size == -1 else self.config.group_size
        return Int4Weight(codes_kn.contiguous(), scales_gn.contiguous(), group_size, K, zeros, g_idx)


def layer_name(layer: torch.nn.Module) -> str:
    """The layer's full name in vLLM; its class where it has none (an output layer)."""
    return str(getattr(layer, "prefix", "") or type(layer).__name__)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Says of which layer, or part of one, the checkpoint is damaged when a value or a shape is refused inside."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{name}: {error}") from None


def prepare(weight: Int4Weight, dtype: torch.dtype) -> op.PreparedInt4:
    """Packs a layer where it is and records in the status table which implementation runs.

    Raises:
        InputError: A scale, zero point or group index is out of range; says which.
    """
    bits = env.INT4_ACTIVATION_BITS.get()
    prepared = op.prepare(weight, dtype, device=weight.device, activation_bits=bits)
    hooks.record(hooks.HookStatus("linear", "active", f"INT4 layers run on {describe(prepared, bits)}"))
    return prepared


def describe(prepared: op.PreparedInt4, bits: int) -> str:
    """`cpu (avx512_bf16), 16-bit activations`."""
    detail = prepared.implementation
    if detail == "cpu":
        from tokenmill.kernels.int4_gemm import cpu_impl

        detail += f" ({cpu_impl.level(bits, prepared.dtype)})"
    return f"{detail}, {bits}-bit activations"


def release(layer: torch.nn.Module, name: str | None) -> None:
    """Replaces a parameter by an empty one: the packed copy serves from now on."""
    parameter: Any = getattr(layer, name, None) if name else None
    if name and parameter is not None:
        layer.register_parameter(name, torch.nn.Parameter(parameter.data.new_empty(0), requires_grad=False))
