"""GPTQ checkpoints that stock vLLM refuses although our kernel can run them.

vLLM 0.32 takes GPTQ with sym=True, desc_act=False, group sizes -1, 32, 64 and 128 that divide every shard. This
method takes the rest of the four-bit ones: act-order, zero points, any group size, ragged last groups, sizes that
are no multiple of 32. Checkpoints that stock takes stay with stock's method (and get our kernel there).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from vllm.scalar_type import scalar_types

from tokenmill.engine.vllm import linear_kernel
from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, SYMMETRIC_ZERO, Int4Weight
from tokenmill.quant.format import parse_config
from tokenmill.quant.pack import read_gptq_zeros

NAME = "tokenmill_gptq"
STOCK_GROUP_SIZES = (-1, 32, 64, 128)


def stock_refuses(config: Mapping[str, Any], sizes: tuple[int, ...] = ()) -> str | None:
    """What of a GPTQ quantization config stock vLLM 0.32 refuses although it is plain four-bit GPTQ; None: nothing.

    Args:
        config: The checkpoint's `quantization_config`.
        sizes: Input features of the model's layers, as far as they are known.
    """
    if config.get("desc_act") and config.get("group_size") != -1:
        return "desc_act=True"
    if not config.get("sym", True):
        return "sym=False"
    if config.get("group_size") not in STOCK_GROUP_SIZES:
        return f"group_size={config['group_size']}"
    ragged = [size for size in sizes if config["group_size"] > 0 and size % config["group_size"]]
    return f"{ragged[0]} features in groups of {config['group_size']}" if ragged else None


def _sizes(hf_config: Any) -> tuple[int, ...]:
    text = getattr(hf_config, "text_config", hf_config)
    return tuple(getattr(text, name, 0) or 0 for name in ("hidden_size", "intermediate_size"))


class WideGPTQConfig(AutoGPTQConfig):  # type: ignore[misc]
    """vLLM's GPTQ configuration without its refusals."""

    #: Read by vLLM's per-layer rules, which refuse what is not in it.
    TYPE_MAP: ClassVar = {(4, True): scalar_types.uint4b8, (4, False): scalar_types.uint4}

    def __init__(self, config: Mapping[str, Any]) -> None:
        QuantizationConfig.__init__(self)
        self.full_config = dict(config)
        self.checkpoint_format = parse_config(config).default.format
        self.dynamic = config.get("dynamic") or {}
        self.weight_bits = 4
        self.pack_factor = CODES_PER_WORD
        self.group_size = config["group_size"]
        self.is_sym = config.get("sym", True)
        self.desc_act = bool(config.get("desc_act"))
        self.lm_head_quantized = bool(config.get("lm_head", False))
        self.modules_in_block_to_quantize = config.get("modules_in_block_to_quantize") or []
        self.quant_type = None
        self.autoround_version = ""

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return list(linear_kernel.ACTIVATION_TYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keeps every tensor; vLLM's own drops g_idx on the way, which turns act-order into noise."""
        return WeightsMapper()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WideGPTQConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: object = None
    ) -> str | None:
        """Claims a four-bit GPTQ checkpoint that stock would refuse, unless the user named another method."""
        ours = hf_quant_cfg.get("quant_method", "").lower() == "gptq" and hf_quant_cfg.get("bits") == 4
        asked = user_quant in (None, "gptq", "auto_gptq", "gptq_marlin", NAME)
        return NAME if ours and asked and stock_refuses(hf_quant_cfg, _sizes(hf_config)) else None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        return get_linear_quant_method(self, layer, prefix, WideGPTQMethod)


class SharedGroupIndex(RowvLLMParameter):  # type: ignore[misc]
    """The g_idx [K] of a layer; merged layers (q, k, v) see the same inputs and must group them alike."""

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **shard: Any) -> None:
        self._load_shared(loaded_weight)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **shard: Any) -> None:
        self._load_shared(loaded_weight)

    def _load_shared(self, loaded_weight: torch.Tensor) -> None:
        if getattr(self, "loaded", False) and not bool((self.data == loaded_weight).all()):
            raise CheckpointError(
                "layers that vLLM merges (q/k/v or gate/up) have different g_idx; quantize them in one order"
            )
        self.loaded = True
        self._assert_and_load(loaded_weight)


@register_weight_loader_v2_supported_method
class WideGPTQMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads one GPTQ layer of any four-bit kind and runs it with `int4_gemm`.

    Scales and zero points are kept whole on every rank; a row-parallel shard picks its groups by index.
    """

    def __init__(self, quant_config: WideGPTQConfig) -> None:
        self.quant_config = quant_config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        config = self.quant_config
        K, N = input_size_per_partition, sum(output_partition_sizes)
        size = input_size if config.group_size == -1 else config.group_size
        reason = linear_kernel.why_not(K, N, min(size, K), config.is_sym, params_dtype)
        if reason is None:
            odd = [width for width in (K, *output_partition_sizes) if width % CODES_PER_WORD]
            reason = (
                f"a shard has {odd[0]} features, no multiple of 8; use a smaller tensor-parallel size" if odd else None
            )
        if reason:
            raise CheckpointError(f"GPTQ layer with {stock_refuses(config.full_config)}: {reason}")
        loader = extra_weight_attrs.get("weight_loader")
        groups = -(-input_size // size)
        packing = {"packed_factor": CODES_PER_WORD, "weight_loader": loader}
        empty = torch.empty
        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(
                data=empty(K // CODES_PER_WORD, N, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=0,
                **packing,
            ),
        )
        layer.register_parameter(
            "qzeros",
            PackedColumnParameter(
                data=empty(groups, N // CODES_PER_WORD, dtype=torch.int32), output_dim=1, packed_dim=1, **packing
            ),
        )
        layer.register_parameter(
            "scales",
            ChannelQuantScaleParameter(data=empty(groups, N, dtype=params_dtype), output_dim=1, weight_loader=loader),
        )
        # Some checkpoints leave g_idx out where it says nothing; then this default stays.
        first = get_tensor_model_parallel_rank() * K if input_size != K else 0
        natural = (torch.arange(first, first + K) // size).to(torch.int32)
        layer.register_parameter("g_idx", SharedGroupIndex(data=natural, input_dim=0, weight_loader=loader))
        layer.tokenmill_shape = (K, size)

    def process_weights_after_loading(self, layer: Any) -> None:
        K, size = layer.tokenmill_shape
        zeros: torch.Tensor | None = read_gptq_zeros(
            layer.qzeros.data, layer.scales.shape[1], self.quant_config.checkpoint_format
        )
        if zeros is not None and bool((zeros == SYMMETRIC_ZERO).all()):
            zeros = None
        g_idx: torch.Tensor | None = layer.g_idx.data.to(torch.int32)
        if bool((g_idx == torch.arange(K, device=layer.g_idx.device) // size).all()):
            g_idx = None
        weight = Int4Weight(layer.qweight.data, layer.scales.data, min(size, K), K, zeros, g_idx)
        self.prepared = linear_kernel.prepare(weight, layer.scales.dtype)
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            linear_kernel.release(layer, name)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.prepared(x, bias=bias)


def install() -> None:
    """Registers the method with vLLM; again is harmless."""
    register_quantization_config(NAME)(WideGPTQConfig)
