"""The doctor tells what is there, names what stands in the way, and its exit status follows."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from tokenmill import doctor, env, platform


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    status = doctor.main(["--json", "--no-hooks", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_every_op_and_setting_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    from tokenmill.kernels import registry

    _, report = report_of(capsys)
    assert {op["op"] for op in report["ops"]} == set(registry.OPS)  # type: ignore[attr-defined]
    assert set(report["variables"]) == {variable.name for variable in env.VARIABLES}  # type: ignore[call-overload]
    for op in report["ops"]:  # type: ignore[attr-defined]
        assert op["chosen"] not in op["refusals"]


def test_a_bad_setting_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", "sse9")
    status, report = report_of(capsys)
    assert status == 1
    assert "sse9" in str(report["problems"])


def test_narrowing_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", "plain")
    _, report = report_of(capsys)
    assert report["isa"] == ["plain"]


def test_a_missing_native_library_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenmill.kernels import extension

    # Uncached, so that what is only pretended here is not remembered for the tests that follow.
    monkeypatch.setattr(extension, "why_not", extension.why_not.__wrapped__)
    monkeypatch.setattr(extension, "why_not_loaded", lambda: "the native library is not built; run `tokenmill build`")
    status, report = report_of(capsys)
    assert status == 1
    assert "tokenmill build" in str(report["problems"])


def test_a_driver_without_a_gpu_for_torch_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(platform, "gpus", lambda: ())
    status, report = report_of(capsys)
    assert status == 1
    assert "CUDA build of torch" in str(report["problems"])


def test_a_model_that_runs_uncompiled_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("COLUMNS", "200")
    path, header = sysconfig.get_path, tmp_path / "Python.h"
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *rest: str(tmp_path) if name == "include" else path(name, *rest)
    )
    header.touch()
    status, report = report_of(capsys)
    assert report["torch_compile"] == {"works": True, "detail": f"{sys.executable}, Python's headers", "remedy": ""}
    header.unlink()
    assert report_of(capsys)[0] == status
    doctor.main(["--no-hooks"])
    shown = capsys.readouterr().out
    assert "does not work: the headers of this Python are not installed; models on the CPU run uncompiled" in shown
    if status == 0:
        assert "Nothing stands in the way, but" in shown
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    _, report = report_of(capsys)
    assert report["torch_compile"]["remedy"] == "unset TORCH_COMPILE_DISABLE"  # type: ignore[index]


def test_people_see_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--no-hooks"])
    shown = capsys.readouterr().out
    assert status in (0, 1)
    for word in ("processor", "torch.compile", "Operations", "Settings", "TOKENMILL_ISA", "int4_gemm"):
        assert word in shown


def test_names_are_whole_in_a_narrow_terminal_and_values_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TOKENMILL_COMMIT", "[/bold]")
    doctor.main(["--no-hooks"])
    shown = capsys.readouterr().out.split()
    assert {variable.name for variable in env.VARIABLES} <= set(shown)
    assert "[/bold]" in shown
