"""A model that is computed block by block gives the logits of transformers bit for bit, whatever its architecture; one
that cannot be is refused before anything is written."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tokenmill.cli import main
from tokenmill.errors import CheckpointError
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.streaming import StreamedModel

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
#: What is not Llama about each: factors on embeddings and logits, caps, windows, parallel blocks, learned positions,
#: biases of the head, blocks that return tuples.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "phi3": {},
    "olmo2": {},
    "stablelm": {},
    "granite": {"embedding_multiplier": 6.0, "logits_scaling": 0.2, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 3.0},
    "cohere2": {"sliding_window": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32},
    "glm": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "nemotron": {"head_dim": 16},
    "gpt_neox": {},
    "gptj": {"n_positions": 256, "rotary_dim": 8, "n_embd": 64, "n_layer": 4, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "bloom": {"n_layer": 4, "n_head": 4},
}


def write(produce: ModuleType, folder: Path, kind: str, **settings: Any) -> Any:
    """A random model of an architecture, large enough in its weights that what is left out of it shows."""
    config = transformers.AutoConfig.for_model(kind, **(SIZES | ARCHITECTURES.get(kind, {}) | settings))
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = (
            parameter * 4 if parameter.dim() > 1 else parameter + torch.randn_like(parameter) / 8
        ).detach()
    model.to(torch.bfloat16).save_pretrained(folder)
    produce.write_tokenizer(folder)
    return model


def expected(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    # transformers' default attention leaves the caps of Gemma 2 out.
    attention = {"attn_implementation": "eager"} if folder.name == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_those_of_transformers(produce: ModuleType, tmp_path: Path, kind: str) -> None:
    write(produce, tmp_path / kind, kind)
    streamed = StreamedModel(Checkpoint(tmp_path / kind))
    tokens = torch.randint(288, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = streamed.head()(streamed.hidden_states([tokens])[0])
    assert torch.equal(logits, expected(tmp_path / kind, tokens))
    assert float(logits.std()) > 0.01
    # What one length needs is not taken for another.
    assert torch.equal(
        streamed.head()(streamed.hidden_states([tokens[:1, :7]])[0]), expected(tmp_path / kind, tokens[:1, :7])
    )


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma", "gemma2", "opt", "phi", "gpt_neox", "bloom"])
def test_every_architecture_that_is_accepted_is_quantized(
    produce: ModuleType, tmp_path: Path, text: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(produce, tmp_path / kind, kind, word_embed_proj_dim=64)
    (tmp_path / "text").write_text(text)
    options = ["--calibration", str(tmp_path / "text"), "--evaluation", str(tmp_path / "text"), "--device", "cpu"]
    options += ["--samples", "4", "--length", "64", "--group-size", "32"]
    assert main(["quantize", str(tmp_path / kind), str(tmp_path / "out"), *options]) == 0, capsys.readouterr().err
    result = StreamedModel(Checkpoint(tmp_path / "out"))
    tokens = torch.randint(288, (1, 64), generator=torch.Generator().manual_seed(0))
    logits, exact = result.head()(result.hidden_states([tokens])[0]), expected(tmp_path / kind, tokens)
    assert not torch.equal(logits, exact)
    assert float((logits - exact).norm() / exact.norm()) < 0.5


def test_a_weight_that_is_tied_is_found_under_either_name(produce: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write(produce, tmp_path / "gemma", "gemma")
    file = tmp_path / "gemma" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    embedding = tensors.pop("model.embed_tokens.weight")
    streamed = StreamedModel(Checkpoint(tmp_path / "gemma"))
    save_file(tensors | {"lm_head.weight": embedding}, file, metadata={"format": "pt"})
    again = StreamedModel(Checkpoint(tmp_path / "gemma"))
    assert again.other_parameters() == ("lm_head.weight", "model.norm.weight")
    tokens = torch.arange(20).unsqueeze(0)
    assert torch.equal(again.embed(tokens), streamed.embed(tokens))
    save_file(tensors | {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding + 1}, file)
    with pytest.raises(CheckpointError, match=r"ties model.embed_tokens.weight and lm_head.weight, which differ"):
        StreamedModel(Checkpoint(tmp_path / "gemma"))


# --- models that are not their embedding, their blocks one after the other, and their head ----------------------------


def backwards(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    for block in reversed(self.layers):
        hidden = block(hidden, **arguments)
    return self.norm(hidden)


def twice(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    for block in [*self.layers, *self.layers]:
        hidden = block(hidden, **arguments)
    return self.norm(hidden)


def between(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    for block in self.layers:
        hidden = hidden + 0.5 * (block(hidden, **arguments) - hidden)
    return self.norm(hidden)


def skipping(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    for block in self.layers[1:]:
        hidden = block(hidden, **arguments)
    return self.norm(hidden)


def of_the_text(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    embedded = hidden
    for block in self.layers:
        hidden = block(hidden, **arguments, embedded=embedded)
    return self.norm(hidden)


def with_memory(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    shared: dict[str, Any] = {}
    for block in self.layers:
        hidden = block(hidden, **arguments, shared=shared)
    return self.norm(hidden)


def to_the_head(self: Any, hidden: torch.Tensor, tokens: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    embedded = hidden
    for block in self.layers:
        hidden = block(hidden, **arguments)
    return self.norm(hidden + embedded)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (backwards, "it runs block 3 where block 0 is due"),
        (skipping, "it runs block 1 where block 0 is due"),
        (twice, "it runs block 0 where block 4 is due"),
        (between, "it changes the hidden states between blocks 0 and 1"),
        (of_the_text, "it passes more of the text to block 0 than hidden states"),
        (with_memory, "it passes more of the text to block 0 than hidden states"),
        (to_the_head, "its head reads more of the text than hidden states"),
    ],
)
def test_any_other_model_is_refused_before_anything_is_written(
    produce: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loop: Callable[..., torch.Tensor],
    message: str,
) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.models.llama.modeling_llama import LlamaModel

    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        arguments = {"position_embeddings": self.rotary_emb(hidden, position_ids=positions)}
        return BaseModelOutputWithPast(last_hidden_state=loop(self, hidden, input_ids, arguments))

    write(produce, tmp_path / "llama", "llama")
    monkeypatch.setattr(LlamaModel, "forward", forward)
    options = ["--method", "rtn", "--no-evaluation", "--device", "cpu", "--length", "64"]
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "llama"), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert f"llama cannot be run block by block: {message}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_numbers_that_json_does_not_have_are_read(produce: ModuleType, tmp_path: Path) -> None:
    """transformers writes the infinity in the configuration of Mamba 2, Bamba and Nemotron-H as an object."""
    sizes = {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16}
    write(produce, tmp_path / "mamba2", "mamba2", **sizes)
    assert '"__float__"' in (tmp_path / "mamba2" / "config.json").read_text()
    assert StreamedModel(Checkpoint(tmp_path / "mamba2")).num_blocks == 4
    assert main(["memory", str(tmp_path / "mamba2")]) == 0


def test_building_one_leaves_torch_as_it_was(dense_model: Path) -> None:
    register = torch.nn.Module.register_parameter
    StreamedModel(Checkpoint(dense_model))
    assert torch.nn.Module.register_parameter is register
    assert not torch.nn.Linear(2, 2).weight.is_meta
