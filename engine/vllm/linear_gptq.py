"""Four-bit GPTQ checkpoints, also those that stock vLLM refuses although our kernel can run them.

vLLM 0.32 takes GPTQ layers with sym=True, desc_act=False, group sizes -1, 32, 64 and 128 that divide every shard. The
method here takes them and the rest: act-order, zero points, any group size, ragged last groups, sizes that are no
multiple of 32 or 8, rules that change these for some layers. What a layer is shows only when it is made, so every
four-bit checkpoint is claimed and each layer decides: ours where our kernel can do it, stock's method where only that
can.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override,
    get_linear_quant_method,
    override_config,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from vllm.scalar_type import scalar_types

from tokenmill.engine.vllm import compat, linear_kernel
from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD, Int4Weight
from tokenmill.quant.format import STOCK_GPTQ_GROUP_SIZES, check_gptq
from tokenmill.quant.pack import read_gptq_zeros

NAME = "tokenmill_gptq"


class WideGPTQConfig(AutoGPTQConfig):  # type: ignore[misc]
    """vLLM's GPTQ configuration without its refusals.

    Attributes:
        weight_bits, group_size, is_sym, desc_act: As in the checkpoint; vLLM applies the rules of `dynamic` to a copy
            for each layer.
    """

    #: Read by vLLM's per-layer rules, which refuse what is not in it.
    TYPE_MAP: ClassVar = {**AutoGPTQConfig.TYPE_MAP, (4, False): scalar_types.uint4}

    def __init__(self, config: Mapping[str, Any]) -> None:
        check_gptq(config)
        QuantizationConfig.__init__(self)
        self.full_config = dict(config)
        self.checkpoint_format = config.get("checkpoint_format") or "gptq"
        self.dynamic = config.get("dynamic") or {}
        self.weight_bits = 4
        self.pack_factor = CODES_PER_WORD
        self.group_size = config["group_size"]
        self.is_sym = bool(config.get("sym", True))
        self.desc_act = bool(config.get("desc_act"))
        self.lm_head_quantized = bool(config.get("lm_head", False))
        self.modules_in_block_to_quantize = config.get("modules_in_block_to_quantize") or []
        self.quant_type = self.TYPE_MAP[(4, self.is_sym)]
        self.autoround_version = config.get("autoround_version", "")

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
        """Keeps the g_idx of linear layers; vLLM's own drops every one, which turns act-order into noise."""
        return WeightsMapper(orig_to_new_regex={re.compile(r"\.experts\..*\.g_idx$"): None})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WideGPTQConfig":
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: object = None
    ) -> str | None:
        """Claims a four-bit GPTQ checkpoint unless the user named another method."""
        ours = hf_quant_cfg.get("quant_method", "").lower() == "gptq" and hf_quant_cfg.get("bits") == 4
        readable = (hf_quant_cfg.get("checkpoint_format") or "gptq") in ("gptq", "gptq_v2")
        asked = user_quant in (None, "gptq", "auto_gptq", "gptq_marlin", NAME)
        return NAME if ours and readable and asked else None

    @property
    def scheme(self) -> str:
        """For messages: `4-bit GPTQ with group_size=32, sym=False, desc_act=False`."""
        settings = f"group_size={self.group_size}, sym={self.is_sym}, desc_act={self.desc_act}"
        return f"{self.weight_bits}-bit GPTQ with {settings}"

    @property
    def has_order(self) -> bool:
        """Whether g_idx says which group a row is in; with one group it says nothing."""
        return self.desc_act and self.group_size != -1

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Ours for a linear layer; for experts what stands in stock's place (see linear_experts.py).

        Raises:
            CheckpointError: Experts have an act-order or, but on a CPU, zero points.
        """
        if not isinstance(layer, RoutedExperts):
            return get_linear_quant_method(self, layer, prefix, WideGPTQMethod)
        if get_dynamic_override(self, prefix) is not False:
            of_layer = deepcopy(self)
            override_config(of_layer, prefix)
            if of_layer.has_order or not (of_layer.is_sym or compat.on_cpu()):
                raise CheckpointError(
                    f"{prefix}: experts in {of_layer.scheme} cannot be loaded; quantize them with sym=True and "
                    "desc_act=False"
                )
        return super().get_quant_method(layer, prefix)


@register_weight_loader_v2_supported_method
class WideGPTQMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads one GPTQ layer of any four-bit kind and runs it with `int4_gemm`.

    Scales and zero points are kept whole on every rank until a row-parallel shard has picked its groups by index.

    Attributes:
        stock: vLLM's method, where only that can do the layer.
        prepared: The packed layer, where ours does it.
    """

    def __init__(self, quant_config: WideGPTQConfig) -> None:
        self.quant_config = quant_config
        self.stock: AutoGPTQLinearMethod | None = None

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
        layer.tokenmill_shape = (K, size)
        load = extra_weight_attrs.get("weight_loader")
        if isinstance(layer, VocabParallelEmbedding):
            load = _load_vocabulary(layer)
        # Some checkpoints leave g_idx out where it says nothing; then this default stays.
        first = get_tensor_model_parallel_rank() * K if input_size != K else 0
        natural = (torch.arange(first, first + K) // size).to(torch.int32)
        layer.register_parameter(
            "g_idx", RowvLLMParameter(data=natural, input_dim=0, weight_loader=_load_alike(layer, load))
        )
        reason = self._why_not(K, N, input_size, params_dtype)
        if reason is not None:
            if not self._stock_can(K):
                raise CheckpointError(f"{linear_kernel.layer_name(layer)} is {config.scheme}: {reason}")
            try:
                self.stock = AutoGPTQLinearMethod(config)
            except ValueError as error:  # it speaks of Marlin, on a CPU too
                raise CheckpointError(
                    f"{linear_kernel.layer_name(layer)} is {config.scheme}: {reason}; nor does vLLM's own ({error})"
                ) from None
            self.stock.create_weights(
                layer, K, output_partition_sizes, input_size, output_size, params_dtype, **extra_weight_attrs
            )
            return
        words, groups = -(-K // CODES_PER_WORD), -(-input_size // size)
        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(
                data=torch.empty(words, N, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=0,
                packed_factor=CODES_PER_WORD,
                weight_loader=load,
            ),
        )
        layer.register_parameter(
            "scales",
            ChannelQuantScaleParameter(
                data=torch.empty(groups, N, dtype=params_dtype), output_dim=1, weight_loader=load
            ),
        )
        if config.is_sym:  # as stock, which does not look at them either
            zeros = BasevLLMParameter(data=torch.empty(0), weight_loader=_load_nothing)
        else:
            zeros = ChannelQuantScaleParameter(
                data=torch.empty(groups, N, dtype=torch.uint8),
                output_dim=1,
                weight_loader=_load_unpacked(load, config.checkpoint_format),
            )
        layer.register_parameter("qzeros", zeros)

    def _why_not(self, K: int, N: int, input_size: int, dtype: torch.dtype) -> str | None:
        config = self.quant_config
        if config.weight_bits != 4:
            return f"our kernel takes 4 bits, not {config.weight_bits}"
        if input_size != K and K % CODES_PER_WORD:
            return f"a shard has {K} features, no multiple of 8; use a smaller tensor-parallel size"
        size = input_size if config.group_size == -1 else config.group_size
        return linear_kernel.why_not(K, N, min(size, K), config.is_sym, dtype)

    def _stock_can(self, K: int) -> bool:
        config = self.quant_config
        fits = config.group_size in STOCK_GPTQ_GROUP_SIZES and (config.group_size == -1 or K % config.group_size == 0)
        return fits and config.is_sym and not config.has_order

    def process_weights_after_loading(self, layer: Any) -> None:
        """Packs the layer and lets go of the checkpoint's tensors.

        Raises:
            CheckpointError: A value is out of range, or the layer has an order that stock's method ignores.
        """
        config, name = self.quant_config, linear_kernel.layer_name(layer)
        if config.has_order and not getattr(layer.g_idx, "loaded", False):
            raise CheckpointError(f"{name}.g_idx is missing; the checkpoint is incomplete")
        K, size = layer.tokenmill_shape
        g_idx = layer.g_idx.data
        if self.stock is not None:
            if not bool((g_idx - g_idx[0] == torch.arange(K, device=g_idx.device) // size).all()):
                raise CheckpointError(f"{name}.g_idx is no plain order, which vLLM's own method cannot run")
            self.stock.process_weights_after_loading(layer)
            linear_kernel.release(layer, "g_idx")
            return
        zeros = None if config.is_sym else layer.qzeros.data
        with linear_kernel.naming(linear_kernel.layer_name(layer)):
            weight = local_weight(layer.qweight.data, layer.scales.data, zeros, g_idx, size)
            self.prepared = linear_kernel.prepare(weight, layer.scales.dtype)
        for short in ("qweight", "qzeros", "scales", "g_idx"):
            linear_kernel.release(layer, short)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] @ W + bias."""
        return self.prepared(x, bias=bias) if self.stock is None else self.stock.apply(layer, x, bias)


def local_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor, group_size: int
) -> Int4Weight:
    """A shard's weight with only the groups that its rows are in.

    Args:
        codes: [ceil(K/8), N] int32, the rows of this shard.
        scales: [G, N] of the whole layer.
        zeros: [G, N] uint8 of the whole layer; None where it is symmetric.
        g_idx: [K] int32, the groups of this shard's rows.
        group_size: Rows that share a scale.

    Raises:
        InputError: A shape does not fit or a value is out of range.
    """
    K = g_idx.shape[0]
    size = min(group_size, K)
    Int4Weight(codes, scales, size, K, zeros, g_idx).check_values()
    first, last = int(g_idx.min()), int(g_idx.max()) + 1
    if bool((g_idx - first == torch.arange(K, device=g_idx.device) // size).all()):
        return Int4Weight(codes, scales[first:last], size, K, None if zeros is None else zeros[first:last])
    return Int4Weight(codes, scales, size, K, zeros, g_idx)


def _load_alike(layer: Any, load: Any) -> Callable[..., None]:
    """Loads g_idx [K]; layers that vLLM merges (q, k, v) see the same inputs and must group them alike."""

    def loader(parameter: Any, loaded: torch.Tensor, *shard: Any, **named: Any) -> None:
        before = parameter.data.clone() if getattr(parameter, "loaded", False) else None
        load(parameter, loaded, *shard, **named)
        if before is not None and not torch.equal(before, parameter.data):
            raise CheckpointError(
                f"{linear_kernel.layer_name(layer)}: layers that vLLM merges (q/k/v or gate/up) have different g_idx; "
                "quantize them in one order"
            )
        parameter.loaded = True

    return loader


def _load_vocabulary(layer: Any) -> Callable[..., None]:
    """Loads an output layer, which vLLM fills up to a multiple of 64 words; its own loader fills rows, not columns."""
    own = layer.shard_indices

    def loader(parameter: Any, loaded: torch.Tensor) -> None:
        dim = getattr(parameter, "output_dim", None)
        if dim is None:
            parameter.data.copy_(loaded)
            return
        count = own.org_vocab_end_index - own.org_vocab_start_index
        parameter.data.zero_()
        parameter.data.narrow(dim, 0, count).copy_(loaded.narrow(dim, own.org_vocab_start_index, count))

    return loader


def _load_unpacked(load: Any, checkpoint_format: str) -> Callable[..., None]:
    """Loads qzeros [G, ceil(N/8)] as zero points [G, N] uint8, which can be cut and merged at any column."""

    def loader(parameter: Any, loaded: torch.Tensor, *shard: Any, **named: Any) -> None:
        zeros = read_gptq_zeros(loaded, loaded.shape[1] * CODES_PER_WORD, checkpoint_format)
        load(parameter, zeros, *shard, **named)

    return loader


def _load_nothing(parameter: Any, loaded: torch.Tensor, *shard: Any, **named: Any) -> None:
    """For a tensor that says nothing."""


def install() -> None:
    """Registers the method with vLLM; again is harmless."""
    register_quantization_config(NAME)(WideGPTQConfig)
