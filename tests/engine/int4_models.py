"""INT4 checkpoints of the bundled target in every format, and each one's exact value as a plain checkpoint."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes, unpack_codes
from tokenmill.models import tiny_pair
from tokenmill.quant.format import Scheme, write_config
from tokenmill.quant.pack import write_layer
from tokenmill.quant.rtn import round_to_nearest


@dataclass(frozen=True)
class Variant:
    """One kind of checkpoint: a name and its scheme."""

    name: str
    scheme: Scheme


VARIANTS = (
    Variant("gptq-g128", Scheme("gptq", 128, True)),
    Variant("gptq-g32", Scheme("gptq", 32, True)),
    Variant("gptq-channel", Scheme("gptq", -1, True)),
    Variant("awq-g64", Scheme("awq", 64, False)),
    Variant("ct-g128", Scheme("pack-quantized", 128, True)),
    Variant("ct-asym-g64", Scheme("pack-quantized", 64, False)),
    Variant("gptq-asym-g128", Scheme("gptq", 128, False)),
    Variant("gptq-act-order-g128", Scheme("gptq", 128, True, act_order=True)),
    Variant("gptq-g16", Scheme("gptq", 16, True)),
    Variant("gptq-ragged-g96", Scheme("gptq", 96, True)),
)


def write_pair(variant: Variant, folder: Path) -> tuple[Path, Path]:
    """Writes the bundled target quantized as `variant` and the same values dequantized; returns both folders."""
    source, _ = tiny_pair()
    tensors = load_file(source / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name.endswith("_proj.weight"):
            weight = quantize(tensor, variant.scheme)
            layer = name.removesuffix("weight")
            quantized |= {layer + short: value for short, value in write_layer(weight, variant.scheme).items()}
            exact[name] = dequantize(weight, torch.float32).t().contiguous()
        else:
            quantized[name] = tensor.half() if tensor.is_floating_point() else tensor
            exact[name] = quantized[name].float()
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    both = folder / variant.name, folder / f"{variant.name}-exact"
    for target, content in zip(both, (quantized, exact), strict=True):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
        target.chmod(0o755)
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    config["torch_dtype"] = config["dtype"] = "float32"
    (both[1] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    config["quantization_config"] = quantization_config(variant.scheme)
    (both[0] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return both


def quantize(tensor: torch.Tensor, scheme: Scheme) -> Int4Weight:
    """Rounds a [N, K] layer to nearest; with act-order, rows are put into groups at random.

    GPTQ orders rows by what the layer's inputs look like, so layers with the same inputs have the same order.
    """
    matrix = tensor.float().t().contiguous()
    K = matrix.shape[0]
    size = scheme.rows_per_group(K)
    seeded = torch.Generator().manual_seed(K)
    order = torch.randperm(K, generator=seeded) if scheme.act_order else torch.arange(K)
    whole = torch.nn.functional.pad(matrix[order], (0, 0, 0, -K % size))  # a ragged last group sees zeros
    rounded = round_to_nearest(whole, size, scheme.symmetric, torch.float16)
    codes = torch.empty(K, matrix.shape[1], dtype=torch.uint8)
    codes[order] = unpack_codes(rounded.codes, rounded.K)[:K]
    g_idx = torch.empty(K, dtype=torch.int32)
    g_idx[order] = (torch.arange(K) // size).int()
    return replace(rounded, K=K, codes=pack_codes(codes), g_idx=g_idx if scheme.act_order else None)


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The entry of config.json that says `scheme`."""
    if scheme.format == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    return write_config(scheme)
