"""Small reads from folders that cannot be trusted: every failure is a clear error, and nothing is run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offprincipal.errors import CheckpointError

_MOST_BYTES = 1 << 26  # of an index; that of a model with 100,000 tensors has 10 MB
MOST_OF_CONFIG = 1 << 24


def is_file(path: Path) -> bool:
    """Whether there is an ordinary file, not a pipe or device; no where the path cannot even be asked for."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_config(*folders: Path, otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The first `config.json` in some folders.

    Args:
        otherwise: the configuration if there is none; empty by default.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = next((folder / "config.json" for folder in folders if is_file(folder / "config.json")), None)
    return dict(otherwise or {}) if path is None else read_json(path, MOST_OF_CONFIG)


def read_bytes(path: Path, start: int, length: int, name: str) -> bytearray:
    """Bytes of a tensor that lie somewhere in a file, which arrays over them may be written to.

    Raises:
        CheckpointError: they cannot be read, or the file ends before them.
    """
    try:
        with path.open("rb") as file:
            whole = start + length <= os.fstat(file.fileno()).st_size
            content = bytearray(length if whole else 0)
            file.seek(start)
            if whole and file.readinto(content) == length:
                return content
    except OSError as error:
        raise CheckpointError(f"cannot read {name} from {path}: {error.strerror or error}") from error
    raise CheckpointError(f"{path} ends before {name} does: copy or save it again")


def shape_of(values: Any = ()) -> tuple[int, ...]:
    """What a pickle gives torch.Size: some whole numbers.

    Raises:
        TypeError: they are something else.
    """
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise TypeError(f"{', '.join(map(brief, numbers[:3]))} in place of a shape")
    return numbers


def brief(value: object) -> str:
    """A value in an error: text and numbers as they are, of all else the kind, since it can hold itself.

    >>> brief("a" * 200)[:4], brief(3), brief([1])
    ("'aaa", '3', 'list')
    """
    return repr(value)[:80] if isinstance(value, str | int | float) else type(value).__name__


def read_json(path: Path, most: int = _MOST_BYTES) -> dict[str, Any]:
    """A JSON object.

    Args:
        most: bytes that are read; parsed they take twenty times as many.

    Raises:
        CheckpointError: it cannot be read, is larger, or is not a JSON object.
    """
    try:
        if not is_file(path):
            raise ValueError("it is not there, or no ordinary file")
        if path.stat().st_size > most:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable as JSON ({error}): download or save the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not contain a JSON object: download or save the checkpoint again")
    return content
