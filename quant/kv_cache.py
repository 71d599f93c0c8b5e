"""What vLLM holds of the requests' contexts, by its own rules: keys and values of all tokens or of a window, latent
vectors, states of one size.

Memory comes in blocks of one number of bytes that hold some tokens of the layers of a group. Where all layers hold the
same tokens there is one group of them all. Otherwise (vLLM's hybrid KV cache manager) each kind of layer is cut into
groups of equally many layers, the last filled up with layers that are none, and every group has blocks of its own.
A window's layers hold the window and what is in flight: two steps, of which one is computed and one prepared.
See vLLM 0.32, v1/kv_cache_interface.py and v1/core/kv_cache_utils.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

#: Tokens of a block, and steps whose tokens are not given back yet.
_BLOCK_TOKENS = 16
_STEPS_IN_FLIGHT = 2
#: States of a request while prefixes are cached, which vLLM does unless no layer attends.
_STATES = 2


@dataclass(frozen=True)
class LayerCache:
    """What one layer holds of a request.

    Attributes:
        holds: That in words.
        numbers: Numbers of a token: keys and values of all heads, or one latent vector. 0 for a state.
        window: The last tokens that it holds; None is all.
        state_bytes: Bytes of a state, however long the context is.
    """

    holds: str
    numbers: int = 0
    window: int | None = None
    state_bytes: int = 0


@dataclass(frozen=True)
class CachePart:
    """What all layers of a kind hold of all requests.

    Attributes:
        layers: How many they are, with those that fill up a group.
        padding: Of them, those that fill up a group.
        holds: What a layer of them holds, in words.
        tokens: Tokens that fit, in each of these layers.
        num_bytes: Bytes in all.
    """

    layers: int
    padding: int
    holds: str
    tokens: int
    num_bytes: int


def cache_parts(
    caches: Mapping[LayerCache, int], kv_bits: int, context: int, requests: int, step_tokens: int
) -> tuple[CachePart, ...]:
    """What requests of one length hold at once in layers of each kind.

    Args:
        caches: What a layer holds, to the number of such layers.
        kv_bits: Bits of a key's or a value's number.
        context: Tokens of each request.
        requests: Requests at once.
        step_tokens: Most tokens that one step computes.
    """
    attending = {cache: cache.numbers * kv_bits // 8 for cache in caches if cache.numbers}  # bytes of a token
    state = max((cache.state_bytes for cache in caches), default=0)
    widest = max(attending.values(), default=0)
    # Blocks of layers that attend are made as large as a state.
    tokens = _BLOCK_TOKENS * -(-state // (_BLOCK_TOKENS * widest)) if state and widest else _BLOCK_TOKENS
    page = widest * tokens or state
    groups_of = _group_size(list(caches.values()))
    is_uniform = not state and len({cache.window for cache in caches}) == 1
    parts = []
    for cache, layers in caches.items():
        if cache not in attending:
            held, own, block = requests * (_STATES if widest else 1), page, 0
        else:
            own = attending[cache] * tokens if is_uniform else page
            block = tokens if is_uniform or page % (attending[cache] * tokens) else page // attending[cache]
            held = _blocks(cache.window, block, context, requests, step_tokens)
        all_layers = layers if is_uniform else -(-layers // groups_of) * groups_of
        parts.append(CachePart(all_layers, all_layers - layers, cache.holds, held * block, held * own * all_layers))
    return tuple(parts)


def _blocks(window: int | None, block: int, context: int, requests: int, step_tokens: int) -> int:
    """Blocks that the requests have in one layer."""
    if window is None:
        return requests * -(-context // block)
    tokens = min(requests * (window - 1) + _STEPS_IN_FLIGHT * step_tokens, requests * context)
    # A window begins and ends within a block; of a single request vLLM counts one end.
    return -(-tokens // block) + 2 * requests - 1


def _group_size(layers: list[int]) -> int:
    """Layers of a group: as many as the smallest kind has, or the largest if it has few more."""
    fewest, most = min(layers, default=1), max(layers, default=1)
    return most if most < 1.5 * fewest else fewest
