"""ggml's product with Q4_0 weights, repacked and run as llama.cpp does it on a CPU; through ggml's C interface.

Q4_0 holds blocks of 32 codes with a float16 scale, (code - 8) * scale: a symmetric weight whose groups are multiples
of 32 is the same numbers there. Activations are quantised to int8, 32 at a time.
"""

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from tokenmill import env
from tokenmill.bench.rivals import Layer, narrowed
from tokenmill.kernels.int4_gemm.weight import Int4Weight, unpack_codes

#: Elements of K in a block, and its bytes: a float16 and 32 codes.
_BLOCK, _BLOCK_BYTES = 32, 18
#: Rows of the weight that its AVX2 and AVX-512 kernels take together.
_INTERLEAVED = 8
#: ggml's numbers of two tensor types, and of the CPU among its kinds of devices.
_F32, _Q4_0, _CPU = 0, 2, 0
#: Its messages below this level tell about each weight that it repacks.
_WARNING = 3
#: Bytes for the descriptions of tensors and a graph of one node; their data is elsewhere.
_CONTEXT_BYTES = 1 << 16


class _Context(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Feature(ctypes.Structure):
    """`ggml_backend_feature`."""

    _fields_ = (("name", c_char_p), ("value", c_char_p))


#: Function to (result, arguments).
_EXPORTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_commit": (c_char_p, ()),
    "ggml_log_set": (None, (c_void_p, c_void_p)),
    "ggml_init": (c_void_p, (_Context,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_load_all_from_path": (None, (c_char_p,)),
    "ggml_backend_dev_by_type": (c_void_p, (c_int,)),
    "ggml_backend_dev_init": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
}


def _tell(level: int, text: bytes, data: int | None) -> None:
    if level >= _WARNING:
        sys.stderr.write(text.decode(errors="replace"))


#: What C calls; it has to outlive the library.
_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(_tell)


class _Ggml:
    """The loaded library with its CPU backend.

    Args:
        path: libggml.so; its other parts lie beside it.
        threads: That compute.

    Raises:
        OSError: It cannot be loaded.
        AttributeError: It lacks a function.
        RuntimeError: It has no CPU backend, or one that cannot take part.
    """

    def __init__(self, path: Path, threads: int) -> None:
        # OpenMP has bound this thread to one core; what is loaded now takes the cores that it finds for all there are.
        bound = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        try:
            self.c = ctypes.CDLL(str(path))
            for name, (result, arguments) in _EXPORTS.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
            self.c.ggml_log_set(_LOG, None)
            self.device = self.c.ggml_backend_dev_by_type(_CPU)
            if self.device is None:  # its backends are plug-ins, one for each instruction set
                self.c.ggml_backend_load_all_from_path(str(path.parent).encode())
                self.device = self.c.ggml_backend_dev_by_type(_CPU)
        finally:
            os.sched_setaffinity(0, bound)
        if self.device is None:
            raise RuntimeError("it has no CPU backend")
        self._registry = self.c.ggml_backend_dev_backend_reg(self.device)
        self.features = self._features()
        if "OPENMP" not in self.features:
            raise RuntimeError("it was built without OpenMP: the threads of its own pool spin while others are timed")
        self.repacked = self._repacked()
        self.backend = self.c.ggml_backend_dev_init(self.device, None)
        self._function(b"ggml_backend_set_n_threads", None, c_void_p, c_int)(self.backend, threads)

    def _function(self, name: bytes, result: Any, *arguments: Any) -> Any:
        address = self.c.ggml_backend_reg_get_proc_address(self._registry, name)
        if address is None:
            raise RuntimeError(f"its CPU backend has no {name.decode()}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def _features(self) -> list[str]:
        """What its CPU backend was built with, such as AVX2 and OPENMP."""
        found, names = self._function(b"ggml_backend_get_features", ctypes.POINTER(_Feature), c_void_p), []
        for feature in found(self._registry):
            if feature.name is None:
                break
            if feature.value == b"1":
                names.append(feature.name.decode())
        return names

    def _repacked(self) -> int:
        """The buffer type that interleaves the rows of a weight."""
        found = self._function(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(c_void_p), c_void_p)(self.device)
        for kind in found:
            if kind is None:
                break
            if self.c.ggml_backend_buft_name(kind) == b"CPU_REPACK":
                return int(kind)
        raise RuntimeError("its CPU backend does not repack weights")

    def context(self) -> int:
        """A new one for descriptions of tensors; ends with `ggml_free`."""
        return int(self.c.ggml_init(_Context(_CONTEXT_BYTES, None, True)))


def library() -> Path | None:
    """libggml.so in the folder that `TOKENMILL_GGML` names, else of llama-cpp-python; None where neither has it."""
    folder = env.GGML.get()
    if folder is None:
        package = find_spec("llama_cpp")
        folder = None if package is None or package.origin is None else Path(package.origin).parent / "lib"
    return next(iter(sorted(folder.glob("libggml.so*"))), None) if folder is not None else None


@functools.cache
def _loaded(path: Path, threads: int) -> _Ggml | str:
    """The library, or why it cannot be used."""
    try:
        return _Ggml(path, threads)
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{path.name} cannot be used: {error}"


def q4_0(weight: Int4Weight) -> torch.Tensor:
    """The weight as ggml stores it: [N, K / 32, 18] bytes, the scale first, then codes 0..15 below codes 16..31."""
    K, N = weight.K, weight.N
    codes = unpack_codes(weight.codes, K).t().reshape(N, K // _BLOCK, 2, _BLOCK // 2)
    scales = weight.scales.repeat_interleave(weight.group_size // _BLOCK, 0)[: K // _BLOCK].t().half().contiguous()
    packed = codes[:, :, 0] | codes[:, :, 1] << 4
    return torch.cat((scales.unsqueeze(2).view(torch.uint8), packed), 2).contiguous()


class _Product:
    """x @ W with one repacked copy of a weight; input and output are the tensors themselves, not copies."""

    def __init__(self, ggml: _Ggml, weight: Int4Weight) -> None:
        self._ggml, self._n, self._k = ggml, weight.N, weight.K
        blocks, context = q4_0(weight), ggml.context()
        self._weight = ggml.c.ggml_new_tensor_2d(context, _Q4_0, weight.K, weight.N)
        buffer = ggml.c.ggml_backend_alloc_ctx_tensors_from_buft(context, ggml.repacked)
        if buffer is None:
            raise RuntimeError(f"ggml has no memory for {blocks.nbytes} bytes of weights")
        weakref.finalize(self, _release, ggml, context, [buffer])
        ggml.c.ggml_backend_tensor_set(self._weight, blocks.data_ptr(), 0, blocks.nbytes)
        self._bound: tuple[torch.Tensor, torch.Tensor] | None = None
        self._unbind: Callable[[], object] = lambda: None

    def _bind(self, x: torch.Tensor) -> None:
        """Makes the graph for this tensor."""
        self._unbind()
        c, y = self._ggml.c, torch.empty(x.shape[0], self._n)
        context = self._ggml.context()
        given = c.ggml_new_tensor_2d(context, _F32, self._k, x.shape[0])
        result = c.ggml_mul_mat(context, self._weight, given)
        buffers = []
        for described, tensor in ((given, x), (result, y)):
            buffers.append(c.ggml_backend_cpu_buffer_from_ptr(tensor.data_ptr(), tensor.nbytes))
            if c.ggml_backend_tensor_alloc(buffers[-1], described, tensor.data_ptr()):
                raise RuntimeError("ggml does not take the memory of torch's tensors")
        self._unbind = weakref.finalize(self, _release, self._ggml, context, buffers)
        if not c.ggml_backend_dev_supports_op(self._ggml.device, result):
            raise RuntimeError("ggml has no kernel for this weight in its repacked form")
        self._graph = c.ggml_new_graph_custom(context, 8, False)
        c.ggml_build_forward_expand(self._graph, result)
        self._bound = (x, y)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] float32 to [M, N], in a buffer that the next call writes anew."""
        if self._bound is None or self._bound[0] is not x:
            self._bind(x)
        assert self._bound is not None
        status = self._ggml.c.ggml_backend_graph_compute(self._ggml.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml ended with status {status}")
        return self._bound[1]


def _release(ggml: _Ggml, context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        ggml.c.ggml_backend_buffer_free(buffer)
    ggml.c.ggml_free(context)


@dataclass(frozen=True)
class GgmlQ40:
    """MUL_MAT of a Q4_0 weight in the buffer type CPU_REPACK."""

    name: str = "ggml-q4_0"
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.float32
    activation_bits: int = 8

    def version(self) -> str:
        """The library's own, with the instruction sets that it was compiled for."""
        found = self._library()
        if isinstance(found, str):
            return "ggml"
        widest = [
            name for name in ("AVX512_BF16", "AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2") if name in found.features
        ]
        commit = found.c.ggml_commit().decode()
        return f"ggml {found.c.ggml_version().decode()} ({commit}, {', '.join(widest[:1]) or 'plain'})"

    def _library(self) -> _Ggml | str:
        path = library()
        if path is None:
            return "no libggml.so: neither llama-cpp-python is installed nor does TOKENMILL_GGML name its folder"
        return _loaded(path, torch.get_num_threads())

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """The library, and sizes that it repacks."""
        found = self._library()
        if isinstance(found, str):
            return found
        if group_size % _BLOCK or K % group_size or N % _INTERLEAVED:
            return f"it takes groups that are multiples of {_BLOCK} and divide K, and N a multiple of {_INTERLEAVED}"
        return narrowed()

    def prepare(self, weight: Int4Weight) -> Layer:
        """One repacked copy."""
        found = self._library()
        if isinstance(found, str):
            raise RuntimeError(found)
        return Layer(_Product(found, weight), weight.N * (weight.K // _BLOCK) * _BLOCK_BYTES)
