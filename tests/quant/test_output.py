"""The directory that a run writes to: what `--overwrite` may delete, what a kill, a full disk or a second run does."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from tokenmill.cli import main
from tokenmill.errors import ConfigurationError
from tokenmill.quant.output import OutputDirectory, check_apart

pytest.importorskip("transformers")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(dense_model: Path, tmp_path: Path) -> Path:
    """A model of its own at models/a, whose weights are a link to shared/weights, as in a hub's cache."""
    folder, shared = tmp_path / "models" / "a", tmp_path / "shared"
    folder.mkdir(parents=True)
    shared.mkdir()
    for file in dense_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").rename(shared / "weights")
    (folder / "model.safetensors").symlink_to(shared / "weights")
    (shared / "config.json").write_text(json.dumps({"quantization_config": {}}))
    return folder


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("models/a", "is the model itself"),
        ("models/a/../a", "is the model itself"),
        ("link", "is the model itself"),
        ("models/a/int4", "is inside the model's directory"),
        ("link/int4", "is inside the model's directory"),
        ("models", "holds the model's"),
        ("shared", "holds the model's"),
    ],
)
def test_an_output_that_is_or_holds_the_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "models" / "config.json").write_text(json.dumps({"quantization_config": {}}))
    before = files(tmp_path)
    options = ["--method", "rtn", "--no-evaluation", "--device", "cpu", "--overwrite"]
    assert main(["quantize", str(model), str(tmp_path / out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert files(tmp_path) == before


def test_an_output_beside_the_model_is_none_of_these(model: Path, tmp_path: Path) -> None:
    for out in ("models/b", "models/aa", "elsewhere/x"):
        check_apart(model, tmp_path / out)


def test_overwriting_deletes_a_quantized_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished = OutputDirectory(out, 2, {"group_size": 32})
    unfinished.write_part(0, {"a": torch.zeros(1)}, {})
    unfinished.close()
    with closing(OutputDirectory(out, 2, {"group_size": 64}, overwrite=True)) as other:
        assert not other.is_written(0)
    (out / "quantize-progress.json").unlink()
    (out / "config.json").write_text(json.dumps({"quantization_config": {}}))
    (out / "tokenizer.json").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").write_text("kept")
    OutputDirectory(out, 2, {}, overwrite=True).close()
    assert sorted(path.name for path in out.iterdir()) == ["quantize-progress.json", "quantize-unfinished"]
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "important", "is no quantized checkpoint, and --overwrite deletes nothing else"),
        ("config.json", "{}", "is no quantized checkpoint"),
        ("config.json", "no json", "is no quantized checkpoint"),
        ("config.json", '{"model_type": "llama"}', "is no quantized checkpoint"),
        ("src/main.py", "important", "holds the directory src, and --overwrite deletes nothing else"),
    ],
)
def test_overwriting_refuses_any_other_directory(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text(content)
    if name.startswith("src"):
        (tmp_path / "out" / "config.json").write_text(json.dumps({"quantization_config": {}}))
    before = files(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        OutputDirectory(tmp_path / "out", 2, {}, overwrite=True)
    assert files(tmp_path) == before


def test_an_output_that_cannot_be_one_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("important")
    for overwrite in (False, True):
        with pytest.raises(ConfigurationError, match="is a file; name a directory"):
            OutputDirectory(tmp_path / "file", 2, {}, overwrite)
        with pytest.raises(ConfigurationError, match="cannot be written to: Not a directory"):
            OutputDirectory(tmp_path / "file" / "out", 2, {}, overwrite)
        with pytest.raises(ConfigurationError, match="cannot be written to"):
            OutputDirectory(Path("/proc/x/y"), 2, {}, overwrite)
    assert (tmp_path / "file").read_text() == "important"


def test_a_progress_file_that_is_none_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "quantize-progress.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="unfinished run of another model"):
        OutputDirectory(tmp_path, 2, {})


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a disk that has no more room: longer files cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("longest", [4000, 8000], ids=["the tokenizer", "the report"])
def test_a_disk_that_is_full_at_the_end_gets_one_line_and_the_run_is_finished_later(
    dense_model: Path, tmp_path: Path, longest: int
) -> None:
    assert 4000 < (dense_model / "tokenizer.json").stat().st_size < 8000
    out = tmp_path / "out"
    report = {"errors": "x" * 8000}
    with closing(OutputDirectory(out, 1, {})) as output:
        output.write_part(0, {"a": torch.zeros(4)}, {})
        with files_of_at_most(longest), pytest.raises(ConfigurationError, match="make room and repeat") as caught:
            output.finish(dense_model, {}, report)
    assert "\n" not in str(caught.value)
    assert not (out / "config.json").exists()
    with closing(OutputDirectory(out, 1, {})) as output:
        assert output.is_written(0)
        output.finish(dense_model, {"model_type": "llama"}, report)
    assert (out / "tokenizer.json").read_bytes() == (dense_model / "tokenizer.json").read_bytes()
    assert not [path for path in out.iterdir() if path.name.startswith("quantize-") and "report" not in path.name]


def test_what_a_kill_left_of_a_file_is_gone_in_the_end(dense_model: Path, tmp_path: Path) -> None:
    """Also what was left of the very first file, before which nothing says that the directory is a run's."""
    out = tmp_path / "out"
    (out / "quantize-unfinished").mkdir(parents=True)
    (out / "quantize-unfinished" / "quantize-progress.json").write_text("{")
    with closing(OutputDirectory(out, 1, {})) as output:
        output.write_part(0, {"a": torch.zeros(4)}, {})
    (out / "quantize-unfinished" / ".tmpAbCdEf").write_bytes(b"gigabytes")  # as safetensors calls them
    with closing(OutputDirectory(out, 1, {})) as output:
        output.finish(dense_model, {}, {})
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "quantize-report.json",
        *(path.name for path in dense_model.iterdir() if path.suffix != ".safetensors"),
    }


def test_two_runs_do_not_write_to_one_directory(tmp_path: Path) -> None:
    with closing(OutputDirectory(tmp_path, 1, {})):
        for overwrite in (False, True):
            with pytest.raises(ConfigurationError, match=r"another tokenmill quantize writes to .*; wait for it"):
                OutputDirectory(tmp_path, 1, {}, overwrite)
    OutputDirectory(tmp_path, 1, {}).close()


def test_weights_can_be_read_by_whom_the_rest_can(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with closing(OutputDirectory(tmp_path / "out", 1, {})) as output:
            output.write_part(0, {"a": torch.zeros(4)}, {})
            assert output.part(0).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
