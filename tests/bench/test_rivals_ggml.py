"""ggml as a rival: our weight in its format, and its product where the library is installed."""

from pathlib import Path

import pytest
import torch

from tokenmill.bench import rivals_ggml
from tokenmill.bench.kernels import measure_shape, random_weight
from tokenmill.bench.machines import Cpu
from tokenmill.bench.rivals_ggml import GgmlQ40, q4_0
from tokenmill.bench.roofline import Roofs
from tokenmill.kernels.int4_gemm.weight import dequantize

RIVAL = GgmlQ40()


@pytest.mark.parametrize(("K", "N", "group_size"), [(256, 24, 128), (96, 8, 32), (64, 16, 64), (448, 8, 448)])
def test_the_blocks_hold_our_weight_exactly(K: int, N: int, group_size: int) -> None:
    """Read back as ggml documents block_q4_0: a half, then 16 bytes with elements 0..15 low and 16..31 high."""
    weight = random_weight(K, N, group_size, torch.device("cpu"))
    blocks = q4_0(weight)
    assert blocks.shape == (N, K // 32, 18)
    scales = blocks[:, :, :2].contiguous().view(torch.float16).double()
    codes = torch.cat((blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4), 2).double()
    assert torch.equal(((codes - 8) * scales).reshape(N, K).t(), dequantize(weight, torch.float64))


def test_without_the_library_it_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_GGML", str(tmp_path))
    assert "TOKENMILL_GGML" in str(RIVAL.why_not(4096, 4096, 128))
    (tmp_path / "libggml.so").write_text("no library")
    assert "libggml.so cannot be used: " in str(RIVAL.why_not(4096, 4096, 128))
    assert RIVAL.version() == "ggml"


@pytest.fixture
def installed() -> None:
    reason = RIVAL.why_not(4096, 4096, 128)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("installed")
def test_it_refuses_what_it_would_end_the_process_for() -> None:
    for K, N, group_size in ((4096, 4100, 128), (4096, 4096, 48), (4100, 4096, 128)):
        assert "it takes groups" in str(RIVAL.why_not(K, N, group_size))


@pytest.mark.usefixtures("installed")
def test_it_is_right_and_takes_other_inputs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cpu()
    monkeypatch.setattr(machine, "roofs", lambda: Roofs(1e10, 1e11, "float32"))
    groups = [{"K": 512, "N": 256, "group_size": 128, "M": M} for M in (1, 5)]
    for rows in measure_shape(groups, [RIVAL], machine, rounds=1):
        assert [row["implementation"] for row in rows if "p50" in row] == ["ggml-q4_0"], rows
    weight = random_weight(256, 64, 64, torch.device("cpu"))
    layer, exact = RIVAL.prepare(weight), dequantize(weight, torch.float64)
    for seed, M in enumerate((3, 1, 3)):
        x = torch.randn(M, 256, generator=torch.Generator().manual_seed(seed))
        wanted = x.double() @ exact
        assert (layer.call(x) - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert layer.nbytes == rivals_ggml.q4_0(weight).nbytes
