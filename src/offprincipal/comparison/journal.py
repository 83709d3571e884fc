"""The journal of a comparison: the rows of every tensor that is done, so that a killed comparison goes on where it was.

One line of JSON a tensor, numbers as they are (JSON keeps every digit of a float64), arrays in base64. A line that a
kill cut short is dropped, and its tensor measured again. The first line says what is being compared: other settings or
other files start anew.
"""

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from offprincipal.comparison.measure import TensorRows
from offprincipal.errors import FileError

NAME = "journal.jsonl"


class Journal:
    """Rows by the name of their tensor, kept in a folder until the comparison is whole.

    Args:
        folder: where the comparison is written.
        key: what is compared, as text.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / NAME
        self._key = key
        self._file: IO[bytes] | None = None

    @contextmanager
    def opened(self) -> Iterator[dict[str, TensorRows]]:
        """What is already done; while open, `add` keeps more.

        Raises:
            FileError: it cannot be written.
        """
        try:
            done, length = self._read()
            with self.path.open("ab") as file:
                file.truncate(length)
                if not length:
                    file.write(_line({"key": self._key}))
                    file.flush()
                self._file = file
                yield done
        except OSError as error:
            raise FileError(
                f"cannot write {self.path}: {error.strerror or error}. Free some space or choose another --out"
            ) from error
        finally:
            self._file = None

    def add(self, name: str, rows: TensorRows) -> None:
        """Keep the rows of one tensor; they outlive this process.

        Raises:
            FileError: another process has taken the journal for itself.
        """
        if self._file is None:
            raise ValueError("the journal is not open")
        if not self._is_ours(self._file):
            raise FileError(
                f"another process is writing to {self.path.parent}: wait for it to end, or choose another --out"
            )
        self._file.write(_line({"tensor": name} | vars(rows)))
        self._file.flush()

    def discard(self) -> None:
        """Remove the journal: the tables are written."""
        self.path.unlink(missing_ok=True)

    def _is_ours(self, file: IO[bytes]) -> bool:
        """Whether the journal is still the file that was opened, of the comparison that it was opened for."""
        try:
            with self.path.open("rb") as now:
                same = os.path.sameopenfile(now.fileno(), file.fileno())
                return same and (_content(now.readline()) or {}).get("key") == self._key
        except OSError:
            return False

    def _read(self) -> tuple[dict[str, TensorRows], int]:
        """Rows by tensor, and the length of the lines that are whole; nothing where the key is another."""
        done: dict[str, TensorRows] = {}
        length = 0
        if not self.path.is_file():
            return done, length
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                content = _content(line)
                if content is None or (number == 0 and content.get("key") != self._key):
                    break
                length += len(line)
                if number:
                    name = content.pop("tensor")
                    done[name] = TensorRows(**content)
        return done, length


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, default=_encoded).encode() + b"\n"


def _content(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line, object_hook=_decoded) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"float64": base64.b64encode(value.astype("<f8").tobytes()).decode("ascii")}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"no place for {type(value)} in the journal")


def _decoded(content: dict[str, Any]) -> Any:
    if content.keys() == {"float64"}:
        return np.frombuffer(base64.b64decode(content["float64"]), "<f8")
    return content
