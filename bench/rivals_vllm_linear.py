"""vLLM's mixed-precision linear kernels as contestants: asked, packed and called as vLLM itself does it.

Works with vLLM 0.26 to 0.32: up to 0.28 the configuration also says whether there is an act-order.
"""

import dataclasses
import functools
import os
import tempfile
from typing import Any

import torch

from tokenmill.bench.rivals import Layer
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight


def _config(K: int, N: int, group_size: int, dtype: torch.dtype) -> Any:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    fields = {
        "full_weight_shape": (K, N),
        "partition_weight_shape": (K, N),
        "weight_type": scalar_types.uint4b8,
        "act_type": dtype,
        "group_size": group_size,
        "zero_points": False,
    }
    if "has_g_idx" in {field.name for field in dataclasses.fields(MPLinearLayerConfig)}:
        fields["has_g_idx"] = False
    return MPLinearLayerConfig(**fields)


def why_not(kernel: str, K: int, N: int, group_size: int, dtype: torch.dtype) -> str | None:
    """None when the kernel says it can do a symmetric layer, else what it answers.

    Args:
        kernel: Its class in `vllm.model_executor.kernels.linear`.
        K: Input features.
        N: Output features.
        group_size: Rows of K that share a scale.
        dtype: Of the activations.
    """
    try:
        from vllm.model_executor.kernels import linear
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        can, reason = getattr(linear, kernel).can_implement(_config(K, N, group_size, dtype))
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        return (
            f"this vLLM does not offer {kernel}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    return None if can else str(reason)


@functools.cache
def _vllm_config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig()


@functools.cache
def _one_process() -> None:
    """vLLM's parameters ask which shard this process holds; there is one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    # A machine without network may not know its own name, by which gloo would look for an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with set_current_vllm_config(_vllm_config()):
        rendezvous = f"file://{tempfile.mkdtemp(prefix='tokenmill-')}/rendezvous"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, rendezvous, 0, backend)
        ensure_model_parallel_initialized(1, 1)


def linear_layer(weight: Int4Weight, dtype: torch.dtype) -> Any:
    """What vLLM's kernels expect: a linear layer of one process, filled from a symmetric GPTQ checkpoint."""
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    _one_process()
    layer: Any = torch.nn.Module()
    directions = {"input_dim": 0, "output_dim": 1, "weight_loader": lambda *arguments: None}
    layer.qweight = PackedvLLMParameter(
        data=weight.codes.clone(), packed_dim=0, packed_factor=CODES_PER_WORD, **directions
    )
    layer.scales = GroupQuantScaleParameter(data=weight.scales.to(dtype), **directions)
    # What vLLM's linear layers say of themselves; Humming asks for more of it than the others.
    layer.input_size = layer.input_size_per_partition = weight.K
    layer.output_size = layer.output_size_per_partition = weight.N
    layer.output_partition_sizes = [weight.N]
    layer.params_dtype, layer.has_bias, layer.bias = dtype, False, None
    return layer


def prepare(kernel: str, weight: Int4Weight, dtype: torch.dtype) -> Layer:
    """Packs a symmetric weight for the kernel and returns the layer that multiplies by it.

    Args:
        kernel: As for `why_not`.
        weight: On the device where it will run.
        dtype: Of the activations.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.kernels import linear

    layer = linear_layer(weight, dtype)
    with set_current_vllm_config(_vllm_config()):
        chosen = getattr(linear, kernel)(
            _config(weight.K, weight.N, weight.group_size, dtype),
            w_q_param_name="qweight",
            w_s_param_name="scales",
            w_zp_param_name="qzeros",
        )
        chosen.process_weights_after_loading(layer)
    nbytes = sum(parameter.nbytes for parameter in layer.parameters())
    return Layer(lambda x: chosen.apply_weights(layer, x), nbytes)
