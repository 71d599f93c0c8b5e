"""Reading a model directory: dense, INT4 in any known format, or bitsandbytes NF4, one tensor at a time.

Opening a checkpoint reads the configuration and every file's header, and refuses what is damaged or incomplete
before any weight is loaded. Weights are memory-mapped: holding a `Checkpoint` costs no memory to speak of.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize
from tokenmill.quant import nf4
from tokenmill.quant.format import FORMATS, QuantizationConfig, Scheme, parse_config
from tokenmill.quant.json_file import read_json
from tokenmill.quant.pack import missing_tensors, read_layer, tensor_names, weight_tensor
from tokenmill.quant.safetensors_header import TensorInfo, read_header

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A model directory with config.json and safetensors files.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        config: Its config.json.
        tensors: Name to place, dtype and shape of everything stored.
        quantization: What its quantization_config says; None for a dense or an NF4 checkpoint.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, the format is unknown, or a quantized layer lacks
            a tensor.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is no directory; give the folder that holds config.json")
        self.config = read_json(self.path / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            header = read_header(file)
            for name in header.keys() & self.tensors.keys():
                others = f"{self.tensors[name].file.name} and {file.name}"
                raise CheckpointError(f"{self.path} has {name} twice, in {others}; remove the file that is not its own")
            self.tensors.update(header)
        self._check_index()
        self._is_nf4 = False
        self.quantization = self._read_quantization()
        self._open_files = ExitStack()
        self._handles: dict[Path, Any] = {}
        self._check_layers()

    def close(self) -> None:
        """Unmaps the files, which count as memory of the process while pages of them are in use.

        What is read afterwards maps them again.
        """
        self._handles.clear()
        self._open_files.close()

    def _files(self) -> list[Path]:
        if (self.path / _INDEX).exists():
            weight_map = read_json(self.path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{self.path / _INDEX} has no weight_map that names files; restore it")
            return [self.path / name for name in sorted(set(weight_map.values()))]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} holds no *.safetensors file; other weight files are not read")
        return files

    def _check_index(self) -> None:
        if (self.path / _INDEX).exists():
            for name, file in read_json(self.path / _INDEX)["weight_map"].items():
                if name not in self.tensors:
                    raise CheckpointError(f"{name} is missing in {self.path / file}; the checkpoint is incomplete")

    def _read_quantization(self) -> QuantizationConfig | None:
        config = self.config.get("quantization_config")
        if config is None:
            for name in ("quantize_config.json", "quant_config.json"):
                if (self.path / name).exists():
                    config = read_json(self.path / name)
        if config is None:
            return None
        if isinstance(config, dict) and config.get("quant_method") == "bitsandbytes":
            nf4.check_config(config)
            self._is_nf4 = True
            return None
        return parse_config(config)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the INT4 layers, in order of their names; empty for a dense or NF4 checkpoint."""
        if self.quantization is None:
            return ()
        own = tensor_names(self.quantization.default) - {"bias"}
        return tuple(
            sorted(
                {
                    layer
                    for layer, _, kind in (name.rpartition(".") for name in self.tensors)
                    if kind in own and self._is_int4(layer)
                }
            )
        )

    def _is_int4(self, layer: str) -> bool:
        """Whether a layer with some of the tensors of an INT4 one is one: it may have lost the others."""
        assert self.quantization is not None
        if f"{layer}.{weight_tensor(self.quantization.default)}" in self.tensors:
            return True
        return f"{layer}.weight" not in self.tensors and self.quantization.scheme(layer) is not None

    def scheme(self, layer: str) -> Scheme:
        """How a layer of `layers` is quantized.

        Raises:
            CheckpointError: The configuration says that it is not.
        """
        scheme = self.quantization.scheme(layer) if self.quantization else None
        if scheme is None:
            raise CheckpointError(f"{layer} has INT4 tensors, but quantization_config leaves it unquantized")
        return scheme

    def _check_layers(self) -> None:
        if self.quantization is None:
            packed = [n for n in self.tensors if n.endswith((".qweight", ".weight_packed"))]
            if packed:
                raise CheckpointError(f"{packed[0]} is INT4, but config.json has no quantization_config; restore it")
            return
        if not self.layers:
            known = ", ".join(FORMATS)
            raise CheckpointError(f"{self.path} has a quantization_config but no INT4 layer; known formats: {known}")
        for layer in self.layers:
            scheme = self.scheme(layer)
            present = {name for name in tensor_names(scheme) if f"{layer}.{name}" in self.tensors}
            for name in missing_tensors(scheme, present):
                raise CheckpointError(f"{layer}.{name} is missing; the checkpoint is incomplete")

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, as it is.

        Raises:
            CheckpointError: There is none of this name, or its bytes cannot be read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {name}; the checkpoint is incomplete")
        try:
            if info.file not in self._handles:
                self._handles[info.file] = self._open_files.enter_context(safe_open(info.file, framework="pt"))
            tensor: torch.Tensor = self._handles[info.file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{info.file} cannot be read: {error}") from None
        return tensor

    def layer(self, name: str) -> Int4Weight:
        """One INT4 layer in canonical form, its values checked.

        Raises:
            CheckpointError: The layer is damaged; the message names the tensor.
        """
        scheme = self.scheme(name)
        stored = {short: f"{name}.{short}" for short in tensor_names(scheme) if f"{name}.{short}" in self.tensors}
        return read_layer(name, {short: self.tensor(full) for short, full in stored.items()}, scheme)

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter of the model by the name that it has in the dense model, dequantized if need be.

        Args:
            name: For example `model.layers.0.mlp.up_proj.weight` (a linear's weight is [out, in]).
            dtype: What to return.

        Raises:
            CheckpointError: It is missing or damaged, or not finite in this dtype.
        """
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in self._layer_set:
            parameter = dequantize(self.layer(layer), dtype).T.contiguous()
        elif self._is_nf4 and nf4.is_quantized(name, self.tensors):
            parts = {part: self.tensor(part) for part in nf4.parts(name, self.tensors)}
            parameter = nf4.dequantize(name, parts).to(dtype)
        else:
            tensor = self.tensor(name)
            stored = str(tensor.dtype).removeprefix("torch.")
            if not tensor.is_floating_point():
                raise CheckpointError(f"{name} is {stored}; it must be floating point")
            if tensor.dtype.itemsize == 1:  # nothing without its scales, which each format calls and cuts otherwise
                raise CheckpointError(f"{name} is {stored}, which is not read; give the checkpoint in 16 or 32 bits")
            parameter = tensor.to(dtype)
        _check_finite(name, parameter)
        return parameter

    @cached_property
    def _layer_set(self) -> frozenset[str]:
        return frozenset(self.layers)

    def has_parameter(self, name: str) -> bool:
        """Whether `parameter` can return this one."""
        return name in self.tensors or (name.endswith(".weight") and name.removesuffix(".weight") in self._layer_set)

    def verify(self) -> Iterator[str]:
        """Reads every INT4 layer and yields its name; what is damaged raises before anybody relies on it.

        Raises:
            CheckpointError: The first damage found.
        """
        for name in self.layers:
            self.layer(name)
            yield name

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


def _check_finite(name: str, parameter: torch.Tensor) -> None:
    # The extremes of a tensor are nan if any element is, and need no second tensor of its size.
    if parameter.numel() and not bool(torch.isfinite(torch.stack(parameter.aminmax())).all()):
        place = (~torch.isfinite(parameter)).nonzero()[0].tolist()
        value = parameter[tuple(place)].item()
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name}{place} is {value} in {dtype}; it must be finite: the checkpoint is damaged")
