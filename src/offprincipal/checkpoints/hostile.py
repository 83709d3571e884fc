"""Small reads from folders that cannot be trusted: every failure is a clear error, and nothing is run."""

import json
from pathlib import Path
from typing import Any

from offprincipal.errors import CheckpointError

_MOST_BYTES = 1 << 28


def is_file(path: Path) -> bool:
    """Whether there is an ordinary file, not a pipe or device; no where the path cannot even be asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable as JSON ({error}): download or save the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download or save the checkpoint again")
    return content
