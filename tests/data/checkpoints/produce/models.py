"""The two models that every producer quantizes: one layer (tests make deeper ones), random weights, a byte tokenizer.

`even` has sizes that every format and kernel likes; `odd` has biases everywhere and sizes (96, 160) that are no
multiple of 64 or 128. Needs torch and transformers, any version; the weights depend on torch's generator only.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES = {
    "even": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "odd": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1},
}
HEAD_DIM = 32
VOCABULARY = 288  # 256 bytes, three markers, filled up to a multiple of 32


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges."""
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*bytes_in_order, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"pad_token": "<pad>", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def write_model(folder: Path, name: str, layers: int = 1) -> None:
    """A Llama checkpoint in bfloat16; inputs get very unequal norms so that act-order has something to order."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SIZES[name]
    biased = name == "odd"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": biased,
        "mlp_bias": biased,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    query, key = sizes["num_attention_heads"] * HEAD_DIM, sizes["num_key_value_heads"] * HEAD_DIM
    linears = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, hidden), "lm_head.weight": normal(VOCABULARY, hidden)}
    blocks = [f"model.layers.{i}" for i in range(layers)]
    for block in blocks:
        for layer, (rows, columns) in linears.items():
            tensors[f"{block}.{layer}.weight"] = normal(rows, columns) / columns**0.5
            if biased:
                tensors[f"{block}.{layer}.bias"] = normal(rows) / 8
    norms = [f"{block}.{norm}" for block in blocks for norm in ("input_layernorm", "post_attention_layernorm")]
    for norm in (*norms, "model.norm"):
        tensors[f"{norm}.weight"] = normal(hidden).exp()
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)


def text() -> list[str]:
    """Calibration text: 32 lines of 128 characters, the same everywhere."""
    lines = []
    for i in range(32):
        digest = hashlib.sha256(str(i).encode()).hexdigest()
        lines.append(" ".join(digest[j : j + 7] for j in range(0, 64, 4)))
    return lines


def digest(tensor: torch.Tensor) -> str:
    """What `expected.json` holds for a weight [out, in]: dtype, shape and the hash of its bytes."""
    tensor = tensor.detach().contiguous().cpu()
    data = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {data}"


def write_expected(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Stores the digest of every dequantized weight, by layer name."""
    lines = {name: digest(weight) for name, weight in sorted(weights.items())}
    (folder / "expected.json").write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    for model in SIZES:
        write_model(Path(sys.argv[1]) / model, model)
