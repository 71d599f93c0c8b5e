"""Refuses an INT4 checkpoint that is damaged or incomplete, before a token is made of it.

vLLM copies what a checkpoint brings into uninitialised parameters: it converts a wrong dtype without a word, ends with
an empty assertion on a wrong shape, and serves whatever was in memory where the checkpoint brings nothing. So around
its `load_weights`, for every method that loads INT4 layers,

- the headers of the files are checked before any data is read: each layer's tensors, their dtypes and shapes;
- the first rows of every weight are marked before, and must have been written after: a layer of which the files have
  nothing at all is seen only so.

Only safetensors files have headers to check. Loaders of their own (dummy weights, sharded state, streamers) are left
alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from tokenmill.engine.vllm import compat
from tokenmill.errors import CheckpointError
from tokenmill.quant.format import QuantizationConfig, parse_config
from tokenmill.quant.pack import form_layer, tensor_names, weight_tensor
from tokenmill.quant.safetensors_header import TensorInfo, read_header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
}  # fmt: skip
#: What marked rows hold. Four words of 32 bits, as no column of a model has them.
_MARK, _MARKED_ROWS = 0x5A17C3E9, 4


def install() -> None:
    """Puts the checks around vLLM's loader in this process; again is harmless."""
    compat.LOAD_WEIGHTS.replace(load_weights)


