"""Of models that read pictures or hear the language model is quantized and all else stays, under the source's names."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tokenmill.errors import CheckpointError
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.gptq import GptqOptions
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.quantizer import Request, quantize_checkpoint
from tokenmill.quant.streaming import StreamedModel

transformers = pytest.importorskip("transformers", minversion="5")

TEXT = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
TURNS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
MARKS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}
#: model_type, settings, what the checkpoint calls a linear of the language model, and the modules that stay.
MODELS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "gemma3": (
        {
            "text_config": {**TEXT, "head_dim": 16, "sliding_window": 16},
            "vision_config": EYES,
            "mm_tokens_per_image": 4,
            "image_token_index": 260,
        },
        "language_model.model.layers.1.mlp.up_proj",
        ("vision_tower", "multi_modal_projector"),
    ),
    "llava": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **EYES},
            "image_token_index": 260,
        },
        "language_model.model.layers.1.mlp.up_proj",
        ("vision_tower", "multi_modal_projector"),
    ),
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, **TURNS},
            "vision_config": {**QWEN_EYES, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [0]},
            **MARKS,
        },
        "model.layers.1.mlp.up_proj",
        ("visual",),
    ),
    "qwen2_vl": (
        {
            "text_config": {**TEXT, **TURNS},
            "vision_config": {**QWEN_EYES, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            **MARKS,
        },
        "model.layers.1.mlp.up_proj",
        ("visual",),
    ),
    "idefics3": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": EYES,
            "scale_factor": 2,
            "image_token_id": 260,
        },
        "model.text_model.layers.1.mlp.up_proj",
        ("vision_model", "connector"),
    ),
    "mistral3": (
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", **EYES},
            "image_token_index": 260,
        },
        "language_model.model.layers.1.mlp.up_proj",
        ("vision_tower", "multi_modal_projector"),
    ),
    "qwen2_audio": (
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "num_mel_bins": 16,
                "max_source_positions": 50,
            },
            "audio_token_index": 260,
        },
        "language_model.model.model.layers.1.mlp.up_proj",
        ("audio_tower", "multi_modal_projector"),
    ),
}


def write(produce: ModuleType, folder: Path, kind: str) -> Path:
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind][0])
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = (parameter * 4 if parameter.dim() > 1 else parameter + 0.1).detach()
    model.save_pretrained(folder)
    produce.write_tokenizer(folder)
    return folder


def request(text: str, format_name: str, method: str = "gptq") -> Request:
    block = BlockSettings(method, 32, True, torch.bfloat16, GptqOptions())  # type: ignore[arg-type]
    return Request(block, format_name, text, None, num_samples=4, length=64)


@pytest.mark.parametrize("kind", MODELS)
def test_the_language_model_is_quantized_and_all_else_stays(
    produce: ModuleType, tmp_path: Path, text: str, kind: str
) -> None:
    _, linear, beside = MODELS[kind]
    source = write(produce, tmp_path / kind, kind)
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    streamed = StreamedModel(Checkpoint(source))
    assert streamed.left_out() == ()
    logits = streamed.head()(streamed.hidden_states([tokens])[0])
    whole = transformers.AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        exact = whole(input_ids=tokens).logits
    assert torch.allclose(logits, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))

    quantize_checkpoint(source, tmp_path / "out", request(text, "pack-quantized"))
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert linear in after.layers
    assert len(after.layers) == 14
    dense = {name for name in after.tensors if name.rpartition(".")[0] not in after.layers or name.endswith(".bias")}
    assert dense | {f"{layer}.weight" for layer in after.layers} == set(before.tensors)
    assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in dense)
    ignored = after.config["quantization_config"]["ignore"]
    towers = {name for name in dense if any(f"{part}." in name for part in beside)}
    assert towers
    for name in towers:  # whatever the loader has in front of it
        assert any(re.match(rule[3:], f"model.{name}") for rule in ignored if rule.startswith("re:")), name
    again = StreamedModel(after)
    shifted = again.head()(again.hidden_states([tokens])[0])
    assert 0 < float((shifted - exact).norm() / exact.norm()) < 0.5


def test_gptq_keeps_the_names_too_and_awq_knows_the_text_within(produce: ModuleType, tmp_path: Path, text: str) -> None:
    source = write(produce, tmp_path / "qwen2_5_vl", "qwen2_5_vl")
    quantize_checkpoint(source, tmp_path / "out", request(text, "gptq", "awq-gptq"))
    result = Checkpoint(tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.qweight" in result.tensors
    assert {layer.split(".")[0] for layer in result.layers} == {"model"}


def test_a_language_model_that_runs_only_in_part_for_text_is_refused(produce: ModuleType, tmp_path: Path) -> None:
    eyes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1}
    eyes |= {"attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 64}
    settings = {
        "text_config": {**TEXT, "cross_attention_layers": [1]},
        "vision_config": {**eyes, "intermediate_layers_indices": [0]},
    }
    config = transformers.AutoConfig.for_model("mllama", **settings)
    transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be run block by block: it runs 1 of its 2 blocks"):
        StreamedModel(Checkpoint(tmp_path))
