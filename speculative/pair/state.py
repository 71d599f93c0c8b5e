"""What a run leaves on disk so that it can go on after a kill: written whole or not at all."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tokenmill.errors import CheckpointError, ConfigurationError

#: Folder inside the output folder; gone when the pair is finished.
FOLDER = "training"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a path beside `path`, flushes the file to disk and renames it into place.

    A process killed at any moment leaves either the old file or the new one.
    """
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunState:
    """The unfinished run in an output folder.

    Args:
        folder: Where it is kept.
        fingerprint: Everything that the weights depend on: recipe, text, device, precision, threads.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, object]) -> None:
        self.folder = folder
        self.fingerprint = dict(fingerprint)

    def begin(self, *, resume: bool) -> None:
        """Makes the folder for a new run, or checks that the run in it is this one.

        Raises:
            ConfigurationError: There is an unfinished run and `resume` is off; or `resume` is on and there is no
                run, or one with another fingerprint.
        """
        record = self.folder / "run.pt"
        if not record.exists():
            if resume:
                raise ConfigurationError(f"{self.folder} holds no unfinished run; leave out --resume to start one")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(record, lambda path: torch.save(self.fingerprint, path))
            return
        if not resume:
            raise ConfigurationError(
                f"{self.folder} holds an unfinished run; pass --resume to go on with it, or remove that folder"
            )
        found = _load(record)
        for name in sorted(set(found) | set(self.fingerprint)):
            if found.get(name) != self.fingerprint.get(name):
                raise ConfigurationError(
                    f"the unfinished run has {name}={found.get(name)}, this call {self.fingerprint.get(name)}; "
                    "resume with the same arguments, Python and device, or start anew in another folder"
                )

    def save_progress(self, stage: str, step: int, parts: Mapping[str, object]) -> None:
        """Records that `step` steps of a stage are done, with the state dicts to go on from."""
        content = {"stage": stage, "step": step, **parts}
        write_atomically(self.folder / "progress.pt", lambda path: torch.save(content, path))

    def progress(self, stage: str) -> dict[str, Any] | None:
        """What `save_progress` recorded last, if that was in this stage."""
        path = self.folder / "progress.pt"
        if not path.exists():
            return None
        found = _load(path)
        return found if found.get("stage") == stage else None

    def save_result(self, stage: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Keeps the float32 weights of a finished stage."""
        write_atomically(self.folder / f"{stage}.pt", lambda path: torch.save(dict(weights), path))

    def result(self, stage: str) -> dict[str, torch.Tensor] | None:
        """The weights of a stage, if it is finished."""
        path = self.folder / f"{stage}.pt"
        return _load(path) if path.exists() else None


def _load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # the unpickler raises whatever the damage leads it to
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}); remove its folder, start anew"
        ) from None
    return content
