"""Stores the models in bitsandbytes' NF4: python with_bitsandbytes.py MODELS OUT."""

import shutil
import sys
from pathlib import Path

import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from models import write_expected
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

VARIANTS = {"bitsandbytes-nf4": ("even", False), "bitsandbytes-odd-nf4-double": ("odd", True)}


def dequantize(packed: torch.Tensor, state: object) -> torch.Tensor:
    """By bitsandbytes' own generic code.

    Its compiled CPU kernel (0.50.2) is wrong where a row is no whole number of blocks: it restarts the count of
    blocks at each row, although blocks run over the flattened matrix when it quantizes. Row 0 is right, later ones
    are not; the generic code agrees with the quantizer.
    """
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(packed.flatten(), absmax, state.code, state.blocksize, state.shape, state.dtype)


def main(models: Path, out: Path) -> None:
    for name, (model, double) in VARIANTS.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            models / model, quantization_config=config, device_map="cpu", torch_dtype=torch.bfloat16
        )
        loaded.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(models / model / file, folder)
        weights = {
            layer: dequantize(module.weight.data, module.weight.quant_state)
            for layer, module in loaded.named_modules()
            if isinstance(module, Linear4bit)
        }
        assert len(weights) == 7, list(weights)
        write_expected(folder, weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
