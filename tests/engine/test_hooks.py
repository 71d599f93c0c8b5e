"""Which hooks are chosen, what becomes of them, and how that is reported."""

import json
import logging
from pathlib import Path

import pytest

from tokenmill.engine.vllm import compat, hooks, register, status, verification
from tokenmill.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, at its import
ALL = frozenset(hooks.NAMES)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts as a fresh process does, and the engines of other tests keep their hooks."""
    monkeypatch.setattr(hooks, "_statuses", {})
    monkeypatch.delenv("TOKENMILL_HOOKS", raising=False)
    monkeypatch.delenv("TOKENMILL_STATUS_FILE", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"all"}, ALL),
        ({"none"}, frozenset()),
        ({"linear"}, {"linear"}),
        ({"linear", "Verification"}, {"linear", "verification"}),
        ({"-verification"}, ALL - {"verification"}),
        ({"all", "-linear", "-attention"}, ALL - {"linear", "attention"}),
        ({"linear", "-linear"}, frozenset()),
    ],
)
def test_selection(text: set[str], expected: set[str]) -> None:
    assert hooks.chosen(frozenset(text)) == expected


@pytest.mark.parametrize("text", [{"lineal"}, {"-lineal"}, {"none", "linear"}])
def test_selection_that_makes_no_sense(text: set[str]) -> None:
    with pytest.raises(ConfigurationError, match="TOKENMILL_HOOKS"):
        hooks.chosen(frozenset(text))


def test_register_may_be_called_again() -> None:
    register()
    first = hooks.statuses()
    register()
    assert hooks.statuses() == first
    assert [item.hook for item in first] == list(hooks.NAMES)
    assert compat.EXPAND_BATCH_TO_TOKENS.stock() is not verification.expand
    assert compat.EXPAND_BATCH_TO_TOKENS.stock().__module__ == "vllm.v1.sample.rejection_sampler"


def test_what_does_not_exist_yet_is_said_to_be_absent() -> None:
    register()
    unwritten = {hook.name for hook in hooks.HOOKS if not hook.target}
    assert {item.hook for item in hooks.statuses() if item.state == "absent"} == unwritten


def test_a_hook_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_HOOKS", "-verification")
    register()
    assert {item.hook: item.state for item in hooks.statuses()}["verification"] == "off"


@pytest.mark.parametrize("version", ["0.99.0", "1.0.0.dev3+gabc", "dev"])
def test_an_unknown_vllm_gets_one_warning_and_stock_behaviour(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    with caplog.at_level(logging.WARNING, logger="tokenmill"):
        register()
        register()
    assert [version in record.getMessage() for record in caplog.records] == [True]
    assert {item.state for item in hooks.statuses()} <= {"refused", "absent"}


def test_a_wrong_setting_gets_one_warning_and_stock_behaviour(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOKENMILL_HOOKS", "lineal")
    with caplog.at_level(logging.WARNING, logger="tokenmill"):
        register()
    assert ["lineal" in record.getMessage() for record in caplog.records] == [True]
    assert {item.state for item in hooks.statuses()} <= {"refused", "absent"}


def test_a_name_that_vllm_lost_refuses_its_hook_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = compat.PrivateName("vllm.v1.sample.rejection_sampler:no_such_function", "verification", "a test")
    monkeypatch.setattr(compat, "EXPAND_BATCH_TO_TOKENS", gone)
    register()
    found = {item.hook: item for item in hooks.statuses()}["verification"]
    assert found.state == "refused"
    assert "no_such_function" in found.detail


def test_status_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "status.json"
    monkeypatch.setenv("TOKENMILL_STATUS_FILE", str(target))
    register()
    assert json.loads(target.read_text()) == hooks.report()
    hooks.record(hooks.HookStatus("linear", "active", "an implementation"))
    assert json.loads(target.read_text())["hooks"][0]["detail"] == "an implementation"
    assert list(tmp_path.iterdir()) == [target], "no half-written file stays"


def test_a_status_file_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOKENMILL_STATUS_FILE", str(tmp_path / "missing" / "status.json"))
    register()
    assert "cannot write" in caplog.text


def test_status_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert status.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hooks"][2]["hook"] == "verification"
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    assert status.main([]) == 1
    assert "0.99.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", compat.PRIVATE_NAMES, ids=lambda name: name.path)
def test_private_names_exist(name: compat.PrivateName) -> None:
    if compat.series(compat.vllm_version()) not in name.series:
        pytest.skip("not a name of this vLLM")
    assert name.resolve() is not None