def load_weights(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
    """vLLM's `DefaultModelLoader.load_weights` with the checks of this module.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete; says which tensor.
    """
    stock = compat.LOAD_WEIGHTS.stock()
    quantization = quantization_of(model_config.hf_config)
    if quantization is None:
        stock(loader, model, model_config)
        return
    prepare = loader._prepare_weights

    def check_and_prepare(*arguments: Any, **options: Any) -> Any:
        prepared = prepare(*arguments, **options)
        _, files, are_safetensors = prepared[:3]
        if are_safetensors:
            check_files([Path(file) for file in files], quantization)
        return prepared

    loader._prepare_weights = check_and_prepare  # it alone knows the files, of a folder and of a hub
    mark(model)
    try:
        stock(loader, model, model_config)
    finally:
        del loader._prepare_weights
    check_marks(model, unused=_unused(model_config.hf_config))


def quantization_of(hf_config: Any) -> QuantizationConfig | None:
    """What a model's config.json says of its INT4 layers; None where it has none, or others besides."""
    for part in (hf_config, getattr(hf_config, "text_config", None)):
        config = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if isinstance(config, dict):
            try:
                return parse_config(config)
            except CheckpointError:  # another method's, of any form
                return None
    return None


def _unused(hf_config: Any) -> frozenset[str]:
    """Layers that a checkpoint may leave out: those of keys and values where some layers use those of others."""
    text = getattr(hf_config, "text_config", hf_config)
    return frozenset(("k_proj", "v_proj") if getattr(text, "num_kv_shared_layers", 0) else ())


def check_files(files: Sequence[Path], quantization: QuantizationConfig) -> None:
    """Checks the headers of a checkpoint's files: which tensors each INT4 layer has, their dtypes and shapes.

    Raises:
        CheckpointError: A file is damaged, or a layer's tensor is missing or has a wrong dtype or shape.
    """
    marker, known = weight_tensor(quantization.default), tensor_names(quantization.default) - {"bias"}
    layers: dict[str, dict[str, TensorInfo]] = {}
    for file in files:
        for name, info in read_header(file).items():
            layer, _, short = name.rpartition(".")
            if short in known:
                layers.setdefault(layer, {})[short] = info
    # A model has thousands of layers of a few kinds; each kind is checked once.
    checked = set()
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for layer, stored in layers.items():
            scheme = quantization.scheme(layer)
            # A lone `scales` may be a parameter of the model's own.
            if scheme is None or (marker not in stored and len(stored) == 1):
                continue
            if marker in stored and len(stored[marker].shape) == 3:  # experts in one tensor, a form of vLLM's own
                continue
            tensors = {
                short: torch.empty(info.shape, dtype=_DTYPES[info.dtype], device="meta")
                for short, info in stored.items()
            }
            if (shape := stored.get("weight_shape")) is not None:
                if shape.file not in opened:
                    opened[shape.file] = stack.enter_context(safe_open(shape.file, framework="pt"))
                tensors["weight_shape"] = opened[shape.file].get_tensor(f"{layer}.weight_shape")
            sizes = tuple(tensors["weight_shape"].flatten().tolist()) if shape is not None else ()
            kind = (scheme, sizes, *sorted((short, info.dtype, info.shape) for short, info in stored.items()))
            if kind not in checked:
                form_layer(layer, tensors, scheme)
                checked.add(kind)


class _Weight(NamedTuple):
    """A linear layer's weight in vLLM: which layer's, the parameter's name, and the rows that are marked.

    Attributes:
        parts: Names and shares of the layers that vLLM merged into it, in order along its outputs.
        marked: [4, N] or [N, 4], a view of the parameter.
        dim: The dimension of `marked` that is inputs.
    """

    parts: tuple[tuple[str, int], ...]
    parameter: str
    marked: torch.Tensor
    dim: int


def _weights(model: torch.nn.Module) -> Iterator[_Weight]:
    from vllm.model_executor.layers.linear import LinearBase

    # A layer of which the checkpoint has nothing may have become an unquantized one.
    for name, module in model.named_modules():
        for short in ("qweight", "weight_packed", *(("weight",) if isinstance(module, LinearBase) else ())):
            parameter = module._parameters.get(short)
            dim = getattr(parameter, "input_dim", None)
            if parameter is None or dim is None or parameter.dim() != 2 or parameter.is_meta or not parameter.numel():
                continue
            marked = parameter.data.narrow(dim, 0, min(_MARKED_ROWS, parameter.shape[dim]))
            parts = _parts(name, module)
            # Of layers that are not quantized, vLLM leaves parts out on purpose here and there.
            yield _Weight(parts if short != "weight" else ((parts[0][0], 1),), short, marked, dim)


def _parts(name: str, module: Any) -> tuple[tuple[str, int], ...]:
    """The layers that vLLM merged into this one and their output features here; itself where it merged none."""
    sizes = getattr(module, "output_partition_sizes", [1])
    outer, _, last = name.rpartition(".")
    merged = getattr(getattr(module, "quant_config", None), "packed_modules_mapping", {}).get(last, ())
    names = [f"{outer}.{part}".lstrip(".") for part in merged] if len(merged) == len(sizes) else [name] * len(sizes)
    return tuple(zip(names, sizes, strict=True))


def mark(model: torch.nn.Module) -> None:
    """Writes what no checkpoint has into the first rows of every linear layer's weight."""
    for weight in _weights(model):
        weight.marked.fill_(float("nan") if weight.marked.is_floating_point() else _MARK)


def check_marks(model: torch.nn.Module, unused: frozenset[str] = frozenset()) -> None:
    """Whether loading has written every weight that `mark` marked.

    Args:
        model: The model after loading.
        unused: Last parts of the names of layers that need not be written.

    Raises:
        CheckpointError: A layer's weight, or that of a layer merged into it, was not written.
    """
    for weight in _weights(model):
        marked = weight.marked
        unwritten = (marked.isnan() if marked.is_floating_point() else marked == _MARK).all(weight.dim)
        total, first = sum(size for _, size in weight.parts), 0
        for name, size in weight.parts:
            last = first + size * len(unwritten) // total  # the outputs may be packed, eight a word
            needed = name.rpartition(".")[2] not in unused and last > first
            if needed and bool(unwritten[first:last].all()):
                raise CheckpointError(f"{name}.{weight.parameter} is missing; the checkpoint is incomplete")
            first = last
