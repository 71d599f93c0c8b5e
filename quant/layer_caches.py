"""What each layer of a model holds of a request's context in vLLM, from the configuration that transformers reads."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tokenmill.errors import CheckpointError
from tokenmill.quant.kv_cache import LayerCache

#: Models of which vLLM keeps the latent vector; of others with latent attention it keeps keys and values.
_LATENT_MODELS = (
    "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm5_next", "glm_moe_dsa",
    "kimi_k2", "kimi_linear", "longcat_flash", "pangu_ultra_moe",
)  # fmt: skip
#: Layers with a state of one size; all others but networks and experts attend, and a hybrid does both.
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent", "hybrid", "hybrid_sliding")


def layer_caches(text: Any) -> Mapping[LayerCache, int]:
    """What a layer holds, to the number of such layers; layers that hold nothing are left out.

    Args:
        text: The configuration of the language model.

    Raises:
        CheckpointError: The number of key and value heads is no number.
    """
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is None:  # a window that is not said to be some layers' own is that of all
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
        kinds *= int(text.num_hidden_layers)
    each = getattr(text, "per_layer_config", None) or [text] * len(kinds)
    # The last layers of some models read the keys and values of layers before them.
    holding = len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)
    caches: Counter[LayerCache] = Counter()
    for kind, layer in list(zip(kinds, each, strict=False))[:holding]:
        if kind in _RECURRENT:
            caches[_state(layer, kind)] += 1
        if kind not in ("linear_attention", "mamba", "conv", "recurrent", "moe", "mlp"):
            caches[_attention(layer, kind)] += 1
    return caches


def widest_attention(text: Any) -> tuple[int, int]:
    """Features of the query and of the key of one token, in the layer that has the most; 0 where none attends.

    Raises:
        CheckpointError: The number of key and value heads is no number.
    """
    if not getattr(text, "num_attention_heads", None):
        return 0, 0
    return max(_attention_sizes(layer) for layer in getattr(text, "per_layer_config", None) or [text])


def _attention_sizes(text: Any) -> tuple[int, int]:
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    if not isinstance(kv_heads, int):
        raise CheckpointError(
            f"config.json: num_key_value_heads={kv_heads!r} is no size; only one number can be planned"
        )
    return heads * head_size, kv_heads * head_size


def _attention(text: Any, kind: str) -> LayerCache:
    latent, rotary = getattr(text, "kv_lora_rank", None), getattr(text, "qk_rope_head_dim", 0)
    if latent and text.model_type.removesuffix("_text") in _LATENT_MODELS:
        # One compressed vector and one rotary key for all heads (DeepSeek-V2, 2024).
        has_index = getattr(text, "index_topk", None)
        more = " (the index of its sparse attention not counted)" if has_index else ""
        return LayerCache(f"latent vectors of all tokens{more}", latent + rotary)
    numbers = 2 * (text.num_attention_heads * (text.qk_nope_head_dim + rotary) if latent else _attention_sizes(text)[1])
    window = getattr(text, "sliding_window", None)
    if "sliding" in kind and window:
        window += text.model_type.startswith("cohere2")  # whose window does not count the token itself
        return LayerCache(f"a window of {window} tokens", numbers, window)
    if kind == "chunked_attention":  # unless VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE is set
        return LayerCache("all tokens, although they attend in chunks", numbers)
    if "compressed" in kind:
        return LayerCache("all tokens (how far they are compressed not counted)", numbers)
    return LayerCache("all tokens", numbers)


def _state(text: Any, kind: str) -> LayerCache:
    """The state of a recurrent layer: what its short convolution looks back on, and that of its recurrence."""

    def size(*names: str) -> int:
        return next((int(value) for name in names if (value := getattr(text, name, None)) not in (None, "auto")), 0)

    taps = size("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv_L_cache") - 1
    inner = size("mamba_d_ssm") or size("mamba_expand", "expand") * text.hidden_size
    state = size("mamba_d_state", "ssm_state_size", "state_size")
    heads = size("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    wide = "float32" in (getattr(text, "mamba_ssm_cache_dtype", None), getattr(text, "mamba_ssm_dtype", None))
    if values := size("linear_num_value_heads"):  # a gated delta net
        keys, value_size = size("linear_num_key_heads") * size("linear_key_head_dim"), size("linear_value_head_dim")
        convolved = 2 * keys + values * value_size
        recurrent = values * value_size * size("linear_key_head_dim")
    elif size("linear_num_heads"):  # Kimi's delta attention
        convolved = 3 * size("linear_num_heads") * size("linear_head_dim")
        recurrent, wide = size("linear_num_heads") * size("linear_head_dim") ** 2, True
    elif kind == "conv":
        convolved, recurrent = size("conv_dim") or text.hidden_size, 0
    elif heads and state:  # Mamba 2
        head_size = size("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim") or inner // heads
        inner = heads * head_size
        convolved = inner + 2 * size("mamba_n_groups", "mamba_ngroups", "n_groups") * state
        recurrent = inner * state
    elif state:  # Mamba
        convolved, recurrent = inner, inner * state
    else:
        return LayerCache("states of unknown size, counted as a block each", state_bytes=1)
    num_bytes = 2 * convolved * max(taps, 0) + (4 if wide else 2) * recurrent
    return LayerCache(f"states of {num_bytes} bytes", state_bytes=num_bytes)
