"""Quantizes the models with GPTQModel: python with_gptqmodel.py MODELS OUT (GPTQMODEL_CPU_WORKERS=2 on two cores)."""

import shutil
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from models import text, write_expected

#: name: (model, settings); `format` gptq stores zero points minus one, gptq_v2 as they are.
VARIANTS = {
    "gptqmodel-g128-sym": ("even", {"group_size": 128, "sym": True, "desc_act": False}),
    "gptqmodel-g64-asym-v2": ("even", {"group_size": 64, "sym": False, "desc_act": False, "format": "gptq_v2"}),
    "gptqmodel-g32-asym": ("even", {"group_size": 32, "sym": False, "desc_act": False}),
    "gptqmodel-g32-actorder": ("even", {"group_size": 32, "sym": True, "desc_act": True}),
    "gptqmodel-perchannel-sym": ("even", {"group_size": -1, "sym": True, "desc_act": False, "act_group_aware": False}),
    "gptqmodel-odd-g32-sym": ("odd", {"group_size": 32, "sym": True, "desc_act": False}),
    "gptqmodel-odd-g64-actorder-asym": ("odd", {"group_size": 64, "sym": False, "desc_act": True}),
}


def main(models: Path, out: Path) -> None:
    for name, (model, settings) in VARIANTS.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        config = QuantizeConfig(bits=4, device="cpu", offload_to_disk=False, **settings)
        quantizer = GPTQModel.load(str(models / model), config)
        quantizer.quantize(text(), batch_size=1)
        quantizer.save(str(folder))
        loaded = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        weights = {
            layer: module.dequantize_weight().T
            for layer, module in loaded.model.named_modules()
            if hasattr(module, "dequantize_weight")
        }
        assert len(weights) == 7, list(weights)
        write_expected(folder, weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
