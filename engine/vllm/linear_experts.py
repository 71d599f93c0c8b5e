"""INT4 experts of mixture-of-experts models on the CPU: each expert's products by `int4_gemm`.

vLLM 0.32 has no INT4 experts on an x86 CPU without zentorch: it ends with "No WNA16 MoE backend supports the deployment
configuration", or asks for a GPU's capability. The methods here load what vLLM's own would, by their parameters and
loaders, pack each expert as a linear layer is packed, and multiply each by the rows that were routed to it.
"""

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from tokenmill import env
from tokenmill.engine.vllm import compat, hooks, linear_kernel
from tokenmill.errors import CheckpointError
from tokenmill.kernels import library
from tokenmill.kernels.int4_gemm import op
from tokenmill.quant.format import Scheme
from tokenmill.quant.pack import form_layer

#: What vLLM's CPU build can compute between an expert's two products.
_ACTIVATIONS = (
    MoEActivation.SILU,
    MoEActivation.GELU,
    MoEActivation.GELU_TANH,
    MoEActivation.SILU_NO_MUL,
    MoEActivation.GELU_NO_MUL,
    MoEActivation.GELU_TANH_NO_MUL,
    MoEActivation.RELU2_NO_MUL,
)
#: vLLM's names of an expert's products: gate and up in one, and down.
_PRODUCTS = ("w13", "w2")

_GPTQ: Any = compat.GPTQ_EXPERTS.stock()
_AWQ: Any = compat.AWQ_EXPERTS.stock()
_PACKED: Any = compat.PACKED_EXPERTS.stock()


