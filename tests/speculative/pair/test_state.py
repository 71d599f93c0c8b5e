"""The state on disk: whole or not at all, and only for the run that it belongs to."""

from pathlib import Path

import pytest
import torch

from tokenmill.errors import CheckpointError, ConfigurationError
from tokenmill.speculative.pair.state import RunState, write_atomically


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def dies(partial: Path) -> None:
        partial.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, dies)
    assert path.read_text() == "old"
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_progress_is_of_one_stage(tmp_path: Path) -> None:
    state = RunState(tmp_path, {"seed": 1})
    state.begin(resume=False)
    assert state.progress("target") is None
    state.save_progress("target", 7, {"model": {"w": torch.ones(2)}})
    found = state.progress("target")
    assert found is not None
    assert found["step"] == 7
    assert torch.equal(found["model"]["w"], torch.ones(2))
    assert state.progress("draft") is None
    assert state.result("target") is None
    state.save_result("target", {"w": torch.zeros(1)})
    assert state.result("target") is not None


def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no unfinished run; leave out --resume"):
        RunState(tmp_path, {"seed": 1}).begin(resume=True)
    RunState(tmp_path, {"seed": 1, "shape": {"hidden": 4}}).begin(resume=False)
    RunState(tmp_path, {"seed": 1, "shape": {"hidden": 4}}).begin(resume=True)
    with pytest.raises(ConfigurationError, match="holds an unfinished run; pass --resume"):
        RunState(tmp_path, {"seed": 1}).begin(resume=False)
    with pytest.raises(ConfigurationError, match="has seed=1, this call 2; resume with the same arguments"):
        RunState(tmp_path, {"seed": 2, "shape": {"hidden": 4}}).begin(resume=True)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    state = RunState(tmp_path, {"seed": 1})
    state.begin(resume=False)
    state.save_progress("target", 1, {})
    path = tmp_path / "progress.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"progress.pt cannot be read .* start anew"):
        state.progress("target")
