"""The directory that a quantized checkpoint is written to, one block at a time, so that it survives a kill.

A block's file appears under its name only when it is whole: it is written in a directory within, flushed and moved
out. config.json comes last: before that nothing takes the directory for a model, and after a kill the finished blocks
are found again. One run at a time has the directory.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tokenmill.errors import CheckpointError, ConfigurationError
from tokenmill.quant.json_file import read_json

_PROGRESS = "quantize-progress.json"
#: Where files are until they are whole. safetensors writes under names of its own first, which a kill leaves behind.
_UNFINISHED = "quantize-unfinished"
_INDEX = "model.safetensors.index.json"
#: Larger files beside the weights are not a tokenizer or a template and stay behind.
_MAX_COMPANION_BYTES = 100 * 2**20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def check_apart(source: Path, out: Path) -> None:
    """Refuses an output whose files could be the source's own, for `OutputDirectory` may delete them.

    Links are followed: the weights of a model in a hub's cache are links to files elsewhere.

    Args:
        source: The model directory.
        out: Where the result is to be written; need not exist.

    Raises:
        ConfigurationError: They are one directory, one is inside the other, or `out` holds what a file of the source
            is a link to.
    """
    model, target = source.resolve(), out.resolve()
    if target == model:
        raise ConfigurationError(f"{out} is the model itself; name another directory to write to")
    if model in target.parents:
        raise ConfigurationError(f"{out} is inside the model's directory; name one beside {source}")
    for file in (model, *(file.resolve() for file in model.iterdir())):
        if target in file.parents:
            raise ConfigurationError(f"{out} holds the model's {file}; name another directory to write to")


class OutputDirectory:
    """Where a run writes, and what an earlier run with the same settings left there. No other run has it until `close`.

    Args:
        path: The directory; made if absent.
        num_parts: Number of files that the checkpoint will have.
        settings: Everything that decides the result; an unfinished run is resumed only if it agrees.
        overwrite: Whether to delete the checkpoint, finished or not, that the directory holds. Nothing else is deleted.

    Raises:
        ConfigurationError: The directory holds something else, another run writes to it, or it cannot be written to.
    """

    def __init__(self, path: Path, num_parts: int, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.num_parts = num_parts
        self._lock: int | None = None
        try:
            if path.exists() and not path.is_dir():
                raise ConfigurationError(f"{path} is a file; name a directory to write to")
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._progress = self._open(settings, overwrite)
        except OSError as error:
            self.close()
            raise ConfigurationError(f"{path} cannot be written to: {error.strerror}; name another directory") from None
        except BaseException:
            self.close()
            raise

    def _open(self, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
        """What is known of the parts that are written; a new run's is written."""
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        progress = self.path / _PROGRESS
        if overwrite:
            _delete_checkpoint(self.path)
        if any(entry.name != _UNFINISHED for entry in self.path.iterdir()):
            if not progress.exists():
                raise ConfigurationError(f"{self.path} is not empty; name another directory or pass --overwrite")
            if read_json(progress).get("fingerprint") != fingerprint:
                raise ConfigurationError(
                    f"{self.path} holds an unfinished run of another model or with other settings; "
                    "repeat its command to resume it, or pass --overwrite"
                )
        shutil.rmtree(self.path / _UNFINISHED, ignore_errors=True)
        if not progress.exists():
            self._write_json(_PROGRESS, {"fingerprint": fingerprint, "settings": dict(settings), "notes": {}})
        return read_json(progress)

    def close(self) -> None:
        """Lets other runs have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def part(self, index: int) -> Path:
        """The file of part 0..num_parts-1."""
        return self.path / f"model-{index + 1:05d}-of-{self.num_parts:05d}.safetensors"

    def is_written(self, index: int) -> bool:
        """Whether the part is there, whole."""
        return self.part(index).exists()

    def write_part(self, index: int, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, float]) -> None:
        """Writes one part, and numbers about it for `notes`.

        The notes are not in the file, because safetensors writes several metadata keys in a random order.

        Raises:
            ConfigurationError: The disk is full or failed; what was written before is still there.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with self._writing():
            aside = self._aside(self.part(index).name)
            save_file(stored, aside, metadata={"format": "pt"})
            # safetensors makes files that nobody but their owner may read.
            aside.chmod(aside.parent.stat().st_mode & 0o666)
            _flush(aside)
            self._progress["notes"][str(index)] = dict(notes)
            self._write_json(_PROGRESS, self._progress)
            aside.rename(self.part(index))
            _flush(self.path)

    def read_part(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a part that is written."""
        with safe_open(self.part(index), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def notes(self, index: int) -> dict[str, float]:
        """The numbers that were written with a part."""
        return dict(self._progress["notes"][str(index)])

    def finish(self, source: Path, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Writes the index, what lies beside the source's weights, the report, and config.json last of all.

        Raises:
            ConfigurationError: The disk is full or failed; what was written before is still there.
        """
        weight_map, total = {}, 0
        for index in range(self.num_parts):
            with safe_open(self.part(index), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    weight_map[name] = self.part(index).name
            total += self.part(index).stat().st_size
        with self._writing():
            self._write_json(
                _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            )
            for file in sorted(source.iterdir()):
                is_ours = file.name in ("config.json", _INDEX, "quantize_config.json", "quant_config.json")
                if not file.is_file() or is_ours or file.name.endswith((*_WEIGHT_SUFFIXES, ".index.json")):
                    continue
                if file.stat().st_size <= _MAX_COMPANION_BYTES:
                    # The source may be read-only; its modes are not copied.
                    shutil.copyfile(file, self.path / file.name)
            self._write_json("quantize-report.json", report)
            self._write_json("config.json", config)
            shutil.rmtree(self.path / _UNFINISHED)
            (self.path / _PROGRESS).unlink()

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        aside = self._aside(name)
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        _flush(aside)
        aside.rename(self.path / name)

    def _aside(self, name: str) -> Path:
        """Where a file is until it is whole."""
        (self.path / _UNFINISHED).mkdir(exist_ok=True)
        return self.path / _UNFINISHED / name

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what to do when the disk is full."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"{self.path} cannot be written: {error}; make room and repeat to resume"
            ) from None


def _lock(path: Path) -> int | None:
    """A descriptor that keeps other runs out of a directory while it is open; None where its file system has no locks.

    Raises:
        ConfigurationError: Another run writes to it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigurationError(f"another tokenmill quantize writes to {path}; wait for it") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _delete_checkpoint(path: Path) -> None:
    """Deletes the files of a quantized checkpoint, or of an unfinished one; of anything else nothing.

    Raises:
        ConfigurationError: The directory holds something else, or directories, which no checkpoint of ours does.
    """
    entries = sorted(entry for entry in path.iterdir() if entry.name != _UNFINISHED)
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.is_symlink()]
    if entries and (folders or not _is_quantized(path)):
        what = f"holds the directory {folders[0]}" if folders else "is no quantized checkpoint"
        raise ConfigurationError(f"{path} {what}, and --overwrite deletes nothing else; name another directory")
    for entry in entries:
        entry.unlink()


def _is_quantized(path: Path) -> bool:
    if (path / _PROGRESS).is_file():
        return True
    try:
        return "quantization_config" in read_json(path / "config.json")
    except CheckpointError:
        return False


def _flush(path: Path) -> None:
    """Makes a file or a directory's entries survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
