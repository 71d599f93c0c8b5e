"""The INT4 benchmark goes on where it was ended, and begins anew where the sources have changed."""

from pathlib import Path

import pytest
import torch

from tokenmill.bench import kernels, rows
from tokenmill.bench.machines import machine
from tokenmill.bench.rivals import Ours, TorchLinear
from tokenmill.bench.rows import RowFile


def test_a_group_is_measured_once_by_the_same_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = kernels.Plan(((64, 32),), (1,), 32, 1, ("tokenmill", "bench", "int4"))
    contestants = [Ours(16), TorchLinear(torch.bfloat16)]
    path = tmp_path / "rows.jsonl"
    said: list[str] = []

    def measure() -> None:
        kernels.measure(plan, contestants, machine(cpu=True), RowFile(path), said.append)

    measure()
    measure()
    assert said[-1] == "64x32: 1 of 1 groups are in rows.jsonl already"
    assert [row["implementation"] for row in rows.read_rows([path])] == ["tokenmill-a16", "torch-bf16"]
    monkeypatch.setattr(rows, "source_digest", lambda sources: "other")
    measure()
    assert len({row["source"] for row in rows.read_rows([path])}) == 2
