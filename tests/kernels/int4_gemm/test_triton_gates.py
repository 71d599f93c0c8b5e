"""What triton makes of the kernels for sm_90, sm_100 and the rest: the committed rows, and the releases at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill.errors import MissingDependencyError
from tokenmill.kernels import gates
from tokenmill.kernels.gates import GateRow
from tokenmill.kernels.int4_gemm import triton_gates
from tokenmill.kernels.int4_gemm.triton_gates import TABLE, TARGETS

ROOT = Path(__file__).resolve().parents[3]
OLDEST = ROOT / "build" / "triton" / "3.6.0"
needs_disassembler = pytest.mark.skipif(gates.disassembler() is None, reason="no cuobjdump")


def measured(*sites: str) -> list[GateRow]:
    """Every target's row, from a process that finds triton in one of the sites first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sites, *sys.path])}
    answer = subprocess.run(
        [sys.executable, "-m", "tokenmill", "kernels", "triton", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert answer.returncode == 0, answer.stderr
    return [
        GateRow(**{**row, "warnings": tuple(row["warnings"])}) for row in map(json.loads, answer.stdout.splitlines())
    ]


def test_the_table_has_two_releases_that_keep_every_rule() -> None:
    rows = gates.read_table(TABLE)
    releases = sorted({row.toolchain for row in rows})
    assert releases[0] == "triton 3.6.0"
    assert len(releases) >= 2
    for release in releases:
        by_key = {(row.instance, row.architecture): row for row in rows if row.toolchain == release}
        ordered = [by_key[target.label, target.architecture] for target in TARGETS]
        assert len(by_key) == len(TARGETS)
        assert triton_gates.judge(ordered, committed=rows) == []


def test_a_broken_rule_is_named() -> None:
    rows = gates.read_table(TABLE)
    release = [row for row in rows if row.toolchain == rows[0].toolchain]
    by_key = {(row.instance, row.architecture): row for row in release}
    ordered = [by_key[target.label, target.architecture] for target in TARGETS]
    worse = GateRow(**{**vars(ordered[0]), "step_instructions": 1000, "instructions": {"HGMMA": 8, "HGMMA-SS": 8}})
    rules = " ".join(triton_gates.judge([worse, *ordered[1:]], committed=rows))
    assert "takes 1000 instructions a step; the limit is" in rules
    assert "has 0 HGMMA-RS; at least 4 are required" in rules
    assert "contains HGMMA-SS" in rules
    assert "in the table" in rules


def test_without_triton_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match="compiling Triton kernels needs triton"):
        triton_gates.main([])


@needs_disassembler
@pytest.mark.parametrize("site", ["", str(OLDEST)], ids=["installed", "oldest"])
def test_the_kernels_become_what_the_table_says(site: str) -> None:
    """HGMMA with the weights in registers on sm_90, UTCHMMA on sm_100, no spill, no I2F, a bounded step."""
    pytest.importorskip("triton", reason="triton is not installed; pip install triton")
    if site and not OLDEST.is_dir():
        pytest.skip("triton 3.6.0 is not in build/triton; run tools/triton_site.py")
    assert triton_gates.judge(measured(*filter(None, [site])), gates.read_table(TABLE)) == []
