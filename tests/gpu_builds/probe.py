"""Loads a GPU build with the plug-in and prints what happened as one JSON object: probe.py TARGET DRAFT.

Runs in a process of its own, with the build first on the path and the stub libraries in the loader's path.
"""

import dataclasses
import inspect
import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hopper

hopper.pretend()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402
from vllm.scalar_type import scalar_types  # noqa: E402
from vllm.v1.attention.selector import get_attn_backend  # noqa: E402
from vllm.v1.sample.rejection_sampler import rejection_sample  # noqa: E402

from tokenmill.bench import rivals_vllm_linear  # noqa: E402
from tokenmill.bench.kernels import random_weight  # noqa: E402
from tokenmill.bench.rivals_gpu import VLLM_LINEARS, VllmLinear  # noqa: E402
from tokenmill.engine.vllm import compat, hooks, launch  # noqa: E402

FLAGS = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"]
FLAGS += ["--data-parallel-size", "4", "--distributed-executor-backend", "ray", "--quantization", "fp8"]


def names() -> dict[str, str]:
    """Every private name this version should have: empty text, or why it cannot be had."""
    found = {}
    for name in compat.PRIVATE_NAMES:
        if compat.series(compat.vllm_version()) in name.series:
            try:
                name.resolve()
                found[name.path] = ""
            except (ImportError, AttributeError) as error:
                found[name.path] = f"{type(error).__name__}: {error}"
    return found


def configuration(target: str, draft: str) -> Any:
    """vLLM's own configuration for the pair on this GPU."""
    drafting = {"model": draft, "num_speculative_tokens": 3}
    return EngineArgs(model=target, max_model_len=512, speculative_config=drafting).create_engine_config()


class Operators(TorchDispatchMode):
    """Operators of the build on CPU tensors: packing gives a tensor of the right shape, the first other one raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        if func.namespace == "aten" or not tensors:
            return func(*args, **kwargs)
        if "repack" in func.name() and "size_k" in given:
            return torch.empty(given["size_k"] // 16, given["size_n"] * 2, dtype=torch.int32)
        if "prepack" in func.name():
            return torch.empty_like(tensors[0])
        raise Reached(func.name())


class Reached(Exception):  # noqa: N818 - not an error: as far as it goes without a GPU
    """The operator was called with arguments that its schema takes."""


def reached(rival: VllmLinear) -> str:
    """How far an adapter gets in packing and multiplying: the operator that needs the GPU, or the error before it."""
    torch.cuda.get_device_properties = lambda *device: SimpleNamespace(multi_processor_count=132)  # type: ignore
    try:
        with Operators():
            layer = rival.prepare(random_weight(512, 256, 128, torch.device("cpu")))
            layer.call(torch.zeros(16, 512, dtype=rival.dtype))
    except Reached as operator:
        return str(operator)
    except Exception as error:  # noqa: BLE001 - what the test wants to see
        return f"{type(error).__name__}: {error}"
    return "the end"


def humming_lacks() -> list[str]:
    """What vLLM's packing for Humming, which is not installed here, asks of a layer and the adapter's does not say."""
    utilities = "vllm.model_executor.layers.quantization.utils."
    module = import_module(utilities + ("humming_utils" if find_spec(utilities + "humming_utils") else "humming"))
    packs = getattr(module, "prepare_humming_linear_layer_config", None) or module.prepare_humming_layer  # until 0.26
    source = inspect.getsource(packs)
    made = {"weight", *re.findall(r"layer\.(\w+) = ", source)}
    layer = rivals_vllm_linear.linear_layer(random_weight(512, 256, 128, torch.device("cpu")), torch.bfloat16)
    return sorted(name for name in set(re.findall(r"layer\.(\w+)", source)) - made if not hasattr(layer, name))


def main() -> None:
    load_general_plugins()
    target, draft = sys.argv[1:]
    config = configuration(target, draft)
    layer: dict[str, Any] = {"weight_type": scalar_types.uint4b8, "act_type": torch.bfloat16, "group_size": 128}
    layer |= {"full_weight_shape": (4096, 4096), "partition_weight_shape": (4096, 4096)}
    if "has_g_idx" in {field.name for field in dataclasses.fields(MPLinearLayerConfig)}:  # until 0.28
        layer["has_g_idx"] = False
    with set_current_vllm_config(config):
        backend = get_attn_backend(head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto")
        kernel = choose_mp_linear_kernel(MPLinearLayerConfig(**layer, zero_points=False))
        rivals = {
            rival.name: rivals_vllm_linear.why_not(rival.kernel, 4096, 4096, 128, torch.bfloat16)
            for rival in VLLM_LINEARS
        }
    _, parsed = launch.parse(["a/model", *FLAGS])
    found = {
        "hooks": hooks.report(),
        "names": names(),
        "operators": hasattr(torch.ops._C, "machete_mm"),
        "from": str(Path(sys.modules["vllm"].__file__ or "").parent.parent),
        "speculation": config.speculative_config.method,
        "attention": backend.get_name(),
        "kernel": kernel.__name__,
        "rivals": rivals,
        "reached": {name: reached(VllmLinear(name, name)) for name in ("MarlinLinearKernel", "MacheteLinearKernel")},
        "humming_lacks": humming_lacks(),
        "sampler": list(inspect.signature(rejection_sample).parameters),
        "replaced": compat.EXPAND_BATCH_TO_TOKENS.resolve() is not compat.EXPAND_BATCH_TO_TOKENS.stock(),
        "flags": [parsed.model_tag]
        + [getattr(parsed, flag[2:].replace("-", "_")) for flag in FLAGS if flag.startswith("--")],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
