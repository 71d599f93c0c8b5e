"""Checkpoints in the layout that transformers and vLLM load: configuration, bfloat16 weights, tokenizer, template."""

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from tokenmill.errors import CheckpointError
from tokenmill.speculative.pair.chat import END_OF_TEXT, END_OF_TURN, PADDING, SPECIAL_TOKENS, TEMPLATE
from tokenmill.speculative.pair.model import Llama, Shape
from tokenmill.speculative.pair.state import write_atomically


def save(folder: Path, model: Llama, tokenizer: tokenizers.Tokenizer, window: int) -> None:
    """Writes a checkpoint; `config.json` comes last, so a folder with one is complete.

    Args:
        folder: Made if it is not there.
        model: Its weights are rounded to bfloat16.
        tokenizer: Stored beside it.
        window: Tokens it was trained to read. Twice that is declared as the limit: rotary positions reach
            further than they were trained, at a cost in quality.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin, end, pad = (SPECIAL_TOKENS.index(token) for token in (END_OF_TEXT, END_OF_TURN, PADDING))
    ids = {"bos_token_id": begin, "pad_token_id": pad}
    config = {
        **model.shape.as_config(),
        **ids,
        "eos_token_id": end,
        "max_position_embeddings": 2 * window,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    # No "bos_token" is ever put before a prompt: the tokenizer has no post-processor that would add one.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2 * window,
    }
    weights = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: path.write_bytes(serialise(weights, {"format": "pt"})))
    write_atomically(folder / "tokenizer.json", lambda path: tokenizer.save(str(path), pretty=False))
    write_atomically(folder / "chat_template.jinja", lambda path: path.write_text(TEMPLATE, encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "generation_config.json", {**ids, "eos_token_id": [end, begin]})
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: dict[str, object]) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


class Loaded(NamedTuple):
    """A checkpoint in memory: the model in float32, its tokenizer, and the window it was trained with."""

    model: Llama
    tokenizer: tokenizers.Tokenizer
    window: int


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    text = path.read_text(encoding="utf-8")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  # the library raises nothing narrower
        raise ValueError(f"{path.name}: {error}") from None


def load(folder: Path) -> Loaded:
    """Reads a checkpoint that `save` wrote.

    Raises:
        CheckpointError: A file is missing or damaged, or the model is not one that `Llama` describes.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = Shape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            feed_forward=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            head_dim=config["head_dim"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_parameters"]["rope_theta"],
        )
        window = config["max_position_embeddings"] // 2
        weights = load_file(folder / "model.safetensors")
        tokenizer = _load_tokenizer(folder / "tokenizer.json")
        model = Llama(shape, seed=0)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json lacks {error}; name a folder that train-pair wrote") from None
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} holds no checkpoint of a pair: {reason}") from None
    return Loaded(model, tokenizer, window)
