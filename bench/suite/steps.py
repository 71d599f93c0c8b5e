"""The steps of the suite in the order of value, and what each consists of on a GPU or, reduced, on a CPU.

Ops and implementations come from the registry: what is registered is checked and measured.
"""

from collections.abc import Iterator, Sequence

from tokenmill import platform
from tokenmill.bench import timing
from tokenmill.bench.suite.correctness import SANITIZERS
from tokenmill.bench.suite.items import Item
from tokenmill.bench.suite.subjects import subject
from tokenmill.kernels import registry
from tokenmill.kernels.spec import OpSpec, short_dtype

STEPS = {
    "machine": "what is here",
    "build": "the native library",
    "roofs": "what the device can do at most",
    "primitives": "hardware primitives against the emulator's golden file",
    "correctness": "every op and implementation against the reference",
    "speed": "ours against torch and the rivals",
    "sanitizer": "CUDA and Triton kernels under compute-sanitizer",
}
_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
_70B = ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192))
#: (shapes, rows of activations): decoding first, then the batch sizes where others fall off, then prefill.
_INT4 = (
    (_8B, (1, 16)),
    (_8B, (64, 256)),
    (_70B, (1, 16)),
    (_8B, (1024, 4096)),
    (_70B, (64, 256)),
    (_8B, (2, 4, 8, 32, 128, 512)),
    (_70B, (1024, 4096)),
    (((10944, 2048), (29568, 8192), (192, 576)), (1, 64)),
)
_VOCABULARY = 128_256
_SPEED_INT4 = "tokenmill.bench.suite.speed:int4"


def items(*, gpu: bool) -> Iterator[Item]:
    """Everything, in order."""
    yield Item("machine", "facts", "tokenmill.bench.suite.hardware:facts")
    yield Item(
        "build", "native library", "tokenmill.bench.suite.hardware:build", {"cuda": gpu}, seconds=600, alone=True
    )
    yield Item("roofs", "roofs", "tokenmill.bench.suite.hardware:roofs")
    yield Item("primitives", "micro-tests", "tokenmill.bench.suite.hardware:primitives", seconds=300)
    correctness = list(_correctness(gpu))
    if gpu:
        # A sanitizer starts torch anew for every item, and CPU kernels are proven without a GPU: figures come before.
        yield from (item for item in correctness if item.arguments["device"] == "cuda")
        yield from _int4_on_gpu(_INT4[:1])
        yield from _other_ops()
        yield from _int4_on_gpu(_INT4[1:2])
        yield from _sanitizers(SANITIZERS[:1])
        yield from _int4_on_gpu(_INT4[2:4])
        yield from _sanitizers(SANITIZERS[1:])
        yield from _int4_on_gpu(_INT4[4:])
        yield from (item for item in correctness if item.arguments["device"] == "cpu")
    else:
        yield from correctness
        yield from _speed_on_cpu()


def _correctness(gpu: bool) -> Iterator[Item]:
    """Of every op and implementation; emulated kernels are for machines without a GPU."""
    for name in registry.OPS:
        spec = subject(name).spec
        for implementation in registry.names(spec):
            if implementation == "reference" or (gpu and implementation in registry.BY_NAME_ONLY):
                continue
            on_gpu = gpu and implementation in ("cuda", "triton")
            slow = not on_gpu and implementation in ("cuda-emulated", "triton")
            for dtype in _dtypes(spec, gpu, interpreted=implementation == "triton" and not on_gpu):
                arguments = {
                    "op": name,
                    "implementation": implementation,
                    "dtype": dtype,
                    "device": "cuda" if on_gpu else "cpu",
                    "cases": 40 if gpu else 6,
                    "seconds": 15.0 if gpu else 2.0,
                    "small": slow,
                }
                environment = {"TRITON_INTERPRET": "1"} if implementation == "triton" and not on_gpu else {}
                title = f"{name} {implementation} {dtype}"
                yield Item("correctness", title, "tokenmill.bench.suite.correctness:check", arguments, 240, environment)


def _dtypes(spec: OpSpec, gpu: bool, interpreted: bool) -> tuple[str, ...]:
    """All on a GPU; one in the reduced form, and float16 in Triton's interpreter, whose bfloat16 is wrong."""
    found = tuple(short_dtype(dtype) for dtype in spec.dtypes())
    if interpreted:
        return tuple(name for name in found if name == "float16") or found[:1]
    return found if gpu else found[:1]


def _sanitizers(tools: Sequence[str]) -> Iterator[Item]:
    for tool in tools:
        for name in registry.OPS:
            spec = subject(name).spec
            for implementation in ("cuda", "triton"):
                if implementation in registry.names(spec):
                    arguments = {"tool": tool, "op": name, "implementation": implementation, "dtype": "bfloat16"}
                    yield Item(
                        "sanitizer",
                        f"{tool} {name} {implementation}",
                        "tokenmill.bench.suite.correctness:sanitize",
                        arguments,
                        180,
                    )


def _int4_on_gpu(batches: Sequence[tuple[Sequence[tuple[int, int]], tuple[int, ...]]]) -> Iterator[Item]:
    for shapes, rows in batches:
        for K, N in shapes:
            arguments = {"K": K, "N": N, "group_size": min(128, K), "rows": rows, "cpu": False, "rounds": 15}
            title = f"int4_gemm {K}x{N} M={','.join(map(str, rows))}"
            yield Item("speed", title, _SPEED_INT4, {**arguments, "quick": False}, 240)


def _other_ops() -> Iterator[Item]:
    """Greedy acceptance at serving sizes; an op without sizes of its own at its typical one."""
    for name in registry.OPS:
        if name == "int4_gemm":
            continue
        spec = subject(name).spec
        sizes: list[dict[str, int]] = [dict(spec.examples[0])]
        if name == "spec_verify_greedy":
            sizes = [{"T": 5 * B, "B": B, "V": _VOCABULARY, "max_spec_len": 5} for B in (1, 8, 64, 256)]
        for axes in sizes:
            title = f"{name} " + " ".join(f"{axis}={size}" for axis, size in axes.items())
            arguments = {"name": name, "axes": axes, "dtype": "bfloat16", "cpu": False, "rounds": 15}
            yield Item("speed", title, "tokenmill.bench.suite.speed:op", arguments, 120)


def _speed_on_cpu() -> Iterator[Item]:
    """Tiny, to show that measuring works; figures of use come from `tokenmill bench int4 --cpu`."""
    arguments = {"K": 1024, "N": 1024, "group_size": 128, "rows": (1, 8), "cpu": True, "rounds": 1, "quick": True}
    bound = timing.binding(platform.physical_cores())
    yield Item("speed", "int4_gemm 1024x1024 M=1,8", _SPEED_INT4, arguments, environment=bound)
    for name in registry.OPS:
        if name != "int4_gemm":
            axes = dict(subject(name).spec.examples[0])
            arguments = {"name": name, "axes": axes, "dtype": "float32", "cpu": True, "rounds": 1}
            yield Item("speed", f"{name} typical", "tokenmill.bench.suite.speed:op", arguments, environment=bound)
