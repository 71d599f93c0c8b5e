"""Models of real layer shapes that need no download: dense ones by their configuration alone, INT4 ones written out.

A slice has few of the real model's layers and a small vocabulary, so that linear layers take the share of the time
that they take in the whole model. Weights are random: what is measured is speed, not text.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenmill.errors import ConfigurationError
from tokenmill.kernels.int4_gemm.weight import Int4Weight
from tokenmill.models import tiny_pair
from tokenmill.quant.format import Scheme, write_config
from tokenmill.quant.pack import write_layer

#: Standard deviation of random weights, as models are initialised.
_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of one kind of decoder (Llama: Touvron et al., 2023; Grattafiori et al., 2024).

    Attributes:
        hidden: Features between layers.
        intermediate: Features inside the MLP.
        heads: Query heads of 128 features.
        kv_heads: Key and value heads.
        layers: Of the whole model.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name inside a layer, output features, input features) of each linear layer."""
        head = self.hidden // self.heads
        yield "self_attn.q_proj", self.heads * head, self.hidden
        yield "self_attn.k_proj", self.kv_heads * head, self.hidden
        yield "self_attn.v_proj", self.kv_heads * head, self.hidden
        yield "self_attn.o_proj", self.hidden, self.heads * head
        yield "mlp.gate_proj", self.intermediate, self.hidden
        yield "mlp.up_proj", self.intermediate, self.hidden
        yield "mlp.down_proj", self.hidden, self.intermediate


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 80),
    "mini": Shape(256, 768, 4, 2, 3),
}


def shape(name: str, layers: int) -> Shape:
    """A shape by name, with so many layers.

    Raises:
        ConfigurationError: The name is unknown or the model has fewer layers.
    """
    if name not in SHAPES:
        raise ConfigurationError(f"--model {name}: give a checkpoint's folder or one of {', '.join(SHAPES)}")
    if not 1 <= layers <= SHAPES[name].layers:
        raise ConfigurationError(f"--layers {layers} is not in 1..{SHAPES[name].layers}, the layers of {name}")
    return SHAPES[name]


def write_dense(folder: Path, sizes: Shape, layers: int) -> Path:
    """A model of `layers` layers without weights, to be served with `--load-format dummy`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source, _ = tiny_pair()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(source, sizes, layers), indent=1), encoding="utf-8")
    return folder


def write_int4(folder: Path, sizes: Shape, layers: int, group_size: int = 128) -> Path:
    """A GPTQ checkpoint with random codes and scales, in the format that stock vLLM loads; returns the folder."""
    write_dense(folder, sizes, layers)
    scheme = Scheme("gptq", group_size, symmetric=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = write_config(scheme)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": _normal(config["vocab_size"], sizes.hidden, generator),
        "lm_head.weight": _normal(config["vocab_size"], sizes.hidden, generator),
        "model.norm.weight": torch.ones(sizes.hidden, dtype=torch.bfloat16),
    }
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(sizes.hidden, dtype=torch.bfloat16)
        for name, N, K in sizes.linears():
            for short, tensor in write_layer(_random_weight(K, N, group_size, generator), scheme).items():
                tensors[f"{prefix}{name}.{short}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def _config(source: Path, sizes: Shape, layers: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return config | {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def _normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=generator) * _DEVIATION).bfloat16()


def _random_weight(K: int, N: int, group_size: int, generator: torch.Generator) -> Int4Weight:
    """Codes are uniform around 8: the scales make the weight's deviation that of a fresh model."""
    words = torch.randint(-(2**31), 2**31, (K // 8, N), generator=generator, dtype=torch.int64).int()
    jitter = torch.rand(K // group_size, N, generator=generator) + 0.5
    scales = jitter * _DEVIATION / 4.6  # the deviation of uniform integers 0..15
    return Int4Weight(words, scales.half(), group_size, K)
