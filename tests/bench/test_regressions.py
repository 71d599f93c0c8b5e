"""Ratios to rivals are compared, never times; what fell is named and shows in the exit status."""

from pathlib import Path

import pytest

from tokenmill.bench import regressions
from tokenmill.bench.command import report
from tokenmill.bench.rows import Row, RowFile


def group(ours: float, rival: float, time: int = 1, device: str = "GPU") -> list[Row]:
    shared = {"op": "int4_gemm", "device": device, "isa": "sm90", "K": 64, "N": 32, "M": 1, "time": time}
    return [
        {**shared, "implementation": "tokenmill-cuda", "role": "ours", "p50": ours},
        {**shared, "implementation": "marlin", "role": "rival", "p50": rival},
        {**shared, "implementation": "machete", "role": "rival", "skipped": "not installed"},
    ]


def test_a_slower_clock_is_no_regression() -> None:
    assert regressions.falls(group(2e-5, 4e-5), group(1e-5, 2e-5)) == []
    assert regressions.compared(group(2e-5, 4e-5), group(1e-5, 2e-5)) == 1


def test_a_fall_of_more_than_five_percent_is_named() -> None:
    assert regressions.falls(group(1.04e-5, 2e-5), group(1e-5, 2e-5)) == []
    fallen = regressions.falls(group(1.06e-5, 2e-5), group(1e-5, 2e-5))
    assert [str(fall) for fall in fallen] == [
        "int4_gemm K=64 N=32 M=1, sm90, tokenmill-cuda against marlin: 2.000x before, 1.887x now"
    ]


def test_ratios_come_from_one_measurement_and_the_last_counts() -> None:
    """A rival of another run is no rival of this one."""
    rows = [*group(1e-5, 2e-5, time=1), *group(1e-5, 3e-5, time=2)]
    assert list(regressions.ratios(rows).values()) == [pytest.approx(3.0)]


def test_other_devices_are_not_compared() -> None:
    assert regressions.compared(group(1e-5, 1e-5), group(1e-5, 9e-5, device="another")) == 0


def test_served_gains_are_ratios_already() -> None:
    row = {"op": "serve", "device": "GPU", "model": "m", "workload": "chat", "variant": "linear"}
    before, now = {**row, "tpot_p50_ms_gain": 3.0}, {**row, "tpot_p50_ms_gain": 2.0}
    assert len(regressions.falls([now], [before])) == 1
    assert regressions.falls([{**now, "variant": "stock"}], [{**before, "variant": "stock"}]) == []


def test_the_command_fails_where_a_ratio_fell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("before", group(1e-5, 2e-5)), ("now", group(2e-5, 2e-5))):
        RowFile(tmp_path / name).append(rows)
    assert report([str(tmp_path / "now"), "--against", str(tmp_path / "before")]) == 1
    assert "FELL  int4_gemm" in capsys.readouterr().out
    assert report([str(tmp_path / "before"), "--against", str(tmp_path / "before")]) == 0
