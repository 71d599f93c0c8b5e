"""ONNX Runtime's MatMulNBits at accuracy level 4: activations quantised to int8 per block, float32 in and out."""

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tokenmill.bench.rivals import Layer, int4_bytes, narrowed, package_version
from tokenmill.kernels.int4_gemm.weight import Int4Weight, unpack_codes


@functools.cache
def _runtime(threads: int) -> Any:
    """The package, with one pool of workers for all sessions.

    Its workers inherit the affinity of the thread that makes them; OpenMP has bound this one to a single core.
    """
    import onnxruntime

    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        # The pool is made with the first session.
        _session(onnxruntime, _model(64, 32, 32, b"\0" * 1024, b"\0" * 256, b"\x88" * 32))
    finally:
        os.sched_setaffinity(0, bound)
    return onnxruntime


def _model(K: int, N: int, block: int, codes: bytes, scales: bytes, zeros: bytes) -> bytes:
    """A graph of one MatMulNBits node."""
    from onnx import TensorProto, helper

    groups = K // block
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales", "zeros"],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=block,
        accuracy_level=4,
    )
    constants = [
        helper.make_tensor("codes", TensorProto.UINT8, [N, groups, block // 2], codes, raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [N * groups], scales, raw=True),
        helper.make_tensor("zeros", TensorProto.UINT8, [N * ((groups + 1) // 2)], zeros, raw=True),
    ]
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
        constants,
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    return bytes(model.SerializeToString())


def _session(runtime: Any, model: bytes) -> Any:
    options = runtime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class OnnxRuntimeInt4:
    """MatMulNBits with accuracy level 4, its fastest."""

    name: str = "onnxruntime-acc4"
    role: Literal["rival"] = "rival"
    dtype: torch.dtype = torch.float32
    activation_bits: int = 8

    def version(self) -> str:
        return package_version("onnxruntime")

    def why_not(self, K: int, N: int, group_size: int) -> str | None:
        """Packages, and blocks that its checks demand."""
        if find_spec("onnxruntime") is None or find_spec("onnx") is None:
            return "onnxruntime and onnx are not both installed"
        if group_size not in (16, 32, 64, 128, 256) or K % group_size:
            return "it takes blocks of 16 to 256 that divide K"
        return narrowed()

    def prepare(self, weight: Int4Weight) -> Layer:
        """One session with the weight as a constant, which it packs once; input and output are bound, not copied."""
        runtime = _runtime(torch.get_num_threads())
        K, N, G = weight.K, weight.N, weight.num_groups
        codes = unpack_codes(weight.codes, K).t().contiguous()  # [N, K], two codes a byte, the first in the low bits
        zeros = torch.full((N, G), 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros.t().contiguous()
        zeros = torch.nn.functional.pad(zeros, (0, G % 2))
        session = _session(
            runtime,
            _model(
                K,
                N,
                weight.group_size,
                (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().numpy().tobytes(),
                weight.scales.float().t().contiguous().numpy().tobytes(),
                (zeros[:, ::2] | zeros[:, 1::2] << 4).contiguous().numpy().tobytes(),
            ),
        )
        binding = session.io_binding()
        bound: list[torch.Tensor] = []

        def call(x: torch.Tensor) -> torch.Tensor:
            if not bound or bound[0] is not x:
                bound[:] = [x, torch.empty(x.shape[0], N)]
                for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", bound[1])):
                    bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())
            session.run_with_iobinding(binding)
            return bound[1]

        return Layer(call, int4_bytes(weight) + weight.scales.nbytes)
