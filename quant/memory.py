"""How much memory a model needs, from its config.json alone: weights by component, KV cache, activations.

weights      every matrix of the architecture, quantized or not
scales       16 bits a group, and 4 bits of zero point if asymmetric
KV cache     2 (key and value) x layers x KV heads x head size x bytes, for each token of context
activations  the largest tensors alive at once for one step of `step_tokens` tokens, and the logits of its rows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.errors import CheckpointError, InputError

#: Bits of a weight that is not quantized, of a scale, and of a KV entry.
_FULL_BITS = 16


@dataclass(frozen=True)
class Component:
    """One kind of weight.

    Attributes:
        name: What it is.
        parameters: How many numbers, in all layers.
        bits: Bits of each, without scales.
        overhead_bytes: Scales and zero points.
    """

    name: str
    parameters: int
    bits: int
    overhead_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.parameters * self.bits // 8 + self.overhead_bytes


@dataclass(frozen=True)
class Plan:
    """The memory of a model.

    Attributes:
        components: Weights, kind by kind.
        full_bytes: Bytes of all weights at 16 bits.
        kv_bytes_per_token: Bytes of KV cache for one token of one request.
        context: Tokens of context a request has.
        requests: Requests at once.
        activation_bytes: Bytes of activations of one step.
    """

    components: tuple[Component, ...]
    full_bytes: int
    kv_bytes_per_token: int
    context: int
    requests: int
    activation_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as planned."""
        return sum(component.num_bytes for component in self.components)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache for all requests at full context."""
        return self.kv_bytes_per_token * self.context * self.requests

    @property
    def total_bytes(self) -> int:
        """Weights, KV cache and activations."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "components": [
                {"name": c.name, "parameters": c.parameters, "bits": c.bits, "bytes": c.num_bytes}
                for c in self.components
            ],
            "parameters": sum(component.parameters for component in self.components),
            "weight_bytes_16_bit": self.full_bytes,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "context": self.context,
            "requests": self.requests,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "total_bytes": self.total_bytes,
        }


@dataclass(frozen=True)
class _Shape:
    """The sizes that a config.json states, under their usual letters."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    experts: int
    shared_inner: int
    tied: bool
    biases: int


def _shape(config: Mapping[str, Any]) -> _Shape:
    config = config.get("text_config", config)

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise CheckpointError(f"config.json: {name}={value!r} is no size")
                return value
        if default is None:
            raise CheckpointError(f"config.json has no {names[0]!r}; only decoder models with that key can be planned")
        return default

    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    if hidden < 1 or heads < 1:
        raise CheckpointError(f"config.json: hidden_size={hidden}, num_attention_heads={heads}; both must be positive")
    kv_heads, head_size = size("num_key_value_heads", default=heads), size("head_dim", default=hidden // heads)
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    inner = size("intermediate_size", "n_inner")
    biases = 0
    if config.get("attention_bias") or config.get("model_type") == "qwen2":
        biases += (heads + 2 * kv_heads) * head_size
    if config.get("mlp_bias"):
        biases += 2 * inner + hidden
    return _Shape(
        hidden=hidden,
        inner=size("moe_intermediate_size", default=inner) if experts else inner,
        layers=size("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=size("vocab_size"),
        experts=experts,
        shared_inner=size("shared_expert_intermediate_size", default=0),
        tied=bool(config.get("tie_word_embeddings", False)),
        biases=biases,
    )


def _matrices(
    name: str, sizes: list[tuple[int, int]], layers: int, bits: int, group_size: int, zeros: bool
) -> Component:
    """A component of [K, N] matrices in every layer, with the scales that they need."""
    parameters = layers * sum(K * N for K, N in sizes)
    if bits == _FULL_BITS:
        return Component(name, parameters, bits)
    groups = layers * sum((1 if group_size == -1 else -(-K // group_size)) * N for K, N in sizes)
    return Component(name, parameters, bits, groups * (_FULL_BITS + (bits if zeros else 0)) // 8)


def plan(
    config: Mapping[str, Any],
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    context: int = 8192,
    requests: int = 1,
    step_tokens: int = 2048,
    kv_bits: int = 16,
) -> Plan:
    """Plans the memory of a decoder-only model.

    Args:
        config: Its config.json.
        bits: Bits of a linear's weight: 4, 8 or 16; embeddings, head, norms and router stay at 16.
        group_size: Input features that share a scale; -1 is per channel.
        symmetric: Whether there are no zero points.
        context: Tokens of each request.
        requests: Requests at once.
        step_tokens: Most tokens that one step computes.
        kv_bits: Bits of a KV entry: 8 or 16.

    Raises:
        CheckpointError: A size is missing or no number.
        InputError: An argument is out of range.
    """
    if bits not in (4, 8, 16) or kv_bits not in (8, 16):
        raise InputError(f"bits={bits}, kv_bits={kv_bits}: weights have 4, 8 or 16 bits, the KV cache 8 or 16")
    if group_size != -1 and group_size < 1:
        raise InputError(f"group_size={group_size} is neither positive nor -1 (per channel)")
    if min(context, requests, step_tokens) < 1:
        raise InputError(f"context={context}, requests={requests}, step_tokens={step_tokens}: each must be positive")
    s = _shape(config)
    query, kv = s.heads * s.head_size, s.kv_heads * s.head_size
    attention = [(s.hidden, query), (s.hidden, kv), (s.hidden, kv), (query, s.hidden)]
    mlp = [(s.hidden, s.inner), (s.hidden, s.inner), (s.inner, s.hidden)]
    shared = [(s.hidden, s.shared_inner), (s.hidden, s.shared_inner), (s.shared_inner, s.hidden)]
    quantized = (s.layers, bits, group_size, not symmetric)
    components = [
        Component("embedding", s.vocabulary * s.hidden, _FULL_BITS),
        _matrices("attention", attention, *quantized),
        _matrices("experts" if s.experts else "feed-forward", mlp * max(s.experts, 1), *quantized),
    ]
    if s.shared_inner:
        components.append(_matrices("shared expert", shared, *quantized))
    small = s.layers * (2 * s.hidden + s.biases + s.experts * s.hidden) + s.hidden
    components.append(Component("norms, biases, routers" if s.experts else "norms and biases", small, _FULL_BITS))
    if not s.tied:
        components.append(Component("output head", s.vocabulary * s.hidden, _FULL_BITS))
    # Residual and normed stream, the wider of QKV and the gate and up projections, and float32 logits a request.
    widest = max(query + 2 * kv, 3 * s.inner)
    activations = step_tokens * (2 * s.hidden + widest) * _FULL_BITS // 8 + requests * s.vocabulary * 4
    return Plan(
        components=tuple(components),
        full_bytes=sum(component.parameters for component in components) * _FULL_BITS // 8,
        kv_bytes_per_token=2 * s.layers * kv * kv_bits // 8,
        context=context,
        requests=requests,
        activation_bytes=activations,
    )
