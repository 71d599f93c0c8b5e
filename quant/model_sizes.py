"""What the matrices, embeddings and KV entries of a model measure, from its config.json alone.

transformers builds the model without memory, with the defaults of its architecture for what config.json leaves out, and
its parameters are counted, those that read pictures or sound apart. Where it is not installed or does not know the
architecture, the usual decoder is assumed: query, key, value and output projections, a gated feed-forward network or
experts of it, two norms.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.errors import CheckpointError
from tokenmill.quant.architecture import ROUTERS, auto_class, read_config, text_config
from tokenmill.quant.kv_cache import LayerCache
from tokenmill.quant.layer_caches import layer_caches, widest_attention

_IN_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that decide a model's memory.

    Attributes:
        hidden: Features of the residual stream.
        vocabulary: Rows of the embedding.
        widest: Most features that one token has at once inside a block: query, key and value; or gate, up and product,
            of all experts that a token goes to.
        caches: What a layer holds of a request's context, to the number of such layers.
        matrices: (component, K, N) of the linears in the blocks to how often each is there.
        embedding: Parameters of the embeddings.
        head: Parameters of the output head; 0 where it is the embedding.
        small: Parameters of everything else in the language model: norms, biases, routers.
        towers: Parameters of what turns pictures or sound into hidden states.
    """

    hidden: int
    vocabulary: int
    widest: int
    caches: Mapping[LayerCache, int]
    matrices: Mapping[tuple[str, int, int], int]
    embedding: int
    head: int
    small: int
    towers: int = 0


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """Reads a config.json.

    Raises:
        CheckpointError: A size is missing, no number or out of range, or the architecture is no language model.
    """
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config={text!r} is no object; restore it")
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        known = False
    else:
        known = config.get("model_type") in CONFIG_MAPPING
    try:
        return _from_transformers(config) if known else _from_keys(text or config)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever an architecture's own check of its sizes raises)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"config.json cannot be planned as model_type={config['model_type']!r}: {reason}"
        ) from None


def _from_transformers(config: Mapping[str, Any]) -> ModelSizes:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    whole = read_config(config)
    text = text_config(whole)
    if text is not whole:  # config.json says it of the whole, or the text's architecture does
        of_text = getattr(text, "tie_word_embeddings", getattr(whole, "tie_word_embeddings", True))
        text.tie_word_embeddings = whole.tie_word_embeddings = config.get("tie_word_embeddings", of_text)
    auto, is_multimodal = auto_class(whole)
    if not is_multimodal and type(text) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(f"config.json: model_type={text.model_type!r} is no language model of transformers")
    with torch.device("meta"):
        model: Any = auto.from_config(whole if is_multimodal else text)
    hidden = int(text.hidden_size)
    matrices: Counter[tuple[str, int, int]] = Counter()
    widths: defaultdict[str, int] = defaultdict(int)
    embedding = head = small = towers = 0
    modules, output = dict(model.named_modules()), model.get_output_embeddings()
    parts = (model.get_decoder(), output) if is_multimodal else (model,)
    language = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        module, size = modules[path], parameter.numel()
        is_expert = parameter.dim() == 3 and ".experts." in name
        is_linear = (
            isinstance(module, nn.Linear | Conv1D) and own == "weight" and path.rpartition(".")[2] not in ROUTERS
        )
        if id(parameter) not in language:
            towers += size
        elif isinstance(module, nn.Embedding):
            embedding += size
        elif module is output:
            head += size
        elif (is_expert or is_linear) and _IN_A_BLOCK.search(name):
            rows, columns = parameter.shape[-2:]
            # Experts are [.., out, in] in most models; those that read the hidden states tell those that are not.
            turned = isinstance(module, Conv1D) or (is_expert and "up" in own and columns != hidden)
            K, N = (rows, columns) if turned else (columns, rows)
            component = _component(name)
            matrices[component, K, N] += size // (K * N)
            if component != "attention":
                network = path if is_expert else path.rpartition(".")[0]
                widths[network] += N * (hidden == K) + K * (hidden == N)
        else:
            small += size
    query, kv = widest_attention(text)
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    for network in widths:
        if network.endswith(".experts") or ".experts." in network:  # and each has an output of its own
            widths[network] = chosen * (widths[network] + hidden)
    return ModelSizes(
        hidden=hidden,
        vocabulary=int(text.vocab_size),
        widest=max(query + 2 * kv, *widths.values(), 0),
        caches=layer_caches(text),
        matrices=dict(matrices),
        embedding=embedding,
        head=head,
        small=small,
        towers=towers,
    )


def _component(name: str) -> str:
    if "shared_expert" in name:
        return "shared expert"
    if ".experts." in name:
        return "experts"
    return "attention" if re.search(r"attn|attention|mixer|mamba", name) else "feed-forward"


def _from_keys(config: Mapping[str, Any]) -> ModelSizes:
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

    if config.get("kv_lora_rank"):
        raise CheckpointError("config.json has kv_lora_rank (latent attention); install transformers to plan it")
    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    if hidden < 1 or heads < 1:
        raise CheckpointError(f"config.json: hidden_size={hidden}, num_attention_heads={heads}; both must be positive")
    head_size = size("head_dim", default=hidden // heads)
    query, kv = heads * head_size, size("num_key_value_heads", default=heads) * head_size
    layers, vocabulary = size("num_hidden_layers", "n_layer"), size("vocab_size")
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=0)
    dense_inner = size("intermediate_size", "n_inner", default=4 * hidden if config.get("n_embd") else None)
    inner = size("moe_intermediate_size", default=dense_inner) if experts else dense_inner
    chosen = size("num_experts_per_tok", default=1)
    biases = 0
    if config.get("attention_bias") or config.get("model_type") == "qwen2":
        biases += query + 2 * kv + (hidden if config.get("attention_bias") else 0)
    if config.get("mlp_bias"):
        biases += 2 * dense_inner + hidden
    matrices: Counter[tuple[str, int, int]] = Counter()
    for K, N in ((hidden, query), (hidden, kv), (hidden, kv), (query, hidden)):
        matrices["attention", K, N] += layers
    networks = [("experts" if experts else "feed-forward", inner, max(experts, 1))]
    if shared := size("shared_expert_intermediate_size", default=0):
        networks.append(("shared expert", shared, 1))
    for component, width, count in networks:
        matrices[component, hidden, width] += 2 * count * layers
        matrices[component, width, hidden] += count * layers
    return ModelSizes(
        hidden=hidden,
        vocabulary=vocabulary,
        widest=max(query + 2 * kv, chosen * (3 * inner + hidden) if experts else 3 * inner),
        caches={_cache_of_keys(config, 2 * kv): layers},
        matrices=dict(matrices),
        embedding=vocabulary * hidden,
        head=0 if config.get("tie_word_embeddings", False) else vocabulary * hidden,
        small=layers * (2 * hidden + biases + experts * hidden) + hidden,
    )


def _cache_of_keys(config: Mapping[str, Any], numbers: int) -> LayerCache:
    """What all layers hold where it is not known which of them have the window that config.json names."""
    window = config.get("sliding_window")
    if isinstance(window, int) and window > 0 and config.get("use_sliding_window", True):
        return LayerCache(f"all tokens (install transformers to plan the window of {window})", numbers)
    return LayerCache("all tokens", numbers)
