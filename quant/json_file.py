"""Reading a JSON object from a file, with an error that names the file."""

import json
from pathlib import Path
from typing import Any

from tokenmill.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        CheckpointError: The file is missing or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}; it must hold an object")
    return value
