"""How much memory a model needs, from its config.json alone: weights by component, KV cache, activations.

weights      every matrix of the architecture, quantized or not, as model_sizes.py counts them; what reads pictures or
             sound stays at 16 bits
scales       16 bits a group, and 4 bits of zero point if asymmetric
KV cache     what vLLM's blocks hold at once of all requests (kv_cache.py): in each layer that attends 2 (key and value)
             x KV heads x head size x bytes a token, or rank + rotary key with latent attention; of a window no more
             than it and what is in flight; states of recurrent layers
activations  the largest tensors alive at once for one step of `step_tokens` tokens, and the logits of its rows
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenmill.errors import InputError
from tokenmill.quant.kv_cache import CachePart, cache_parts
from tokenmill.quant.model_sizes import ModelSizes, model_sizes

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
        kv_bytes_per_token: Bytes of KV cache for one token of one request in all layers that hold it.
        kv_parts: What the layers of each kind hold of all requests.
        context: Tokens of context a request has.
        requests: Requests at once.
        activation_bytes: Bytes of activations of one step.
    """

    components: tuple[Component, ...]
    full_bytes: int
    kv_bytes_per_token: int
    kv_parts: tuple[CachePart, ...]
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
        return sum(part.num_bytes for part in self.kv_parts)

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
            "kv_parts": [asdict(part) for part in self.kv_parts],
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "total_bytes": self.total_bytes,
        }


def _matrices(name: str, sizes: ModelSizes, bits: int, group_size: int, zeros: bool) -> Component:
    """A component of [K, N] matrices, with the scales that they need."""
    own = [(K, N, count) for (component, K, N), count in sizes.matrices.items() if component == name]
    parameters = sum(K * N * count for K, N, count in own)
    if bits == _FULL_BITS:
        return Component(name, parameters, bits)
    groups = sum((1 if group_size == -1 else -(-K // group_size)) * N * count for K, N, count in own)
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
        CheckpointError: A size is missing or no number, or the architecture is no language model.
        InputError: An argument is out of range.
    """
    if bits not in (4, 8, 16) or kv_bits not in (8, 16):
        raise InputError(f"bits={bits}, kv_bits={kv_bits}: weights have 4, 8 or 16 bits, the KV cache 8 or 16")
    if group_size != -1 and group_size < 1:
        raise InputError(f"group_size={group_size} is neither positive nor -1 (per channel)")
    if min(context, requests, step_tokens) < 1:
        raise InputError(f"context={context}, requests={requests}, step_tokens={step_tokens}: each must be positive")
    sizes = model_sizes(config)
    names = dict.fromkeys(component for component, _, _ in sizes.matrices)
    rest = "norms, biases, routers" if "experts" in names else "norms and biases"
    components = [
        Component("embedding", sizes.embedding, _FULL_BITS),
        *(_matrices(name, sizes, bits, group_size, not symmetric) for name in names),
        Component(rest, sizes.small, _FULL_BITS),
    ]
    if sizes.head:
        components.append(Component("output head", sizes.head, _FULL_BITS))
    if sizes.towers:
        components.append(Component("vision and audio", sizes.towers, _FULL_BITS))
    # Residual and normed stream, what is widest inside a block, and float32 logits a request.
    features = 2 * sizes.hidden + sizes.widest
    return Plan(
        components=tuple(components),
        full_bytes=sum(component.parameters for component in components) * _FULL_BITS // 8,
        kv_bytes_per_token=sum(cache.numbers * layers for cache, layers in sizes.caches.items()) * kv_bits // 8,
        kv_parts=cache_parts(sizes.caches, kv_bits, context, requests, step_tokens),
        context=context,
        requests=requests,
        activation_bytes=step_tokens * features * _FULL_BITS // 8 + requests * sizes.vocabulary * 4,
    )
