"""The cost of policy and router as rows."""

import sys
from pathlib import Path

import pytest

from tokenmill.bench import policies
from tokenmill.bench.rows import read_rows


def test_every_sort_of_prompt_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "COUNT", 2)
    monkeypatch.setattr(sys, "argv", ["policies", "--out", str(tmp_path / "rows.jsonl")])
    policies.main()
    rows = read_rows([tmp_path / "rows.jsonl"])
    assert [row["prompt"] for row in rows] == [*policies.SORTS, "5 MB"]
    assert all(row["new_ms"] > 0 and row["seen_ms"] > 0 for row in rows[:-1])
    assert all({"device", "versions", "commit", "command"} <= row.keys() for row in rows)
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
