"""The `governance` section: what it refuses, and that no process is told the master key."""

from pathlib import Path

import pytest

from tokenmill.engine.gateway import config
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.settings import Document
from tokenmill.engine.supervisor.plan import make_plan
from tokenmill.errors import ConfigurationError

KEY = "0123456789abcdef"


def loaded(folder: Path, *lines: str) -> config.Config:
    """A file with one remote backend and this section."""
    path = folder / "c.yaml"
    path.write_text("\n".join(["tiers:", "  a:", "    backends:", "      - url: http://h", "governance:", *lines]))
    return config.load(path)


def options(folder: Path, *lines: str) -> Options:
    """What the workers are told."""
    found = make_plan(loaded(folder, *lines)).governance
    assert found is not None
    return found


def test_off_without_the_section(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers: {a: {backends: [{url: 'http://h'}]}}")
    assert make_plan(config.load(path)).governance is None


def test_master_key_reaches_the_workers_as_a_hash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_MASTER_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    found = options(tmp_path, "  store: books/gateway.db", "  retention_days: 3")
    assert found == Options(str(tmp_path / "books/gateway.db"), digest(KEY), retention_days=3)
    assert found.is_master(digest(KEY)) and not found.is_master(digest(KEY + "x"))
    plan = make_plan(loaded(tmp_path, "  store: books/gateway.db"))
    document = Document(plan.remotes, plan.settings(), governance=plan.governance)
    assert KEY.encode() not in document.to_json()
    assert Document.from_json(document.to_json()) == document
    assert digest(KEY) not in repr(found)


@pytest.mark.parametrize(
    ("sections", "opened"),
    [
        ("", True),
        ("observability: {open_metrics: false}", False),
        (f"governance: {{store: x.db, master_key: {KEY}}}", False),
        (f"governance: {{store: x.db, master_key: {KEY}}}\nobservability: {{open_metrics: true}}", True),
    ],
)
def test_metrics_that_name_teams_are_for_nobody_without_a_key(tmp_path: Path, sections: str, opened: bool) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("tiers: {a: {backends: [{url: 'http://h'}]}}\n" + sections)
    assert make_plan(config.load(path)).observability.open_metrics is opened


@pytest.mark.parametrize(("key", "guessable"), [("sk-1234", True), ("a" * 15, True), ("a" * 16, False)])
def test_short_master_key_is_marked(tmp_path: Path, key: str, guessable: bool) -> None:
    """Where it is taken; a long one is not slowed down because short ones would be taken."""
    lines = ("  store: x.db", f"  master_key: {key}", "  guessable_master_key: true")
    found = options(tmp_path, *lines)
    assert found is not None and found.guessable == guessable


@pytest.mark.parametrize(("value", "says"), [(None, "is not set"), ("short", "5 characters, fewer than 16")])
def test_no_master_key_no_governance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, says: str
) -> None:
    monkeypatch.delenv("TOKENMILL_MASTER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKENMILL_MASTER_KEY", value)
    with pytest.raises(ConfigurationError, match=says) as raised:
        options(tmp_path, "  store: x.db")
    assert "TOKENMILL_MASTER_KEY" in str(raised.value)
    assert "token_urlsafe" in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["  master_key_env: X"], "store: is missing"),
        (["  store: mysql://h/d"], "no postgresql://"),
        (["  store: postgresql://h"], "no postgresql://"),
        (["  store: postgresql://u:p@h/d"], "holds a password"),
        (["  store: x", "  master_key: short"], "5 characters"),
        (["  store: x", "  master_key: 0123456789abcdef", "  master_key_env: X"], "keep one"),
        (["  store: x", "  retention_days: 0"], "retention_days"),
        (["  store: x", "  budget: 3"], "unknown field"),
    ],
)
def test_wrong_sections_are_one_line(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        options(tmp_path, *lines)
    assert "\n" not in str(raised.value)
