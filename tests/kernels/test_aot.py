"""Static gates of Triton kernels, compiled for GPUs that are not here."""

from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed; pip install triton")

import triton.language as tl  # noqa: E402

from tokenmill.kernels import aot, gates  # noqa: E402
from tokenmill.kernels.gates import Gate  # noqa: E402

needs_disassembler = pytest.mark.skipif(gates.disassembler() is None, reason="no cuobjdump")


@triton.jit
def product(a, b, c, M, N, K, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """c = a @ b for one block of rows and columns."""
    rows = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(a + rows[:, None] * K + (k + rows)[None, :])
        y = tl.load(b + (k + rows)[:, None] * N + rows[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + rows[:, None] * N + rows[None, :], total.to(tl.bfloat16))


CONFIGURATION = aot.Configuration(
    label="BLOCK=64",
    signature={"a": "*bf16", "b": "*bf16", "c": "*bf16", "M": "i32", "N": "i32", "K": "i32", "BLOCK": "constexpr"},
    constants={"BLOCK": 64},
    aligned=("a", "b", "c", "N", "K"),
)


@needs_disassembler
@pytest.mark.parametrize(("architecture", "matrix"), [("80", "HMMA"), ("90a", "HGMMA"), ("100a", "UTCHMMA")])
def test_each_architecture_gets_its_own_matrix_instruction(architecture: str, matrix: str) -> None:
    row = aot.measure(product, CONFIGURATION, architecture)
    assert (row.kernel, row.instance, row.architecture) == ("product", "BLOCK=64", architecture)
    assert row.toolchain == f"triton {triton.__version__}"
    assert row.static_smem_bytes > 0
    gate = Gate(Path(__file__), (architecture,), required={matrix: 1, "LDGSTS": 1})
    assert gates.violations(gate, row) == []
    assert "has 0 QGMMA; at least 1 are required" in " ".join(
        gates.violations(Gate(Path(__file__), (architecture,), required={"QGMMA": 1}), row)
    )