class Int4Experts(FusedMoEMethodBase):  # type: ignore[misc]
    """What the methods of all formats share.

    Attributes:
        scheme: How the experts are quantized.
        names: The tensors of a product, as a checkpoint and, behind `w13_` or `w2_`, vLLM call them; scales second.
        prepared: By product, the packed experts of this rank.
    """

    scheme: Scheme
    names: tuple[str, ...]

    def _begin(self, moe: Any, scheme: Scheme, bits: int, names: tuple[str, ...]) -> None:
        """Takes the place of vLLM's `__init__`, which looks for a kernel of its own.

        Raises:
            CheckpointError: The experts cannot run here; says why.
        """
        FusedMoEMethodBase.__init__(self, moe)
        self.input_dtype = None
        self.scheme, self.names = scheme, names
        self.prepared: dict[str, list[op.PreparedInt4]] = {}
        self._biases: dict[str, torch.Tensor | None] = {}
        reason = None
        if bits != 4:
            reason = f"they have {bits} bits, our kernel takes 4"
        elif moe.activation not in _ACTIVATIONS or moe.swiglu_limit is not None:
            reason = f"their activation {moe.activation.value} (limit {moe.swiglu_limit}) has no operator there"
        elif scheme.act_order:
            reason = "their rows are ordered by activation; quantize them with desc_act=False or a static order"
        else:
            reason = self._shard_splits(moe)
        if reason:
            raise CheckpointError(f"experts in {scheme.format} cannot be loaded on a CPU: {reason}")

    def _shard_splits(self, moe: Any) -> str | None:
        """Why the inputs of a product, or this rank's part of them, are no whole groups; None where they are."""
        size = self.scheme.group_size
        for K in (moe.hidden_dim, moe.intermediate_size_per_partition):
            if size != -1 and K % size:
                return f"{K} input features of an expert on one rank are no multiple of group_size={size}"
        return None

    def create_weights(self, layer: Any, *arguments: Any, **options: Any) -> None:
        """vLLM's own parameters, with scales that are seen to be missing where no file brings any."""
        super().create_weights(layer, *arguments, **options)
        for product in _PRODUCTS:
            getattr(layer, f"{product}_{self.names[1]}").data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Packs every expert and lets go of the checkpoint's tensors.

        Raises:
            CheckpointError: A tensor is missing or damaged; says of which expert.
        """
        bits = env.INT4_ACTIVATION_BITS.get()
        for product in _PRODUCTS:
            parts = {name: getattr(layer, f"{product}_{name}").data for name in self.names}
            bias = getattr(layer, f"{product}_bias", None)
            self._biases[product] = None if bias is None else bias.data
            self.prepared[product] = []
            for expert in range(layer.local_num_experts):
                tensors = {name: part[expert] for name, part in parts.items()}
                name = f"{layer.layer_name}.{expert}.{product}"
                if bool(tensors[self.names[1]].isnan().all()):
                    raise CheckpointError(f"{name} is missing; the checkpoint is incomplete")
                with linear_kernel.naming(name):
                    weight = form_layer(name, self._with_shape(tensors), self.scheme)
                    packed = op.prepare(weight, layer.params_dtype, device=weight.device, activation_bits=bits)
                self.prepared[product].append(packed)
            for name in (*self.names, "qzeros", "weight_shape"):
                linear_kernel.release(layer, f"{product}_{name}")
        described = linear_kernel.describe(self.prepared["w2"][0], bits)
        hooks.record(hooks.HookStatus("linear", "active", f"INT4 layers run on {described}"))

    def _with_shape(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Nothing: no kernel of vLLM's asks for it."""

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum over each row's experts of weight * down(activation(gate_up(x))), of the experts on this rank.

        Args:
            layer: vLLM's layer.
            x: [M, hidden].
            topk_weights: [M, k].
            topk_ids: [M, k], experts of all ranks.
            shared_experts: Computed by vLLM.
            shared_experts_input: Likewise.
        """
        if torch.compiler.is_compiling():  # which rows an expert gets is no matter of shapes
            out: torch.Tensor = torch.ops.tokenmill.int4_experts(x, topk_weights, topk_ids, layer.layer_name)
            return out
        return self.multiply(layer, x, topk_weights, topk_ids)

    def multiply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """What `apply` returns."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        places = torch.argsort(ids.flatten(), stable=True)
        counts = torch.bincount(ids.flatten().clamp(min=-1) + 1, minlength=layer.local_num_experts + 1).tolist()
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        first = counts[0]  # those of other ranks come first
        for expert, count in enumerate(counts[1:]):
            if not count:
                continue
            mine = places[first : first + count]
            first += count
            rows = mine // ids.shape[1]
            weights = topk_weights.flatten()[mine].unsqueeze(1)
            chosen = x[rows]
            if layer.apply_router_weight_on_input:
                chosen = (chosen * weights).to(x.dtype)
            y = self._multiply("w2", expert, self._activate(layer, self._multiply("w13", expert, chosen))).float()
            out.index_add_(0, rows, y if layer.apply_router_weight_on_input else y * weights)
        return out.to(x.dtype)

    def _multiply(self, product: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = self._biases[product]
        return self.prepared[product][expert](x, bias=None if bias is None else bias[expert])

    def _activate(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[1] // 2 if layer.activation.is_gated else x.shape[1]
        out = x.new_empty(x.shape[0], width)
        apply_moe_activation(layer.activation, out, x)
        return out


class GPTQExperts(Int4Experts, _GPTQ):  # type: ignore[misc]
    """Experts of GPTQ checkpoints; with zero points, too."""

    def __init__(self, quant_config: Any, moe: Any) -> None:
        self.quant_config = quant_config
        size, symmetric = quant_config.group_size, quant_config.is_sym
        ordered = bool(quant_config.desc_act) and size != -1
        names = ("qweight", "scales") if symmetric else ("qweight", "scales", "qzeros")
        form = getattr(quant_config, "checkpoint_format", "gptq")
        self._begin(moe, Scheme(form, size, symmetric, ordered), quant_config.weight_bits, names)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As of all formats; biases that no file brought are none."""
        for product in _PRODUCTS:
            if f"{product}_bias" not in layer._loaded_expert_biases:
                layer.register_parameter(f"{product}_bias", None)
        super().process_weights_after_loading(layer)


class AWQExperts(Int4Experts, _AWQ):  # type: ignore[misc]
    """Experts of AWQ checkpoints."""

    def __init__(self, quant_config: Any, moe: Any) -> None:
        self.quant_config = quant_config
        symmetric = not quant_config.zero_point
        names = ("qweight", "scales") if symmetric else ("qweight", "scales", "qzeros")
        scheme = Scheme("awq", quant_config.group_size, symmetric)
        self._begin(moe, scheme, quant_config.weight_bits, names)

    def _shard_splits(self, moe: Any) -> str | None:
        if self.scheme.group_size == -1:
            return "vLLM makes no place for one group a column of an AWQ expert; quantize them in groups"
        return super()._shard_splits(moe)


class PackedExperts(Int4Experts, _PACKED):  # type: ignore[misc]
    """Experts of compressed-tensors checkpoints."""

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None) -> None:
        self.weight_quant, self.input_quant = weight_quant, input_quant
        self.symmetric, self.num_bits = weight_quant.symmetric, weight_quant.num_bits
        self.packed_factor = 32 // self.num_bits
        self.strategy = weight_quant.strategy
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
        names = ("weight_packed", "weight_scale", *(() if self.symmetric else ("weight_zero_point",)))
        ordered = str(weight_quant.actorder or "").rpartition(".")[2].lower() == "group"
        scheme = Scheme("pack-quantized", self.group_size, self.symmetric, ordered)
        self._begin(moe, scheme, self.num_bits, names)

    def _with_shape(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The files' own shapes are those of gate and up apart, and of all ranks."""
        N, words = tensors["weight_packed"].shape
        return {**tensors, "weight_shape": torch.tensor([N, words * self.packed_factor])}


def _op(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    """`Int4Experts.multiply` of the layer with this name in the engine that runs."""
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    out: torch.Tensor = layer.quant_method.multiply(layer, x, topk_weights, topk_ids)
    return out


library.define(
    "int4_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor",
    _op,
    lambda x, *arguments: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def install() -> None:
    """Has vLLM load INT4 experts by the methods of this module; again is harmless."""
    compat.GPTQ_EXPERTS.replace(GPTQExperts)
    compat.AWQ_EXPERTS.replace(AWQExperts)
    compat.PACKED_EXPERTS.replace(PackedExperts)
    # Where Marlin cannot do a layer, vLLM would load it for a Triton kernel, whose layout this one does not read.
    for name in (compat.GPTQ_EXPERTS_CHECK, compat.AWQ_EXPERTS_CHECK, compat.EXPERTS_CHECK):
        name.replace(_takes_all)


def _takes_all(*arguments: Any, **options: Any) -> bool:
    return True
