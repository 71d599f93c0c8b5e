"""Quantizes the models with llm-compressor: python with_llmcompressor.py MODELS OUT."""

import json
import shutil
import sys
from pathlib import Path

from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from models import text, write_expected
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}

#: name: (model, modifier, weight settings)
VARIANTS = {
    "llmcompressor-g128-sym": ("even", GPTQModifier, GROUP | {"group_size": 128}),
    "llmcompressor-g32-asym": ("even", GPTQModifier, GROUP | {"group_size": 32, "symmetric": False}),
    "llmcompressor-g64-static": ("even", GPTQModifier, GROUP | {"group_size": 64, "actorder": "static"}),
    "llmcompressor-perchannel-sym": (
        "even",
        QuantizationModifier,
        {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"},
    ),
    "llmcompressor-odd-g32-asym": ("odd", GPTQModifier, GROUP | {"group_size": 32, "symmetric": False}),
    "llmcompressor-odd-perchannel-asym": (
        "odd",
        QuantizationModifier,
        {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"},
    ),
}


def main(models: Path, out: Path) -> None:
    for name, (model, modifier, weights) in VARIANTS.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        loaded = AutoModelForCausalLM.from_pretrained(models / model, torch_dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(models / model)
        rows = [{"input_ids": tokenizer(line)["input_ids"]} for line in text()]
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = modifier(ignore=["lm_head"], config_groups=groups)
        oneshot(
            model=loaded,
            dataset=Dataset.from_list(rows),
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=256,
        )
        loaded.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
        tensors = load_file(folder / "model.safetensors")
        expected = {}
        for key in [key for key in tensors if key.endswith(".weight_packed")]:
            layer = key.removesuffix(".weight_packed")
            parts = {k.removeprefix(f"{layer}."): t for k, t in tensors.items() if k.startswith(f"{layer}.")}
            expected[layer] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert len(expected) == 7, list(expected)
        write_expected(folder, expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
