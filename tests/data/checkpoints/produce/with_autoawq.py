"""Quantizes the models with AutoAWQ on the CPU: python with_autoawq.py MODELS OUT."""

import shutil
import sys
from pathlib import Path

from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from models import text, write_expected
from safetensors.torch import load_file
from transformers import AutoTokenizer

VARIANTS = {"autoawq-g64": ("even", 64), "autoawq-g128": ("even", 128), "autoawq-odd-g32": ("odd", 32)}


def main(models: Path, out: Path) -> None:
    for name, (model, group_size) in VARIANTS.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        quantizer = AutoAWQForCausalLM.from_pretrained(
            str(models / model), device_map="cpu", torch_dtype="float16", use_cache=False
        )
        tokenizer = AutoTokenizer.from_pretrained(str(models / model))
        config = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
        # The search for clipping ranges wants sizes that are multiples of 64.
        clip = model == "even"
        quantizer.quantize(
            tokenizer, quant_config=config, calib_data=text() * 4, max_calib_seq_len=128, apply_clip=clip
        )
        quantizer.save_quantized(str(folder))
        tokenizer.save_pretrained(str(folder))
        tensors = load_file(next(folder.glob("*.safetensors")))
        weights = {}
        for key in [key for key in tensors if key.endswith(".qweight")]:
            layer = key.removesuffix(".qweight")
            parts = [tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")]
            weights[layer] = dequantize_gemm(*parts, 4, group_size).T
        assert len(weights) == 7, list(weights)
        write_expected(folder, weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
